"""A training step without data: all that a checkpoint holds moves."""

from typing import Any

import torch


def step(training: Any) -> None:
    """Every trainable weight, every average and the optimizer's state move."""
    generator = torch.Generator().manual_seed(training.step)
    for parameter in training.trainable:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    training.optimizer.step()
    training.scheduler.step()
    if training.ema is not None:
        training.ema.step(training.trainable)
    training.step += 1
