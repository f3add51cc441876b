"""Learning-rate schedules, counted in optimizer steps: whatever the accumulation or the number of processes.

Each is called as `fn(optimizer, total_steps=N)` and stepped once per optimizer step. It multiplies the rate that the
optimizer was made with, first by step / warmup_steps during warm-up, then by the curve over the steps that are left:
`progress` is 0 at the end of warm-up and 1 after the last step. As in `diffusers.optimization`; here so that the
arguments are typed, and a schedule survives any number of steps beyond the last.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Curve = Callable[[float], float]


def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LambdaLR:
    """The full rate after warm-up."""
    return _schedule(optimizer, total_steps, warmup_steps, lambda progress: 1.0)


def linear(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LambdaLR:
    """From the full rate in a line to 0."""
    return _schedule(optimizer, total_steps, warmup_steps, lambda progress: 1.0 - progress)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LambdaLR:
    """From the full rate along half a cosine to 0."""
    return _schedule(optimizer, total_steps, warmup_steps, _half_cosine)


def cosine_with_restarts(
    optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, num_cycles: int = 1
) -> LambdaLR:
    """`num_cycles` falls along half a cosine, each from the full rate to 0."""

    def curve(progress: float) -> float:
        return 0.0 if progress >= 1.0 else _half_cosine((num_cycles * progress) % 1.0)

    return _schedule(optimizer, total_steps, warmup_steps, curve)


def polynomial(
    optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, power: float = 1.0, lr_end: float = 1e-7
) -> LambdaLR:
    """From the full rate to `lr_end`, along (1 - progress) ** power.

    Raises:
        ValueError: if `lr_end` is not below the optimizer's rate.
    """
    lr = float(optimizer.defaults["lr"])
    if lr_end >= lr:
        raise ValueError(f"scheduler.lr_end ({lr_end}) has to be below optimizer.lr ({lr})")
    last = lr_end / lr
    return _schedule(optimizer, total_steps, warmup_steps, lambda progress: last + (1 - last) * (1 - progress) ** power)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _schedule(optimizer: Optimizer, total_steps: int, warmup_steps: int, curve: Curve) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return curve(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)
