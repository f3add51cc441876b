"""Expand the `data.path` of WebDataset shards to files and URLs, in order."""

import re
from collections.abc import Sequence
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

from kandinsky_exp.data import tally
from kandinsky_exp.data.formats.download import is_url, shown
from kandinsky_exp.data.formats.folders import is_systems
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError, cut
from kandinsky_exp.system.files import exists, expanded, is_file, is_folder

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MANY = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


def expand(path: str | Path | Sequence[str], key: str) -> tuple[str, ...]:
    """Shards of a path, a glob, a folder or a URL, any with `{000..007}` or `{a,b}` in it, or of several of these.

    Args:
        key: of the setting, for messages.

    Raises:
        DataError: for a file that is not there, a folder without shards, or a pattern that fits none.
    """
    paths = [str(path)] if isinstance(path, (str, Path)) else [str(item) for item in path]
    shards = tuple(shard for item in paths for name in _braces(item, key) for shard in _found(name, key))
    if not shards:
        raise DataError(f"{key}: no shards; give tar files, such as 'shards/{{000..007}}.tar'")
    return shards


def files_beside(path: str | Path | Sequence[str]) -> Tally:
    """What folders of shards hold besides."""
    unused: Tally = {}
    for item in [path] if isinstance(path, (str, Path)) else path:
        folder = expanded(item)
        for file in sorted(folder.iterdir()) if not is_url(str(item)) and is_folder(folder) else ():
            if not _is_shard(file) and not is_systems(file.name):
                tally.count(unused, f"not used, beside the {ENDINGS[0]} files", file.name)
    return unused


def _is_shard(file: Path) -> bool:
    return file.name.lower().endswith(ENDINGS) and not is_systems(file.name)


def _braces(path: str, key: str) -> list[str]:
    """Every string that braces stand for. A file of exactly this name is itself."""
    if not is_url(path) and exists(path):
        return [path]
    parts = BRACES.split(path)  # text and insides of braces by turns
    choices = [[part] if index % 2 == 0 else _choices(part, path, key) for index, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inside: str, path: str, key: str) -> list[str]:
    numbers = NUMBERS.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers.groups()
    count = int(last) - int(first) + 1
    if not 1 <= count <= MANY:
        raise DataError(f"{key}: {{{inside}}} in {shown(path)} counts {max(count, 0):,} shards; write {{first..last}}")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]


def _found(name: str, key: str) -> list[str]:
    if is_url(name):
        return [_checked(name, key)]
    path = expanded(name)
    if is_folder(path):
        found = sorted(str(file) for file in path.iterdir() if _is_shard(file))
        problem = f"{path} holds no {' or '.join(ENDINGS[:2])}"
    elif exists(path) or not has_magic(name):
        found = [str(path)] if is_file(path) else []
        problem = f"there is no file {path}"
    else:
        found, problem = sorted(glob(str(path))), f"no file fits {path}"  # noqa: PTH207 - absolute patterns
    if not found:
        raise DataError(f"{key}: {problem}; give tar files, such as 'shards/{{000..007}}.tar', or their folder")
    return found


def _checked(url: str, key: str) -> str:
    try:
        good = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:
        good = False
    if not good:
        raise DataError(
            f"{key}: this is no address of a server and a file on it: {cut(url.partition('?')[0])}; give http://…/….tar"
        )
    return url
