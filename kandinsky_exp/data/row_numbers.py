"""Which rows of a set count: kept by the shorter of two lists, for sets of very many rows."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class AllBut:
    """The numbers of `range(total)` in order, without some.

    Args:
        without: (m,) those that are missing, sorted: all that takes memory.
    """

    def __init__(self, total: int, without: NDArray[np.int64]) -> None:
        self.total, self.without = total, without
        self._before = without - np.arange(len(without))  # how many of the others come before each

    def __len__(self) -> int:
        return self.total - len(self.without)

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return place + int(np.searchsorted(self._before, place, side="right"))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.delete(np.arange(self.total, dtype=dtype), self.without)


def kept(rows: NDArray[np.int64], total: int) -> NDArray[np.int64] | AllBut:
    """Row numbers (n,) of `range(total)`, sorted; in a form whose memory follows those that are left out if these are
    fewer."""
    if 2 * len(rows) < total:
        return rows
    left_out = np.ones(total, np.bool_)
    left_out[rows] = False
    return AllBut(total, np.flatnonzero(left_out))
