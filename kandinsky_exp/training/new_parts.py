"""Parts of a network that its base had not, and that learn faster for it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def learn_faster(optimizer: torch.optim.Optimizer, network: nn.Module, factor: float, parts: Mapping[str, int]) -> None:
    """Let each step of an optimizer go `factor` times as far in these parts as it would.

    That is what a learning rate so many times as large does, also where it is of some inputs of a parameter alone,
    which no group of an optimizer's can be.

    Args:
        parts: names of parameters, and their first input channel that is meant; 0 = all.
    """
    if factor == 1 or not parts:
        return
    named = dict(network.named_parameters())
    before: list[Tensor] = []

    def views() -> list[Tensor]:  # anew each time: placing a network may give its parameters other memory
        found = [named[name].detach() for name in parts]
        return [value[:, start:] if start else value for value, start in zip(found, parts.values(), strict=True)]

    def remember(*_: object) -> None:
        before[:] = [value.clone() for value in views()]

    def go_on(*_: object) -> None:
        for value, old in zip(views(), before, strict=True):
            value.copy_(torch.lerp(old, value, factor))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(go_on)
