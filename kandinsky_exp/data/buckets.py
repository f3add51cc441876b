"""Aspect-ratio buckets: sizes of about equal area, so that pictures need not be cut to squares."""

import math
from itertools import count

import numpy as np
from numpy.typing import NDArray

MULTIPLE = 64  # pixels: what the published decoder's networks halve to whole numbers
TOLERANCE = 0.1  # of the area: more would make the images of one run differ in detail and in memory
WIDEST = 4  # the longest side against the shortest; beyond it a picture is cropped

Size = tuple[int, int]  # (width, height) in pixels


def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """Sizes in multiples of 64 px whose area is within a tenth of that of a square of this side.

    The square itself is one of them; the longest side is at most four times the shortest.

    Raises:
        ValueError: the resolution is no multiple of 64.
    """
    if resolution % MULTIPLE or resolution < MULTIPLE:
        raise ValueError(f"{resolution} is not a multiple of {MULTIPLE}")
    sides = range(MULTIPLE, 2 * resolution + 1, MULTIPLE)
    area = resolution * resolution
    return tuple(
        (width, height)
        for width in sides
        for height in sides
        if abs(width * height - area) <= TOLERANCE * area and max(width, height) <= WIDEST * min(width, height)
    )


def nearest_bucket(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """The size whose aspect ratio is nearest on a logarithmic scale: the one that crops least."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), size))


def note_on_sizes(resolution: int) -> str:
    """What is to be said where the square is the only size, or nothing."""
    if len(bucket_sizes(resolution)) > 1:
        return ""
    larger = next(side for side in count(resolution + MULTIPLE, MULTIPLE) if len(bucket_sizes(side)) > 1)
    return (
        f"data.buckets: at data.resolution={resolution} there is no size but the square, to which all pictures are "
        f"cropped; data.resolution={larger} is the next one with others"
    )


def notes_on_rare(shapes: NDArray[np.int64], per_step: int, steps: int) -> list[str]:
    """What becomes of shapes of which there are fewer images than an optimizer step takes of one shape.

    Args:
        shapes: height and width of each image in any unit, (n, 2).
        per_step: images of an optimizer step over all processes.
    """
    kinds, counts = np.unique(shapes, axis=0, return_counts=True)
    epochs = 1
    while (epochs * counts // per_step).sum() < steps:  # each shape trains when enough visits to it have gathered
        epochs += 1 + int((steps - (epochs * counts // per_step).sum()) * per_step // counts.sum())
    notes = []
    for chosen, fate in (
        (epochs * counts < per_step, f"never train in {steps:,} steps"),
        ((epochs * counts >= per_step) & (counts < per_step), "come more than once in every batch of theirs"),
    ):
        if chosen.any():
            listed = ", ".join(
                f"{width // math.gcd(width, height)}:{height // math.gcd(width, height)} ({number})"
                for (height, width), number in zip(kinds[chosen].tolist(), counts[chosen].tolist(), strict=True)
            )
            notes.append(
                f"data.buckets: {counts[chosen].sum():,} images {fate}, because a step takes {per_step} images of one "
                f"shape, and of theirs there are fewer: {listed}; crop them to a more frequent shape, or lower "
                "trainer.batch_size or trainer.grad_accumulation"
            )
    return notes
