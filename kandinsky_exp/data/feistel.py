"""A permutation that is computed place by place, for sets whose order would be too long to keep in memory."""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


class FeistelPermutation:
    """Of `range(rows)`: a Feistel network over the next power of four, walked on until it is within (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains", methods 2 and 3).

    Args:
        seeds: what chooses it.
    """

    def __init__(self, rows: int, *seeds: int) -> None:
        self.rows = rows
        self.half = np.uint64(max(1, -(-(rows - 1).bit_length() // 2)))  # bits
        self.mask = (np.uint64(1) << self.half) - np.uint64(1)
        self.keys = np.random.SeedSequence(seeds).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at these places, (n,)."""
        values = self._network(places.astype(np.uint64))
        while (outside := values >= self.rows).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right + key) & self.mask)
        return left << self.half | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
