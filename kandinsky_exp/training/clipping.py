"""Gradient clipping by the norm of all gradients (Pascanu et al. 2013)."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

EPSILON = 1e-6  # as in `torch.nn.utils.clip_grad_norm_`


def clip(parameters: list[nn.Parameter], optimizer: Any, accelerator: Accelerator, max_norm: float | None) -> Tensor:
    """The norm of the gradients before; they are clipped, at the latest in the optimizer's next step.

    A fused optimizer divides gradients by its `grad_scale` while it reads them: that saves a pass over all of them. The
    attribute is a loss scaler's; where there is one, gradients are clipped first.

    Args:
        optimizer: the bare one.
        max_norm: None for no clipping.
    """
    if accelerator.scaler is not None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        norm: Tensor = accelerator.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
        return norm
    norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
    optimizer.grad_scale = None if max_norm is None else ((norm + EPSILON) / max_norm).clamp(min=1)
    return norm
