"""The metrics of drawn pictures, on sets whose answers are known."""

import math

import pytest
import torch
from torch import Tensor

from kandinsky_exp.evaluation import intervals, measuring, metrics
from kandinsky_exp.evaluation.measuring import Embedded

SIDE = 32


def cloud(count: int, seed: int, shift: float = 0.0, spread: float = 1.0) -> Tensor:
    """Around a direction that all have in common, as CLIP's embeddings lie."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.zeros(SIDE)
    middle[0], middle[1] = 6.0, shift
    return middle + spread * torch.randn(count, SIDE, generator=generator)


def cmmd_by_hand(first: Tensor, second: Tensor) -> float:
    def k(x: Tensor, y: Tensor) -> float:
        x, y = x.double() / x.double().norm(), y.double() / y.double().norm()
        return math.exp(-float(((x - y) ** 2).sum()) / 200)

    n, m = len(first), len(second)
    own = sum(k(first[i], first[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(k(second[i], second[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return 1000 * (own + other - 2 * sum(k(x, y) for x in first for y in second) / (n * m))


def test_cmmd_is_its_formula() -> None:
    first, second = cloud(5, 0), cloud(7, 1, shift=2)
    assert metrics.cmmd(first, second) == pytest.approx(cmmd_by_hand(first, second), rel=1e-4)


@pytest.mark.parametrize("count", [8, 32, 128])
def test_cmmd_of_equal_sets_is_zero_on_average_whatever_their_size(count: int) -> None:
    draws = torch.tensor([metrics.cmmd(cloud(count, 2 * seed), cloud(count, 2 * seed + 1)) for seed in range(50)])
    assert abs(float(draws.mean())) < 3 * float(draws.std()) / math.sqrt(50)
    assert bool((draws < 0).any())  # it is no estimate that leans upwards


def test_a_set_against_itself_is_at_its_floor_and_a_shifted_one_far_above() -> None:
    real, drawn = cloud(200, 0), cloud(200, 1)
    floor = measuring.measure(embedded(real, real), [[0, 1]], 0).metrics["cmmd_floor"]
    assert floor.low is not None
    assert floor.high is not None
    assert floor.low < 0 < floor.high
    assert floor.low < metrics.cmmd(drawn, real) < floor.high
    assert metrics.cmmd(cloud(200, 1, shift=6), real) > 10 * floor.high


def test_an_interval_of_a_share_is_one_of_shares() -> None:
    found = measuring.measure(embedded(cloud(40, 1, spread=0.3), cloud(40, 0)), [[0, 1]], 0).metrics
    assert (found["precision"].value, found["precision"].high) == (1.0, 1.0)
    assert found["recall"].low == 0.0


def embedded(drawn: Tensor, real: Tensor, train: Tensor | None = None) -> Embedded:
    return Embedded(drawn, real, real, cloud(300, 99) if train is None else train)


def test_precision_and_recall_tell_quality_from_variety() -> None:
    real = cloud(300, 0)

    def found(drawn: Tensor) -> tuple[float, float]:
        sets = metrics.distances(drawn, drawn), metrics.distances(real, real), metrics.distances(drawn, real)
        return metrics.precision_and_recall(*sets)

    same, narrow, far = found(cloud(300, 1)), found(cloud(300, 1, spread=0.3)), found(cloud(300, 1, shift=30))
    assert min(same) > 0.55
    assert same[0] == pytest.approx(same[1], abs=0.15)
    assert narrow[0] > 0.95
    assert narrow[1] < 0.05
    assert max(far) == 0


def test_precision_and_recall_by_hand() -> None:
    """On a line, with the nearest neighbour: radii are the distances within a set."""
    drawn, real = torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0.4, 2.0, 2.1])
    pairs = [(one[:, None] - other[None, :]).abs() for one, other in ((drawn, drawn), (real, real), (drawn, real))]
    # Radii of the drawn: 1, 1, 9; of the real: 1.6, 0.1, 0.1. Drawn 0 and 1 lie within 1.6 of 0.4, 10 in none;
    # all real ones lie within 9 of 10, or within 1 of 1.
    assert metrics.precision_and_recall(*pairs, neighbours=1) == (pytest.approx(2 / 3), 1.0)


def test_the_nearest_is_a_planted_copy() -> None:
    others = cloud(metrics.ROWS + 50, 5)
    pictures = cloud(6, 6)
    pictures[2], pictures[4] = 3 * others[metrics.ROWS + 7], others[11]
    near, place = metrics.nearest(pictures, others)
    assert place[[2, 4]].tolist() == [metrics.ROWS + 7, 11]
    assert near[[2, 4]].abs().max() < 1e-6
    expected = (1 - metrics.unit(pictures) @ metrics.unit(others).T).min(1)
    assert torch.allclose(near, expected.values.clamp(min=0), atol=1e-6)
    assert torch.equal(place, expected.indices)


def test_copies_are_told_and_what_is_merely_alike_is_not() -> None:
    train, real = cloud(300, 1), cloud(100, 2)
    healthy = measuring.measure(embedded(cloud(100, 3), real, train), [[0, 1]], 0)
    assert not healthy.copies
    copied = measuring.measure(embedded(train[:100] + 0.01 * cloud(100, 4), real, train), [[0, 1]], 0)
    assert copied.copies
    assert len(copied.closest) == measuring.CLOSEST
    assert all(pair.drawn == pair.train for pair in copied.closest)
    assert [pair.distance for pair in copied.closest] == sorted(pair.distance for pair in copied.closest)


def test_clip_score_and_diversity_by_hand() -> None:
    pictures, texts = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[10.0, 0.0], [-1.0, 0.0]])
    assert metrics.clip_scores(pictures, texts).tolist() == pytest.approx([60.0, 0.0])
    assert metrics.diversity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 0.0]])) == pytest.approx(1 - 1 / 3)
    with pytest.raises(ValueError, match="two pictures"):
        metrics.diversity(pictures[:1])
    with pytest.raises(ValueError, match="two pictures of each set"):
        metrics.cmmd(pictures[:1], pictures)


# --- intervals


def test_the_deviation_over_halves_is_that_of_the_whole() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    by_halves = intervals.measured(0.0, lambda: torch.stack([values[h].mean() for h in intervals.halves(400, 1)]), 400)
    assert by_halves.high == pytest.approx(1.96 * float(values.std()) / 20, rel=0.15)


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_an_interval_of_cmmd_covers_the_truth(shift: float) -> None:
    truth = metrics.cmmd(cloud(3000, 1000, shift), cloud(3000, 1001))
    hit = 0
    for seed in range(40):
        found = measuring._discrepancy(cloud(100, 2 * seed, shift), cloud(100, 2 * seed + 1), seed)
        assert found.low is not None
        assert found.high is not None
        hit += found.low <= truth <= found.high
    assert hit >= 35  # of 40: 95 % of them in the mean


def test_halves_have_no_picture_twice() -> None:
    for half in intervals.halves(11, 0, 20):
        assert len(set(half.tolist())) == len(half) == 5


def test_too_few_have_no_interval() -> None:
    few = intervals.mean(torch.arange(7.0))
    assert (few.value, few.low, few.high, few.count) == (3.0, None, None, 7)
    assert str(few) == "3"
    assert str(intervals.Measured(11.1575, 11.1575 - 5.886, 17.04, 16)) == "11.2 ± 5.9"
    assert str(intervals.Measured(0.20258, 0.20258 - 0.0528, 0.255, 16)) == "0.203 ± 0.053"
    assert str(intervals.Measured(1234.5, 1234.5 - 210.0, 1444.5, 16)) == "1234 ± 210"
