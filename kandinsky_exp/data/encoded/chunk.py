"""What is encoded and not yet written: batches that fill, and the rows since the last commit."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kandinsky_exp.data.encoded.columns import Array
from kandinsky_exp.data.encoded.layout import CAPTION_ROWS
from kandinsky_exp.data.encoded.workers import Features, Loaded, collate

Cells = dict[str, Array]


@dataclass
class Row:
    """An image, or one of its captions.

    Args:
        captions: an image's, by their rows in the part.
        views: features of each view, once they are encoded; a caption has one view.
    """

    example: Loaded
    source_row: int
    captions: list[int] = field(default_factory=list)
    views: list[Cells] = field(default_factory=list)


@dataclass
class BatchFiller:
    """Gathers rows until `size` of them have tensors of equal shapes, and encodes these as one batch.

    Args:
        encode: takes the rows of a batch, and each view of them stacked.
    """

    size: int
    encode: Callable[[list[Row], list[Features]], None]
    waiting: dict[tuple[torch.Size, ...], list[tuple[Row, list[Features]]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, row: Row, views: list[Features]) -> None:
        shapes = tuple(tensor.shape for tensor in views[0].values())
        self.waiting[shapes].append((row, views))
        if len(self.waiting[shapes]) == self.size:
            self._encode(self.waiting.pop(shapes))

    def finish(self) -> None:
        """Encode what waits for more of its shapes, in smaller batches."""
        while self.waiting:
            self._encode(self.waiting.pop(next(iter(self.waiting))))

    def _encode(self, batch: Sequence[tuple[Row, list[Features]]]) -> None:
        stacked = [collate(view) for view in zip(*(views for _, views in batch), strict=True)]
        self.encode([row for row, _ in batch], stacked)


@dataclass
class Chunk:
    """The rows of the examples since the last write.

    Args:
        seen: examples, those that were left out among them.
        captions: those that did not occur in the part before.
    """

    seen: int = 0
    images: list[Row] = field(default_factory=list)
    captions: list[Row] = field(default_factory=list)

    def size_each(self) -> float:
        """Bytes per example, from what is encoded so far."""
        captions_each = len(self.captions) / max(1, len(self.images))
        return _mean_size(self.images) + _mean_size(self.captions) * captions_each

    def image_columns(self, ragged: Collection[str]) -> dict[str, Any]:
        """A row per view of each image.

        Args:
            ragged: features whose shapes differ.
        """
        facts = {
            "source_row": np.array([row.source_row for row in self.images], np.int64),
            "picture": np.array([row.example.picture for row in self.images], np.int64),
        }
        views = len(self.images[0].views)
        made = {
            "id": [row.example.id for row in self.images for _ in range(views)],
            **{name: np.repeat(column, views, axis=0) for name, column in facts.items()},
            **columns(self.images, ragged),
        }
        if self.images[0].captions:  # every image has some, or none has
            made[CAPTION_ROWS] = [np.array(row.captions, np.int64) for row in self.images for _ in range(views)]
        return made


def _mean_size(rows: Sequence[Row]) -> float:
    encoded = [row for row in rows if row.views]
    size = sum(array.nbytes for row in encoded for cells in row.views for array in cells.values())
    return size / max(1, len(encoded))


def columns(rows: Sequence[Row], ragged: Collection[str]) -> dict[str, Any]:
    """A row per view of each."""
    made: dict[str, Any] = {}
    for name in rows[0].views[0]:
        cells = [view[name] for row in rows for view in row.views]
        made[name] = cells if name in ragged else np.stack(cells)
    return made
