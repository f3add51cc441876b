"""Arrow files of rows with checksums: they grow by appending and are read through a memory map.

Every row ends with a checksum of its cells, which is compared whenever the row is read: a damaged file is an error, no
wrong batch.
"""

import json
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial, reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kandinsky_exp.data.encoded.layout import cure
from kandinsky_exp.errors import DataError

DTYPES = {"fp16": np.float16, "fp32": np.float32}
CHECKSUM = "crc32"
HEAD = 4096  # bytes, more than a schema takes
KEPT = 2  # record batches of an open file that stay decoded: some 15 kB each
SHAPE = ".shape"  # ends the name of the column with the shapes of a ragged one

Array = NDArray[Any]
Column = Array | Sequence[str] | Sequence[Array]  # equal shapes (n, …), strings, or arrays of shapes that differ
Columns = Mapping[str, Column]
Places = tuple["array[int]", "array[int]"]  # (m,) where each record batch begins; (m + 1,) its first row, and the end


class ColumnWriter:
    """Appends record batches to a file, from `size` bytes on: what lies behind them is cut off.

    Column (n, …) becomes a fixed-size list whose shape stands in the field's metadata; a sequence of arrays becomes a
    list and a column of shapes; a sequence of str becomes strings.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._file = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        self.size = size

    def append(self, columns: Columns) -> None:
        batch = _record_batch(columns)
        if self.size == 0:
            self.size += self._file.write(batch.schema.serialize())
        self.size += self._file.write(batch.serialize())

    def flush(self) -> None:
        """Have everything on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _record_batch(columns: Columns) -> pa.RecordBatch:
    flat: dict[str, Array | list[str]] = {}
    ragged: dict[str, list[Array]] = {}
    for name, column in columns.items():
        if isinstance(column, np.ndarray):
            flat[name] = column
        elif isinstance(column[0], str):
            flat[name] = [str(text) for text in column]
        else:
            ragged[name] = [np.asarray(cell) for cell in column]
            flat[name] = []
            flat[f"{name}{SHAPE}"] = np.array([cell.shape for cell in ragged[name]], np.int64)
    checksums = [0] * len(next(iter(columns.values())))
    fields, arrays = [], []
    for name, values in flat.items():
        cells = ragged.get(name, values)
        checksums = [_checksum(cells[row], before) for row, before in enumerate(checksums)]
        array, shape = _arrow(cells)
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False, metadata={"shape": json.dumps(shape)}))
    fields.append(pa.field(CHECKSUM, pa.uint32(), nullable=False, metadata={"shape": "[]"}))
    return pa.record_batch([*arrays, pa.array(checksums, pa.uint32())], schema=pa.schema(fields))


def _checksum(cell: Any, before: int) -> int:
    return zlib.crc32(cell.encode() if isinstance(cell, str) else np.ascontiguousarray(cell).data, before)


def _arrow(cells: Any) -> tuple[pa.Array, list[int] | None]:
    """An Arrow array and the shape of one row; None for strings, [-1] for lists of varying length."""
    if isinstance(cells, list) and isinstance(cells[0], str):
        return pa.array(cells, pa.string()), None
    if isinstance(cells, list):
        offsets = pa.array(list(accumulate((cell.size for cell in cells), initial=0)), pa.int64())
        return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate([c.reshape(-1) for c in cells]))), [-1]
    shape = list(cells.shape[1:])
    flat = pa.array(np.ascontiguousarray(cells).reshape(-1))
    return (pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape))), shape) if shape else (flat, shape)


class MappedColumns:
    """Rows of such a file, read when asked for. What stays in memory does not grow with them.

    Args:
        places: where the record batches of files lie, by path, as far as somebody has looked.
    """

    def __init__(self, path: Path, places: dict[Path, Places] | None = None) -> None:
        self.path = path
        try:
            with pa.memory_map(str(path)) as file:
                content = file.read_buffer()
            schema = pa.ipc.read_schema(pa.ipc.read_message(content))
            places = {} if places is None else places
            if path not in places:
                places[path] = _places(content, schema)
        except MemoryError:  # Arrow's is one of its own too, and says nothing of the file
            raise
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; Arrow's own speak of what it found in the file
            raise ValueError(f"{path.name}: {error}") from error
        shapes = {field.name: json.loads(field.metadata[b"shape"]) for field in schema}
        self.ragged = [name.removesuffix(SHAPE) for name in shapes if name.endswith(SHAPE)]  # rows differ in shape
        self._names = shapes.keys()
        self._offsets, self._starts = places[path]
        self._views = lru_cache(KEPT)(partial(_views, content, schema, shapes, self._offsets))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> dict[str, Any]:
        """All cells of a row: arrays of their shapes, still mapped, numbers and str.

        Raises:
            IndexError: there is no such row.
            DataError: its checksum differs.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        views, row = self._place(index)
        cells = {name: _cell(view, row) for name, view in views.items()}
        expected = int(cells.pop(CHECKSUM))
        if reduce(lambda before, cell: _checksum(cell, before), cells.values(), 0) != expected:
            raise DataError(f"{self.path}: row {index} is damaged; {cure(self.path.parent)}")
        for name in [name for name in cells if name.endswith(SHAPE)]:
            cells[name.removesuffix(SHAPE)] = cells[name.removesuffix(SHAPE)].reshape(cells.pop(name))
        return cells

    def cell(self, name: str, index: int) -> Any:
        """One number, or a small array, of a row, without a look at its checksum."""
        views, row = self._place(index)
        return _cell(views[name], row)

    def has(self, name: str) -> bool:
        return name in self._names

    def _place(self, index: int) -> tuple[dict[str, Any], int]:
        """The record batch of a row, and the row there."""
        batch = bisect_right(self._starts, index) - 1
        try:
            return self._views(batch), index - self._starts[batch]
        except MemoryError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.path}: row {index} cannot be read ({error}); {cure(self.path.parent)}") from error

    def column(self, name: str) -> Array:
        """A column of numbers, (n, …), copied."""
        return np.concatenate([self._views(batch)[name] for batch in range(len(self._offsets))])


def head_checksum(file: Path) -> int:
    """Of the part of a table's file that says what its columns are, which no row's checksum covers."""
    with file.open("rb") as handle:
        return zlib.crc32(handle.read(HEAD))


def check_files(folder: Path, entry: dict[str, Any]) -> None:
    """Compare the files of a part with its line in a manifest, as far as that costs little.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: they differ.
    """
    for name, size in entry["bytes"].items():
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
        if head_checksum(folder / name) != entry["heads"][name]:
            raise ValueError(f"the head of {name} is not as it was written")


def _places(content: pa.Buffer, schema: pa.Schema) -> Places:
    offsets, starts, stream = [], [0], pa.BufferReader(content)
    pa.ipc.read_message(stream)  # the schema's
    while (offset := stream.tell()) < content.size:
        offsets.append(offset)
        starts.append(starts[-1] + pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema).num_rows)
    return array("q", offsets), array("q", starts)


def _views(
    content: pa.Buffer, schema: pa.Schema, shapes: dict[str, list[int] | None], offsets: Sequence[int], batch: int
) -> dict[str, Any]:
    """The columns of a record batch."""
    read = pa.ipc.read_record_batch(pa.ipc.read_message(content[offsets[batch] :]), schema)
    return {name: _view(read.column(name), shape) for name, shape in shapes.items()}


def _view(array: pa.Array, shape: list[int] | None) -> Any:
    """What a cell is cut from without a copy: an Arrow array, (offsets, values), or an array (n, …)."""
    if shape is None:
        return array
    if shape == []:
        return array.to_numpy(zero_copy_only=True)
    values = array.values.to_numpy(zero_copy_only=True)
    return (array.offsets.to_numpy(), values) if shape == [-1] else values.reshape(len(array), *shape)


def _cell(view: Any, row: int) -> Any:
    if isinstance(view, tuple):
        offsets, values = view
        return values[offsets[row] : offsets[row + 1]]
    return view[row].as_py() if isinstance(view, pa.Array) else view[row]
