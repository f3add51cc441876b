"""The order of visits: every position of one endless global stream is a pure function of the seed.

A run, whatever its number of processes, workers, and interruptions, walks the stream p = 0, 1, 2, … Position p visits
row `order(seed, p // N)[p % N]`, so that every epoch shows each of the N rows once.
"""

import hashlib
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Visit = tuple[int, int]  # (index, epoch)


def order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The permutation of `range(rows)` that an epoch visits, (rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def choose_caption(seed: int, epoch: int, index: int, count: int) -> int:
    """Which of a row's `count` captions a visit uses, in [0, count), uniform over epochs and rows."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count


def positions(
    step: int, micro: int, rank: int, *, batch_size: int, grad_accumulation: int, num_processes: int
) -> range:
    """Stream positions of one process's batch: micro-batch `micro` of optimizer step `step`, both counted from 0.

    One optimizer step takes the same rows whatever way its global batch is divided into micro-batches and processes.
    """
    before = step * grad_accumulation * num_processes + micro * num_processes + rank
    return range(before * batch_size, (before + 1) * batch_size)


class StreamBatchSampler:
    """Batches of visits of one process, for `DataLoader(batch_sampler=…)`, from `start_step` on to `total_steps`.

    Args:
        rows: number of rows in the data set, N.
        start_step: optimizer steps already done; a resumed run goes on at the exact visit where it stopped.
        total_steps: optimizer steps of the whole run.
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
    ) -> None:
        if rows < 1 or batch_size < 1 or grad_accumulation < 1 or not 0 <= rank < num_processes:
            raise ValueError(f"{rows=}, {batch_size=}, {grad_accumulation=}, {rank=} of {num_processes=}")
        self.rows, self.seed, self.rank = rows, seed, rank
        self.steps = range(start_step, total_steps)
        self.grad_accumulation = grad_accumulation
        self._shape = {
            "batch_size": batch_size,
            "grad_accumulation": grad_accumulation,
            "num_processes": num_processes,
        }

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.steps) * self.grad_accumulation

    def __iter__(self) -> Iterator[list[Visit]]:
        # Positions only grow, so one epoch's permutation is all that is ever needed at a time.
        current, permutation = -1, order(self.seed, 0, 0)
        for step in self.steps:
            for micro in range(self.grad_accumulation):
                batch: list[Visit] = []
                for position in positions(step, micro, self.rank, **self._shape):
                    epoch, place = divmod(position, self.rows)
                    if epoch != current:
                        current, permutation = epoch, order(self.seed, epoch, self.rows)
                    batch.append((int(permutation[place]), epoch))
                yield batch
