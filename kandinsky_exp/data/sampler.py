"""The order of visits: every position of one endless global stream is a pure function of the seed.

A run, whatever its number of processes, workers, and interruptions, walks the stream p = 0, 1, 2, … Position p visits
row `order(seed, p // N)[p % N]`, so that every epoch shows each of the N rows once. From `MANY` rows on it is a
permutation that needs no array of them (`feistel`), but for runs that began with the other. Groups and lengths change
which visits an optimizer step takes, never which an epoch has.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kandinsky_exp.data.feistel import FeistelPermutation

Visit = tuple[int, int]  # (index, epoch)
Order = Literal["permutation", "feistel"]
MANY = 10_000_000  # rows
BLOCK = 1 << 16  # visits
WINDOW = 64  # optimizer steps whose visits are sorted by length


def order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The permutation of `range(rows)` that an epoch visits, (rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def order_of(rows: int) -> Order:
    """By which a new run visits so many rows."""
    return "permutation" if rows < MANY else "feistel"


def choose_caption(seed: int, epoch: int, index: int, count: int) -> int:
    """Which of a row's `count` captions a visit uses, in [0, count), uniform over epochs and rows."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def choose_mirror(seed: int, epoch: int, index: int) -> int:
    """Whether a visit shows the image (0) or its mirror (1), in equal parts over epochs and rows."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, epoch, index), digest_size=8, person=b"mirror").digest()
    return digest[0] & 1


class StreamBatchSampler:
    """Batches of visits of one process, for `DataLoader(batch_sampler=…)`, from `start_step` on to `total_steps`.

    An optimizer step takes the same rows whatever way its global batch is divided into micro-batches and processes.

    Args:
        rows: number of rows in the data set, N.
        start_step: optimizer steps already done; a resumed run goes on at the exact visit where it stopped.
        total_steps: optimizer steps of the whole run.
        groups: (rows,) numbers; all rows of an optimizer step, on all processes, have the same one. Visits keep the
            order of the stream within their group, and a step comes when its group has filled it. None = one group.
        order: None = as the number of rows has it.
        length: of what a visit shows. The visits of some steps that follow each other are divided into as many anew,
            each of visits of similar length, in random order. After every epoch the visits are those that were to come.
            Not with groups.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        *,
        batch_size: int,
        total_steps: int,
        start_step: int = 0,
        grad_accumulation: int = 1,
        num_processes: int = 1,
        rank: int = 0,
        groups: NDArray[np.int64] | None = None,
        order: Order | None = None,
        length: Callable[[Visit], int] | None = None,
    ) -> None:
        if groups is not None and length is not None:
            raise ValueError("rows are ordered by groups or by length")
        if rows < 1 or batch_size < 1 or grad_accumulation < 1 or not 0 <= rank < num_processes:
            raise ValueError(f"{rows=}, {batch_size=}, {grad_accumulation=}, {rank=} of {num_processes=}")
        self.rows, self.seed, self.rank = rows, seed, rank
        self.steps = range(start_step, total_steps)
        self.batch_size, self.grad_accumulation, self.num_processes = batch_size, grad_accumulation, num_processes
        self.groups, self.length, self.order = groups, length, order or order_of(rows)
        self._epoch: tuple[int, Callable[[NDArray[np.int64]], NDArray[np.int64]]] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.steps) * self.grad_accumulation

    def __iter__(self) -> Iterator[list[Visit]]:
        per_micro = self.batch_size * self.num_processes
        per_step = per_micro * self.grad_accumulation
        steps = self._steps(per_step, self.steps) if self.length is None else self._by_length(per_step, self.length)
        for visits in steps:
            for start in range(self.rank * self.batch_size, len(visits), per_micro):
                yield visits[start : start + self.batch_size]

    def _by_length(self, per_step: int, length: Callable[[Visit], int]) -> Iterator[list[Visit]]:
        """The visits of each optimizer step over all processes, of similar length."""
        if not self.steps:
            return
        window = self._window(self.steps.start, per_step)
        end = self._window(self.steps[-1], per_step).stop
        stream = self._steps(per_step, range(window.start, end))
        while window.start < self.steps.stop:
            visits = sorted((visit for _ in window for visit in next(stream)), key=length)
            places = np.random.default_rng([self.seed, window.start]).permutation(len(window))
            for step, place in zip(window, places, strict=True):
                if step in self.steps:
                    yield visits[place * per_step : (place + 1) * per_step]
            window = self._window(window.stop, per_step)

    def _window(self, step: int, per_step: int) -> range:
        """The steps whose visits are sorted together with those of this one; all begin in the same epoch."""

        def first(epoch: int) -> int:
            return -(-epoch * self.rows // per_step)  # the first step that begins in it

        epoch = step * per_step // self.rows
        start = first(epoch) + (step - first(epoch)) // WINDOW * WINDOW
        return range(start, min(start + WINDOW, max(first(epoch + 1), start + 1)))

    def _steps(self, per_step: int, steps: range) -> Iterator[list[Visit]]:
        """The visits of these optimizer steps over all processes, in the order of the stream."""
        if self.groups is not None:
            yield from self._in_groups(self.groups, per_step, steps)
            return
        for step in steps:
            yield self._visits(step * per_step, (step + 1) * per_step)

    def _visits(self, start: int, stop: int) -> list[Visit]:
        """Those at these positions of the stream."""
        found: list[Visit] = []
        while start < stop:
            epoch, place = divmod(start, self.rows)
            until = min(stop - start, self.rows - place)
            rows = self._permutation(epoch)(np.arange(place, place + until))
            found += [(row, epoch) for row in rows.tolist()]
            start += until
        return found

    def _walk(self, epoch: int, backwards: bool = False) -> Iterator[Visit]:
        """All visits of an epoch, a block of them at a time."""
        end = (epoch + 1) * self.rows
        starts = range(epoch * self.rows, end, BLOCK)
        for start in reversed(starts) if backwards else starts:
            visits = self._visits(start, min(start + BLOCK, end))
            yield from reversed(visits) if backwards else visits

    def _permutation(self, epoch: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """What an epoch shows at a place."""
        if self._epoch is None or self._epoch[0] != epoch:
            found = FeistelPermutation(self.rows, self.seed, epoch) if self.order == "feistel" else None
            self._epoch = epoch, found or order(self.seed, epoch, self.rows).__getitem__
        return self._epoch[1]

    def _in_groups(self, groups: NDArray[np.int64], per_step: int, steps: range) -> Iterator[list[Visit]]:
        first, done, waiting = self._state_before(groups, per_step, steps.start)
        for epoch in count(first):
            for visit in self._walk(epoch):
                if done == steps.stop:
                    return
                queue = waiting[groups[visit[0]]]
                queue.append(visit)
                if len(queue) == per_step:
                    if done in steps:
                        yield list(queue)
                    done += 1
                    queue.clear()

    def _state_before(self, groups: NDArray[np.int64], per_step: int, start: int) -> tuple[int, int, list[list[Visit]]]:
        """(epoch, steps done before it, visits that wait in each group) of the last epoch that begins before the start.

        Epochs fill as many steps as they have room for, whatever their order: nothing before has to be walked.
        """
        sizes = np.bincount(groups)
        epoch = start * per_step // self.rows + 1
        while epoch and int((epoch * sizes // per_step).sum()) > start:
            epoch -= 1
        waiting: list[list[Visit]] = [[] for _ in sizes]
        missing = epoch * sizes % per_step
        earlier = epoch
        while missing.any():
            earlier -= 1
            for visit in self._walk(earlier, backwards=True):
                if missing[group := groups[visit[0]]]:
                    missing[group] -= 1
                    waiting[group].insert(0, visit)
        return epoch, int((epoch * sizes // per_step).sum()), waiting


class PairedBatchSampler:
    """Batches of one stream, each followed by the batch that another stream has at that place.

    Args:
        first, second: of equal shapes and steps; the rows of the second are numbered after those of the first.
    """

    def __init__(self, first: StreamBatchSampler, second: StreamBatchSampler) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[list[Visit]]:
        for visits, beside in zip(self.first, self.second, strict=True):
            yield visits + [(self.first.rows + row, epoch) for row, epoch in beside]
