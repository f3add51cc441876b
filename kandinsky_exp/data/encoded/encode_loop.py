"""The encode loop: batches of a source's images and captions through the encoders, part by part into a table."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kandinsky_exp.data import tally
from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.data.encoded.chunk import BatchFiller, Chunk, Row, columns
from kandinsky_exp.data.encoded.columns import DTYPES, Array
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, MASK
from kandinsky_exp.data.encoded.part_queue import PartQueue
from kandinsky_exp.data.encoded.parts import PartFacts, PartWriter, rows_of_chunk
from kandinsky_exp.data.encoded.progress import ProgressBar
from kandinsky_exp.data.encoded.workers import Batch, Features, Loader, workers_failed
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.tally import first_few
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.logs import Log
from kandinsky_exp.system.threads import usable_cores

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
        beside: processes on this machine that encode at the same time and share its cores, this one among them.
    """

    dtype: CacheDtype = "fp16"
    batch_size: int = 8
    fixed_batch: bool = True
    workers: int | None = None
    mirrored: bool = False
    skip_bad: bool = False
    beside: int = 1

    def processes(self, count: int | None) -> int:
        if self.workers is not None:
            return self.workers
        return 0 if count is not None and count <= FEW else max(0, min(8, usable_cores() // self.beside - 1))


@dataclass
class EncodeLoop:
    """Makes the parts of a table that its queue takes."""

    source: Source
    stage: Encoder
    how: EncodeSettings
    queue: PartQueue
    log: Log
    chunk: Chunk = field(default_factory=Chunk)
    part: PartWriter | None = None
    caption_rows: dict[bytes, int] = field(default_factory=dict)  # of the part's captions, by their tokens

    def __post_init__(self) -> None:
        self.plan = self.queue.plan
        self.bar = ProgressBar(self.source.count, self._rows_there(), self.log)
        self.images, self.captions = (BatchFiller(self.plan.batch_size, self._encode) for _ in range(2))

    def make(self, first: int) -> None:
        """Make a part that was taken, and then others until there is none to take.

        Raises:
            DataError: see `encode_table`.
        """
        failed = None
        try:
            self._walk(first)
        except RuntimeError as error:  # torch hears of a worker's death by a signal, whatever it is doing then
            if "DataLoader worker" not in str(error):
                raise
            failed = workers_failed(error)
        finally:
            if self.part is not None:
                self.part.discard()
        if failed is not None:  # here, where no traceback keeps the workers and what lies on the device
            raise failed

    def _walk(self, first: int) -> None:
        loader, before = Loader(self.stage.preprocess, self.how.mirrored), 0.0
        batches = loader.batches(self.queue.lists(first), self.how.processes(self.source.count))
        for batch in batches:
            place = self.queue.read()
            part = self.part = self.part or self._begun(place.part)
            self._check(batch, batches)
            self._take(part, batch)
            if before and any(row.views for row in self.chunk.images) and not self.bar.announced:
                self._announce((time.monotonic() - before) / len(batch.examples))
            self.bar(self._rows_there() + part.facts.source_rows + self.chunk.seen, len(batch.examples))
            if place.ends_part or self.chunk.seen >= rows_of_chunk(self.plan.batch_size):
                self._write(part)
            if place.ends_part:
                self._finish(part, place.ends_sweep)
            before = time.monotonic()  # the first batch takes longer than the others: it is not counted

    def _rows_there(self) -> int:
        return sum(len(self.plan.rows_of(number)) for number in self.queue.there)

    def _begun(self, number: int) -> PartWriter:
        making = self.queue.making
        self.caption_rows.clear()
        return PartWriter(
            making.folder, PartFacts(self.plan.table, number, self.plan.batch_size), self.queue.claims.mark
        )

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
        catalog.refuse_if_no_room(self.queue.making.folder, needed)

    def _take(self, part: PartWriter, batch: Batch) -> None:
        start = self.plan.rows_of(part.facts.number).start + part.facts.source_rows + self.chunk.seen
        rows = {}
        for offset, example in enumerate(batch.examples):
            if example.problem:
                part.facts.skipped.append(example.problem)
                continue
            rows[offset] = Row(example, start + offset)
            part.facts.note_cut(example.id, example.cut)
            if example.note:
                tally.count(part.facts.noted, example.note, example.id)
        self.chunk.seen += len(batch.examples)
        self.chunk.images += rows.values()
        for stack in batch.images:
            for offset, views in stack.rows():
                self.images.add(rows[offset], views)
        for stack in batch.captions:
            for offset, views in stack.rows():
                rows[offset].captions.append(self._caption_row(rows[offset], views))

    def _caption_row(self, image: Row, views: list[Features]) -> int:
        """The row of a caption in its part; it is encoded where it occurs first."""
        tokens = b"".join(views[0][name].numpy().tobytes() for name in sorted(views[0]))
        if tokens not in self.caption_rows:
            self.caption_rows[tokens] = len(self.caption_rows)
            self.chunk.captions.append(Row(image.example, image.source_row))
            self.captions.add(self.chunk.captions[-1], views)
        return self.caption_rows[tokens]

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
        """A feature of a batch as stored: whole numbers as they are, others in the dtype of the table.

        What that cannot hold is refused, not stored as infinity.
        """
        if tensor.dtype == torch.uint8:
            return tensor.cpu().numpy()
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

    def _write(self, part: PartWriter) -> None:
        """Encode what waits for its batch to fill, and write the chunk."""
        chunk, facts = self.chunk, part.facts
        self.images.finish()
        self.captions.finish()
        if not self.bar.announced:
            self._announce((time.monotonic() - self.bar.started) / max(1, chunk.seen))
        if chunk.images:
            part.append(IMAGES, chunk.image_columns(self.stage.ragged_features if self._has_sizes else ()))
        if chunk.captions:
            part.append(CAPTIONS, columns(chunk.captions, self.stage.ragged_features))
        facts.source_rows += chunk.seen
        facts.images += len(chunk.images)
        facts.captions += len(chunk.captions)
        self.chunk = Chunk()

    def _finish(self, part: PartWriter, ends_sweep: bool) -> None:
        if ends_sweep:
            tally.add(part.facts.noted, self.source.passed_over())
        part.finish()
        self.part = None
        self.queue.finished(part.facts.number)

    @property
    def _has_sizes(self) -> bool:
        return bool(self.stage.preprocess.buckets)


def _prefix(mask: Tensor) -> int:
    """How many tokens a mask (L,) keeps. Padding is on the right: the table stores a length."""
    tokens = int(mask.sum())
    if not mask[:tokens].all():
        raise DataError(
            "the tokenizer of weights.prior pads on the left; Kandinsky's text encoder wants it on the right"
        )
    return tokens
