"""Holes for the inpainting decoder to fill, drawn at latent size on the generator's own device.

Box, blob and frame are those that Kandinsky 2.2 was trained with; a hole that is all of the picture is not among them.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kandinsky_exp.stages.diffusion import Generators, uniform

SHAPES = ("full", "box", "blob", "frame", "blob_and_frame")
SIDES = 0.1, 0.62  # of a box, as parts of the picture's
BORDERS = 0.15, 0.3  # of a frame
VERTICES = 16  # of a blob, in equal angles
SHORTEST = 0.4  # of a blob's rays, as a part of the longest


def problem(shares: Mapping[str, float]) -> str | None:
    """What is wrong with how often shapes are to come."""
    numbers = [
        value for value in shares.values() if isinstance(value, int | float) and math.isfinite(value) and value >= 0
    ]
    if shares.keys() <= set(SHAPES) and len(numbers) == len(shares) and sum(numbers) > 0:
        return None
    return f"has to give shares that are not negative, one above 0, of {', '.join(SHAPES)}, not {dict(shares)}"


def draw(
    shares: Mapping[str, float], size: tuple[int, int, int], generator: Generators, device: torch.device
) -> Tensor:
    """Holes of a batch, (B, 1, h, w) of 0 and 1, where 1 is to be filled.

    Args:
        shares: how often each of `SHAPES` comes, in relation to the others.
        size: (B, h, w) of the latents.
    """
    count, height, width = size
    drawn = uniform(count, generator, device, 9 + VERTICES)
    kind, place, border, rays = drawn[:, 0], drawn[:, 1:5], drawn[:, 5:9], drawn[:, 9:]
    y = ((torch.arange(height, device=device) + 0.5) / height).view(1, height, 1)
    x = ((torch.arange(width, device=device) + 0.5) / width).view(1, 1, width)
    box, blob = _box(place, y, x), _blob(place, rays, y, x)
    frame = _frame(border, y, x)
    found = {"full": torch.ones_like(box), "box": box, "blob": blob, "frame": frame, "blob_and_frame": blob | frame}
    ends = list(accumulate(shares.get(name, 0.0) for name in SHAPES))  # on the host: nothing waits for the device
    chosen = sum(((kind * ends[-1] >= end).long() for end in ends[:-1]), torch.zeros_like(kind, dtype=torch.long))
    holes = torch.stack([found[name] for name in SHAPES])[chosen, torch.arange(count, device=device)]
    return holes.unsqueeze(1).float()


def _spread(numbers: Tensor, between: Sequence[float]) -> Tensor:
    return between[0] + (between[1] - between[0]) * numbers


def _box(place: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels whose middle is in a box of each picture; at least the one that its middle is in."""
    (top, bottom), (left, right) = (_ends(place[:, axis], place[:, 2 + axis]) for axis in range(2))
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return inside | _at((top + bottom) / 2, (left + right) / 2, y, x)


def _ends(size: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    side = _spread(size, SIDES)
    start = (1 - side) * where
    return start.view(-1, 1, 1), (start + side).view(-1, 1, 1)


def _at(middle_y: Tensor, middle_x: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The pixel that a point is in."""
    height, width = y.shape[1], x.shape[2]
    return ((middle_y * height).floor() == (y * height).floor()) & ((middle_x * width).floor() == (x * width).floor())


def _blob(place: Tensor, rays: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Inside of a closed curve in the box: rays of random length from its middle, smooth between neighbours."""
    (top, bottom), (left, right) = (_ends(place[:, axis], place[:, 2 + axis]) for axis in range(2))
    middle_y, middle_x = (top + bottom) / 2, (left + right) / 2
    across, down = (x - middle_x) / (right - left) * 2, (y - middle_y) / (bottom - top) * 2
    turn = (torch.atan2(down, across) / (2 * math.pi) % 1) * VERTICES
    before = turn.floor()
    weight = (1 - torch.cos((turn - before) * math.pi)) / 2
    lengths = _spread(rays, (SHORTEST, 1.0))
    index = before.long() % VERTICES
    flat = index.flatten(1)
    first, second = (lengths.gather(1, (flat + step) % VERTICES).view_as(index) for step in (0, 1))
    inside = across.square() + down.square() < torch.lerp(first, second, weight).square()
    return inside | _at(middle_y, middle_x, y, x)


def _frame(border: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """All around the picture, each side by itself; at least one row or column of pixels."""
    thick = _spread(border, BORDERS).view(-1, 4, 1, 1).unbind(1)
    distances = y, 1 - y, x, 1 - x
    sides = [away <= torch.maximum(side, away.min()) for away, side in zip(distances, thick, strict=True)]
    return sides[0] | sides[1] | sides[2] | sides[3]
