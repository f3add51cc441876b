"""Rows of a `datasets` data set: from the hub, or a local copy."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kandinsky_exp.data.examples import MAX_BYTES, Example, Indexed, no_columns, read_file
from kandinsky_exp.data.file_hashes import CHUNK, FileDigests, Hash, update
from kandinsky_exp.data.formats.file_rows import LEADS_OUT, parse_captions
from kandinsky_exp.data.formats.metadata import holds_pictures
from kandinsky_exp.data.source_facts import Announced, AnnouncedSplits
from kandinsky_exp.errors import DataError, first_line

FEW = 64  # rows of a Parquet file that are in memory at once, where each is a picture


@dataclass(frozen=True, eq=False)
class HubRows(Indexed):
    """A split of a `datasets` data set, its image column not decoded, without other columns than the two.

    Args:
        home: where paths of images start from.
        inside: whether they have to stay in there.
        whole: with all columns, of which a stage may read further ones.
        extra_columns: that one reads.
        beside: columns of pictures that belong to the images, by the names of these.
    """

    name: str
    rows: Any
    image_column: str
    caption_column: str
    home: str = ""
    inside: bool = False
    whole: Any = None
    extra_columns: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        values = self.rows[row]
        captions, problem = parse_captions(values, self.caption_column)
        read = self._reading(values[self.image_column])
        cells = {name: values[name] for name in self.extra_columns}
        beside = {name: self._reading(values[column]) for name, column in self.beside.items()}
        lacking = [f"it has no {name} in '{column}'" for name, column in self.beside.items() if not values[column]]
        where = f"{self.name}, row {row}"
        return Example(f"row {row}", captions, read, where, problem, "; ".join(lacking), cells, beside)

    def _reading(self, cell: Any) -> Callable[[], bytes]:
        return partial(_bytes, _parts(cell), self.home, self.inside)

    def with_columns(self, names: Sequence[str]) -> "HubRows":
        if lacking := [name for name in names if name not in self.whole.column_names]:
            raise no_columns(self.name, lacking)
        rows = self.whole.select_columns(list(dict.fromkeys([*self.rows.column_names, *names])))
        return replace(self, rows=rows, extra_columns=tuple(names))

    def with_companions(self, columns: Mapping[str, str], folders: Mapping[str, Path]) -> "HubRows":
        for name in folders:
            raise DataError(f"data.{name}s: the rows of {self.name} have no names of files; set data.{name}_column")
        if lacking := [column for column in columns.values() if column not in self.whole.column_names]:
            raise no_columns(self.name, lacking)
        whole = self.whole
        for name, column in columns.items():
            whole = pictures_as_bytes(whole, self.name, column, f"data.{name}_column")
            if _is_image(whole.features[column]) != _is_image(whole.features[self.image_column]):
                raise DataError(f"data.{name}_column: '{column}' is no column of the kind of '{self.image_column}'")
        rows = whole.select_columns(list(dict.fromkeys([*self.rows.column_names, *columns.values()])))
        return replace(self, rows=rows, whole=whole, beside=dict(columns))

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
        batches = self.rows.select_columns([self.caption_column]).iter(CHUNK)
        for row, value in enumerate(chain.from_iterable(batch[self.caption_column] for batch in batches)):
            captions, problem = parse_captions({self.caption_column: value}, self.caption_column)
            counts[row], wrong[row] = len(captions), bool(problem)
        return counts, wrong

    def fingerprint(self, digests: FileDigests) -> str:
        columns = (self.image_column, self.caption_column, *self.extra_columns, *self.beside.values())
        total = hashlib.sha256(f"hub {len(self)} {' '.join(columns)}".encode())
        files = [file["filename"] for file in self.rows.cache_files]
        if files and self._holds_bytes():
            update(total, digests.required(f"hub {self.name}", files))
            if self.rows._indices is not None:  # what `select` and `filter` leave
                update(total, self.rows._indices.column(0).combine_chunks())
            return total.hexdigest()
        for what, column in (("images", self.image_column), *sorted(self.beside.items())):
            paths = pa.concat_arrays([_paths(batch.column(column), self.home) for batch in self._batches()])
            update(total, digests(f"{what} of hub {self.name}", paths))
        for batch in self._batches():
            _hash_batch(total, batch, self.image_column)
        return total.hexdigest()

    def _batches(self) -> Iterator[pa.Table]:
        yield from self.rows.with_format("arrow").iter(CHUNK)

    def _holds_bytes(self) -> bool:
        """Whether the Arrow files hold all pictures themselves, not only paths."""
        columns = [self.rows.data.column(column) for column in (self.image_column, *self.beside.values())]
        chunks = (
            pc.struct_field(chunk, "bytes") if pa.types.is_struct(chunk.type) else chunk
            for column in columns
            for chunk in column.chunks
        )
        return all(chunk.null_count == 0 for chunk in chunks)


def _parts(image: Any) -> dict[str, Any]:
    """Its `bytes`, or else its `path`, as far as the row has them."""
    return {"bytes": image} if isinstance(image, bytes) else image or {}


def _paths(images: pa.ChunkedArray, home: str) -> pa.Array:
    """Of the images that are files; empty for the others."""
    rows = map(_parts, images.to_pylist())
    paths = (row.get("path") if row.get("bytes") is None else None for row in rows)
    return pa.array([os.path.join(home, path) if path else "" for path in paths], pa.large_string())  # noqa: PTH118


def _hash_batch(total: Hash, batch: pa.Table, image_column: str) -> None:
    for image in map(_parts, batch.column(image_column).to_pylist()):
        total.update(hashlib.sha256(image.get("bytes") or b"").digest())
    for name in batch.column_names:
        if name != image_column:
            total.update(repr(batch.column(name).to_pylist()).encode())


def _bytes(image: dict[str, Any], home: str, inside: bool) -> bytes:
    content: bytes | None = image.get("bytes")
    if content is None and (path := image.get("path")):
        if inside and LEADS_OUT.search(path):
            raise OSError(0, f"{path} leads out of the data set's folder")
        content = read_file(os.path.join(home, path))  # noqa: PTH118
    if content is None:
        raise FileNotFoundError(2, "the row has no image")
    if len(content) > MAX_BYTES:
        raise OSError(0, f"larger than the limit of {MAX_BYTES >> 10:,} KB")
    return content


def load(name: str, split: str, revision: str | None, subset: str | None = None) -> Any:
    """Every split by its name.

    Args:
        subset: the configuration, where there are several.

    Raises:
        DataError: if `datasets` cannot load it.
    """
    import datasets

    several, one = ((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if subset is not None and (several or one):
        raise DataError(f"data.subset: {name} was saved to disk as one configuration; leave data.subset out")
    try:
        if several:
            return datasets.load_from_disk(name)
        if one:
            return {split: datasets.load_from_disk(name)}
        return datasets.load_dataset(name, subset, revision=revision)
    except Exception as error:  # connection, hub, file format, builder: the library has no common base class
        raise not_there(name, revision, subset, error) from error


def announced(
    name: str,
    split: str,
    validation_split: str | None,
    revision: str | None,
    subset: str | None = None,
    limit: int | None = None,
) -> AnnouncedSplits:
    """The splits and how many images they have, before anything of them is fetched.

    Args:
        subset: the configuration, where there are several.
        limit: of the images of each split.

    Raises:
        DataError: if it cannot be asked.
    """
    import datasets

    try:
        found = datasets.load_dataset_builder(name, subset, revision=revision).info.splits or {}
    except Exception as error:  # as above
        raise not_there(name, revision, subset, error) from error
    title = name if subset is None else f"{name}/{subset}"
    sizes = {key: min(filter(None, (value.num_examples, limit)), default=None) for key, value in found.items()}
    train, validation = (Announced(f"{title}/{key}", sizes.get(key or "")) for key in (split, validation_split))
    return AnnouncedSplits(train, validation if validation_split in sizes else None)


def parquet_rows(file: Path, image_column: str, caption_column: str) -> HubRows:
    """A source of a Parquet file in which the pictures are.

    Raises:
        DataError: if it cannot be read, or has no rows.
    """
    import datasets

    try:
        rows = datasets.load_dataset(  # nosec B615 # a file
            "parquet", data_files=glob.escape(str(file.absolute())), split="train", batch_size=FEW
        )
    except Exception as error:  # as above
        raise DataError(f"{file}: not a Parquet file that can be read: {first_line(error)}; write it again") from error
    if not len(rows):
        raise DataError(f"{file}: it has no rows; write one per image")
    made = hub_rows(str(file), "train", rows, image_column, caption_column)
    return replace(made, name=str(file), home=str(file.parent.absolute()), inside=False)


def hub_rows(name: str, split: str, rows: Any, image_column: str, caption_column: str) -> HubRows:
    """A source of one loaded split.

    Raises:
        DataError: if it has no such column of images, or no rows.
    """
    if not len(rows):
        raise DataError(f"data.name: split '{split}' of {name} has no rows")
    rows = pictures_as_bytes(rows, name, image_column, "data.image_column")
    of_files = not _is_image(rows.features[image_column])
    keep = [column for column in (image_column, caption_column) if column in rows.column_names]
    home = str(Path(name).absolute()) if of_files else ""  # an image of `datasets` has whole paths
    return HubRows(f"{name}/{split}", rows.select_columns(keep), image_column, caption_column, home, of_files, rows)


def pictures_as_bytes(rows: Any, name: str, column: str, key: str) -> Any:
    """The rows, a column of pictures not decoded.

    Args:
        key: the setting that names it.

    Raises:
        DataError: it is no such column.
    """
    import datasets

    feature, kinds = rows.features.get(column), rows.features.arrow_schema
    if _is_image(feature):
        return rows.cast_column(column, datasets.Image(decode=False))
    if feature is None or not holds_pictures(kinds.field(column).type):
        columns = ", ".join(f"{known} ({_kind(feature)})" for known, feature in rows.features.items())
        raise DataError(f"{key}: '{column}' is no column of images in {name}; it has {columns}")
    return rows


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def _kind(feature: Any) -> str:
    import datasets

    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def not_there(name: str, revision: str | None, subset: str | None, error: Exception) -> DataError:
    """Why a data set cannot be loaded, and what to do."""
    import datasets

    known: list[str] = []
    if isinstance(error, ValueError):  # what a wrong configuration is
        with contextlib.suppress(Exception):  # as above: then the first error says more
            known = datasets.get_dataset_config_names(name, revision=revision)
    if known and (subset not in known if subset else len(known) > 1):
        wrong = f"{name} has no configuration '{subset}'" if subset else f"{name} has several configurations"
        return DataError(f"data.subset: {wrong}; give one of {', '.join(known)}")
    check = "check the id, your access (hf auth login) and the network, or give a local copy"
    return DataError(f"data.name: {name} cannot be loaded: {first_line(error)}; {check}")
