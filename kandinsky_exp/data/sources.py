"""Where images and captions come from: folders, lists, hub data sets, tar shards, or the emoji of the package."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kandinsky_exp.data import tally
from kandinsky_exp.data.dreambooth import ClassImages, refuse, subject
from kandinsky_exp.data.examples import Indexed
from kandinsky_exp.data.formats import metadata
from kandinsky_exp.data.formats.download import shown
from kandinsky_exp.data.formats.file_rows import FileRows, image_columns, read_listed
from kandinsky_exp.data.formats.folders import outside, unlisted
from kandinsky_exp.data.formats.hub_rows import announced, hub_rows, load, parquet_rows
from kandinsky_exp.data.formats.shard_names import expand, files_beside
from kandinsky_exp.data.formats.shards import Shards
from kandinsky_exp.data.formats.sidecar import read_beside
from kandinsky_exp.data.sampler import order
from kandinsky_exp.data.source_facts import declares
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.files import expanded, is_file, is_folder

EMOJI = Path(__file__).parents[1] / "tiny" / "assets" / "emoji"
IMAGE_KEYS = "jpg;png;webp;jpeg"
LISTS = (".csv", ".parquet", ".jsonl", ".tsv")


def folder(path: str | Path, image_column: str = "image", caption_column: str = "text") -> Splits:
    """A folder of images with captions, or one with such a `train/` inside.

    The captions stand in `metadata.jsonl`, `.csv` or `.parquet`, where a row names its image by `file_name`, relative
    to the metadata file, or by `image_column`; or, with no such file, in a `.txt` beside each image. A `validation/`
    with captions of its own is the held-out split.

    Raises:
        DataError: if there is no such folder, metadata or row, or no line of the metadata is a row.
    """
    root = expanded(path)
    if not is_folder(root):
        raise DataError(f"data.path: {root} is not a folder; give the folder that holds the images and their captions")
    listed = metadata.find(root) is not None
    home = root / "train" if (root / "train").is_dir() and not listed else root
    if listed and metadata.find(root / "train") is not None:
        raise DataError(f"data.path: both {root} and its train/ hold metadata; keep one, or give {root / 'train'}")
    validation = root / "validation"
    has_split = validation.is_dir() and not (listed and metadata.find(validation) is None)
    train = _read_folder(home, validation, image_column, caption_column, skip=[validation] if has_split else [])
    if home != root:
        tally.add(train.unused, outside(root, [home, validation]))
    if not has_split:
        return Splits(train, None)
    return Splits(train, _read_folder(validation, validation / "validation", image_column, caption_column))


def _read_folder(
    home: Path, validation: Path, image_column: str, caption_column: str, skip: Collection[Path] = ()
) -> FileRows:
    file = metadata.find(home)
    if file is None:
        return read_beside(home, validation)
    rows = read_listed(file, image_column, caption_column, inside=True)
    return replace(rows, unused=unlisted(home, skip, rows.columns.column("file"), file.name))


@declares(folders=(), files=("path", "validation_path"))
def listing(
    path: str | Path,
    image_column: str = "image",
    caption_column: str = "text",
    validation_path: str | Path | None = None,
) -> Splits:
    """A CSV (or TSV), Parquet or JSON-lines file that lists paths of images, absolute or relative to it, with captions.

    A Parquet file may hold the images' bytes themselves.

    Raises:
        DataError: if there is no such file, or no line of it is a row.
    """
    train = _read_list(path, "data.path", image_column, caption_column)
    if validation_path is None:
        return Splits(train, None)
    return Splits(train, _read_list(validation_path, "data.validation_path", image_column, caption_column))


def _read_list(path: str | Path, key: str, image_column: str, caption_column: str) -> Indexed:
    file = expanded(path)
    if not is_file(file) or file.suffix.lower() not in LISTS:
        wrong = "has none of these endings" if is_file(file) else "is no file"
        raise DataError(f"{key}: {file} {wrong}; give a list of images as {', '.join(LISTS)}")
    if file.suffix.lower() == ".parquet":
        column = metadata.picture_column(file, image_columns(image_column))
        if column is not None:
            return parquet_rows(file, column, caption_column)
    return read_listed(file, image_column, caption_column, inside=False)


@declares(folders=(), streamed="shards")
def webdataset(
    path: str | Path | Sequence[str],
    image_column: str = IMAGE_KEYS,
    caption_column: str = "txt",
    validation_path: str | Path | Sequence[str] | None = None,
) -> Splits:
    """WebDataset tar shards, local or by http(s), read as a stream.

    Args:
        path: files, globs, folders or URLs, with `{000..007}` or `{a,b}` for several.
        image_column: extensions of the images' members, the preferred one first; as it is, those of all pictures.
        caption_column: extension of the captions' members, or `json.<key>`.

    Raises:
        DataError: if there are no such shards.
    """
    keys = tuple(key for part in image_column.split(";") if (key := part.strip().lower().lstrip(".")))
    if not keys or not caption_column:
        raise DataError("data.image_column: give the extensions of the images in the shards, such as jpg;png")

    def shards(paths: str | Path | Sequence[str], key: str) -> Shards:
        names = expand(paths, key)
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        plain = keys == tuple(IMAGE_KEYS.split(";"))  # what can be decoded is used, unless only some of it is asked for
        title, beside = f"{shown(names[0])}{more}", files_beside(paths)
        return Shards(title, names, keys, caption_column.lstrip("."), any_picture=plain, beside=beside)

    held_out = shards(validation_path, "data.validation_path") if validation_path is not None else None
    return Splits(shards(path, "data.path"), held_out)


@declares(title="the emoji that ship with kandinsky-exp")
def emoji() -> Splits:
    """The 64 + 16 captioned emoji, 64 px, that ship with the package."""
    splits = folder(EMOJI)
    splits.train.left_out().clear()  # the licence
    return splits


@declares(hub_id="name", announced=announced)
def hub(
    name: str,
    image_column: str = "image",
    caption_column: str = "text",
    split: str = "train",
    validation_split: str | None = "validation",
    revision: str | None = None,
    subset: str | None = None,
) -> Splits:
    """A data set of the hub, or a local folder that `datasets` reads: parquet, image folder, or saved to disk.

    Args:
        subset: which of its configurations, where it has several.

    Raises:
        DataError: if it cannot be loaded or has no such split, configuration or image column.
    """
    loaded = load(name, split, revision, subset)
    title = name if subset is None else f"{name}/{subset}"
    if split not in loaded:
        raise DataError(f"data.split: {name} has no split '{split}'; it has {', '.join(loaded)}")
    train = hub_rows(title, split, loaded[split], image_column, caption_column)
    if validation_split is None or (validation_split == "validation" and validation_split not in loaded):
        return Splits(train, None)
    if validation_split not in loaded:
        raise DataError(f"data.validation_split: {name} has no split '{validation_split}'; it has {', '.join(loaded)}")
    return Splits(train, hub_rows(title, validation_split, loaded[validation_split], image_column, caption_column))


def dreambooth(
    instance_path: str | Path,
    instance_prompt: str,
    class_path: str | Path | None = None,
    class_prompt: str | None = None,
    num_class_images: int = 100,
    prior_loss_weight: float = 1.0,
    validation_path: str | Path | None = None,
) -> Splits:
    """A few pictures of one subject with one caption, and pictures of its class that train beside them.

    Nothing of so few is held out: without `validation_path` there is no validation split.

    Raises:
        DataError: a folder is none or holds no picture, or a prompt is no caption.
    """
    own, held_out, class_folder = (
        expanded(path).absolute() if path is not None else None for path in (instance_path, validation_path, class_path)
    )
    for key, other in (("data.validation_path", held_out), ("data.class_path", class_folder)):
        if other == own:
            raise DataError(f"{key}: {other} is data.instance_path, too; give another folder")
    skip = [folder for folder in (held_out, class_folder) if folder is not None]
    train = subject("data.instance_path", instance_path, instance_prompt, skip)
    validation = subject("data.validation_path", held_out, instance_prompt) if held_out is not None else None
    class_images = None
    if class_prompt is not None:
        refuse("data.class_prompt", class_prompt)
        class_images = ClassImages(class_folder, class_prompt, num_class_images, prior_loss_weight)
    return Splits(train, validation, class_images, dividable=False)


def with_columns(splits: Splits, names: Sequence[str]) -> Splits:
    """The same with further columns of its metadata.

    Raises:
        DataError: there are none of these names.
    """
    if not names:
        return splits
    validation = splits.validation and splits.validation.with_columns(names)
    return replace(splits, train=splits.train.with_columns(names), validation=validation)


def with_companions(splits: Splits, kinds: Mapping[str, type[Any]], settings: Mapping[str, Any]) -> Splits:
    """The same with pictures that belong to its own, from the folders or else the columns that settings name.

    Args:
        kinds: of these pictures, by name; of some no file is read.

    Raises:
        DataError: there are none, or none for class images.
    """
    names = [name for name, kind in kinds.items() if kind.is_read]
    if not names:
        return splits
    if splits.class_images is not None:
        raise DataError(f"data.class_prompt: class images have no {names[0]} of their own; leave it out")
    folders = {name: expanded(path).absolute() for name in names if (path := settings.get(f"{name}s"))}
    columns = {name: str(settings.get(f"{name}_column")) for name in names if name not in folders}
    validation = splits.validation and splits.validation.with_companions(columns, folders)
    return replace(splits, train=splits.train.with_companions(columns, folders), validation=validation)


def subset(splits: Splits, max_samples: int | None, seed: int) -> Splits:
    """At most `max_samples` images of each split, drawn by seed, or the first ones of a stream.

    A smaller number draws a subset of a larger one's.

    Raises:
        DataError: if `max_samples` is not positive.
    """
    if max_samples is None:
        return splits
    if max_samples < 1:
        raise DataError(f"data.max_samples: {max_samples} leaves no image; give a positive number or null")
    validation = splits.validation.limited(max_samples, seed) if splits.validation is not None else None
    return replace(splits, train=splits.train.limited(max_samples, seed), validation=validation)


def held_out(
    rows: int, fraction: float, seed: int, pictures: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that train and rows that are held out, both sorted: at least one of each; a fraction of 0 holds out none.

    Args:
        pictures: (rows, 2), equal where rows show the same picture: these stay together, and the fraction is one of
            pictures. None = each row has its own.

    Raises:
        DataError: if the fraction is not in [0, 1], or there is only one picture to divide.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"validation.fraction: {fraction} is not between 0 and 1")
    if fraction == 0:
        return np.arange(rows), np.arange(0)
    numbers = np.arange(rows) if pictures is None else _numbered(pictures)
    different = len(np.unique(numbers))
    if different < 2:
        raise DataError("validation.fraction: one image cannot be divided; add images or set validation.fraction=0")
    count = min(max(1, round(different * fraction)), different - 1)
    held = np.isin(numbers, order(seed, 0, different)[:count])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _numbered(pictures: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,) numbers in the order of the first rows: where none repeats, those of the rows."""
    _, first, same = np.unique(pictures, axis=0, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[same.reshape(-1)]
