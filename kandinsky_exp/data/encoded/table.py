"""The encoded features on disk: Arrow IPC streams that grow by appending and are read through a memory map.

`images.arrow` has a row per view of an image (the image; its mirror, if mirrors are encoded): id, row of the source,
where its captions start and how many they are, a digest of its file, and what the image encoders gave. `captions.arrow`
has a row per caption, its states only up to the end of its mask. Floats are stored in the table's dtype. Every row ends
with a checksum of its cells, which is compared whenever the row is read: a damaged table is an error, no wrong batch.
"""

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, MASK, META, removal
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError

DTYPES = {"fp16": np.float16, "fp32": np.float32}
CHECKSUM = "crc32"
HEAD = 4096  # bytes, more than a schema takes
SHAPE = ".shape"  # ends the name of the column with the shapes of a ragged one
NO_FEATURES = ("id", "source_row", "caption_start", "caption_count", "picture")
FORMAT = 2  # a new one must not find old tables

Array = NDArray[Any]
Column = Array | Sequence[str] | Sequence[Array]  # equal shapes (n, …), strings, or arrays of shapes that differ
Columns = Mapping[str, Column]


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
        checksums = [_checksum(cells, row, before) for row, before in enumerate(checksums)]
        array, shape = _arrow(cells)
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False, metadata={"shape": json.dumps(shape)}))
    fields.append(pa.field(CHECKSUM, pa.uint32(), nullable=False, metadata={"shape": "[]"}))
    return pa.record_batch([*arrays, pa.array(checksums, pa.uint32())], schema=pa.schema(fields))


def _checksum(cells: Any, row: int, before: int) -> int:
    cell: Any = cells[row]
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
    """Rows of such a file, read when asked for. What stays in memory grows with its record batches, not its rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_stream(file)
                batches = list(reader)
        except MemoryError:  # Arrow's is one of its own too, and says nothing of the file
            raise
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; Arrow's own speak of what it found in the file
            raise ValueError(f"{path.name}: {error}") from error
        shapes = {field.name: json.loads(field.metadata[b"shape"]) for field in reader.schema}
        self.ragged = [name.removesuffix(SHAPE) for name in shapes if name.endswith(SHAPE)]  # rows differ in shape
        self._starts = list(accumulate((batch.num_rows for batch in batches), initial=0))
        self._views = [{name: _view(batch.column(name), shape) for name, shape in shapes.items()} for batch in batches]

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
        batch = bisect_right(self._starts, index) - 1
        views, place = self._views[batch], index - self._starts[batch]
        cells = {name: _cell(view, place) for name, view in views.items()}
        expected = int(cells.pop(CHECKSUM))
        if self._sum(cells.values()) != expected:
            raise DataError(
                f"{self.path}: row {index} is damaged; remove the table with `{removal(self.path.parent)}`, and it "
                "will be encoded again"
            )
        for name in [name for name in cells if name.endswith(SHAPE)]:
            cells[name.removesuffix(SHAPE)] = cells[name.removesuffix(SHAPE)].reshape(cells.pop(name))
        return cells

    @staticmethod
    def _sum(cells: Any) -> int:
        total = 0
        for cell in cells:
            total = zlib.crc32(cell.encode() if isinstance(cell, str) else cell, total)
        return total

    def has(self, name: str) -> bool:
        return name in self._views[0]

    def column(self, name: str) -> Array:
        """A column of numbers, (n, …), copied."""
        return np.concatenate([views[name] for views in self._views])


def head_checksum(file: Path) -> int:
    """Of the part of a table's file that says what its columns are, which no row's checksum covers."""
    with file.open("rb") as handle:
        return zlib.crc32(handle.read(HEAD))


def _view(array: pa.Array, shape: list[int] | None) -> Any:
    """What a cell is cut from without a copy: an Arrow array, (offsets, values), or an array (n, …)."""
    if shape is None:
        return array
    if shape == []:
        return array.to_numpy(zero_copy_only=True)
    values = array.values.to_numpy(zero_copy_only=True)
    return (array.offsets.to_numpy(), values) if shape == [-1] else values.reshape(len(array), *shape)


def _cell(view: Any, place: int) -> Any:
    if isinstance(view, tuple):
        offsets, values = view
        return values[offsets[place] : offsets[place + 1]]
    return view[place].as_py() if isinstance(view, pa.Array) else view[place]


class FeatureTable:
    """Encoded images and captions; row i is the i-th image of the source that could be read.

    Tensors come in the dtype of the table (float16 or float32): the stage casts them on its device.
    """

    def __init__(self, folder: Path) -> None:
        """Open a table.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: the folder holds no complete table.
        """
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text("utf-8"))
        for name, size in self.meta["bytes"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
            if head_checksum(folder / name) != self.meta["heads"][name]:
                raise ValueError(f"the head of {name} is not as it was written")
        self.views: int = self.meta["views"]
        self._images = MappedColumns(folder / IMAGES)
        self._captions = MappedColumns(folder / CAPTIONS) if self.meta["captions"] else None
        if len(self._images) != self.meta["images"] * self.views:
            raise ValueError(f"{IMAGES} holds {len(self._images)} rows instead of {self.meta['images'] * self.views}")

    def __reduce__(self) -> tuple[type["FeatureTable"], tuple[Path]]:
        return FeatureTable, (self.folder,)  # workers map the files again

    def __len__(self) -> int:
        return len(self._images) // self.views

    @property
    def skipped(self) -> list[str]:
        """What was wrong with the examples that were left out."""
        return [str(problem) for problem in self.meta["skipped"]]

    @property
    def noted(self) -> Tally:
        """What else was not used; tables of before did not count it."""
        return dict(self.meta.get("noted", {}))

    @property
    def ids(self) -> list[str]:
        """The examples' ids, read from disk at each call."""
        return [self.id(index) for index in range(len(self))]

    def id(self, index: int) -> str:
        return str(self._image(index)["id"])

    def source_row(self, index: int) -> int:
        """The row of the source that was encoded; it differs from `index` where examples were left out."""
        return int(self._image(index)["source_row"])

    def captions(self, index: int) -> int:
        """How many encoded captions an image has; 0 in a table without text."""
        return int(self._image(index)["caption_count"])

    def shapes(self) -> Array:
        """Shape of what differs in shape of each image, (n, 3): of the latents."""
        return self._images.column(f"{self._images.ragged[0]}{SHAPE}")[:: self.views]

    def pictures(self) -> Array | None:
        """(n, 2), equal where two images are the same file; None in a table from before that was stored."""
        return self._images.column("picture")[:: self.views] if self._images.has("picture") else None

    def row(self, index: int, caption: int = 0, view: int = 0) -> dict[str, Tensor]:
        """Features of an image and of one of its captions, without a batch axis.

        What the stage's encoders gave, of varying length zero after the caption's mask, `text_mask` (L,) bool.

        Args:
            view: 1 for the mirrored image, where it was encoded.

        Raises:
            IndexError: there is no such row, caption or view.
            DataError: what is stored does not agree with its checksum.
        """
        return self.visit(index, lambda count: caption, view)

    def visit(self, index: int, choose: Callable[[int], int], view: int = 0) -> dict[str, Tensor]:
        """`row` with the caption that `choose(number of captions)` draws; the image is looked up once."""
        cells = self._image(index, view)
        start, count = int(cells["caption_start"]), int(cells["caption_count"])
        features = {name: _tensor(cell) for name, cell in cells.items() if name not in NO_FEATURES}
        if self._captions is None:
            return features
        if not 0 <= (caption := choose(count)) < count:
            raise IndexError(f"caption {caption} of {count} of {cells['id']}")
        return features | self._text(self._captions.row(start + caption), self._captions.ragged)

    def _image(self, index: int, view: int = 0) -> dict[str, Any]:
        if not (0 <= index < len(self) and 0 <= view < self.views):
            raise IndexError(f"row {index} of {len(self)}, view {view} of {self.views}")
        return self._images.row(index * self.views + view)

    def _text(self, cells: dict[str, Any], ragged: list[str]) -> dict[str, Tensor]:
        length = self.meta["text_length"]
        features = {name: _tensor(cell, length if name in ragged else None) for name, cell in cells.items()}
        masks = [torch.arange(length) < len(cells[name]) for name in ragged]
        return features | ({MASK: masks[0]} if masks else {})


def _tensor(view: Array, length: int | None = None) -> Tensor:
    """A copy, zero up to `length`: the map is read-only, and pages it in here and now."""
    if length is None:
        return torch.from_numpy(np.array(view))
    padded = np.zeros((length, *view.shape[1:]), view.dtype)
    padded[: len(view)] = view
    return torch.from_numpy(padded)
