"""How images are drawn, whatever draws them."""

from dataclasses import dataclass

import torch
from torch import Tensor

Embeds = tuple[Tensor, Tensor]  # image embeddings (N, E), and those to guide away from (N, E)


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn.

    Args:
        seed: prompt i always starts from the noise of (seed, i), on every device.
        first: number i of the first prompt.
        batch_size: prompts drawn at once.
        height, width: in pixels.
    """

    inference_steps: int = 25
    guidance_scale: float = 4.0
    seed: int = 0
    batch_size: int = 8
    height: int = 512
    width: int = 512
    first: int = 0

    def generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.first + index) % (1 << 63))
