"""Intervals of what is measured on samples of pictures."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 200
Z = 1.96  # of 95 %


@dataclass(frozen=True)
class Measured:
    """A number that was measured.

    Args:
        low, high: its 95 % interval, None where there are too few pictures for one.
        count: pictures that it was measured on.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None or self.high is None or self.low == self.high:
            return f"{self.value:.3g}"
        margin = max(self.value - self.low, self.high - self.value)
        digits = max(0, 1 - math.floor(math.log10(margin)))  # of the margin two count, and no more of the value
        return f"{self.value:.{digits}f} ± {margin:.{digits}f}"


def halves(count: int, seed: int, draws: int = DRAWS) -> list[Tensor]:
    """Random halves of a sample: `draws` times the sorted numbers of half of `count` pictures, each number once."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[: count // 2].sort().values for _ in range(draws)]


def measured(value: float, spread: Callable[[], Tensor], count: int) -> Measured:
    """A value with its interval.

    The deviation of a statistic over random halves, drawn without replacement, is that of the statistic itself over
    samples of the whole size: the variance of a mean is s² / (n/2) times 1 - (n/2) / n, which is s² / n (subsampling:
    Politis, Romano and Wolf 1999). No picture is drawn twice, so nothing is compared with itself.

    Args:
        spread: gives the statistic of each half, (D,).
        count: pictures; fewer than 8 give no interval.
    """
    if count < 8:
        return Measured(value, None, None, count)
    margin = Z * float(spread().double().std())
    return Measured(value, value - margin, value + margin, count)


def mean(values: Tensor) -> Measured:
    """The mean of one number for each picture, with the interval of its standard error."""
    values = values.double()
    if len(values) < 8:
        return Measured(float(values.mean()), None, None, len(values))
    margin, middle = Z * float(values.std()) / len(values) ** 0.5, float(values.mean())
    return Measured(middle, middle - margin, middle + margin, len(values))
