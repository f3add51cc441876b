"""The parts of Kandinsky 2.2 as their configs describe them: shapes and types, and no data."""

from collections.abc import Iterable
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
        return nn.Module.to(network, getattr(torch, dtype))  # diffusers' own warns of modules to keep in float32

    def tensors(self, part: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Ones: a stage looks at them, and refuses what cannot be."""
        shapes = compatibility.expected_shapes(part, self.folder(part))
        return {name: torch.ones(shapes[name]) for name in names}
