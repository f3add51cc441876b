"""What drawn pictures are measured by, over embeddings of one encoder: (N, E) tensors, one row a picture."""

import torch
from torch import Tensor
from torch.nn import functional

SIGMA = 10.0  # of the Gaussian kernel of CMMD
SCALE = 1000.0  # CMMD is shown in thousandths, as its authors do
NEIGHBOURS = 3  # k of precision and recall
ROWS = 4096  # of a large set at once


def unit(embeds: Tensor) -> Tensor:
    """Embeddings of length 1, float32."""
    return functional.normalize(embeds.float(), dim=-1)


def clip_scores(pictures: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each picture and its text, at least 0 (Hessel et al. 2021, without their 2.5). (N,)"""
    return 100 * (unit(pictures) * unit(texts)).sum(-1).clamp(min=0)


def kernel(first: Tensor, second: Tensor) -> Tensor:
    """The Gaussian kernel exp(-|x - y|² / 2σ²) of each pair of unit embeddings, (N, M) float64."""
    # In float64: at σ = 10 all of them lie within 0.02 of 1, and what is measured is how they differ.
    squared = 2 - 2 * unit(first).double() @ unit(second).double().T
    return torch.exp(-squared.clamp(min=0) / (2 * SIGMA**2))


def cmmd(drawn: Tensor, real: Tensor) -> float:
    """CLIP maximum mean discrepancy, unbiased, so that it may lie below 0 (Jayasumana et al. 2024).

    Raises:
        ValueError: a set has fewer than two pictures.
    """
    weights = [torch.ones(1, len(some), dtype=torch.float64) for some in (drawn, real)]
    return float(Discrepancy(drawn, real).of(*weights))


class Discrepancy:
    """CMMD of parts of two sets, whose kernels are computed once."""

    def __init__(self, drawn: Tensor, real: Tensor) -> None:
        self.within = [_without_own(kernel(some, some)) for some in (drawn, real)]
        self.between = kernel(drawn, real)

    def of(self, drawn: Tensor, real: Tensor) -> Tensor:
        """Of the pictures whose weight is 1, the others' being 0; a pair of a picture with itself counts for nothing.

        Args:
            drawn, real: (D, N) and (D, M) float64, a row for each of D parts.

        Returns:
            (D,)
        """
        counts = [part.sum(-1) for part in (drawn, real)]
        if min(float(count.min()) for count in counts) < 2:
            raise ValueError("CMMD needs two pictures of each set")
        within = [
            ((part @ own) * part).sum(-1) / (count * (count - 1))
            for part, own, count in zip((drawn, real), self.within, counts, strict=True)
        ]
        between = ((drawn @ self.between) * real).sum(-1) / (counts[0] * counts[1])
        return SCALE * (within[0] + within[1] - 2 * between)


def _without_own(pairs: Tensor) -> Tensor:
    return pairs.fill_diagonal_(0)


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances of unit embeddings, (N, M)."""
    return (2 - 2 * unit(first) @ unit(second).T).clamp(min=0).sqrt()


def precision_and_recall(
    drawn: Tensor, real: Tensor, between: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """The share of drawn pictures among the real ones, and of real ones among the drawn (Kynkäänniemi et al. 2019).

    A picture is among a set if it lies within the distance of one of the set to its k-th nearest there.

    Args:
        drawn, real, between: distances (N, N), (M, M), (N, M).
        neighbours: k.
    """
    radii = [_radius(own, neighbours) for own in (drawn, real)]
    precision = (between <= radii[1][None, :]).any(1)
    recall = (between <= radii[0][:, None]).any(0)
    return float(precision.float().mean()), float(recall.float().mean())


def _radius(own: Tensor, neighbours: int) -> Tensor:
    """Of each picture to its k-th nearest, itself left out."""
    others = own.clone().fill_diagonal_(0)  # rounding may leave more than 0 there
    return others.kthvalue(min(neighbours + 1, len(own)), dim=1).values


def diversity(pictures: Tensor) -> float:
    """1 minus the mean cosine of the pairs of pictures of one prompt.

    Raises:
        ValueError: there is one picture only.
    """
    count = len(pictures)
    if count < 2:
        raise ValueError("diversity needs two pictures")
    cosines = unit(pictures) @ unit(pictures).T
    return float(1 - (cosines.sum() - cosines.trace()) / (count * (count - 1)))


def nearest(pictures: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The distance, 1 - cosine, of each picture to the nearest of others, and which one that is: (N,), (N,) int64."""
    asked, place = unit(pictures), torch.zeros(len(pictures), dtype=torch.long)
    best = torch.full((len(pictures),), -2.0)
    for start in range(0, len(others), ROWS):
        cosines, rows = (asked @ unit(others[start : start + ROWS]).T).max(1)
        place = torch.where(cosines > best, rows + start, place)
        best = torch.maximum(cosines, best)
    return (1 - best).clamp(min=0), place
