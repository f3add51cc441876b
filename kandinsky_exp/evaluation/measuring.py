"""From embeddings to the numbers of a report: each with the interval that its sample leaves open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kandinsky_exp.evaluation import metrics
from kandinsky_exp.evaluation.intervals import DRAWS, Measured, halves, mean, measured

CLOSEST = 10  # pairs that are shown


@dataclass(frozen=True)
class Embedded:
    """Embeddings by one encoder, (N, E) each.

    Args:
        drawn: one picture for each caption, then those that were drawn again.
        captioned: the real pictures of these captions.
        held_out: real ones that did not train, those among them.
        train: those that did.
        texts: of the captions, where the encoder reads text as well.
    """

    drawn: Tensor
    captioned: Tensor
    held_out: Tensor
    train: Tensor
    texts: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """A drawn picture and the training picture nearest to it.

    Args:
        drawn, train: their numbers.
        distance: 1 - cosine.
    """

    drawn: int
    train: int
    distance: float


@dataclass(frozen=True)
class Result:
    """What was measured with one encoder."""

    metrics: Mapping[str, Measured]
    closest: Sequence[Pair]

    @property
    def copies(self) -> bool:
        """Whether drawn pictures lie nearer to training pictures than real pictures that did not train do.

        Beyond what the samples leave open: the two intervals do not overlap.
        """
        drawn, real = self.metrics["nearest_train"], self.metrics["nearest_heldout"]
        return drawn.high is not None and real.low is not None and drawn.high < real.low


def measure(embedded: Embedded, groups: Sequence[Sequence[int]], seed: int) -> Result:
    """All metrics of drawn pictures.

    Args:
        groups: numbers of the drawn pictures of one caption each.
        seed: of the halves that intervals come from.
    """
    count = len(embedded.captioned)
    drawn = embedded.drawn[:count]
    near, place = metrics.nearest(drawn, embedded.train)
    found: dict[str, Measured] = {}
    if embedded.texts is not None:
        found["clip_score"] = mean(metrics.clip_scores(drawn, embedded.texts))
        found["clip_score_heldout"] = mean(metrics.clip_scores(embedded.captioned, embedded.texts))
    found["cmmd"] = _discrepancy(drawn, embedded.held_out, seed)
    found["cmmd_floor"] = _floor(embedded.held_out, seed)
    found |= _among(drawn, embedded.captioned, seed)
    found["diversity"] = mean(torch.tensor([metrics.diversity(embedded.drawn[list(group)]) for group in groups]))
    found["nearest_train"] = mean(near)
    found["nearest_heldout"] = mean(metrics.nearest(embedded.held_out, embedded.train)[0])
    order = near.argsort()[:CLOSEST].tolist()
    return Result(found, [Pair(number, int(place[number]), float(near[number])) for number in order])


def _discrepancy(drawn: Tensor, real: Tensor, seed: int) -> Measured:
    between = metrics.Discrepancy(drawn, real)
    whole = [torch.ones(1, len(some), dtype=torch.float64) for some in (drawn, real)]
    value = float(between.of(*whole))

    def spread() -> Tensor:
        return between.of(_weights(len(drawn), seed), _weights(len(real), seed + 1))

    return measured(value, spread, min(len(drawn), len(real)))


def _weights(count: int, seed: int) -> Tensor:
    """(D, N): 1 for the pictures of each half, 0 for the others."""
    found = torch.zeros(DRAWS, count, dtype=torch.float64)
    for row, half in zip(found, halves(count, seed), strict=True):
        row[half] = 1
    return found


def _floor(real: Tensor, seed: int) -> Measured:
    """CMMD of two halves of the real pictures."""
    (first,) = halves(len(real), seed, 1)
    rest = torch.ones(len(real), dtype=torch.bool).index_fill(0, first, False)
    return _discrepancy(real[first], real[rest], seed)


def _among(drawn: Tensor, real: Tensor, seed: int) -> dict[str, Measured]:
    """Precision and recall of as many drawn pictures as real ones."""
    within = metrics.distances(drawn, drawn), metrics.distances(real, real), metrics.distances(drawn, real)
    values = metrics.precision_and_recall(*within)

    def of_half(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
        own, other, between = within
        return metrics.precision_and_recall(own[ours][:, ours], other[theirs][:, theirs], between[ours][:, theirs])

    count = len(drawn)
    spread = torch.tensor([of_half(*pair) for pair in zip(halves(count, seed), halves(count, seed + 1), strict=True)])
    return {
        "precision": _share(measured(values[0], lambda: spread[:, 0], count)),
        "recall": _share(measured(values[1], lambda: spread[:, 1], count)),
    }


def _share(found: Measured) -> Measured:
    """With an interval from 0 to 1."""
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
