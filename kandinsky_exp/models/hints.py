"""The decoder for hints asked for pictures: ControlNet as Kandinsky 2.2 has it, a hint beside the noisy latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.models.decoder_kinds import HINT, kind_of_network
from kandinsky_exp.models.sampling import Embeds, SampleSettings, slices, widened_dtype

SCALE = 8  # pixels of a hint per latent, along each side: its block halves three times, whatever MoVQ does


def reads_hints(network: Any) -> bool:
    return kind_of_network(network) is HINT


def draw(pipeline: Any, embeds: Embeds, hints: Tensor, settings: SampleSettings) -> list[Image.Image]:
    """Pictures for image embeddings, each with its hint.

    Args:
        embeds: image embeddings (N, E), and those to guide away from (N, E).
        hints: (N, 3, 8h, 8w) in [0, 1], for latents of (h, w).
    """
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    images: list[Image.Image] = []
    with widened_dtype(pipeline.movq, dtype), _decoding_in_slices(pipeline.movq):  # it knows one type for both
        for start in range(0, len(hints), settings.batch_size):
            end = min(start + settings.batch_size, len(hints))
            chunk, null, hint = (part[start:end].to(device, dtype) for part in (*embeds, hints))
            (drawn,) = pipeline(chunk, null, hint, **settings.asked(range(start, end)))
            images += drawn
    return images


@contextmanager
def _decoding_in_slices(movq: Any) -> Iterator[None]:
    """The pipeline would have MoVQ decode a whole batch at once, and gives no latents."""
    decode = movq.decode

    def sliced(latents: Tensor, **how: Any) -> dict[str, Tensor]:
        return {
            "sample": torch.cat([decode(some, **how).sample for some in latents.tensor_split(slices(len(latents)))])
        }

    movq.decode = sliced
    try:
        yield
    finally:
        del movq.decode


def to_draw(pipeline: Any, count: int, settings: SampleSettings) -> Tensor:
    """The hint of the settings for each image, (N, 3, 8h, 8w); black where there is none: without an edge."""
    height, width = (side // pipeline.movq_scale_factor * SCALE for side in (settings.height, settings.width))
    hint = settings.hint or Image.new("RGB", (width, height))
    if hint.size != (width, height):
        hint = hint.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
    pixels = torch.from_numpy(np.array(hint.convert("RGB"))).permute(2, 0, 1)
    return (pixels / 255).expand(count, -1, -1, -1)


def shown(hint: Tensor) -> Image.Image:
    """A hint (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((hint * 255).round().byte().permute(1, 2, 0).cpu().numpy())
