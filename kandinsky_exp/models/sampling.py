"""How images are drawn, whatever draws them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

Embeds = tuple[Tensor, Tensor]  # image embeddings (N, E), and those to guide away from (N, E)


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn.

    Args:
        seed: prompt i always starts from the noise of (seed, i), on every device.
        first: number i of the first prompt.
        batch_size: prompts drawn at once.
        height, width: in pixels.
        negative_prompt: what the images should not show.
        picture: of this size, that all of them are drawn from.
        strength: part of the steps that are drawn, from the noised picture on; None = all of them.
        hole: of mode L and this size; a decoder for inpainting fills the white of it and keeps the rest.
        hint: a picture in the shape that is drawn, of any size, which a decoder for hints draws from.
        begin: latents to begin with, of the images of these generators; None = their noise.
    """

    inference_steps: int = 25
    guidance_scale: float = 4.0
    seed: int = 0
    batch_size: int = 8
    height: int = 512
    width: int = 512
    first: int = 0
    negative_prompt: str | None = None
    picture: Image.Image | None = field(default=None, compare=False)  # no prompt's embedding depends on it
    hole: Image.Image | None = field(default=None, compare=False)
    hint: Image.Image | None = field(default=None, compare=False)
    strength: float | None = field(default=None, compare=False)
    begin: Callable[[list[torch.Generator]], Tensor] | None = field(default=None, compare=False)

    def asked(self, images: Iterable[int]) -> dict[str, Any]:
        """What a decoder's pipeline is told of the images of these numbers."""
        generators = [self.generator(index) for index in images]
        return {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.inference_steps,
            "guidance_scale": self.guidance_scale,
            "generator": generators,
            "return_dict": False,
            **({} if self.begin is None else {"latents": self.begin(generators)}),
        }

    def generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.first + index) % (1 << 63))


def slices(count: int) -> int:
    """In how many parts MoVQ decodes so many pictures: two at once, or three, hold little memory.

    Not one by one: on a CPU the numbers of one alone can differ in their last bits from those in company.
    """
    return max(1, count // 2)


@contextmanager
def widened_dtype(network: Any, dtype: torch.dtype) -> Iterator[None]:
    """A network in a type that holds what its own does and, if it is no wider than that, this one; and back."""
    own = network.dtype
    try:
        nn.Module.to(network, torch.promote_types(own, dtype))
        yield
    finally:
        nn.Module.to(network, own)
