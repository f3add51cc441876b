"""What a stage says of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class StageLoss:
    """What one batch says.

    Args:
        loss: scalar with a gradient: weighted, with every term.
        per_sample: (B,), detached: the plain squared error, comparable between runs whatever their weighting.
        timesteps: (B,).
        measured: of each of the stage's `measures` (2,): a sum of squared errors, and of how many.
    """

    loss: Tensor
    per_sample: Tensor
    timesteps: Tensor
    measured: Mapping[str, Tensor] = field(default_factory=dict)
