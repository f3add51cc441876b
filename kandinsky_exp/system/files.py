"""Paths, folders, locks and atomic writes. Any text has an answer as a path, never an exception."""

import json
import os
import re
import shlex
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from kandinsky_exp.errors import ConfigError


def expanded(path: str | Path) -> Path:
    """With `~` as the home folder; `~name` of nobody who is known here stays as it is."""
    try:
        return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for a stranger's home
    except ValueError:  # `~` and what is no text
        return Path(path)


def output_root(value: str) -> Path:
    """The folder that the setting `output_root` means, absolute whatever the working directory becomes."""
    return expanded(value).absolute()


def json_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text("utf-8"))
        return content if isinstance(content, dict) else None
    return None


def looks_local(path: str) -> bool:
    """Whether a text can only be a path: `a/b` may be an id on the hub, `./a`, `/a`, `~/a` and `a/b/c` may not."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def setting(key: str, value: str | Path) -> str:
    """A setting as it is typed into a shell; what a sweep varies is in the name of a job, with `=` and `,`."""
    text = str(value)
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
        same = part if os.path.lexists(os.path.join(found, part)) else _same_name(found or ".", part)  # noqa: PTH118
        if same is None:
            return path
        found = os.path.join(found, same)  # noqa: PTH118
    return found


def _same_name(folder: str, name: str) -> str | None:
    wanted = unicodedata.normalize("NFC", name)
    with suppress(OSError, ValueError):
        return next((other for other in os.listdir(folder) if unicodedata.normalize("NFC", other) == wanted), None)  # noqa: PTH208
    return None


LOG = "train.log"


def make_root(folder: Path) -> None:
    """Make the folder that everything is written to.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output_root: {folder} cannot be written ({error.strerror}); choose another") from error


@contextmanager
def occupied(folder: Path, file: str = LOG, busy: str = "is training in") -> Iterator[None]:
    """Keep other processes out of a run's folder by a lock on its `train.log`, which goes when this process does.

    A POSIX lock: unlike flock's, it is not handed on to worker processes, which outlive a killed one by seconds.

    Raises:
        ConfigError: another process is there.
    """
    with (folder / file).open("a") as locked_file:
        try:
            import fcntl

            fcntl.lockf(locked_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves it open which of the two it is
            raise ConfigError(
                f"name: another process {busy} {folder}; wait for it, stop it, or choose another name"
            ) from error
        except (ImportError, OSError):  # Windows, or a file system without locks: then nobody is kept out
            pass
        yield


def fresh_folder(root: Path, name: str) -> Path:
    """A new folder of that name, with a suffix where it is taken."""
    for suffix in ("", *(f"-{count}" for count in range(2, 1000))):
        folder = root / f"{name}{suffix}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise ConfigError(f"name: a thousand folders are called {name}; choose another")


def locked(file: Path) -> FileLock:
    """A lock that other processes of this machine respect."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, whole."""
    with replacing(path) as aside:
        aside.write_text(text, "utf-8")


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """A file to write, which then takes the place of `path`: a reader sees the old or the new one, whole.

    Args:
        mark: tells the files of several writers apart.
    """
    aside = path.with_name(f".{path.name}{mark}.part")
    aside.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder`: that is there whole or not at all."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk has other uses for the room
        raise
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Have a file or folder on the disk: a rename may get there before the data it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
