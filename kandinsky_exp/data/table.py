"""The encoded features on disk: two Arrow IPC files that are read through a memory map.

`images.arrow` has a row per image: id, where its captions start and how many they are, and what the image encoders
gave. `captions.arrow` has a row per caption. Floats are stored in the table's dtype; the states of a caption only up to
the end of its mask.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {"fp16": np.float16, "fp32": np.float32}
BATCH_BYTES = 16 << 20
IMAGES, CAPTIONS, META = "images.arrow", "captions.arrow", "table.json"

Array = NDArray[Any]
Columns = dict[str, Array]  # equally long along the first axis


def write_columns(path: Path, batches: Iterable[Columns]) -> int:
    """Write batches of columns as an Arrow IPC file, in record batches of about 16 MB; returns the number of rows.

    Numeric columns (n, …) become fixed-size lists whose shape stands in the field's metadata, object arrays of 1-d
    arrays become lists, and arrays of str become strings.
    """
    rows, writer = 0, None
    with pa.OSFile(str(path), "wb") as sink:
        for columns in _gather(batches):
            batch = _record_batch(columns)
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            rows += batch.num_rows
        if writer is not None:
            writer.close()
    return rows


def _gather(batches: Iterable[Columns]) -> Iterator[Columns]:
    """Small batches joined to large ones: a record batch costs a little memory and time when the file is opened."""
    held: list[Columns] = []
    size = 0
    for columns in batches:
        held.append(columns)
        size += sum(sum(map(_size, column)) if column.dtype == object else column.nbytes for column in columns.values())
        if size >= BATCH_BYTES:
            yield _join(held)
            held, size = [], 0
    if held:
        yield _join(held)


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else len(value)


def _join(held: list[Columns]) -> Columns:
    return {name: np.concatenate([columns[name] for columns in held]) for name in held[0]}


def _record_batch(columns: Columns) -> pa.RecordBatch:
    fields, arrays = [], []
    for name, column in columns.items():
        array, shape = _arrow(column)
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False, metadata={"shape": json.dumps(shape)}))
    return pa.record_batch(arrays, schema=pa.schema(fields))


def _arrow(column: Array) -> tuple[pa.Array, list[int] | None]:
    """An Arrow array and the shape of one row; None for strings, [-1] for lists of varying length."""
    if column.dtype == object and isinstance(column[0], str):
        return pa.array(column, pa.string()), None
    if column.dtype == object:
        offsets = pa.array(list(accumulate(map(len, column), initial=0)), pa.int64())
        return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(column))), [-1]
    shape = list(column.shape[1:])
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape))), shape


class MappedColumns:
    """Rows of such a file, read when asked for. What stays in memory grows with its record batches, not its rows."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            shapes = {field.name: json.loads(field.metadata[b"shape"]) for field in reader.schema}
        self._starts = list(accumulate((batch.num_rows for batch in batches), initial=0))
        self._views = [{name: _view(batch.column(name), shape) for name, shape in shapes.items()} for batch in batches]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def value(self, name: str, index: int) -> Any:
        """One cell: an array of the row's shape, still mapped, or a str."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        view, row = self._views[batch][name], index - self._starts[batch]
        if isinstance(view, tuple):
            offsets, values = view
            return values[offsets[row] : offsets[row + 1]]
        return view[row].as_py() if isinstance(view, pa.Array) else view[row]

    @property
    def names(self) -> list[str]:
        return list(self._views[0])


def _view(array: pa.Array, shape: list[int] | None) -> Any:
    """What a cell is cut from without a copy: an Arrow array, (offsets, values), or an array (n, …)."""
    if shape is None:
        return array
    values = array.values.to_numpy(zero_copy_only=True)
    return (array.offsets.to_numpy(), values) if shape == [-1] else values.reshape(len(array), *shape)


class FeatureTable:
    """Encoded images and captions. Row i is row i of the source that was encoded.

    Tensors come in the dtype of the table (float16 or float32): the stage casts them on its device.
    """

    def __init__(self, folder: Path) -> None:
        """Open a table.

        Raises:
            OSError, ValueError: if the folder holds no complete table.
        """
        self.folder = folder
        self._meta = json.loads((folder / META).read_text("utf-8"))
        self._images = MappedColumns(folder / IMAGES)
        self._captions = MappedColumns(folder / CAPTIONS) if self._meta["captions"] else None
        if len(self._images) != self._meta["images"]:
            raise ValueError(f"{folder / IMAGES} holds {len(self._images)} of {self._meta['images']} rows")

    def __reduce__(self) -> tuple[type["FeatureTable"], tuple[Path]]:
        return FeatureTable, (self.folder,)  # workers map the files again

    def __len__(self) -> int:
        return len(self._images)

    @property
    def ids(self) -> list[str]:
        """The examples' ids, read from disk at each call."""
        return [self.id(index) for index in range(len(self))]

    def id(self, index: int) -> str:
        name: str = self._images.value("id", index)
        return name

    def captions(self, index: int) -> int:
        """How many encoded captions an image has; 0 in a table without text."""
        return int(self._images.value("caption_count", index))

    def row(self, index: int, caption: int = 0) -> dict[str, Tensor]:
        """Features of an image and of one of its captions, without a batch axis.

        `image_embeds` (E,), `latents` (4, h, w), `text_embeds` (E,), `text_states` (L, E) zero after the mask,
        `text_mask` (L,) bool: as many of them as were encoded.
        """
        names = (name for name in self._images.names if name not in ("id", "caption_start", "caption_count"))
        features = {name: _tensor(self._images.value(name, index)) for name in names}
        if self._captions is None:
            return features
        if not 0 <= caption < self.captions(index):
            raise IndexError(f"caption {caption} of {self.captions(index)} of {self.id(index)}")
        place = int(self._images.value("caption_start", index)) + caption
        return features | self._text(self._captions, place)

    def _text(self, captions: MappedColumns, place: int) -> dict[str, Tensor]:
        names = (name for name in captions.names if name not in ("text_states", "text_tokens"))
        features = {name: _tensor(captions.value(name, place)) for name in names}
        tokens, length = int(captions.value("text_tokens", place)), self._meta["text_length"]
        states = captions.value("text_states", place).reshape(tokens, -1)
        padded = np.zeros((length, states.shape[1]), states.dtype)
        padded[:tokens] = states
        return features | {"text_states": torch.from_numpy(padded), "text_mask": torch.arange(length) < tokens}


def _tensor(view: Array) -> Tensor:
    return torch.from_numpy(np.array(view))  # a copy: the map is read-only, and pages it in here and now
