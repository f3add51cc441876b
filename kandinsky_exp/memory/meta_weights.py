"""The parts of Kandinsky 2.2 as their configs describe them: shapes and types, and no data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_exp.models import compatibility
from kandinsky_exp.models.components import MODELS
from kandinsky_exp.models.weights import Weights


class MetaWeights(Weights):
    """Networks on the meta device, where all that builds a run works and nothing takes memory. No tensor is fetched."""

    def _tensors(self, name: str) -> list[str]:
        return []

    def _made(self, part: str, folder: Path, dtype: str, bits: str | None) -> Any:
        if part not in MODELS:
            return super()._made(part, folder, dtype, bits)
        network = compatibility.without_data(part, folder)
        nn.Module.to(network, getattr(torch, dtype))  # diffusers' own `to` warns of modules to keep in float32
        if part == "prior":  # the stage looks at these two, and refuses those of an untrained one
            network.clip_mean = nn.Parameter(torch.zeros(network.clip_mean.shape))
            network.clip_std = nn.Parameter(torch.ones(network.clip_std.shape))
        return network


def give_fakes(network: nn.Module, device: torch.device) -> None:
    """Tensors on a device in place of those on the meta device; to be called inside a `FakeTensorMode`."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = nn.Parameter(_like(weight, device), requires_grad=weight.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer, device)


def _like(value: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
