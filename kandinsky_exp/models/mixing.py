"""Mixing: the weighted mean of the image embeddings of pictures and texts.

As `KandinskyV22PriorPipeline.interpolate` has it; that of the pipeline for image to image (`…PriorEmb2Emb…`) returns
random numbers to guide away from. Texts have the noise and the negative prompt that they would have by themselves, so
that the mix of one text is what this text is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.models import pipelines
from kandinsky_exp.models.sampling import Embeds, SampleSettings


def shares(weights: Sequence[float]) -> list[float]:
    """Weights whose sum is 1: of a longer mean the decoder knows nothing."""
    return [weight / sum(weights) for weight in weights]


@torch.no_grad()
def embed_mix(
    pipeline: Any, mix: Sequence[str | Image.Image], weights: Sequence[float], count: int, settings: SampleSettings
) -> Embeds:
    """One mix as `count` image embeddings (N, E), and the embeddings to guide away from (N, E).

    Args:
        pipeline: the prior's, with its image encoder.
        mix: texts, and RGB pictures.
        weights: one for each, with a sum above 0.
    """
    texts = [entry for entry in mix if isinstance(entry, str)]
    by_text = {text: pipelines.embed_prompts(pipeline, [text] * count, settings) for text in texts or [""]}
    found = [by_text[entry][0] if isinstance(entry, str) else _of_picture(pipeline, entry) for entry in mix]
    mixed = sum(weight * embeds for weight, embeds in zip(shares(weights), found, strict=True))
    _, negative = next(iter(by_text.values()))  # the same, whatever the text
    return torch.as_tensor(mixed).expand_as(negative), negative


def _of_picture(pipeline: Any, picture: Image.Image) -> Tensor:
    """(1, E)."""
    encoder = pipeline.image_encoder
    pixels = pipeline.image_processor(picture, return_tensors="pt").pixel_values
    embed: Tensor = encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds
    return embed
