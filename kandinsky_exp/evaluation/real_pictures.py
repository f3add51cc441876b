"""The pictures that drawn ones are measured against: their embeddings, captions and files."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.data.examples import Example, Indexed
from kandinsky_exp.data.features import CachedFeatures
from kandinsky_exp.data.sampler import choose_caption
from kandinsky_exp.evaluation.encoders import OwnEncoder, PictureEncoder
from kandinsky_exp.training.feature_reader import FeatureReader

EMBEDS = "image_embeds"  # the feature of that name, of all stages of the package
AT_ONCE = 64  # pictures in memory


@dataclass(frozen=True)
class RealPictures:
    """Some rows of what trains, or of what is held out.

    Args:
        rows: of the reader.
    """

    reader: FeatureReader
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def embeds(self, encoder: PictureEncoder) -> Tensor:
        """(N, E) float32: those of the encoded table where they are Kandinsky's own, of the files otherwise."""
        dataset = self.reader.dataset
        if isinstance(encoder, OwnEncoder) and isinstance(dataset, CachedFeatures) and dataset.has(EMBEDS):
            return torch.from_numpy(np.stack([dataset.feature(row, EMBEDS) for row in self.rows])).float()
        parts = []
        for start in range(0, len(self.rows), AT_ONCE):
            some = self.examples(self.rows[start : start + AT_ONCE])
            parts.append(encoder([example.image() for example in some]))
        return torch.cat(parts)

    def captions(self) -> list[str]:
        """What validation reads of each; "" of a row without one."""
        seed = self.reader.settings.seed
        return [
            example.captions[choose_caption(seed, 0, row, len(example.captions))] if example.captions else ""
            for row, example in zip(self.rows, self.examples(self.rows), strict=True)
        ]

    def pictures(self, rows: Sequence[int]) -> list[Image.Image]:
        return [example.image() for example in self.examples(rows)]

    def examples(self, rows: Sequence[int]) -> list[Example]:
        """Rows as their source has them; a source that is read in one sweep is walked once."""
        source, places = self.reader.source, [self.reader.dataset.source_row(row) for row in rows]
        if isinstance(source, Indexed):
            return [source[place] for place in places]
        wanted = set(places)
        walked = enumerate(islice(source.examples(), max(places, default=-1) + 1))
        found = {place: example for place, example in walked if place in wanted}
        return [found[place] for place in places]


def some_of(reader: FeatureReader, count: int, seed: int) -> RealPictures:
    """So many rows, drawn by the seed, in their order; all where there are no more."""
    generator = torch.Generator().manual_seed(seed)
    return RealPictures(reader, sorted(torch.randperm(len(reader), generator=generator)[:count].tolist()))
