"""What is encoded and not yet written: the examples since the last commit of a journal."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from kandinsky_exp.data.encoded.table import Array
from kandinsky_exp.data.encoded.workers import Features

Cells = dict[str, Array]


@dataclass
class Chunk:
    """Image and caption batches are filled across examples, never across chunks."""

    seen: int = 0
    ids: list[str] = field(default_factory=list)
    source_rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    pictures: list[Array | None] = field(default_factory=list)
    images: list[list[Cells]] = field(default_factory=list)  # by view, once encoded
    captions: list[Cells] = field(default_factory=list)
    waiting: dict[tuple[torch.Size, ...], list[tuple[int, list[Features]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    texts: list[Features] = field(default_factory=list)

    def size_each(self) -> float:
        """Bytes per example, from what is encoded so far."""
        images, captions = [cells for views in self.images for cells in views], self.captions
        sizes = [sum(array.nbytes for row in rows for array in row.values()) for rows in (images, captions)]
        ready = max(1, sum(map(bool, self.images)))
        captions_each = sum(self.counts) / max(1, len(self.counts))
        return sizes[0] / ready + sizes[1] / max(1, len(captions)) * captions_each

    def image_columns(self, captions_before: int, views: int, ragged: Collection[str]) -> dict[str, Any]:
        """A row per view of each image.

        Args:
            captions_before: those that the table has already.
            ragged: features whose shapes differ.
        """
        starts = accumulate(self.counts, initial=captions_before)
        facts = {
            "source_row": np.array(self.source_rows, np.int64),
            "caption_start": np.array(list(starts)[:-1], np.int64),
            "caption_count": np.array(self.counts, np.int64),
            "picture": np.array(self.pictures, np.int64),
        }
        return {
            "id": [name for name in self.ids for _ in range(views)],
            **{name: np.repeat(column, views, axis=0) for name, column in facts.items()},
            **_columns([cells for row in self.images for cells in row], ragged),
        }

    def caption_columns(self, ragged: Collection[str]) -> dict[str, Any]:
        """A row per caption."""
        return _columns(self.captions, ragged)


def _columns(rows: list[Cells], ragged: Collection[str]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in rows[0]:
        cells = [row[name] for row in rows]
        columns[name] = cells if name in ragged else np.stack(cells)
    return columns
