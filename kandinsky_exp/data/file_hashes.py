"""SHA-256 of files and Arrow columns. A file is read again only where its size or mtime has changed."""

import contextlib
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kandinsky_exp.errors import DataError
from kandinsky_exp.system.files import exists, on_disk, replacing
from kandinsky_exp.system.logs import Log
from kandinsky_exp.system.threads import usable_cores

MISSING = bytes(32)  # stands for a file that cannot be read
CHUNK = 4096
FEW = 512
REPORT_SECONDS = 10.0
SETTLED = 2_000_000_000  # ns: a file may change again within one tick of a coarse file system's clock

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def update(total: Hash, column: pa.Array) -> None:
    """Hash the values of an Arrow array of large strings, large lists of them, numbers or fixed-size binary values.

    Equal arrays give equal hashes, whatever they are sliced from; a null is not an empty text.
    """
    total.update(len(column).to_bytes(8, "little"))
    if column.null_count:
        total.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)))
        column = column.fill_null("")
    if pa.types.is_large_list(column.type):
        total.update(pc.list_value_length(column).to_numpy())
        update(total, column.flatten())
    elif pa.types.is_large_string(column.type):
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
        total.update(np.diff(offsets))
        total.update(column.buffers()[2].slice(offsets[0], offsets[-1] - offsets[0]) if len(column) else b"")
    elif pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        total.update(column.buffers()[1].slice(column.offset * width, len(column) * width))
    else:
        total.update(np.ascontiguousarray(column.to_numpy()))


def of_content(content: bytes) -> Integers:
    """What tells the content of a file from others, (2,)."""
    return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.int64)


def release() -> None:
    """Give back what Arrow keeps for its next allocations: a long run would carry it along."""
    pa.default_memory_pool().release_unused()


class FileDigests:
    """sha256 of files: size and mtime decide, content is read only where they differ from what was remembered.

    Args:
        folder: where the memory is kept, one small Arrow file per data set; None remembers nothing. A memory that is
            damaged or cannot be written only costs the time of reading the files again.
        log: gets a line now and then while many files are read.
    """

    def __init__(self, folder: Path | None, log: Log | None = None) -> None:
        self.folder, self.log = folder, log

    def __call__(self, name: str, paths: Sequence[str] | pa.Array) -> pa.Array:
        """Digests of the files at `paths`, an array of binary(32); `MISSING` for one that cannot be read.

        Args:
            name: names the memory; one data set keeps to one.
        """
        if not isinstance(paths, pa.Array):
            paths = pa.array(paths, pa.large_string())
        now = time.time_ns()
        sizes, times = _stat(paths)
        memory = _remembered(self._file(name))
        digests, fresh = _recall(memory, paths, sizes, times)
        settled = (sizes >= 0) & (np.abs(now - times) > SETTLED)

        def remember() -> None:
            keep = pa.array(settled & digests.any(axis=1))
            _write(_columns(paths, sizes, times, digests).filter(keep), self._file(name))

        self._read(paths, np.flatnonzero(fresh), digests, remember)
        keep = settled & digests.any(axis=1)
        if (fresh & keep).any() or keep.sum() != memory.num_rows:
            remember()
        return _binary(digests)

    def _read(self, paths: pa.Array, rows: Integers, digests: Bytes, remember: Callable[[], None]) -> None:
        """Fill in the digests of `rows`; what was read by then survives an interruption."""
        reported = time.monotonic()
        for start in range(0, len(rows), FEW):
            some = rows[start : start + FEW]
            with ThreadPool(min(8, usable_cores())) as pool:  # reading and hashing release the interpreter lock
                hashes = pool.map(_hash_file, paths.take(pa.array(some)).to_pylist())
            digests[some] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                remember()
                if self.log is not None:
                    self.log(f"read {start + len(some):,} of {len(rows):,} files that are new or have changed")

    def required(self, name: str, paths: Sequence[str]) -> pa.Array:
        """The same, of files that have to be there.

        Raises:
            DataError: naming the first one that cannot be read.
        """
        digests = self(name, paths)
        for path, digest in zip(paths, digests, strict=True):
            if digest.as_py() == MISSING:
                raise DataError(f"{path} cannot be read; put it back or give another data.path")
        return digests

    def _file(self, name: str) -> Path | None:
        return self.folder / f"files-{hashlib.sha256(name.encode()).hexdigest()[:16]}.arrow" if self.folder else None


def _columns(paths: pa.Array, sizes: Integers, times: Integers, digests: Bytes) -> pa.RecordBatch:
    arrays = [paths, pa.array(sizes), pa.array(times), _binary(digests)]
    return pa.record_batch(arrays, names=["path", "size", "mtime_ns", "digest"])


def _remembered(file: Path | None) -> pa.RecordBatch:
    nothing = np.zeros(0, np.int64)
    empty = _columns(pa.array([], pa.large_string()), nothing, nothing, np.zeros((0, 32), np.uint8))
    try:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            columns = reader.get_batch(0)
            same = columns.schema.equals(empty.schema)
            intact = same and reader.schema.metadata == {b"sum": _sum(columns)}
            return columns if intact else empty
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return empty


def _write(columns: pa.RecordBatch, file: Path | None) -> None:
    """Atomically, and in silence where the disk is full or read-only."""
    if file is None:
        return
    columns = columns.replace_schema_metadata({b"sum": _sum(columns)})
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, f".{uuid.uuid4().hex}") as aside, pa.ipc.new_file(str(aside), columns.schema) as writer:
            writer.write_batch(columns)


def _recall(
    memory: pa.RecordBatch, paths: pa.Array, sizes: Integers, times: Integers
) -> tuple[Bytes, NDArray[np.bool_]]:
    """Digests (n, 32), zero where nothing fits, and which of the files (n,) have to be read."""
    digests, fresh = np.zeros((len(paths), 32), np.uint8), sizes >= 0
    if not memory.num_rows or not len(paths):
        return digests, fresh
    known = memory.column("path")
    rows = np.arange(len(paths))
    if not known.equals(paths):
        rows = pc.index_in(paths, value_set=known).fill_null(-1).to_numpy().astype(np.int64)
    same = rows >= 0
    for column, values in (("size", sizes), ("mtime_ns", times)):
        same &= memory.column(column).to_numpy()[rows] == values
    stored = memory.column("digest")
    matrix = np.frombuffer(stored.buffers()[1], np.uint8)[stored.offset * 32 :][: len(stored) * 32].reshape(-1, 32)
    digests[same] = matrix[rows[same]]
    return digests, fresh & ~same


def _sum(columns: pa.RecordBatch) -> bytes:
    total = hashlib.sha256()
    for column in columns.columns:
        update(total, column)
    return total.hexdigest().encode()


def _stat(paths: pa.Array) -> tuple[Integers, Integers]:
    """Sizes in bytes and mtimes in ns, (n,) each; -1 for what is no readable regular file."""
    sizes, times = np.full(len(paths), -1), np.full(len(paths), -1)
    for row, path in enumerate(_strings(paths)):
        try:
            try:
                status = os.stat(path)  # noqa: PTH116 - a hundred thousand Path objects take as long as the calls
            except FileNotFoundError:
                status = os.stat(on_disk(path))  # noqa: PTH116
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            sizes[row], times[row] = status.st_size, status.st_mtime_ns
    return sizes, times


def _strings(values: pa.Array) -> Iterator[str]:
    """Few Python strings at a time: memory does not grow with the rows."""
    for start in range(0, len(values), CHUNK):
        yield from values.slice(start, CHUNK).to_pylist()


def _hash_file(path: str) -> bytes:
    try:
        with Path(path if exists(path) else on_disk(path)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return MISSING


def _binary(digests: Bytes) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(digests), [None, pa.py_buffer(digests)])
