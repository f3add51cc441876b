"""A durable FIFO queue of JSON records and their files.

A record's line is written, by one call, before it is sent, and the file it is in goes once all of it is delivered. So a
process that is killed at any moment loses nothing that was handed over, and may deliver the last file a second time:
whatever is sent has to be the same when it is sent twice.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky_exp.system.files import flush

log = logging.getLogger(__name__)
Record = dict[str, Any]

SEGMENT = 1_000_000  # bytes, some 10,000 records: what is read into memory at once
RETRY = 5.0  # seconds until a disk that took nothing is asked again
MAX_HELD = 100_000  # records in memory while the disk takes none, some 20 MB


@dataclass(frozen=True)
class Segment:
    """Records that are delivered, and then forgotten, together.

    Args:
        path: None where they are in memory only, in `held`.
    """

    path: Path | None
    records: list[Record]
    held: list[bytes] | None = None


class DiskQueue:
    """Records in the order in which they came.

    Args:
        folder: made when there is a record.
        lock: guards `folder` and those above it; nothing slow is done under it.
        limit: bytes after which another file is begun; 0 = a file for each record.
    """

    def __init__(self, folder: Path, lock: threading.Lock, limit: int = SEGMENT) -> None:
        self.folder = folder
        self._lock = lock
        self._limit = limit
        self._file: int | None = None
        self._size = 0
        self._held: list[bytes] = []  # lines that the disk did not take
        self._unsynced: set[Path] = set()
        self.newest = max((int(path.stem) for path in self.paths()), default=0)
        self._retry = 0.0
        self._warned = False

    def append(self, record: Record, seal: bool = False) -> None:
        """Hand over a record; it is on disk, though perhaps not yet on the platter, when this returns.

        Args:
            seal: nothing else is to follow in the same file.
        """
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._held.append(line)
            if time.monotonic() < self._retry:
                return self._trim()
            try:
                self._write(b"".join(self._held))
            except OSError as error:
                self._close()
                self._full(error)
            else:
                self._held = []
                if seal or self._size >= self._limit:
                    self._close()

    def paths(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):  # removed just now
            return sorted(path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal())
        return []

    def on_disk(self) -> Iterator[Record]:
        return (record for path in self.paths() for record in read(path))

    def first(self, newest: int) -> Segment | None:
        """The oldest records up to file number `newest`; nothing is added to them any more. None where none wait."""
        with self._lock:
            path = next(iter(self.paths()), None)
            if path is None and self._held:
                return Segment(None, [json.loads(line) for line in self._held], self._held)
            if path is None or int(path.stem) > newest:
                return None
            if int(path.stem) == self.newest:
                self._close()
        return Segment(path, read(path))

    def remove(self, segment: Segment) -> None:
        """Forget what is delivered."""
        folders = [self.files(record) for record in segment.records if "files" in record]
        if segment.path is not None:
            segment.path.unlink(missing_ok=True)
        with self._lock:
            if segment.held is self._held:  # else they went to the disk meanwhile, and are delivered again
                del self._held[: len(segment.records)]
            self._unsynced.difference_update([*folders, *filter(None, [segment.path])])
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def waiting(self) -> int:
        """How many records wait on the disk."""
        return sum(1 for _ in self.on_disk())

    def held(self) -> int:
        """How many wait in memory, and go with the process."""
        return len(self._held)

    def attach(self, record: Record, fill: Callable[[Path], object]) -> None:
        """Append a record with files.

        Args:
            fill: writes them into the folder that it is given.

        Raises:
            Exception: what `fill` raises; then there is no record.
        """
        record = {**record, "files": uuid.uuid4().hex}
        folder = self.files(record)
        with self._lock:
            folder.mkdir(parents=True)
        try:
            fill(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._unsynced.update([folder, folder.parent])
        self.append(record)

    def files(self, record: Record) -> Path:
        return self.folder / "files" / str(record["files"])

    def remove_orphans(self) -> None:
        """Files whose record was never written: their process was killed in between."""
        known = {record.get("files") for record in self.on_disk()}
        for folder in (self.folder / "files").glob("*"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def sync(self) -> None:
        """Wait until what was handed over is on the platter, should the machine lose its power."""
        with self._lock:
            paths, self._unsynced = self._unsynced, set()
        for path in paths:
            for each in (*(inside(path) if path.parent == self.folder / "files" else ()), path):
                fsync(each)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.newest += 1
            path = self.folder / f"{self.newest:08d}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self._size = 0
        self._unsynced.update([self.folder / f"{self.newest:08d}.jsonl", self.folder, self.folder.parent])
        written = os.write(self._file, data)
        if written < len(data):
            os.ftruncate(self._file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _trim(self) -> None:
        if len(self._held) > MAX_HELD:
            self._held = self._held[-MAX_HELD // 2 :]
            log.warning("MLflow: neither %s nor the store takes records; the oldest are dropped", self.folder)

    def _full(self, error: OSError) -> None:
        self._retry = time.monotonic() + RETRY
        self._trim()
        if not self._warned:
            self._warned = True
            log.warning(
                "MLflow: records cannot be written to %s (%s); until they are delivered they are in memory only",
                self.folder,
                error.strerror,
            )


def read(path: Path) -> list[Record]:
    """The records of a file. A last line without its end was never handed over: its writer was killed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().split(b"\n")[:-1]
        return [_parsed(line) for line in lines]
    return []


def _parsed(line: bytes) -> Record:
    with contextlib.suppress(ValueError):
        if isinstance(record := json.loads(line), dict):
            return record
    return {"kind": "damaged", "text": line.decode("utf-8", "replace")}


def inside(folder: Path) -> Iterator[Path]:
    """All that is under a folder, as far as it is still there: what is delivered goes meanwhile."""
    for parent, folders, files in os.walk(folder):  # a glob raises where a folder goes
        yield from (Path(parent, name) for name in (*folders, *files))


def fsync(path: Path) -> None:
    try:
        flush(path)
    except FileNotFoundError:  # delivered meanwhile
        pass
    except OSError as error:
        log.warning("MLflow: %s may not survive a power cut (%s)", path, error.strerror)
