"""The folder of encoded features: finding a table, keeping others out while it is made, listing and removing."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kandinsky_exp.data.journal import PROGRESS
from kandinsky_exp.data.progress import Log
from kandinsky_exp.data.table import META, FeatureTable
from kandinsky_exp.errors import ConfigError, DataError

SPARE = 1.05  # of what a table is thought to need


def partial(folder: Path) -> Path:
    """Where a table is made."""
    return folder.with_name(f"{folder.name}.partial")


def open_table(folder: Path, log: Log) -> FeatureTable | None:
    """The table in a folder, None if there is none; a damaged one is removed, so that it is made again.

    A complete table never changes: neither a lock nor a writable disk is needed to read it.
    """
    if not folder.exists():
        return None
    try:
        table = FeatureTable(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log(f"the encoded features in {folder} are damaged ({error}); encoding again")
        shutil.rmtree(folder)
        return None
    with contextlib.suppress(OSError):  # its time is that of its last use; a read-only disk keeps none
        (folder / META).touch()
    return table


@contextmanager
def locked(folder: Path, log: Log) -> Iterator[None]:
    """Alone with a table in the making."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log(f"another process is encoding into {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_if_no_room(folder: Path, needed: int) -> None:
    """Before anything is written.

    Args:
        needed: bytes.

    Raises:
        DataError: the disk has less than that, and a little to spare.
    """
    free = shutil.disk_usage(folder).free
    if needed * SPARE > free:
        raise DataError(
            f"output_root: the encoded features need {needed / 1e9:,.2f} GB and the disk of {folder.parent} has "
            f"{free / 1e9:,.2f} GB left; set output_root to a larger disk, data.max_samples or data.cache_dtype=fp16, "
            "or remove old ones (kandinsky-exp encode list=true)"
        )


@dataclass(frozen=True)
class Entry:
    """One table, or one in the making.

    Args:
        bytes: on the disk.
        used: when it was last used, seconds since the epoch.
    """

    name: str
    about: str
    images: int
    bytes: int
    used: float


def entries(cache: Path) -> list[Entry]:
    """All tables in a cache folder, the last used first."""
    folders = [folder for folder in cache.glob("*") if (folder / META).is_file() or (folder / PROGRESS).is_file()]
    return sorted(map(_entry, folders), key=lambda entry: -entry.used)


def _entry(folder: Path) -> Entry:
    complete = (folder / META).is_file()
    file = folder / (META if complete else PROGRESS)
    size = sum(part.stat().st_size for part in folder.iterdir())
    try:
        facts = json.loads(file.read_text("utf-8"))
        about = " ".join(str(facts[key]) for key in ("stage", "source", "dtype") if key in facts)
        images = int(facts["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(folder.name, "damaged", 0, size, file.stat().st_mtime)
    return Entry(folder.name, about if complete else "not complete", images, size, file.stat().st_mtime)


def remove(cache: Path, names: list[str]) -> int:
    """Remove tables by their names or the beginnings of these; `all` is every one. Returns the bytes that became free.

    Raises:
        ConfigError: nothing is named so, or another process is encoding into it. Nothing was removed then.
    """
    found = entries(cache)
    chosen = {entry for name in names for entry in found if name == "all" or (name and entry.name.startswith(name))}
    unknown = [name for name in names if name != "all" and not any(entry.name.startswith(name) for entry in chosen)]
    if unknown:
        known = ", ".join(entry.name[:8] for entry in found) or "none"
        raise ConfigError(f"remove: no encoded features are named {', '.join(unknown)} in {cache}; there are {known}")
    with contextlib.ExitStack() as held:
        for entry in chosen:
            lock = FileLock(cache / f"{entry.name.removesuffix('.partial')}.lock")
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                raise ConfigError(f"remove: another process is encoding into {entry.name}; wait for it") from None
        for entry in chosen:
            shutil.rmtree(cache / entry.name)
    return sum(entry.bytes for entry in chosen)


def listing(cache: Path) -> str:
    """The tables as lines of text."""
    found = entries(cache)
    if not found:
        return f"{cache} holds no encoded features"
    lines = [f"{'name':<34}{'images':>10}{'MB':>11}  {'last used':<17} what"]
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append(f"{entry.name[:32]:<34}{entry.images:>10,}{entry.bytes / 1e6:>11,.1f}  {used:<17} {entry.about}")
    lines.append(f"{sum(entry.bytes for entry in found) / 1e6:,.1f} MB in {cache}")
    return "\n".join(lines)
