"""The inpainting decoder asked for pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from kandinsky_exp.models.sampling import Embeds, SampleSettings, widened_dtype

EMPTY = (128, 128, 128)  # what stands in a hole where a picture with one is shown


def fill(
    pipeline: Any,
    embeds: Embeds,
    pictures: Sequence[Image.Image],
    holes: Sequence[Image.Image],
    settings: SampleSettings,
) -> list[Image.Image]:
    """Pictures with their holes filled, and their own pixels elsewhere.

    One a call: of several, the pipeline would keep what the first one keeps.

    Args:
        embeds: image embeddings (N, E), and those to guide away from (N, E).
        pictures: N, of the size that is drawn.
        holes: N, of mode L and that size; white is filled.
    """
    filled = []
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    with widened_dtype(pipeline.movq, dtype):  # the pipeline knows one type for both
        for index, (picture, hole) in enumerate(zip(pictures, holes, strict=True)):
            one, null = (part[index : index + 1].to(device, dtype) for part in embeds)
            whole = whole_cells(hole, pipeline.movq_scale_factor)
            ((drawn,),) = pipeline(one, picture, whole, null, **settings.asked([index]))
            filled.append(Image.composite(drawn, picture, hole))
    return filled


def whole_cells(hole: Image.Image, scale: int) -> Image.Image:
    """The hole, grown to all pixels of each latent that it touches: the pipeline looks at one pixel of each.

    Args:
        scale: pixels per latent, along each side.
    """
    white = np.asarray(hole) >= 128
    height, width = white.shape
    touched = white.reshape(height // scale, scale, width // scale, scale).any((1, 3))
    return Image.fromarray(np.kron(touched, np.full((scale, scale), 255, np.uint8)))


def to_fill(count: int, settings: SampleSettings) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures and their holes; where none are given, empty ones: the prompt alone says what is drawn."""
    size = settings.width, settings.height
    picture, hole = settings.picture, settings.hole
    if picture is None or hole is None:
        picture, hole = Image.new("RGB", size, EMPTY), Image.new("L", size, 255)
    return [picture] * count, [hole] * count


def hole_shown(picture: Image.Image, hole: Image.Image) -> Image.Image:
    """The picture with an empty hole."""
    return Image.composite(Image.new("RGB", picture.size, EMPTY), picture, hole)
