"""Disk space: what the encoded features of a run will take, and what is free."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from kandinsky_exp import build
from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.data.encoded.columns import DTYPES
from kandinsky_exp.data.encoded.layout import MASK
from kandinsky_exp.data.examples import Indexed, Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.source_facts import Announced, AnnouncedSplits
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.memory.dry_run import DryRun

LOOKED_AT = 1000  # rows whose captions are counted and tokenized
OF_A_ROW = 76  # bytes of an image beside its features: id, row, captions, digest, checksum
OF_A_CAPTION = 30
OF_A_TABLE = 2_000  # bytes of its schemas and facts


@dataclass(frozen=True)
class Cache:
    """Encoded features of one source.

    Args:
        images: None where nobody knows how many there are.
        each: bytes per image.
        is_there: whether a table of that source, in that type and with as many images, is there already.
    """

    images: int | None
    each: float
    is_there: bool

    @property
    def bytes(self) -> int:
        return 0 if self.is_there else int(OF_A_TABLE + (self.images or 0) * self.each)


def of_caches(
    cfg: DictConfig, dry_run: DryRun, splits: Splits | AnnouncedSplits, sets: Iterable[Source | Announced]
) -> Iterator[Cache]:
    """Without a look at the content of images and encoders: what has changed meanwhile is encoded anew."""
    preprocess, kept = dry_run.stage.preprocess, splits.class_images
    for source in (*splits.both, *sets):
        yield _cache(cfg, dry_run, source.name, source.count, *_captions(preprocess, source))
    if kept is not None:  # of which some may have to be drawn, in a folder that has no name yet
        yield _cache(cfg, dry_run, str(kept.folder), kept.count, 1.0, _tokens(preprocess, [kept.prompt]))


def _cache(cfg: DictConfig, dry_run: DryRun, name: str, count: int | None, captions: float, tokens: float) -> Cache:
    """Of so many images, each with so many captions of so many tokens."""
    about = f"{dry_run.stage.encoded} {name} {cfg.data.cache_dtype}"
    found = catalog.entries(build.cache_folder(cfg))
    is_there = any(entry.about == about and entry.images == count for entry in found)
    itemsize = np.dtype(DTYPES[cfg.data.cache_dtype]).itemsize
    images, *texts = dry_run.encoded()
    sizes = {name: 1 if name in dry_run.stage.preprocess.companions else itemsize for name in images}
    view = sum(shape.numel() * sizes[name] for name, shape in images.items()) + OF_A_ROW
    total = float(view * (1 + cfg.data.flip))
    for shapes in texts:
        ragged = shapes.keys() & dry_run.stage.ragged_features
        numbers = sum(tokens * shapes[name][1:].numel() for name in ragged)
        numbers += sum(shapes[name].numel() for name in shapes.keys() - ragged - {MASK})
        total += captions * (numbers * itemsize + OF_A_CAPTION)
    return Cache(count, total, is_there)


def _captions(preprocess: Preprocess, source: Source | Announced) -> tuple[float, float]:
    """(captions per image, tokens per caption) of some rows; of a stream, which would have to be read, a guess."""
    if not isinstance(source, Indexed) or preprocess.tokenizer is None:
        return 1.0, _tokens(preprocess, [])
    rows = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
    texts = [text for row in rows for text in source[int(row)].captions]
    return len(texts) / len(rows), _tokens(preprocess, texts)


def _tokens(preprocess: Preprocess, texts: Sequence[str]) -> float:
    """Their mean number; of no texts the largest that can be, and 0 where no text is read."""
    if preprocess.tokenizer is None:
        return 0.0
    if not texts:
        return float(preprocess.tokenizer.model_max_length)
    return sum(int(tensors[MASK].sum()) for tensors, _ in preprocess.tokenize(texts)) / len(texts)


def free(folder: Path) -> int | None:
    """Bytes of the disk that a folder lies on, or will lie on; None where the disk cannot say so."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None
