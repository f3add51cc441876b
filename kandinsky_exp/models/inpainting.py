"""The inpainting decoder: made of a plain one, and asked for pictures."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.models.compatibility import inpainting_channels as channels
from kandinsky_exp.models.sampling import Embeds, SampleSettings

EMPTY = (128, 128, 128)  # what stands in a hole where a picture with one is shown


def is_for_inpainting(network: Any) -> bool:
    """Told by its channels."""
    out = network.config.out_channels  # with a learned variance two for each latent's, or one
    return network.config.in_channels in (channels(out // 2), channels(out))


def widen(network: Any, latents: int) -> None:
    """Make a plain decoder one that sees what is kept, and at first does not heed it: its new weights are zero."""
    old: nn.Conv2d = network.conv_in
    new = nn.Conv2d(
        channels(latents),
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :latents] = old.weight
        new.bias = old.bias
    network.conv_in = new
    network.register_to_config(in_channels=channels(latents))


@torch.no_grad()
def add_trained(network: Any, found: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
    """Go from the network's first layer towards trained ones; a plain decoder is widened for it.

    Args:
        found: weights of the layer, and how far: 0 = not at all, 1 = all the way.

    Raises:
        RuntimeError: they are another decoder's.
    """
    if not found:
        return
    if found[0][0]["conv_in.weight"].shape[1] == channels(network.conv_in.in_channels):
        widen(network, network.conv_in.in_channels)
    for name, own in network.conv_in.named_parameters(prefix="conv_in"):
        first, *others = (torch.lerp(own, trained[name].to(own), scale) for trained, scale in found)
        own.copy_(first + sum(other - own for other in others) if others else first)


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
    with _widened_dtype(pipeline.movq, dtype):  # the pipeline knows one type for both
        for index, (picture, hole) in enumerate(zip(pictures, holes, strict=True)):
            one, null = (part[index : index + 1].to(device, dtype) for part in embeds)
            whole = whole_cells(hole, pipeline.movq_scale_factor)
            ((drawn,),) = pipeline(one, picture, whole, null, **settings.asked([index]))
            filled.append(Image.composite(drawn, picture, hole))
    return filled


@contextmanager
def _widened_dtype(network: Any, dtype: torch.dtype) -> Iterator[None]:
    """A network in a type that holds what its own does and, if it is no wider than that, this one; and back."""
    own = network.dtype
    try:
        nn.Module.to(network, torch.promote_types(own, dtype))
        yield
    finally:
        nn.Module.to(network, own)


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
