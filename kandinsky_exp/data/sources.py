"""Where images and captions come from: a folder, a hub data set, or the emoji that ship with the package."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kandinsky_exp.data import metadata
from kandinsky_exp.data.checks import Report, check
from kandinsky_exp.data.examples import Example, Hashed, Rows, Source, Splits, Subset
from kandinsky_exp.data.sampler import order
from kandinsky_exp.errors import DataError

__all__ = ["Example", "Report", "Source", "Splits", "check", "emoji", "folder", "hub", "split", "subset"]

EMOJI = Path(__file__).parents[1] / "tiny" / "assets" / "emoji"


@dataclass(frozen=True)
class HubRows(Hashed):
    """A split of a `datasets` data set, its image column not decoded."""

    rows: Any
    image_column: str
    caption_column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        captions, problem = parse_captions(row, self.caption_column)
        read = partial(_hub_bytes, row[self.image_column] or {})
        return Example(f"row {index}", captions, read, f"{self.name}, row {index}", problem)


def _hub_bytes(image: dict[str, Any]) -> bytes:
    content: bytes | None = image.get("bytes")
    if content is None and image.get("path"):
        content = Path(image["path"]).read_bytes()
    if content is None:
        raise FileNotFoundError(2, "the row has no image")
    return content


def parse_captions(row: dict[str, Any], column: str) -> tuple[tuple[str, ...], str]:
    """The captions of a row, or none and the reason."""
    value = row.get(column)
    if column not in row:
        return (), f"no column '{column}' among {', '.join(map(str, row))}; set data.caption_column"
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return (), f"'{column}' holds {value!r:.60}; a caption is a string or a list of strings"
    if not texts or not all(text.strip() for text in texts):
        return (), f"an empty caption in '{column}'; write one or take the row out"
    return tuple(texts), ""


def folder(path: str | Path, image_column: str = "image", caption_column: str = "text") -> Splits:
    """A folder of images with `metadata.jsonl` or `metadata.csv`, in the folder or in a `train/` inside.

    A row names its image by `file_name`, relative to the metadata file, or by `image_column`. A `validation/` with
    metadata of its own is the held-out split.

    Raises:
        DataError: if there is no such folder, metadata or row, or a line of the metadata is no row.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path: {root} is not a folder; give the folder that holds metadata.jsonl or metadata.csv")
    home = root / "train" if (root / "train").is_dir() and metadata.find(root) is None else root
    if home == root and metadata.find(root / "train") is not None:
        raise DataError(f"data.path: both {root} and its train/ hold metadata; keep one, or give {root / 'train'}")
    held_out = root / "validation"
    train = _read_folder(home, image_column, caption_column)
    if not held_out.is_dir() or (home == root and metadata.find(held_out) is None):
        return Splits(train, None)
    return Splits(train, _read_folder(held_out, image_column, caption_column))


def _read_folder(home: Path, image_column: str, caption_column: str) -> Rows:
    file = metadata.find(home)
    if file is None:
        raise DataError(
            f"data.path: {home} holds neither metadata.jsonl nor metadata.csv; write one row per image, such as "
            '{"file_name": "1.png", "text": "a caption"}'
        )
    examples, problems = [], []
    for line, row in metadata.read(file):
        where = f"{file}, line {line}"
        name = _file_name(row, image_column)
        if not name:
            problems.append(f"{where}: {_no_image(row, image_column)}")
            continue
        captions, problem = parse_captions(row, caption_column)
        examples.append(Example(name, captions, partial(Path.read_bytes, home / name), where, problem))
    if problems:
        raise DataError(metadata.first_few(problems))
    if not examples:
        raise DataError(f"{file} has no rows; write one per image")
    return Rows(str(home), tuple(examples))


def _file_name(row: metadata.Row, image_column: str) -> str | None:
    """By default `file_name`, as in the image folders of `datasets`; a column that was asked for counts alone."""
    columns = ["file_name", "image"] if image_column == "image" else [image_column]
    name = next((row[column] for column in columns if column in row), None)
    return name if isinstance(name, str) else None


def _no_image(row: metadata.Row, image_column: str) -> str:
    wanted = "'file_name'" if image_column == "image" else f"'{image_column}'"
    columns = ", ".join(row) or "none"
    return f"no image file in column {wanted} (columns: {columns}); name it there or set data.image_column"


def emoji() -> Splits:
    """The 64 + 16 captioned emoji, 64 px, that ship with the package."""
    return folder(EMOJI)


def hub(
    name: str,
    image_column: str = "image",
    caption_column: str = "text",
    split: str = "train",
    validation_split: str | None = "validation",
    revision: str | None = None,
) -> Splits:
    """A data set of the hub, or a local folder that `datasets` reads: parquet, image folder, or saved to disk.

    Raises:
        DataError: if it cannot be loaded or has no such split or image column.
    """
    loaded = _load(name, split, revision)
    if split not in loaded:
        raise DataError(f"data.split: {name} has no split '{split}'; it has {', '.join(loaded)}")
    train = _hub_rows(name, split, loaded[split], image_column, caption_column)
    if validation_split is None or (validation_split == "validation" and validation_split not in loaded):
        return Splits(train, None)
    if validation_split not in loaded:
        raise DataError(f"data.validation_split: {name} has no split '{validation_split}'; it has {', '.join(loaded)}")
    return Splits(train, _hub_rows(name, validation_split, loaded[validation_split], image_column, caption_column))


def _load(name: str, split: str, revision: str | None) -> Any:
    """Every split by its name."""
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        if (Path(name) / "state.json").is_file():
            return {split: datasets.load_from_disk(name)}
        return datasets.load_dataset(name, revision=revision)
    except Exception as error:  # connection, hub, file format, builder: the library has no common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"data.name: {name} cannot be loaded: {reason}") from error


def _hub_rows(name: str, split: str, rows: Any, image_column: str, caption_column: str) -> HubRows:
    import datasets

    if not isinstance(rows.features.get(image_column), datasets.Image):
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
        raise DataError(f"data.image_column: '{image_column}' is no column of images in {name}; it has {columns}")
    if not len(rows):
        raise DataError(f"data.name: split '{split}' of {name} has no rows")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    keep = [column for column in (image_column, caption_column) if column in rows.column_names]
    return HubRows(f"{name}/{split}", rows.select_columns(keep), image_column, caption_column)


def subset(splits: Splits, max_samples: int | None, seed: int) -> Splits:
    """At most `max_samples` images of each split, drawn by seed. A smaller number draws a subset of a larger one's.

    Raises:
        DataError: if `max_samples` is not positive.
    """
    if max_samples is None:
        return splits
    if max_samples < 1:
        raise DataError(f"data.max_samples: {max_samples} leaves no image; give a positive number or null")
    validation = _draw(splits.validation, max_samples, seed) if splits.validation is not None else None
    return Splits(_draw(splits.train, max_samples, seed), validation)


def _draw(source: Source, count: int, seed: int) -> Source:
    if count >= len(source):
        return source
    return Subset(source.name, source, np.sort(order(seed, 0, len(source))[:count]).tolist())


def split(splits: Splits, fraction: float, seed: int) -> Splits:
    """Hold out a part of a set that has no validation split: at least one image, never all of them; 0 is none.

    A set that has one keeps it as it is.

    Raises:
        DataError: if the fraction is not in [0, 1], or there is only one image to divide.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"validation.fraction: {fraction} is not between 0 and 1")
    if splits.validation is not None or fraction == 0:
        return splits
    source, rows = splits.train, len(splits.train)
    if rows < 2:
        raise DataError("validation.fraction: one image cannot be divided; add images or set validation.fraction=0")
    count = min(max(1, round(rows * fraction)), rows - 1)
    shuffled = order(seed, 0, rows)
    held_out, rest = (np.sort(part).tolist() for part in (shuffled[:count], shuffled[count:]))
    return Splits(Subset(source.name, source, rest), Subset(f"{source.name} (held out)", source, held_out))
