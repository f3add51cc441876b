"""EMA and schedule-free averages of the trained weights.

Validation and the result use the average where there is one. An EMA (`trainer.ema_decay`) is kept beside the weights. A
schedule-free optimizer trains weights y and computes the average x from its own state (Defazio et al. 2024, "The Road
Less Scheduled", arXiv:2405.15682, equations 3 to 5). From y to x and back rounds, so y is copied and put back exactly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kandinsky_exp.errors import is_out_of_memory
from kandinsky_exp.training.loop import Training

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def bare(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's, which has all methods, whatever it wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def is_schedule_free(optimizer: Any) -> bool:
    """Whether it switches the weights between those that train and their average, by `train()` and `eval()`."""
    return all(callable(getattr(bare(optimizer), name, None)) for name in ("train", "eval"))


@contextmanager
def averaged_weights(training: Training) -> Iterator[None]:
    """The average in place of the weights that train; nothing where there is none."""
    if training.ema is not None:
        _trade_places(training.ema, training.trainable)
        try:
            yield
        finally:
            _trade_places(training.ema, training.trainable)
    elif is_schedule_free(training.optimizer):
        with _its_average(bare(training.optimizer), training.trainable):
            yield
    else:
        yield


def _trade_places(ema: "EMAModel", parameters: list[nn.Parameter]) -> None:
    """`ema.store` and `ema.copy_to`, or `ema.restore`, without a copy: it makes two of all weights in host memory."""
    for index, parameter in enumerate(parameters):
        average = ema.shadow_params[index]
        ema.shadow_params[index], parameter.data = parameter.data, average


@contextmanager
def _its_average(optimizer: Any, trainable: list[nn.Parameter]) -> Iterator[None]:
    copies = _copies(trainable)
    try:
        optimizer.eval()  # may run out of memory half-way
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_([*trainable], copies)


def _copies(trainable: list[nn.Parameter]) -> list[Tensor]:
    """Of the weights; in host memory where the device has no room for as many once more."""
    try:
        return [parameter.detach().clone() for parameter in trainable]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return [parameter.detach().to("cpu", copy=True) for parameter in trainable]


def averages(training: Training) -> list[Tensor] | None:
    """The average of each trainable weight, None where there is none.

    Of an EMA, its own tensors; of a schedule-free optimizer, copies in host memory: a device may have no room for more.
    """
    if training.ema is not None:
        return list(training.ema.shadow_params)
    if not is_schedule_free(training.optimizer):
        return None
    with averaged_weights(training):
        return [parameter.detach().to("cpu", copy=True) for parameter in training.trainable]
