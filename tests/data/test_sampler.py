"""The order of visits: complete epochs, equal whatever the division into processes, exact after a resume."""

import time
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from kandinsky_exp.data.feistel import FeistelPermutation
from kandinsky_exp.data.sampler import StreamBatchSampler, choose_caption, order, order_of


def flat(sampler):
    return [visit for batch in sampler for visit in batch]


def test_order_is_a_permutation_of_seed_and_epoch_alone():
    assert sorted(order(0, 0, 100)) == list(range(100))
    assert np.array_equal(order(3, 5, 100), order(3, 5, 100))
    assert not np.array_equal(order(0, 0, 100), order(0, 1, 100))
    assert not np.array_equal(order(0, 0, 100), order(1, 0, 100))


def test_order_does_not_drift_with_library_versions():
    assert order(0, 0, 10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


def test_positions_follow_the_published_formula():
    shape = {"batch_size": 2, "grad_accumulation": 2, "num_processes": 3, "total_steps": 6}
    place = {(int(row), 0): position for position, row in enumerate(order(0, 0, 100))}
    ranks = [
        [[place[visit] for visit in batch] for batch in StreamBatchSampler(100, 0, rank=rank, **shape)]
        for rank in range(3)
    ]
    assert (ranks[0][0], ranks[2][0], ranks[0][1]) == ([0, 1], [4, 5], [6, 7])
    assert ranks[2][5 * 2 + 1] == [5 * 12 + 5 * 2, 5 * 12 + 5 * 2 + 1]


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 12, 100])
def test_every_epoch_visits_every_row_once(rows):
    visits = flat(StreamBatchSampler(rows, 0, batch_size=3, total_steps=rows))
    for epoch in range(3):
        assert sorted(index for index, of in visits if of == epoch) == list(range(rows))


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)])
def test_a_step_sees_the_same_rows_however_its_batch_is_divided(batch_size, accumulation, processes):
    whole = list(StreamBatchSampler(11, 4, batch_size=8, total_steps=6))
    shape = {"batch_size": batch_size, "grad_accumulation": accumulation, "num_processes": processes}
    ranks = [list(StreamBatchSampler(11, 4, total_steps=6, rank=rank, **shape)) for rank in range(processes)]
    for step, expected in enumerate(whole):
        micros = range(step * accumulation, (step + 1) * accumulation)
        assert [visit for micro in micros for batches in ranks for visit in batches[micro]] == expected


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_a_resumed_stream_goes_on_where_it_stopped(start):
    shape = {"batch_size": 3, "total_steps": 10, "grad_accumulation": 2, "num_processes": 2, "rank": 1}
    whole, rest = StreamBatchSampler(7, 0, **shape), StreamBatchSampler(7, 0, start_step=start, **shape)
    assert list(rest) == list(whole)[start * 2 :]
    assert len(rest) == len(list(rest)) == (10 - start) * 2


def test_iterating_twice_gives_the_same_batches():
    sampler = StreamBatchSampler(5, 0, batch_size=4, total_steps=5)
    assert list(sampler) == list(sampler)


def test_a_global_batch_larger_than_the_set_spans_epochs():
    (batch,) = StreamBatchSampler(3, 0, batch_size=8, total_steps=1)
    assert [epoch for _, epoch in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_late_step_costs_what_an_early_one_does():
    def seconds(start):
        started = time.perf_counter()
        list(islice(StreamBatchSampler(1000, 0, batch_size=4, start_step=start, total_steps=10**9), 2000))
        return time.perf_counter() - started

    assert min(seconds(10**8) for _ in range(3)) < 5 * min(seconds(0) for _ in range(3))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"batch_size": 0}, {"grad_accumulation": 0}, {"rank": 2}])
def test_impossible_shapes_are_refused(wrong):
    shape = {"rows": 5, "seed": 0, "batch_size": 1, "total_steps": 1, "num_processes": 2} | wrong
    with pytest.raises(ValueError, match="rows="):
        StreamBatchSampler(**shape)


def test_captions_are_chosen_evenly_and_by_seed_epoch_and_row():
    choices = [choose_caption(0, epoch, index, 3) for epoch in range(100) for index in range(100)]
    assert min(np.bincount(choices, minlength=3)) > 3100
    assert choose_caption(0, 1, 2, 5) == choose_caption(0, 1, 2, 5)
    assert len({choose_caption(0, epoch, 7, 3) for epoch in range(20)}) == 3
    assert len({choose_caption(seed, 0, 7, 3) for seed in range(20)}) == 3
    assert {choose_caption(0, epoch, 0, 1) for epoch in range(9)} == {0}


# ---- sorted by length


def lengths(seed, rows):
    """Of each row, a few tokens to many; the same in every epoch."""
    table = np.random.default_rng(seed).integers(2, 40, rows)
    return lambda visit: int(table[visit[0]])


def steps_of(rows, per_step, total, start=0, **settings):
    sampler = StreamBatchSampler(rows, 7, batch_size=per_step, total_steps=total, start_step=start, **settings)
    return list(sampler)


@pytest.mark.parametrize(("rows", "per_step"), [(1000, 4), (1000, 7), (50, 8), (5, 8), (3, 8), (64 * 4 * 2, 4)])
def test_by_length_every_epoch_shows_what_it_showed(rows, per_step):
    """At each step before which an epoch was shown, as many visits of each row were there as without it."""
    total = 3 * rows // per_step + 2
    plain = steps_of(rows, per_step, total)
    sorted_ = steps_of(rows, per_step, total, length=lengths(1, rows))
    assert [len(step) for step in sorted_] == [len(step) for step in plain]
    for epoch in range(1, 4):
        done = -(-epoch * rows // per_step)
        if done <= total:
            shown = [sorted(visit for step in some[:done] for visit in step) for some in (plain, sorted_)]
            assert shown[0] == shown[1]


def test_by_length_a_step_pads_less():
    length = lengths(1, 1000)
    plain, sorted_ = (steps_of(1000, 8, 250, length=some) for some in (None, length))
    longest = [np.mean([max(map(length, step)) for step in some]) for some in (plain, sorted_)]
    mean = np.mean([length((row, 0)) for row in range(1000)])
    assert longest[0] > 1.6 * mean
    assert longest[1] < 1.1 * mean
    firsts = [length(step[0]) for step in sorted_]
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.2  # steps of all lengths by turns


@pytest.mark.parametrize("start", [1, 63, 64, 65, 100, 249])
def test_by_length_a_resumed_run_goes_on_where_it_stopped(start):
    whole = steps_of(1000, 8, 250, length=lengths(1, 1000))
    assert steps_of(1000, 8, 250, start, length=lengths(1, 1000)) == whole[start:]
    assert steps_of(1000, 8, 180, length=lengths(1, 1000)) == whole[:180]  # whatever was to come


def test_by_length_processes_and_accumulation_divide_the_same_steps():
    whole = steps_of(1000, 8, 200, length=lengths(1, 1000))
    shape = {"batch_size": 2, "grad_accumulation": 2, "num_processes": 2, "total_steps": 200}
    parts = [list(StreamBatchSampler(1000, 7, **shape, rank=rank, length=lengths(1, 1000))) for rank in range(2)]
    for step, visits in enumerate(whole):
        found = [parts[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert [visit for part in found for visit in part] == visits


def test_rows_are_ordered_by_groups_or_by_length():
    with pytest.raises(ValueError, match="by groups or by length"):
        StreamBatchSampler(4, 0, batch_size=1, total_steps=1, groups=np.zeros(4, np.int64), length=len)


# ---- a permutation that is computed


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_it_is_a_permutation(rows):
    first, other = (FeistelPermutation(rows, 3, epoch)(np.arange(rows)) for epoch in range(2))
    assert sorted(first.tolist()) == sorted(other.tolist()) == list(range(rows))
    assert rows < 17 or not np.array_equal(first, other)
    assert np.array_equal(FeistelPermutation(rows, 3, 0)(np.arange(rows)[rows // 2 :]), first[rows // 2 :])


def test_it_does_not_drift_with_library_versions():
    assert FeistelPermutation(1000, 0, 0)(np.arange(8)).tolist() == [78, 469, 91, 110, 454, 346, 934, 45]


def test_it_looks_random():
    """Neither is a place like its row, nor a row like the next one."""
    rows = FeistelPermutation(100_000, 0, 0)(np.arange(100_000)).astype(float)
    assert abs(np.corrcoef(rows, np.arange(100_000))[0, 1]) < 0.015
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.015
    counts = np.histogram2d(np.arange(100_000), rows, bins=20)[0]
    assert ((counts - 250) ** 2 / 250).sum() == pytest.approx(19 * 19, abs=4 * (2 * 19 * 19) ** 0.5)  # chi squared


def test_large_sets_need_no_array_of_their_rows():
    rows = 100_000_000
    assert (order_of(9_999_999), order_of(10_000_000)) == ("permutation", "feistel")
    tracemalloc.start()
    sampler = StreamBatchSampler(rows, 0, batch_size=64, start_step=2_345_678, total_steps=2_345_778)
    visits = flat(sampler)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    position = 2_345_678 * 64
    expected = FeistelPermutation(rows, 0, position // rows)(np.arange(position % rows, position % rows + 6400))
    assert [row for row, _ in visits] == expected.tolist()
    assert {epoch for _, epoch in visits} == {1}


@pytest.mark.parametrize("groups", [None, np.arange(100) % 3])
def test_orders_show_every_row_once_an_epoch_and_go_on(groups):
    shape = {"batch_size": 4, "total_steps": 75, "groups": groups}
    for name in ("permutation", "feistel"):
        whole = list(StreamBatchSampler(100, 0, **shape, order=name))
        shown = Counter(row for batch in whole for row, _ in batch)
        for group in range(1 if groups is None else 3):
            times = [shown[row] for row in range(100) if groups is None or groups[row] == group]
            assert max(times) - min(times) <= (0 if groups is None else 1)
        for start in (1, 24, 25, 26, 60):
            assert list(StreamBatchSampler(100, 0, **shape, order=name, start_step=start)) == whole[start:]
