"""Walk a folder, and tell pictures from other files and from those of the operating system."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from kandinsky_exp.data import tally
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.system.picture_names import PICTURES, endings

# How files of such formats begin.
SIGNATURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|II[*+]\0|MM\0[*+]"
    rb"|P[1-6]\s+[\d#]|\0\0\0\x0c(?:jP  |JXL )|\xff\x4f\xff\x51|\xff\x0a|8BPS\0|v/1\x01|qoif|DDS \x7c"
    rb"|.{4}ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1|avi[fs])",
    re.DOTALL,
)
HEAD = 32  # bytes, enough for each of these
# Files that lie beside pictures in great numbers, and need not be opened to know what they are.
OTHERS = endings("txt caption json jsonl csv tsv parquet md yaml yml xml html npy npz pt pth pkl cls log tar")
SYSTEM = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin", "#recycle"})
NO_PICTURES = "not used, files that are no pictures"


def is_systems(name: str) -> bool:
    """Whether a file or folder is hidden, or the operating system's: never anybody's picture."""
    return name.startswith(".") or name.lower() in SYSTEM


def walk(home: Path, skip: Collection[Path], unused: Tally) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder and those in it, in alphabetical order: (folder, what precedes its files' names, their names).

    Links to folders are followed, but nothing is entered twice. What is the system's is left out.

    Args:
        skip: folders inside that are left out.
        unused: gets the folders that cannot be entered.
    """
    entered = [home.resolve(), *(folder.resolve() for folder in skip)]

    def unreadable(error: OSError) -> None:
        tally.count(unused, "not used, folders that cannot be read", str(error.filename))

    def enters(folder: Path) -> bool:
        if folder in skip or is_systems(folder.name):
            return False
        if not folder.is_symlink():
            return True
        target = folder.resolve()
        if any(target.is_relative_to(other) or other.is_relative_to(target) for other in entered):
            tally.count(unused, "not used, links to folders that are read anyway", str(folder.relative_to(home)))
            return False
        entered.append(target)
        return True

    for folder, inside, files in os.walk(home, followlinks=True, onerror=unreadable):
        inside[:] = [name for name in sorted(inside) if enters(Path(folder, name))]
        prefix = "" if Path(folder) == home else f"{Path(folder).relative_to(home).as_posix()}/"
        yield Path(folder), prefix, sorted(name for name in files if not is_systems(name))


def suffix(name: str) -> str:
    return Path(name).suffix.lower()


def is_picture(file: Path) -> bool:
    """Whether a file claims to be a picture: by its ending, or by how it begins."""
    ending = suffix(file.name)
    if ending in PICTURES or ending in OTHERS:
        return ending in PICTURES
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with file.open("rb") as content:
            return begins_as_picture(content.read(HEAD))
    except OSError:
        return False


def begins_as_picture(head: bytes) -> bool:
    return SIGNATURE.match(head) is not None


def is_unicode(name: str) -> bool:
    return name.isascii() or name.encode(errors="replace").decode() == name


def unlisted(home: Path, skip: Collection[Path], listed: pa.Array, by: str) -> Tally:
    """What lies in a folder without a row of its own.

    Args:
        listed: names of files, relative to the folder.
        by: name of the file that lists them.
    """
    unused: Tally = {}
    names = []
    for _, prefix, files in walk(home, skip, unused):
        names += [prefix + name for name in files if is_unicode(prefix + name)]
    found = pa.array(names, pa.large_string())
    for name in found.filter(pc.invert(pc.is_in(_plain(found), value_set=_plain(listed.drop_null())))).to_pylist():
        if name != by:
            _count(unused, home, name, f"not used, pictures that {by} does not list")
    return unused


def outside(root: Path, parts: Collection[Path]) -> Tally:
    """What lies beside the folders that are read, `train/` and `validation/`."""
    unused: Tally = {}
    for _, prefix, files in walk(root, parts, unused):
        for name in files:
            _count(unused, root, prefix + name, "not used, pictures beside train/ and validation/")
    return unused


def _count(unused: Tally, home: Path, name: str, pictures: str) -> None:
    tally.count(unused, pictures if is_picture(home / name) else NO_PICTURES, name)


def _plain(names: pa.Array) -> pa.Array:
    """Equal where names stand for one file: accents as one letter, no `./`."""
    return pc.utf8_normalize(pc.replace_substring_regex(names, r"(^|/)(\./+|/)+", r"\1"), form="NFC")
