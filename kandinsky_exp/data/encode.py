"""Encode a data set once: every image and every caption through the frozen encoders, into a table on disk."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.table import CAPTIONS, DTYPES, IMAGES, META, Array, Columns, FeatureTable, write_columns
from kandinsky_exp.errors import DataError

FORMAT = 1  # of the table; a new one must not find old tables
REPORT_SECONDS = 10.0

CacheDtype = Literal["fp16", "fp32"]
Features = dict[str, Tensor]
Log = Callable[[str], None]


class Encoder(Protocol):
    """The part of a stage that encodes; image keys and text keys may come in separate batches."""

    @property
    def preprocess(self) -> Preprocess: ...
    def encode(self, examples: Features) -> Features: ...


def cache_key(source_fingerprint: str, encoder_fingerprint: str, preprocess: Preprocess, dtype: CacheDtype) -> str:
    """Name of the folder of a table: all that its content depends on."""
    parts = [FORMAT, source_fingerprint, encoder_fingerprint, preprocess.fingerprint(), dtype]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def collate(rows: Sequence[Features]) -> Features:
    """Stack rows of equal shapes along a new batch axis."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def captions_of(source: Source, index: int) -> tuple[str, ...]:
    """The captions of a row of which there must be one."""
    example = source[index]
    if not example.captions:
        raise DataError(f"{example.where}: {example.caption_problem}")
    return example.captions


def encode_table(
    source: Source,
    stage: Encoder,
    folder: Path,
    *,
    dtype: CacheDtype,
    batch_size: int,
    num_workers: int,
    log: Log,
) -> FeatureTable:
    """Open the table in `folder`, after encoding every image and every caption once if it is not there.

    The folder appears complete or not at all. Several processes may ask for it: one encodes, the others wait.

    Args:
        folder: the table's own folder, named by `cache_key`.
        batch_size: images, and then captions, per call of `stage.encode`.
        num_workers: processes that read and preprocess images.

    Raises:
        DataError: for an unreadable image, a missing caption, or features that the dtype cannot hold.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    with _acquired(lock, folder, log):
        table = _open(folder, log)
        if table is not None:
            log(f"encoded features of {len(table):,} images found in {folder}")
            return table
        _write_aside(folder, _Encoding(source, stage, dtype, batch_size, num_workers, log))
    return FeatureTable(folder)


def _acquired(lock: FileLock, folder: Path, log: Log) -> AbstractContextManager[object]:
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        log(f"another process is encoding into {folder}; waiting for it")
        return lock.acquire()


def _open(folder: Path, log: Log) -> FeatureTable | None:
    if not folder.exists():
        return None
    try:
        return FeatureTable(folder)
    except (OSError, ValueError, KeyError) as error:
        log(f"the encoded features in {folder} are damaged ({error}); encoding again")
        shutil.rmtree(folder)
        return None


def _write_aside(folder: Path, encoding: "_Encoding") -> None:
    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: nobody else writes under the lock
    partial.mkdir()
    try:
        encoding.write(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Images(Dataset[Features]):
    """Preprocessed images without captions."""

    def __init__(self, source: Source, preprocess: Preprocess) -> None:
        self.source, self.preprocess = source, preprocess

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Features:
        return self.preprocess(self.source[index].image(), None)


@dataclass(frozen=True)
class _Encoding:
    """One pass over the images and one over the captions of a source."""

    source: Source
    stage: Encoder
    dtype: CacheDtype
    batch_size: int
    num_workers: int
    log: Log

    def write(self, folder: Path) -> None:
        tokenizer = self.stage.preprocess.tokenizer
        counts = [len(captions_of(self.source, row)) if tokenizer is not None else 0 for row in range(len(self.source))]
        images = write_columns(folder / IMAGES, self._images(counts))
        captions = write_columns(folder / CAPTIONS, self._captions(counts)) if tokenizer is not None else 0
        length = tokenizer.model_max_length if tokenizer is not None else 0
        meta = {"format": FORMAT, "images": images, "captions": captions, "text_length": length}
        (folder / META).write_text(json.dumps(meta), "utf-8")

    def _images(self, counts: Sequence[int]) -> Iterator[Columns]:
        starts = list(accumulate(counts, initial=0))
        progress = _Progress("images", len(self.source), self.log)
        done = 0
        for batch in self._image_batches():
            features = self.stage.encode(batch)
            rows = range(done, done + len(next(iter(features.values()))))
            ids = [self.source[row].id for row in rows]
            yield {
                "id": np.array(ids, object),
                "caption_start": np.array(starts[rows.start : rows.stop], np.int64),
                "caption_count": np.array(counts[rows.start : rows.stop], np.int64),
                **{name: self._array(name, values, ids) for name, values in features.items()},
            }
            done = rows.stop
            progress(done)

    def _image_batches(self) -> Iterator[Features]:
        images = _Images(self.source, self.stage.preprocess)
        try:
            yield from DataLoader(images, self.batch_size, num_workers=self.num_workers, collate_fn=collate)
        except DataError as error:  # a worker's comes with its traceback in front
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None

    def _captions(self, counts: Sequence[int]) -> Iterator[Columns]:
        captions = ((index, text) for index in range(len(self.source)) for text in captions_of(self.source, index))
        progress = _Progress("captions", sum(counts), self.log)
        done = 0
        while batch := list(islice(captions, self.batch_size)):
            features = self.stage.encode(collate([self.stage.preprocess(None, text) for _, text in batch]))
            ids = [self.source[index].id for index, _ in batch]
            mask, states = features.pop("text_mask"), features.pop("text_states")
            tokens = [_prefix(row) for row in mask.cpu()]
            ragged = np.empty(len(tokens), object)
            for row, values in enumerate(self._array("text_states", states, ids)):
                ragged[row] = values[: tokens[row]].reshape(-1)
            arrays = {name: self._array(name, values, ids) for name, values in features.items()}
            yield {"text_tokens": np.array(tokens, np.int64), "text_states": ragged, **arrays}
            done += len(batch)
            progress(done)

    def _array(self, name: str, tensor: Tensor, ids: Sequence[str]) -> Array:
        """A feature of a batch as stored. What the dtype cannot hold is refused, not stored as infinity."""
        exact = tensor.detach().float().cpu().numpy()
        with np.errstate(over="ignore"):
            array: Array = exact.astype(DTYPES[self.dtype])
        wrong = ~np.isfinite(array.reshape(len(ids), -1)).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            cure = (
                "set data.cache_dtype=fp32" if np.isfinite(exact[row]).all() else "set precision.frozen_dtype=float32"
            )
            raise DataError(f"{ids[row]}: {name} is not finite as {self.dtype}; {cure}")
        return array


def _prefix(mask: Tensor) -> int:
    """How many tokens a mask (L,) keeps. Padding is on the right: the table stores a length."""
    tokens = int(mask.sum())
    if not mask[:tokens].all():
        raise DataError(
            "the tokenizer of weights.prior pads on the left; Kandinsky's text encoder wants it on the right"
        )
    return tokens


class _Progress:
    """A line about every ten seconds, and one at the end."""

    def __init__(self, what: str, total: int, log: Log) -> None:
        self.what, self.total, self.log = what, total, log
        self.started = self.reported = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if done < self.total and now - self.reported < REPORT_SECONDS:
            return
        self.reported = now
        rate = done / max(now - self.started, 1e-9)
        self.log(f"encoded {done:,} of {self.total:,} {self.what}, {rate:.1f}/s")
