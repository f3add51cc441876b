"""Two loops by turns in one process: a loop that is measured, and the bare one that it is compared with.

The measured loop calls `Turns` once per optimizer step. Every `block` steps it waits there while the bare loop takes as
many, so that whatever else the machine does meets both alike. What counts is the ratio within each pair of blocks, and
the median of it over the pairs.

A run of ours calls it from its learning-rate schedule, which a config may name (`scheduler._target_=turns.schedule`):
that is the one thing that happens once per step and belongs to the user.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Hook = Callable[[], None]
_HOOKS: list[Hook] = []


@dataclass
class Turns:
    """Seconds of steps, in pairs of blocks.

    Args:
        bare: takes one step of the bare loop; None where only the measured loop runs.
        block: steps per block.
        offset: a block ends where the number of steps is this, modulo `block`: so that steps that do more than the
            others, such as those that log, come in the middle of a block.
    """

    bare: Hook | None
    block: int = 10
    offset: int = 5
    pairs: list[tuple[list[float], list[float]]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    _steps: list[float] = field(default_factory=list)
    _since: float | None = None

    def __call__(self) -> None:
        now = time.perf_counter()
        self.ends.append(time.time())
        if self._since is not None:
            self._steps.append(now - self._since)
        if self.bare is not None and len(self.ends) % self.block == self.offset:
            self.pairs.append((self._steps, [_timed(self.bare) for _ in range(self.block)]))
            self._steps = []
        self._since = time.perf_counter()

    @property
    def seconds(self) -> list[float]:
        """Of every step of the measured loop but the first, where there is no bare one."""
        return self._steps

    def summary(self) -> dict[str, float]:
        """Median over the pairs of blocks; the first block and the first step after each change of turns warm up."""
        blocks = [(_mean(measured), _mean(bare)) for measured, bare in self.pairs[1:]]
        return {
            "step": statistics.median(measured for measured, _ in blocks),
            "bare": statistics.median(bare for _, bare in blocks),
            "ratio": statistics.median(measured / bare for measured, bare in blocks),
            "pairs": len(blocks),
        }


def _mean(block: list[float]) -> float:
    return statistics.fmean(block[1:])


def _timed(step: Hook) -> float:
    since = time.perf_counter()
    step()
    return time.perf_counter() - since


def steps_for(blocks: int, block: int = 10, offset: int = 5) -> int:
    """Steps of a run that gives so many pairs of blocks, besides the first."""
    return blocks * block + offset


def hook(function: Hook | None) -> None:
    """Have `schedule` call this once per step; None for nothing."""
    _HOOKS[:] = [] if function is None else [function]


class _Hooked(LambdaLR):
    def step(self, epoch: int | None = None) -> None:
        super().step()
        if self.last_epoch > 0:  # the first call comes from the constructor
            for function in _HOOKS:
                function()


def schedule(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, stamps: str | None = None) -> LambdaLR:
    """A constant rate whose every step calls the hook.

    Args:
        stamps: a file that gets a line per step, the time since 1970, where no hook is set.
    """
    if stamps is not None:
        hook(lambda: _stamp(Path(stamps)))
    return _Hooked(optimizer, lambda step: 1.0)


def _stamp(file: Path) -> None:
    with file.open("a") as lines:
        lines.write(f"{time.time():.6f}\n")


def read_stamps(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().split()]
