"""Memory of an optimizer's state and of its step, measured on a few small real weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from kandinsky_exp import build
from kandinsky_exp.memory.tensor_tracker import TensorTracker

# By number of dimensions. All are prime, so that the size of a tensor tells which sides it has: rows, columns or all.
# More than 4,096 weights in each: of fewer, 8-bit optimizers keep a state in 32 bits.
SIDES: dict[int, tuple[int, ...]] = {1: (4801,), 2: (67, 71), 3: (13, 17, 23), 4: (7, 11, 13, 5)}
SEVERAL = 8

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepNeed:
    """Bytes that are kept from step to step, and beyond these and gradients while a step is made."""

    state: int
    temporary: int


def measure(cfg: DictConfig, trainable: Sequence[Tensor], device: torch.device) -> StepNeed:
    """What the configured optimizer needs for weights of these shapes, with or without data."""
    make = partial(build.make_optimizer, cfg, device=device)
    rules = {sides: _rules(make, sides, device) for sides in {_sides(weight) for weight in trainable}}
    state = sum(rule(weight) for weight in trainable for rule in rules[_sides(weight)])
    sizes = [weight.nbytes for weight in trainable]
    each, together = _temporary(make, device)
    return StepNeed(int(state), int(each * max(sizes) + together * sum(sizes)))


def _sides(weight: Tensor) -> int:
    return min(max(weight.ndim, 1), max(SIDES))


def _rules(make: Make, dimensions: int, device: torch.device) -> list[Callable[[Tensor], float]]:
    """One per tensor of a weight's state: from a weight to the bytes of that tensor."""
    weights = _weights(dimensions, 2, device)
    optimizer = make(weights)
    _step(optimizer, weights)
    states = [[value for value in optimizer.state[weight].values() if isinstance(value, Tensor)] for weight in weights]
    shared = {value.data_ptr() for value in states[0]} & {value.data_ptr() for value in states[1]}
    return [_rule(value, SIDES[dimensions]) for value in states[0] if value.data_ptr() not in shared]


def _rule(value: Tensor, sides: tuple[int, ...]) -> Callable[[Tensor], float]:
    for count in range(len(sides) + 1):
        for chosen in combinations(range(len(sides)), count):
            if math.prod(sides[index] for index in chosen) == value.numel():
                return lambda weight: math.prod(weight.shape[index] for index in chosen if weight.ndim) * value.itemsize
    return lambda weight: weight.numel() * value.nbytes / math.prod(sides)  # such as one number per block


def _temporary(make: Make, device: torch.device) -> tuple[float, float]:
    """(times the largest weight, times all weights together): one by one, or all in one pass."""
    one, several = (_extra(make, _weights(2, count, device)) for count in (1, SEVERAL))
    together = max(0.0, (several - one) / (SEVERAL - 1))
    return max(0.0, one - together), together


def _extra(make: Make, weights: list[nn.Parameter]) -> float:
    """What the second step needs beyond what is there before and after it, in weights of that size."""
    optimizer = make(weights)
    _step(optimizer, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    state = (value for value in tree_iter(dict(optimizer.state)) if isinstance(value, Tensor))
    with TensorTracker([*weights, *(weight.grad for weight in weights if weight.grad is not None), *state]) as live:
        optimizer.step()
    return float(live.peak / weights[0].nbytes)


def _weights(dimensions: int, count: int, device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(SIDES[dimensions], device=device)) for _ in range(count)]


def _step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad()
