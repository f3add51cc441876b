"""What a run writes to the disk: encoded features, checkpoints, the result."""

import shutil
from collections.abc import Iterator, Sequence
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


def of_caches(cfg: DictConfig, made: DryRun, splits: Splits | AnnouncedSplits) -> Iterator[Cache]:
    """Without a look at the content of images and encoders: what has changed meanwhile is encoded anew."""
    reads_captions = made.stage.preprocess.tokenizer is not None
    for source in splits.both:
        captions = _captions(made.stage.preprocess, source) if reads_captions else (0.0, 0.0)
        yield _cache(cfg, made, source.name, source.count, captions)
    if (kept := splits.class_images) is not None:  # some may still have to be drawn, in a folder without a name
        tokens = _tokens(made.stage.preprocess, [kept.prompt]) if reads_captions else 0.0
        yield _cache(cfg, made, str(kept.folder), kept.count, (1.0, tokens))


def _cache(cfg: DictConfig, made: DryRun, name: str, count: int | None, captions: tuple[float, float]) -> Cache:
    about = f"{made.stage.name} {name} {cfg.data.cache_dtype}"
    found = catalog.entries(build.cache_folder(cfg))
    is_there = any(entry.about == about and entry.images == count for entry in found)
    return Cache(count, _each(cfg, made, *captions), is_there)


def _each(cfg: DictConfig, made: DryRun, captions: float, tokens: float) -> float:
    """Bytes per image, which has so many captions of so many tokens."""
    itemsize = np.dtype(DTYPES[cfg.data.cache_dtype]).itemsize
    images, *texts = made.encoded()
    total = float((sum(shape.numel() for shape in images.values()) * itemsize + OF_A_ROW) * (1 + cfg.data.flip))
    for shapes in texts:
        ragged = shapes.keys() & made.stage.ragged_features
        numbers = sum(tokens * shapes[name][1:].numel() for name in ragged)
        numbers += sum(shapes[name].numel() for name in shapes.keys() - ragged - {MASK})
        total += captions * (numbers * itemsize + OF_A_CAPTION)
    return total


def _captions(preprocess: Preprocess, source: Source | Announced) -> tuple[float, float]:
    """(captions per image, tokens per caption) of some rows; of a stream, which would have to be read, a guess."""
    length = preprocess.tokenizer.model_max_length  # type: ignore[union-attr]
    if not isinstance(source, Indexed):
        return 1.0, float(length)
    rows = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
    texts = [text for row in rows for text in source[int(row)].captions]
    return len(texts) / len(rows), _tokens(preprocess, texts) if texts else float(length)


def _tokens(preprocess: Preprocess, texts: Sequence[str]) -> float:
    """Their mean number."""
    return sum(int(tensors[MASK].sum()) for tensors, _ in preprocess.tokenize(texts)) / len(texts)


def free(folder: Path) -> int | None:
    """Bytes of the disk that a folder lies on, or will lie on; None where the disk cannot say so."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None
