"""The folder of encoded tables: open, lock, list and remove them. Imports no torch."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kandinsky_exp.data.encoded import claims
from kandinsky_exp.data.encoded.layout import IMAGES, META, PARTIAL, PICTURE_RULES, PLAN, PROGRESS, command, partial
from kandinsky_exp.errors import ConfigError, DataError, cause_of
from kandinsky_exp.system import files
from kandinsky_exp.system.logs import Log

if TYPE_CHECKING:
    from kandinsky_exp.data.encoded.table import FeatureTable

SPARE = 1.05  # of what a table is thought to need
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
# Of runs, beside tables: whole or half written.
LEFTOVERS = ("null-*.safetensors", "files-*.arrow", ".files-*", "*.aside", "*.part")


def open_table(folder: Path, log: Log, *, mend: bool = False) -> "FeatureTable | None":
    """The table in a folder, None if there is none that is whole.

    A complete table never changes: neither a lock nor a writable disk is needed to read it.

    Args:
        mend: make a damaged one a table in the making again: what is whole of it stays. Only for who has it `locked`.

    Raises:
        DataError: there is something that could not be read, which may be the machine's fault.
    """
    from kandinsky_exp.data.encoded.table import FeatureTable  # needs torch, as listing and removing do not

    try:
        if not folder.exists():
            return None
        table = FeatureTable(folder)
    except DAMAGE as error:
        if not mend:
            log(f"the encoded features in {folder} are damaged ({error})")
            return None
        with writing(folder):
            _reopen(folder)
        log("what is damaged of them is encoded again")
        return None
    except (OSError, MemoryError) as error:
        raise DataError(
            f"the encoded features in {folder} cannot be read ({cause_of(error)}); they were left as they are: give "
            "the same command again once that is mended, or set output_root to another folder"
        ) from error
    with contextlib.suppress(OSError):  # its time is that of its last use; a read-only disk keeps none
        os.utime(folder / META)
    return table


def _reopen(folder: Path) -> None:
    """Make a table one in the making; one without a plan, of an earlier version, goes."""
    (folder / META).unlink(missing_ok=True)
    if (folder / PLAN).is_file() and not partial(folder).exists():
        folder.replace(partial(folder))
    else:
        shutil.rmtree(folder)


@contextmanager
def locked(folder: Path, log: Log) -> Iterator[None]:
    """Alone with a folder of a table, for a moment: while it is begun, joined or removed.

    Raises:
        DataError: no lock can be put there.
    """
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log(f"another process is busy with {folder}; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what changes the disk that tables lie on, and around nothing else: errors are the disk's.

    Raises:
        DataError: it is full or cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"output_root: the disk of {folder.parent} is full. What was encoded so far stays: make room and give "
                f"the same command again, or set output_root to another disk, or remove tables ({command(folder)})"
            ) from error
        raise DataError(
            f"output_root: encoded features cannot be written to {folder.parent} ({cause_of(error)}); set output_root "
            "to a folder that can, or data.cache=false to train without them"
        ) from error


def refuse_if_no_room(folder: Path, needed: int) -> None:
    """Before anything is written.

    Args:
        needed: bytes.

    Raises:
        DataError: the disk has less than that, and a little to spare.
    """
    with writing(folder):
        free = shutil.disk_usage(folder).free
    if needed * SPARE > free:
        raise DataError(
            f"output_root: the encoded features need {needed / 1e9:,.2f} GB and the disk of {folder.parent} has "
            f"{free / 1e9:,.2f} GB left; set output_root to a larger disk, data.max_samples or data.cache_dtype=fp16, "
            f"or remove old ones ({command(folder)})"
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

    @property
    def table(self) -> str:
        """Name of the table that it is, or is to become."""
        return self.name.removesuffix(PARTIAL)

    def __str__(self) -> str:
        return f"{self.name} ({self.images:,} images, {self.bytes / 1e6:,.1f} MB, {self.about})"


def entries(cache: Path) -> list[Entry]:
    """All tables in a cache folder, the last used first."""
    found = [entry for folder in cache.glob("*") if (entry := _entry(folder)) is not None]
    return sorted(found, key=lambda entry: -entry.used)


def _entry(folder: Path) -> Entry | None:
    """None for what is no table, and for one that another process removes or finishes meanwhile."""
    try:
        file = next((folder / name for name in (META, PLAN, PROGRESS, IMAGES) if (folder / name).is_file()), None)
        if file is None:
            return None
        used = file.stat().st_mtime
    except OSError:
        return None
    facts = files.json_object(file) or {}
    about = " ".join(str(facts[key]) for key in ("stage", "source", "dtype") if key in facts)
    if file.name != META:
        return Entry(folder.name, "not complete", _images(folder, facts), _size(folder), used)
    if not isinstance(images := facts.get("images"), int):
        return Entry(folder.name, "damaged", 0, _size(folder), used)
    if facts.get("rules") != PICTURE_RULES:
        about += ", of an older version that read pictures otherwise: no longer used"
    size = facts.get("bytes")  # of its parts; tables of earlier versions have none
    return Entry(folder.name, about, images, size if isinstance(size, int) else _size(folder), used)


def _images(folder: Path, facts: dict[str, Any]) -> int:
    """About how many are encoded in a table in the making."""
    whole = 0
    with contextlib.suppress(FileNotFoundError):
        whole = sum(part.name.isdecimal() for part in folder.iterdir())
    encoded = whole * int(facts.get("part_rows", 0))
    return min(int(facts.get("rows") or encoded), encoded) + int(facts.get("images", 0))


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; what goes meanwhile counts for nothing."""
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(inside) / name).stat().st_size
    return total


def remove(cache: Path, names: list[str]) -> tuple[list[Entry], int]:
    """Remove tables, each by its name or a beginning that no other has. Returns them, and the bytes that became free.

    `all` is every one, and all that runs keep beside them.

    Raises:
        ConfigError: a name fits none or several, or another process is encoding into it, and nothing was removed; or
            the disk does not let go of it.
    """
    tables = {table for name in names for table in _named(name, entries(cache), cache)}
    try:
        with contextlib.ExitStack() as held:
            for table in sorted(tables):
                try:
                    held.enter_context(FileLock(cache / f"{table}.lock").acquire(timeout=0))
                except Timeout:
                    raise ConfigError(f"remove: another process is encoding into {table}; wait for it") from None
                if claims.is_anyone_at(cache / f"{table}{PARTIAL}"):
                    raise ConfigError(f"remove: another process is encoding into {table}; wait for it")
            # One in the making may have become complete, or have gone, before its lock was free.
            chosen = [entry for entry in entries(cache) if entry.table in tables]
            for entry in chosen:
                shutil.rmtree(cache / entry.name)
        return chosen, sum(entry.bytes for entry in chosen) + (_sweep(cache) if "all" in names else 0)
    except OSError as error:
        raise ConfigError(f"remove: {error.filename or cache} cannot be removed ({cause_of(error)})") from error


def _named(name: str, found: list[Entry], cache: Path) -> set[str]:
    """The tables that a name means: one, or with `all` every one."""
    if name == "all":
        return {entry.table for entry in found}
    exact = {entry.table for entry in found if name in (entry.name, entry.table)}
    meant = exact or {entry.table for entry in found if name and entry.name.startswith(name)}
    if len(meant) == 1:
        return meant
    if meant:
        fitting = "\n  ".join(str(entry) for entry in found if entry.table in meant)
        raise ConfigError(f"remove: {name} fits {len(meant)} of the tables in {cache}; name one of\n  {fitting}")
    known = ", ".join(entry.name[:8] for entry in found) or "none"
    raise ConfigError(f"remove: no encoded features are named {name} in {cache}; there are {known}")


def _sweep(cache: Path) -> int:
    """Remove what runs keep beside the tables; the bytes that became free."""
    freed = 0
    for lock in cache.glob("*.lock"):
        with contextlib.suppress(Timeout), FileLock(lock).acquire(timeout=0):  # another process holds it: it stays
            lock.unlink(missing_ok=True)
    for pattern in LEFTOVERS:
        for file in filter(Path.is_file, cache.glob(pattern)):
            with contextlib.suppress(FileNotFoundError):
                freed += file.stat().st_size
                file.unlink()
    return freed


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
