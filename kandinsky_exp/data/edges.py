"""Edges of a picture by the method of Canny (1986), to the pixel as OpenCV's `Canny` finds them in 8-bit pictures.

OpenCV itself is 60 MB for this one function.
"""

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 100, 200  # as ControlNet's examples have it
TAN_22_5 = 13573  # of 22.5°, in units of 2^-15
NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int32]


def canny(pixels: Bytes, low: int = LOW, high: int = HIGH) -> Bytes:
    """The edges (H, W), 255 where one is, of a picture (H, W, C).

    Gradients are Sobel's, their size |dx| + |dy|; of several channels the one with the largest counts.

    Args:
        low, high: what an edge's size has to be above, along it and somewhere on it.
    """
    across, down = _gradients(pixels.astype(np.int32))
    size = np.abs(across) + np.abs(down)
    channel = size.argmax(2, keepdims=True)
    across, down, size = (np.take_along_axis(part, channel, 2)[..., 0] for part in (across, down, size))
    thin = _is_ridge(across, down, size) & (size > low)
    return _connected(thin & (size > high), thin).astype(np.uint8) * 255


def _gradients(pixels: Numbers) -> tuple[Numbers, Numbers]:
    """Across and down, (H, W, C) each."""
    wide = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), "edge")
    smooth_down = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    smooth_across = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    return smooth_down[:, 2:] - smooth_down[:, :-2], smooth_across[2:] - smooth_across[:-2]


def _is_ridge(across: Numbers, down: Numbers, size: Numbers) -> NDArray[np.bool_]:
    """Where a gradient is larger than its neighbours in its own direction, rounded to 45°."""
    x, y = np.abs(across).astype(np.int64), np.abs(down).astype(np.int64) << 15
    flat, steep = y < x * TAN_22_5, y > x * TAN_22_5 + (x << 16)
    falling = (across ^ down) < 0

    def at(row: int, column: int) -> Numbers:
        wide = np.pad(size, 1)
        height, width = size.shape
        return wide[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    level = (size > at(0, -1)) & (size >= at(0, 1))
    upright = (size > at(-1, 0)) & (size >= at(1, 0))
    one, other = (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1))
    return np.where(flat, level, np.where(steep, upright, np.where(falling, other, one)))


def _connected(sure: NDArray[np.bool_], possible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is possible and connected with what is sure, along sides or corners."""
    width = possible.shape[1] + 2
    open_ = np.pad(possible, 1).reshape(-1)
    reached = np.pad(sure, 1).reshape(-1)
    border = np.flatnonzero(reached)
    steps = np.array([row * width + column for row, column in NEIGHBOURS])
    while len(border):
        near = (border[:, None] + steps).reshape(-1)
        border = np.unique(near[open_[near] & ~reached[near]])
        reached[border] = True
    found: NDArray[np.bool_] = reached.reshape(possible.shape[0] + 2, width)[1:-1, 1:-1]
    return found


def f1(found: Bytes, wanted: Bytes) -> float:
    """Agreement of edges (H, W) with others: the harmonic mean of precision and recall, one pixel off is a hit."""
    ours, theirs = found > 0, wanted > 0
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision, recall = (ours & _widened(theirs)).sum() / ours.sum(), (theirs & _widened(ours)).sum() / theirs.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def _widened(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """By one pixel to all sides."""
    height, width = edges.shape
    wide = np.pad(edges, 1)
    shifted = [wide[1 + row : 1 + row + height, 1 + column : 1 + column + width] for row, column in NEIGHBOURS]
    found: NDArray[np.bool_] = np.logical_or.reduce([edges, *shifted])
    return found
