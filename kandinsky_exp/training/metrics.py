"""Training metrics, kept on the device until the next log point."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor

from kandinsky_exp.errors import NonFiniteLoss, UserError

PARTS = 4  # of the timestep range, each with a loss of its own
NAMED = 16  # samples of a step that is not finite
FOLD = 64  # micro-steps whose per-sample losses are kept before they are added up
SKIPPED = 20  # steps in a row that a loss scaler may skip: it halves its scale each time, and 2^16 is where it begins


@dataclass
class StepResult:
    """What one optimizer step leaves behind, all but `rows` still on the device.

    Args:
        loss, norm: scalars: the mean loss of the micro-steps, and the gradient's norm before clipping.
        rows: row numbers of each micro-step, on the host.
        samples: (per-sample squared errors, timesteps) of each micro-step, both (B,).
        waited: seconds until the batches were there.
        measured: of each micro-step, see `StageLoss`.
    """

    loss: Tensor
    norm: Tensor
    rows: list[Tensor]
    samples: list[tuple[Tensor, Tensor]]
    waited: float
    measured: list[Mapping[str, Tensor]] = field(default_factory=list)


@dataclass
class Meter:
    """Losses stay on the device until they are read, every `log_every` steps.

    Args:
        num_timesteps: length of the noise schedule, whose quarters have a loss each.
        identify: what a user calls a row of the data, for messages.
    """

    accelerator: Accelerator
    total_batch: int
    num_timesteps: int
    identify: Callable[[int], str] = str
    last_loss: float | None = None
    _results: list[StepResult] = field(default_factory=list)
    _samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _by_part: Tensor | None = None
    _measured: dict[str, Tensor] = field(default_factory=dict)
    _unchecked: int = 0
    _skipped: int = 0  # the last steps that were checked, in a row, whose gradient was not finite
    _started: float = field(default_factory=time.monotonic)
    _paused_at: float | None = None

    def __post_init__(self) -> None:
        if self.accelerator.device.type == "cuda":  # what encoding or drawing took before is not training's
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)

    def add(self, result: StepResult) -> None:
        self._samples += result.samples
        if len(self._samples) >= FOLD:
            self._fold()
        for found in result.measured:
            for name, pair in found.items():
                self._measured[name] = self._measured[name] + pair if name in self._measured else pair
        result.samples, result.measured = [], []
        self._results.append(result)
        self._unchecked += 1

    def state(self) -> dict[str, Any]:
        """What was measured since the last reading, on all processes, once all is checked: for a checkpoint."""
        mine = {
            "losses": [result.loss for result in self._results],
            "norms": [result.norm for result in self._results],
            "waited": sum(result.waited for result in self._results),
            "samples": [list(pair) for pair in self._samples],
            "by_part": self._by_part,
            "measured": dict(self._measured),
            "elapsed": (self._paused_at or time.monotonic()) - self._started,
            "skipped": self._skipped,
            "last_loss": self.last_loss,
        }
        if self.accelerator.num_processes == 1:
            return {"processes": [mine]}
        return {"processes": gather_object([recursively_apply(lambda value: value.detach().cpu(), mine)])}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, so that the next reading is the one of a run that was never stopped.

        On another number of processes each gets the mean of what all had measured of a step, beyond rounding.
        """
        found = state.get("processes", [])
        if not found:
            return
        alike = len(found) == self.accelerator.num_processes
        rank = self.accelerator.process_index
        mine = found[rank] if alike else _shared(found, is_first=rank == 0)
        device = self.accelerator.device
        mine = recursively_apply(lambda value: value.to(device), mine)
        self._results = [
            StepResult(loss, norm, [], [], 0.0) for loss, norm in zip(mine["losses"], mine["norms"], strict=True)
        ]
        if self._results:
            self._results[0].waited = mine["waited"]
        self._samples = [(errors, timesteps) for errors, timesteps in mine["samples"]]
        self._by_part, self._skipped, self.last_loss = mine["by_part"], mine["skipped"], mine["last_loss"]
        self._measured = dict(mine.get("measured", {}))
        self._started = time.monotonic() - mine["elapsed"]

    def check(self, step: int, rate: float) -> None:
        """Stop at the first step since the last check whose loss, or gradient without a scaler, is not finite.

        Raises:
            NonFiniteLoss: on every process, whichever of them it happened on.
        """
        if self._unchecked == 0:
            return
        bad, skipped = self._judged(*self._stacked())
        if float(self.accelerator.reduce(bad.any().float().reshape(1), reduction="sum")) > 0:
            self._raise(step, rate, bad.tolist(), skipped)
        self._unchecked, self._skipped = 0, skipped

    def read(self, step: int, rate: float) -> dict[str, float]:
        """Mean over the steps since the last reading and over all processes; empties the meter.

        One transfer from the device brings all of it.

        Raises:
            NonFiniteLoss: as `check` does.
        """
        steps, waited = len(self._results), sum(result.waited for result in self._results)
        losses, norms = self._stacked()
        bad, skipped = self._judged(losses, norms)
        names = list(self._measured)
        found, loss, norm, *parts = self._totals(bad, losses, norms)
        if found > 0:
            self._raise(step, rate, bad.tolist(), skipped)
        elapsed = max(time.monotonic() - self._started, 1e-9)
        self.last_loss = loss
        self._results, self._by_part, self._measured, self._unchecked, self._skipped = [], None, {}, 0, skipped
        self._started = time.monotonic()
        by_part = {
            f"train/loss_t{part}": error / count
            for part, (error, count) in enumerate(zip(parts[:PARTS], parts[PARTS : 2 * PARTS], strict=True))
            if count > 0
        }
        measured = means(names, parts[2 * PARTS :], "train/loss_")
        return {
            "train/loss": loss,
            **by_part,
            **measured,
            "train/lr": rate,
            "train/grad_norm": norm,
            "train/samples_per_second": steps * self.total_batch / elapsed,
            "train/step_seconds": elapsed / steps,
            "train/data_seconds": waited / steps,
            "train/peak_memory_gb": peak_memory(self.accelerator.device) / 1e9,
        }

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Losses and norms of the steps since the last reading, on the device: (steps,) each."""
        return (
            torch.stack([result.loss for result in self._results]),
            torch.stack([result.norm for result in self._results]),
        )

    def _totals(self, bad: Tensor, losses: Tensor, norms: Tensor) -> list[float]:
        """Non-finite or not, mean loss, mean norm; of each quarter of the timesteps the summed error and count; what
        the stage measured."""
        self._fold()
        by_part = torch.zeros(2 * PARTS, device=self.accelerator.device) if self._by_part is None else self._by_part
        means = torch.stack([losses.mean(), norms.mean().float()]) / self.accelerator.num_processes
        flag = bad.any().float().reshape(1)
        mine = torch.cat([flag, means, by_part, *self._measured.values()])
        totals: list[float] = self.accelerator.reduce(mine, reduction="sum").tolist()
        return totals

    def _fold(self) -> None:
        """Add per-sample errors up by quarter of the timestep range, on the device: (2 · PARTS,), errors and counts."""
        if not self._samples:
            return
        errors = torch.cat([errors for errors, _ in self._samples]).float()
        timesteps = torch.cat([timesteps for _, timesteps in self._samples])
        chosen = torch.arange(PARTS, device=errors.device)[:, None] == timesteps * PARTS // self.num_timesteps
        sums = torch.cat([torch.where(chosen, errors, 0.0).sum(1), chosen.sum(1).float()])
        self._by_part = sums if self._by_part is None else self._by_part + sums
        self._samples = []

    def _judged(self, losses: Tensor, norms: Tensor) -> tuple[Tensor, int]:
        """Which of the unchecked steps are not finite, on the device; and the last ones in a row that a scaler skipped.

        Fewer than SKIPPED in a row are a loss scaler's work, not a failure. With one every step waits for the device
        anyway, to learn whether it was skipped.
        """
        first = len(self._results) - self._unchecked
        finite, has_update = losses[first:].isfinite(), norms[first:].isfinite()
        if self.accelerator.scaler is None:
            return ~(finite & has_update), 0
        in_a_row, counts = self._skipped, []
        for updated in has_update.tolist():
            in_a_row = 0 if updated else in_a_row + 1
            counts.append(in_a_row)
        return ~finite | (torch.tensor(counts, device=finite.device) >= SKIPPED), in_a_row

    def _raise(self, step: int, rate: float, bad: list[bool], skipped: int) -> None:
        number = None
        if any(bad):
            first = bad.index(True)
            result = self._results[first - self._unchecked]
            number = step - self._unchecked + first + 1
            where = f"at step {number}"
            values = f"loss {float(result.loss):.4g}, gradient norm {float(result.norm):.4g}, lr {rate:.3g}"
            details = f"{values}, samples {self._names(result.rows)}"
        else:  # that process names them
            where = f"on another process, at one of the {self._unchecked} steps up to step {step}"
            details = f"lr {rate:.3g}"
        many = f", the {SKIPPED}th in a row that the loss scaler skipped" if skipped >= SKIPPED else ""
        raise NonFiniteLoss(
            f"the loss or its gradient is not finite {where}{many} ({details}). The last checkpoint is from before. "
            "Lower optimizer.lr, raise scheduler.warmup_steps, or look at the samples",
            step=number,
        )

    def _names(self, rows: list[Tensor]) -> str:
        """The first samples of a step, as the data set calls them."""
        numbers = torch.cat([part.flatten() for part in rows]).tolist()
        names = []
        for row in numbers[:NAMED]:
            try:
                names.append(self.identify(row))
            except UserError:  # it cannot be read: that is not what stops the run
                names.append(f"row {row}")
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        return f"{', '.join(names)}{more}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        self._paused_at = time.monotonic()
        yield
        self._started += time.monotonic() - self._paused_at
        self._paused_at = None


def _shared(found: list[dict[str, Any]], *, is_first: bool) -> dict[str, Any]:
    """What several processes measured, for each of another number of them: summed errors go to the first alone."""
    losses = [torch.stack(list(values)).mean() for values in zip(*(one["losses"] for one in found), strict=True)]
    parts = [one["by_part"] for one in found if one["by_part"] is not None]
    summed = {
        "samples": [pair for one in found for pair in one["samples"]] if is_first else [],
        "by_part": torch.stack(parts).sum(0) if parts and is_first else None,
        "measured": {
            name: torch.stack([one["measured"][name] for one in found]).sum(0)
            for name in (found[0].get("measured", {}) if is_first else {})
        },
    }
    return {**found[0], "losses": losses, **summed}


def means(names: Iterable[str], totals: Sequence[float], prefix: str) -> dict[str, float]:
    """Metrics of what a stage measures, from a sum and a number for each; none where there was nothing to measure."""
    pairs = zip(names, totals[::2], totals[1::2], strict=True)
    return {f"{prefix}{name}": total / count for name, total, count in pairs if count > 0}


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the accelerator's memory, or of this process's where there is none; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
