"""Two loops by turns in one process: a loop that is measured, and the bare one that it is compared with.

The measured loop calls `Turns` once per optimizer step. Every `block` steps it waits there while the bare loop takes as
many, so that whatever else the machine does meets both alike. What counts is the ratio within each pair of blocks, and
the median of it over the pairs.

A run of ours calls it from its learning-rate schedule: see `schedule.py`.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

Hook = Callable[[], None]


class Case(TypedDict):
    """What a step is measured with: weights, pictures and an output root by their paths."""

    stage: str
    pipelines: str
    pictures: str
    root: str
    batch: int
    resolution: int


_hooks: list[Hook] = []


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


def against_bare(block: int, case: Case) -> Turns:
    """Of some loop and the bare one."""
    from bare import BareStep

    places = case["stage"], case["pipelines"], case["pictures"]
    return Turns(BareStep(*places, case["batch"], case["resolution"]), block, block // 2)


def steps_for(blocks: int, block: int = 10, offset: int = 5) -> int:
    """Steps of a run that gives so many pairs of blocks, besides the first."""
    return blocks * block + offset


def hook(function: Hook | None) -> None:
    """Have `step_done` call this; None for nothing."""
    _hooks[:] = [] if function is None else [function]


def step_done() -> None:
    """One optimizer step of a run is done."""
    for function in _hooks:
        function()


def stamp_into(file: Path) -> None:
    """Have every step add a line to a file: the time since 1970, and the CPU seconds of this process."""

    def stamp() -> None:
        with file.open("a") as lines:
            lines.write(f"{time.time():.6f} {time.process_time():.6f}\n")

    hook(stamp)


def read_stamps(file: Path) -> list[float]:
    return [float(line.split()[0]) for line in file.read_text().splitlines()]
