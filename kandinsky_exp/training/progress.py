"""How the validation losses of a run develop: the best one, how long ago that was, and whether it overfits."""

import itertools
import logging
import math
from dataclasses import dataclass, field
from typing import Any

KEPT = ("start", "best", "best_step", "stale", "metrics")
RISES = 3  # validations in a row that tell overfitting from noise
logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a run's validations came to.

    Args:
        patience: validations without a better loss after which the run ends; None = it goes on.
        start: loss before the first step, which is no result of training: the others do not compare with it.
        best, best_step: the lowest loss, and where it was.
        stale: validations since then.
        metrics: what the last validation recorded; on the main process alone.
    """

    patience: int | None = None
    start: float | None = None
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    _trained: list[float] = field(default_factory=list)  # training losses since the last validation
    _curves: list[tuple[float, float]] = field(default_factory=list)  # (training, validation loss) of the last ones
    _is_told: bool = False

    def trained(self, loss: float) -> None:
        """Note a training loss that was logged."""
        self._trained.append(loss)

    def validated(self, step: int, loss: float) -> None:
        """Note a validation: one whose loss is not finite is not better than any."""
        if step == 0:
            self.start = loss
        elif math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.best_step, self.stale = loss, step, 0
        else:
            self.stale += 1
        if self._trained:
            self._curves = [*self._curves[-RISES:], (sum(self._trained) / len(self._trained), loss)]
            self._trained = []
        self._tell_overfitting(step)

    @property
    def ended(self) -> str | None:
        """Why the run ends before its last step, None where it does not."""
        if self.patience is None or self.stale < self.patience:
            return None
        best = "one that is finite" if self.best is None else f"{self.best:.5g} of step {self.best_step}"
        return f"no better validation loss than {best} in {self.stale} validations"

    def _tell_overfitting(self, step: int) -> None:
        """Once: when the validation loss has risen several times in a row while the training loss fell."""
        curves = self._curves
        pairs = list(itertools.pairwise(curves))
        rising = len(pairs) == RISES and all(later[1] > before[1] for before, later in pairs)
        if self._is_told or not rising or not curves[-1][0] < curves[0][0]:
            return
        self._is_told = True
        logger.warning(
            "step %d: the run overfits: over the last %d validations the validation loss rose from %.5f to %.5f while "
            "the training loss fell from %.5f to %.5f. More pictures help, or fewer steps: checkpoint.result=best "
            "keeps the best weights, validation.patience=%d ends such a run",
            step,
            RISES,
            curves[0][1],
            curves[-1][1],
            curves[0][0],
            curves[-1][0],
            RISES,
        )

    def state(self) -> dict[str, Any]:
        """For `state.json`: what decides when the run ends, and what it is ranked by."""
        return {name: getattr(self, name) for name in KEPT}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one of an earlier version knows nothing of it."""
        for name in KEPT:
            setattr(self, name, state[name])
