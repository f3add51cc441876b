"""The encode loop: batches of a source's images and captions through the encoders, chunk by chunk into a journal."""

import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from kandinsky_exp.data import tally
from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.data.encoded.chunk import BatchFiller, Chunk, Row, columns
from kandinsky_exp.data.encoded.columns import DTYPES, Array
from kandinsky_exp.data.encoded.journal import Journal
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, MASK
from kandinsky_exp.data.encoded.progress import ProgressBar
from kandinsky_exp.data.encoded.workers import Batch, Features, Loader, workers_failed
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.tally import first_few
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.logs import Log

CHUNK = 256  # examples between commits: what a killed process does again at most
LOOK_ON_SECONDS = 5.0  # how long to look for further problems when one was found
FEW = 64  # examples that are not worth starting worker processes for

CacheDtype = Literal["fp16", "fp32"]


class Encoder(Protocol):
    """The part of a stage that encodes; image keys and text keys may come in separate batches.

    Of its `ragged_features` those of captions follow the caption's mask; with buckets those of images their shape.
    """

    @property
    def preprocess(self) -> Preprocess: ...
    @property
    def ragged_features(self) -> Collection[str]: ...
    def encode(self, examples: Features) -> Features: ...


@dataclass(frozen=True)
class EncodeSettings:
    """How a data set is encoded.

    Args:
        batch_size: images, and then captions, per call of `Encoder.encode`.
        fixed_batch: somebody chose that; otherwise what an earlier process began goes on in its batches.
        workers: processes that decode images; None = one per core but one, and none for a few images.
        mirrored: also encode the mirror of each image.
        skip_bad: leave out what cannot be used, instead of raising.
    """

    dtype: CacheDtype = "fp16"
    batch_size: int = 8
    fixed_batch: bool = True
    workers: int | None = None
    mirrored: bool = False
    skip_bad: bool = False

    def processes(self, count: int | None) -> int:
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return 0 if count is not None and count <= FEW else min(8, cores - 1)


@dataclass
class EncodeLoop:
    """See the module."""

    source: Source
    stage: Encoder
    how: EncodeSettings
    journal: Journal
    log: Log
    chunk: Chunk = field(default_factory=Chunk)

    def __post_init__(self) -> None:
        self.bar = ProgressBar(self.source.count, self.journal.progress.source_rows, self.log)
        self.images, self.captions = (BatchFiller(self.how.batch_size, self._encode) for _ in range(2))

    def encode_all(self) -> None:
        """From where the journal is to the end of the source.

        Raises:
            DataError: see `encode_table`.
        """
        failed = None
        try:
            with closing(self.bar):
                self._walk()
        except RuntimeError as error:  # torch hears of a worker's death by a signal, whatever it is doing then
            if "DataLoader worker" not in str(error):
                raise
            failed = workers_failed(error)
        if failed is not None:  # here, where no traceback keeps the workers and what lies on the device
            raise failed
        self.bar.sum_up(self.journal.progress.images, self.journal.progress.captions)

    def _walk(self) -> None:
        done, size = self.bar.first, self.how.batch_size
        loader = Loader(self.stage.preprocess, self.how.mirrored)
        batches = loader.batches(self.source.examples(done), size, self.how.processes(self.source.count))
        chunk_rows, before = -(-CHUNK // size) * size, 0.0
        for batch in batches:
            self._check(batch, batches)
            self._take(batch)
            done += len(batch.examples)
            if before and any(row.views for row in self.chunk.images) and not self.bar.announced:
                self._announce((time.monotonic() - before) / len(batch.examples))
            self.bar(done)
            if self.chunk.seen >= chunk_rows:
                self._commit()
            before = time.monotonic()  # the first batch takes longer than the others: it is not counted
        tally.add(self.journal.progress.noted, self.source.passed_over())
        self._commit()

    def _check(self, batch: Batch, rest: Iterator[Batch]) -> None:
        """Refuse bad examples; where there is one, look a little further, to name several at once."""
        problems = [example.problem for example in batch.examples if example.problem]
        if not problems or self.how.skip_bad:
            return
        until = time.monotonic() + LOOK_ON_SECONDS
        for following in rest:
            problems += [example.problem for example in following.examples if example.problem]
            if time.monotonic() > until:
                break
        raise DataError(f"{first_few(problems)}\n(data.on_error=skip leaves such examples out and lists them)")

    def _announce(self, seconds_each: float) -> None:
        """Say what is coming, from the first examples, before anything is written.

        Raises:
            DataError: the disk has no room for it.
        """
        needed = self.bar.announce(self.chunk.size_each(), seconds_each)
        catalog.refuse_if_no_room(self.journal.folder, needed)

    def _take(self, batch: Batch) -> None:
        start, rows = self.journal.progress.source_rows + self.chunk.seen, {}
        for offset, example in enumerate(batch.examples):
            if example.problem:
                self.journal.progress.skipped.append(example.problem)
                continue
            rows[offset] = Row(example, start + offset)
            self.journal.progress.note_cut(example.id, example.cut)
            if example.note:
                tally.count(self.journal.progress.noted, example.note, example.id)
        self.chunk.seen += len(batch.examples)
        self.chunk.images += rows.values()
        for stack in batch.images:
            for offset, views in stack.rows():
                self.images.add(rows[offset], views)
        for stack in batch.captions:
            for offset, views in stack.rows():
                rows[offset].captions += 1
                self.chunk.captions.append(Row(rows[offset].example, start + offset))
                self.captions.add(self.chunk.captions[-1], views)

    def _encode(self, rows: list[Row], views: list[Features]) -> None:
        for view in views:
            features = self.stage.encode(view)
            mask = features[MASK].cpu() if MASK in features else None
            ragged = set() if mask is None else features.keys() & self.stage.ragged_features
            if ragged:
                del features[MASK]  # their lengths tell it
            arrays = {name: self._array(name, tensor, rows) for name, tensor in features.items()}
            for number, row in enumerate(rows):
                cells = {name: array[number] for name, array in arrays.items()}
                length = 0 if mask is None else _prefix(mask[number])
                cells |= {name: cells[name][:length].copy() for name in ragged}  # copies: padding need not stay
                row.views.append(cells)

    def _array(self, name: str, tensor: Tensor, rows: Sequence[Row]) -> Array:
        """A feature of a batch as stored. What the dtype cannot hold is refused, not stored as infinity."""
        exact = tensor.detach().float().cpu().numpy()
        with np.errstate(over="ignore"):
            array: Array = exact.astype(DTYPES[self.how.dtype])
        wrong = ~np.isfinite(array.reshape(len(rows), -1)).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            cure = (
                "set data.cache_dtype=fp32" if np.isfinite(exact[row]).all() else "set precision.frozen_dtype=float32"
            )
            raise DataError(f"{rows[row].example.id}: {name} is not finite as {self.how.dtype}; {cure}")
        return array

    def _commit(self) -> None:
        """Encode what waits for its batch to fill, and write the chunk."""
        chunk, progress = self.chunk, self.journal.progress
        self.images.finish()
        self.captions.finish()
        if not self.bar.announced:
            self._announce((time.monotonic() - self.bar.started) / max(1, chunk.seen))
        if chunk.images:
            ragged = self.stage.ragged_features if self.stage.preprocess.buckets else ()
            self.journal.append(IMAGES, chunk.image_columns(progress.captions, ragged))
        if chunk.captions:
            self.journal.append(CAPTIONS, columns(chunk.captions, self.stage.ragged_features))
        progress.source_rows += chunk.seen
        progress.images += len(chunk.images)
        progress.captions += len(chunk.captions)
        self.journal.commit()
        self.chunk = Chunk()


def _prefix(mask: Tensor) -> int:
    """How many tokens a mask (L,) keeps. Padding is on the right: the table stores a length."""
    tokens = int(mask.sum())
    if not mask[:tokens].all():
        raise DataError(
            "the tokenizer of weights.prior pads on the left; Kandinsky's text encoder wants it on the right"
        )
    return tokens
