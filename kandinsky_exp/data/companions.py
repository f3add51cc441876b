"""Pictures that belong to a picture: the hole to fill in it, or a hint of what it shows, as tensors.

They are cropped, scaled and mirrored as their picture is, and have its size.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.data.buckets import Size
from kandinsky_exp.data.edges import canny
from kandinsky_exp.data.preprocess import cropped

GREY = 32, 224  # what is darker is black, what is lighter white: compression leaves a little of both
SOFT = 0.05  # part of the pixels that may be in between, on the borders of a drawn hole
HINT_SCALE = 8  # pixels of a hint per latent, along each side


def hole_of(picture: Image.Image) -> Image.Image:
    """A hole as a picture of mode L, 255 where something is to be filled and 0 elsewhere.

    Raises:
        ValueError: it is empty or full, or neither black nor white.
    """
    pixels = np.asarray(picture.convert("L"))
    grey = float(((pixels > GREY[0]) & (pixels < GREY[1])).mean())
    if grey > SOFT:
        raise ValueError(f"{grey:.0%} of its pixels are neither black nor white; white is filled, black is kept")
    white = pixels > 127
    if not white.any():
        raise ValueError("it is empty: nothing in it is white, which is what would be filled")
    if white.all():
        raise ValueError("it is full: nothing in it is black, which is what would be kept")
    return Image.fromarray(white.astype(np.uint8) * 255)


@dataclass(frozen=True)
class Hole:
    """The user's hole, (1, h, w) of 0 and 1 at the size of latents.

    Args:
        scale: pixels per latent, along each side.
    """

    is_read: ClassVar[bool] = True
    scale: int

    def shape(self, size: Size) -> tuple[int, ...]:
        return 1, size[1] // self.scale, size[0] // self.scale

    def __call__(self, own: Image.Image, picture: Image.Image, size: Size) -> Tensor:
        _, height, width = self.shape(size)
        hole = np.asarray(cropped(hole_of(own), width, height, Image.Resampling.NEAREST)) > 127
        if hole.all() or not hole.any():
            raise ValueError(f"nothing {'is kept' if hole.all() else 'of it is left'} at {width} x {height} latents")
        return torch.from_numpy(hole.astype(np.uint8)[None])


@dataclass(frozen=True)
class Hint:
    """The user's hint, (3, 8h, 8w) of 0 to 255, where latents are (h, w)."""

    is_read: ClassVar[bool] = True
    channels: ClassVar[int] = 3
    scale: int

    def shape(self, size: Size) -> tuple[int, ...]:
        return self.channels, size[1] // self.scale * HINT_SCALE, size[0] // self.scale * HINT_SCALE

    def __call__(self, own: Image.Image, picture: Image.Image, size: Size) -> Tensor:
        pixels = np.asarray(own)
        if (pixels == pixels[0, 0]).all():
            raise ValueError("it shows nothing: all of its pixels are equal")
        _, height, width = self.shape(size)
        return torch.from_numpy(np.array(cropped(own, width, height)).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Edges(Hint):
    """The edges of the picture itself as its hint: one channel (1, 8h, 8w), 255 where one is."""

    is_read: ClassVar[bool] = False
    channels: ClassVar[int] = 1

    def __call__(self, own: Image.Image | None, picture: Image.Image, size: Size) -> Tensor:
        _, height, width = self.shape(size)
        return torch.from_numpy(canny(np.asarray(cropped(picture, width, height)))[None])
