"""What an encoded table holds: features of images and of their captions, in parts of two files each.

`images.arrow` has a row per view of an image (the image; its mirror, if mirrors are encoded): id, row of the source,
which rows of the part's captions are its own, a digest of its file, and what the image encoders gave. `captions.arrow`
has a row per different caption of the part, its states only up to the end of its mask. Floats are stored in the table's
dtype. `table.json` is the manifest: facts of the whole, and a line per part.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky_exp.data.encoded.columns import SHAPE, Array, MappedColumns, Places, check_files
from kandinsky_exp.data.encoded.layout import CAPTION_ROWS, CAPTIONS, IMAGES, MASK, META, cure, part_folder
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError, cause_of

NO_FEATURES = ("id", "source_row", "caption_start", "caption_count", CAPTION_ROWS, "picture")
FORMAT = 3  # a new one must not find old tables, but where `EARLIER` says so
EARLIER = (2,)  # without parts: their files lie in the table's own folder, a caption's row for each time it occurs
OPEN = 1024  # parts at a time: all of most tables, for rows are visited in any order
CHECKED = 64  # parts whose files are looked at when the table is opened, in tables that have no more


class _Part:
    """The files of a part, mapped."""

    def __init__(self, folder: Path, entry: dict[str, Any], views: int, places: dict[Path, Places]) -> None:
        self.images = MappedColumns(folder / IMAGES, places)
        self.captions = MappedColumns(folder / CAPTIONS, places) if entry["captions"] else None
        if len(self.images) != entry["images"] * views:
            raise ValueError(f"{IMAGES} holds {len(self.images)} rows instead of {entry['images'] * views}")
        self.features = [name for name in self.images.ragged if name not in NO_FEATURES]

    def caption_rows(self, row: int) -> Any:
        """Of an image's captions."""
        if self.images.has(CAPTION_ROWS):
            return self.images.cell(CAPTION_ROWS, row)
        if self.captions is None:
            return range(0)
        start, count = (int(self.images.cell(name, row)) for name in ("caption_start", "caption_count"))
        return range(start, start + count)


class FeatureTable:
    """Encoded images and captions; row i is the i-th image of the source that could be read.

    Tensors come in the dtype of the table (float16 or float32): the stage casts them on its device.
    """

    def __init__(self, folder: Path) -> None:
        """Open a table; of its parts a few at a time, when a row of theirs is first read.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: the folder holds no complete table.
        """
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text("utf-8"))
        self.views: int = self.meta["views"]
        has_parts = "parts" in self.meta
        self._entries: list[dict[str, Any]] = self.meta.pop("parts") if has_parts else [self.meta]
        self._folders = [part_folder(folder, number) for number in range(len(self._entries))] if has_parts else [folder]
        self._starts: list[int] = list(accumulate((entry["images"] for entry in self._entries), initial=0))
        self._part = lru_cache(OPEN)(partial(_opened, folder, self._folders, self._entries, self.views, {}))
        if self._starts[-1] != self.meta["images"]:
            raise ValueError(f"its parts hold {self._starts[-1]:,} images instead of {self.meta['images']:,}")
        names = {file.name for file in folder.iterdir()}
        for part, entry in zip(self._folders, self._entries, strict=True):
            if has_parts and part.name not in names:
                raise ValueError(f"part {part.name} is missing")
            if len(self._entries) <= CHECKED:
                check_files(part, entry)

    def __reduce__(self) -> tuple[type["FeatureTable"], tuple[Path]]:
        return FeatureTable, (self.folder,)  # workers map the files again

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def skipped(self) -> list[str]:
        """What was wrong with the examples that were left out."""
        return [str(problem) for problem in self.meta["skipped"]]

    @property
    def noted(self) -> Tally:
        """What else was not used; tables of before did not count it."""
        return dict(self.meta.get("noted", {}))

    def id(self, index: int) -> str:
        return str(self._image(index)["id"])

    def source_row(self, index: int) -> int:
        """The row of the source that was encoded; it differs from `index` where examples were left out."""
        return int(self._image(index)["source_row"])

    def shapes(self) -> Array:
        """Shape of what differs in shape of each image, (n, 3): of the latents."""
        return self._column(f"{self._any.features[0]}{SHAPE}")

    def pictures(self) -> Array | None:
        """(n, 2), equal where two images are the same file; None in a table from before that was stored."""
        return self._column("picture") if self._any.images.has("picture") else None

    def row(self, index: int, choose: Callable[[int], int] = lambda count: 0, view: int = 0) -> dict[str, Tensor]:
        """Features of an image and of one of its captions, without a batch axis.

        What the stage's encoders gave: of a caption's states only those of its n tokens, and `text_mask` (n,), true.

        Args:
            choose: draws one of so many captions.
            view: 1 for the mirrored image, where it was encoded.

        Raises:
            IndexError: there is no such row, caption or view.
            DataError: what is stored does not agree with its checksum.
        """
        part, row = self._place(index, view)
        cells = part.images.row(row)
        features = {name: _tensor(cell) for name, cell in cells.items() if name not in NO_FEATURES}
        if part.captions is None:
            return features
        rows = part.caption_rows(row)
        if not 0 <= (caption := choose(len(rows))) < len(rows):
            raise IndexError(f"caption {caption} of {len(rows)} of {cells['id']}")
        text = part.captions.row(int(rows[caption]))
        features |= {name: _tensor(cell) for name, cell in text.items()}
        if ragged := part.captions.ragged:
            features[MASK] = torch.ones(len(text[ragged[0]]), dtype=torch.bool)
        return features

    def feature(self, index: int, name: str) -> Array:
        """One feature of an image.

        Raises:
            DataError: what is stored does not agree with its checksum.
        """
        return np.array(self._image(index)[name])

    def has(self, name: str) -> bool:
        """Whether its images have this feature."""
        return len(self) > 0 and self._any.images.has(name)

    def tokens(self, index: int, choose: Callable[[int], int]) -> int:
        """How many the caption of a row has, of a table whose captions have a length."""
        part, row = self._place(index)
        assert part.captions is not None  # nosec B101 # narrows the type
        rows = part.caption_rows(row)
        return int(part.captions.cell(f"{part.captions.ragged[0]}{SHAPE}", int(rows[choose(len(rows))]))[0])

    def _image(self, index: int) -> dict[str, Any]:
        part, row = self._place(index)
        return part.images.row(row)

    def _place(self, index: int, view: int = 0) -> tuple[_Part, int]:
        """The part of an image, and the image's row there."""
        if not (0 <= index < len(self) and 0 <= view < self.views):
            raise IndexError(f"row {index} of {len(self)}, view {view} of {self.views}")
        number = bisect_right(self._starts, index) - 1
        return self._part(number), (index - self._starts[number]) * self.views + view

    @property
    def _any(self) -> _Part:
        return self._place(0)[0]

    def _column(self, name: str) -> Array:
        """A column of numbers of all images, copied."""
        return np.concatenate(list(self._cells(name)))

    def _cells(self, name: str) -> Iterator[Array]:
        for number, entry in enumerate(self._entries):
            if entry["images"]:
                yield self._part(number).images.column(name)[:: self.views]


def _opened(
    table: Path,
    folders: list[Path],
    entries: list[dict[str, Any]],
    views: int,
    places: dict[Path, Places],
    number: int,
) -> _Part:
    folder, entry = folders[number], entries[number]
    try:
        if len(entries) > CHECKED and folder / IMAGES not in places:
            check_files(folder, entry)
        return _Part(folder, entry, views, places)
    except (OSError, ValueError, KeyError) as error:
        if not (table / META).exists():
            raise DataError(f"{table} was removed, or is mended, by another process; give the command again") from error
        raise DataError(f"{folder} is damaged ({cause_of(error)}); {cure(folder)}") from error


def _tensor(view: Array) -> Tensor:
    """A copy: the map is read-only, and pages it in here and now."""
    return torch.from_numpy(np.array(view))
