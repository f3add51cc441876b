"""The pictures that drawn ones are measured against: their embeddings, captions and files."""

import logging
from collections.abc import Iterator, Sequence
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
from kandinsky_exp.system.telling import told
from kandinsky_exp.training.feature_reader import FeatureReader

EMBEDS = "image_embeds"  # the feature of that name, of all stages of the package
AT_ONCE = 64  # pictures in memory
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RealPictures:
    """Some rows of what trains, or of what is held out.

    Args:
        rows: of the reader, ascending.
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
        examples, parts = self.examples(self.rows), []
        starts = range(0, len(self.rows), AT_ONCE)
        for _ in told(starts, "real pictures", "embedded", logger.info, lambda start: min(AT_ONCE, len(self) - start)):
            parts.append(encoder([example.image() for example in islice(examples, AT_ONCE)]))
        return torch.cat(parts)

    def captions(self) -> list[str]:
        """What validation reads of each; "" of a row without one."""
        seed = self.reader.settings.seed
        return [
            example.captions[choose_caption(seed, 0, row, len(example.captions))] if example.captions else ""
            for row, example in zip(self.rows, self.examples(self.rows), strict=True)
        ]

    def pictures(self, rows: Sequence[int]) -> list[Image.Image]:
        """Of any rows of the reader, each of which may be asked for several times."""
        some = sorted(set(rows))
        found = {row: example.image() for row, example in zip(some, self.examples(some), strict=True)}
        return [found[row] for row in rows]

    def examples(self, rows: Sequence[int]) -> Iterator[Example]:
        """Ascending rows as their source has them; a source that is read in one sweep is walked once."""
        source, places = self.reader.source, [self.reader.dataset.source_row(row) for row in rows]
        if isinstance(source, Indexed):
            yield from (source[place] for place in places)
            return
        wanted, end = set(places), max(places, default=-1) + 1
        yield from (example for place, example in enumerate(islice(source.examples(), end)) if place in wanted)


def some_of(reader: FeatureReader, count: int, seed: int) -> RealPictures:
    """So many rows, drawn by the seed, in their order; all where there are no more."""
    generator = torch.Generator().manual_seed(seed)
    return RealPictures(reader, sorted(torch.randperm(len(reader), generator=generator)[:count].tolist()))
