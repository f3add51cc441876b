"""Rows of a `datasets` data set: from the hub, or a local copy."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kandinsky_exp.data.digests import CHUNK, FileDigests, Hash, update
from kandinsky_exp.data.examples import Example, Indexed, Source, read_file
from kandinsky_exp.data.rows import parse_captions
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.errors import DataError


@dataclass(frozen=True, eq=False)
class HubRows(Indexed):
    """A split of a `datasets` data set, its image column not decoded, without other columns than the two."""

    name: str
    rows: Any
    image_column: str
    caption_column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        values = self.rows[row]
        captions, problem = parse_captions(values, self.caption_column)
        read = partial(_bytes, values[self.image_column] or {})
        return Example(f"row {row}", captions, read, f"{self.name}, row {row}", problem)

    def caption_counts(self) -> NDArray[np.int64]:
        return self._about_captions[0]

    def suspects(self, captions: bool) -> NDArray[np.int64]:
        return np.flatnonzero(self._about_captions[1]) if captions else np.zeros(0, np.int64)

    @cached_property
    def _about_captions(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """How many captions each row has, and whether something is wrong with them."""
        counts, wrong = np.zeros(len(self), np.int64), np.ones(len(self), np.bool_)
        if self.caption_column not in self.rows.column_names:
            return counts, wrong
        texts = self.rows.select_columns([self.caption_column])
        row = 0
        for batch in texts.iter(CHUNK):
            for value in batch[self.caption_column]:
                captions, problem = parse_captions({self.caption_column: value}, self.caption_column)
                counts[row], wrong[row] = len(captions), bool(problem)
                row += 1
        return counts, wrong

    def fingerprint(self, digests: FileDigests) -> str:
        total = hashlib.sha256(f"hub {len(self)} {self.image_column} {self.caption_column}".encode())
        files = [file["filename"] for file in self.rows.cache_files]
        if files and self._holds_bytes():
            update(total, digests.required(f"hub {self.name}", files))
            if self.rows._indices is not None:  # what `select` and `filter` leave
                update(total, self.rows._indices.column(0).combine_chunks())
            return total.hexdigest()
        paths = pa.concat_arrays([_paths(batch.column(self.image_column)) for batch in self._batches()])
        update(total, digests(f"images of hub {self.name}", paths))
        for batch in self._batches():
            _hash_batch(total, batch, self.image_column)
        return total.hexdigest()

    def _batches(self) -> Iterator[pa.Table]:
        yield from self.rows.with_format("arrow").iter(CHUNK)

    def _holds_bytes(self) -> bool:
        """Whether the Arrow files hold all pictures themselves, not only paths."""
        images = self.rows.data.column(self.image_column)
        return all(pc.struct_field(chunk, "bytes").null_count == 0 for chunk in images.chunks)


def _paths(images: pa.ChunkedArray) -> pa.Array:
    """Of the images that are files; empty for the others."""
    rows = ((image or {}) for image in images.to_pylist())
    return pa.array([row.get("path") or "" if row.get("bytes") is None else "" for row in rows], pa.large_string())


def _hash_batch(total: Hash, batch: pa.Table, image_column: str) -> None:
    for image in batch.column(image_column).to_pylist():
        total.update(hashlib.sha256((image or {}).get("bytes") or b"").digest())
    for name in batch.column_names:
        if name != image_column:
            total.update(repr(batch.column(name).to_pylist()).encode())


def _bytes(image: dict[str, Any]) -> bytes:
    content: bytes | None = image.get("bytes")
    if content is None and image.get("path"):
        content = read_file(image["path"])
    if content is None:
        raise FileNotFoundError(2, "the row has no image")
    return content


def load(name: str, split: str, revision: str | None) -> Any:
    """Every split by its name.

    Raises:
        DataError: if `datasets` cannot load it.
    """
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        if (Path(name) / "state.json").is_file():
            return {split: datasets.load_from_disk(name)}
        return datasets.load_dataset(name, revision=revision)
    except Exception as error:  # connection, hub, file format, builder: the library has no common base class
        raise _not_there(name, error) from error


def hub_rows(name: str, split: str, rows: Any, image_column: str, caption_column: str) -> HubRows:
    """A source of one loaded split.

    Raises:
        DataError: if it has no such column of images, or no rows.
    """
    import datasets

    if not isinstance(rows.features.get(image_column), datasets.Image):
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
        raise DataError(f"data.image_column: '{image_column}' is no column of images in {name}; it has {columns}")
    if not len(rows):
        raise DataError(f"data.name: split '{split}' of {name} has no rows")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    keep = [column for column in (image_column, caption_column) if column in rows.column_names]
    return HubRows(f"{name}/{split}", rows.select_columns(keep), image_column, caption_column)


@dataclass(frozen=True)
class Announced(Source):
    """A split of which no more is known than its page on the hub says: nothing of it was fetched."""

    streamed = True
    name: str
    images: int | None

    @property
    def count(self) -> int | None:
        return self.images

    def examples(self, start: int = 0) -> Iterator[Example]:
        raise NotImplementedError

    def __getitem__(self, row: int) -> Example:
        raise NotImplementedError

    def fingerprint(self, digests: FileDigests) -> str:
        raise NotImplementedError


def announced(
    name: str, split: str, validation_split: str | None, revision: str | None, limit: int | None = None
) -> Splits:
    """What the hub says of a data set.

    Args:
        limit: of the images of each split.

    Raises:
        DataError: if it cannot be asked.
    """
    import datasets

    try:
        found = datasets.load_dataset_builder(name, revision=revision).info.splits or {}
    except Exception as error:  # connection, hub, builder: the library has no common base class
        raise _not_there(name, error) from error
    sizes = {key: min(filter(None, (value.num_examples, limit)), default=None) for key, value in found.items()}
    parts = [Announced(f"{name}/{key}", sizes.get(key)) for key in (split, validation_split) if key is not None]
    return Splits(parts[0], parts[1] if validation_split in sizes else None)


def _not_there(name: str, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    check = "check the id, your access (hf auth login) and the network, or give a local copy"
    return DataError(f"data.name: {name} cannot be loaded: {reason}; {check}")
