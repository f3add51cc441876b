"""A learning-rate schedule that tells `turns` of every step: `scheduler._target_=schedule.constant`.

It is how a benchmark gets into a run: a config may name its own schedule, and that is stepped once per optimizer step.
"""

from pathlib import Path

import turns
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class _Hooked(LambdaLR):
    def step(self, epoch: int | None = None) -> None:
        super().step()
        if self.last_epoch > 0:  # the first call comes from the constructor
            turns.step_done()


def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, stamps: str | None = None) -> LambdaLR:
    """A constant rate.

    Args:
        stamps: a file that gets a line per step, as `turns.stamp_into` writes it.
    """
    if stamps is not None:
        turns.stamp_into(Path(stamps))
    return _Hooked(optimizer, lambda step: 1.0)
