"""The moving average that `trainer.ema_decay` keeps; apart, for diffusers imports its pipelines for it."""

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class Average(EMAModel):  # type: ignore[misc]  # untyped
    """An EMA whose step is one pass, without a temporary copy of all parameters."""

    @torch.no_grad()
    def step(self, parameters: list[nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, [*parameters], 1 - self.cur_decay_value)
