"""Row numbers of sets of very many rows."""

import numpy as np
import pytest

from kandinsky_exp.data.row_numbers import AllBut, kept


@pytest.mark.parametrize("without", [[], [0], [9], [3, 4, 5], [0, 2, 9], list(range(10))])
def test_all_but_some(without):
    expected = [number for number in range(10) if number not in without]
    rows = AllBut(10, np.array(without, np.int64))
    assert len(rows) == len(expected)
    assert list(rows) == [rows[place] for place in range(len(rows))] == np.asarray(rows).tolist() == expected
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("seed", range(8))
def test_the_shorter_list_is_kept(seed):
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(rng.random(200) < rng.random())
    held = kept(rows, 200)
    assert np.array_equal(np.asarray(held), rows)
    assert len(held.without if isinstance(held, AllBut) else held) <= 100


def test_a_hundred_million_rows_take_the_memory_of_those_left_out():
    rows = AllBut(100_000_000, np.arange(0, 100_000_000, 1_000_000))
    assert (len(rows), rows[0], rows[len(rows) - 1], rows[999_998]) == (99_999_900, 1, 99_999_999, 999_999)
    assert rows[999_999] == 1_000_001
