"""Aspect-ratio buckets: sizes of equal area, so that pictures need not be cut to squares."""

import math

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
