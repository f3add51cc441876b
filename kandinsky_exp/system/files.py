"""Paths as they are typed: any text at all has an answer here, never an exception, from a NUL to 5,000 letters."""

import os
import re
import shlex
import unicodedata
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With `~` as the home folder; `~name` of nobody who is known here stays as it is."""
    try:
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for a stranger's home
    except ValueError:  # `~` and what is no text
        return Path(path)


def looks_local(path: str) -> bool:
    """Whether a text can only be a path: `a/b` may be an id on the hub, `./a`, `/a`, `~/a` and `a/b/c` may not."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def setting(key: str, place: str | Path) -> str:
    """A setting as it is typed into a shell; what a sweep varies is in the name of a job, with `=` and `,`."""
    text = str(place)
    if not re.fullmatch(r"[\w./-]+", text):  # Hydra's grammar
        text = '"{}"'.format(text.replace('"', '\\"'))
    return shlex.quote(f"{key}={text}")


def is_folder(path: str | Path) -> bool:
    return os.path.isdir(expanded(path))  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def is_file(path: str | Path) -> bool:
    return os.path.isfile(expanded(path))  # noqa: PTH113


def exists(path: str | Path) -> bool:
    return os.path.exists(expanded(path))  # noqa: PTH110


def on_disk(path: str) -> str:
    """The path of a file whose name looks the same; the path as it is where there is none.

    Some systems and archives write é as one letter, others as two: what a list says and what lies there may differ.
    """
    if path.isascii():
        return path
    found = "/" if path.startswith("/") else ""
    for part in path.strip("/").split("/"):
        there = os.path.join(found, part)  # noqa: PTH118
        if not os.path.lexists(there):
            same = _same_name(found or ".", part)
            if same is None:
                return path
            there = os.path.join(found, same)  # noqa: PTH118
        found = there
    return found


def _same_name(folder: str, name: str) -> str | None:
    wanted = unicodedata.normalize("NFC", name)
    try:
        return next((other for other in os.listdir(folder) if unicodedata.normalize("NFC", other) == wanted), None)  # noqa: PTH208
    except (OSError, ValueError):
        return None
