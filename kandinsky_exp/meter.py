"""What the steps since the last log point came to; nothing here waits for the device before it is read."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from kandinsky_exp.errors import NonFiniteLoss, UserError

PARTS = 4  # of the timestep range, each with a loss of its own
NAMED = 16  # samples of a step that is not finite
FOLD = 64  # micro-steps whose per-sample losses are kept before they are added up


@dataclass
class StepResult:
    """What one optimizer step leaves behind, all but `rows` still on the device.

    Args:
        loss, norm: scalars: the mean loss of the micro-steps, and the gradient's norm before clipping.
        rows: row numbers of each micro-step, on the host.
        samples: (per-sample squared errors, timesteps) of each micro-step, both (B,).
        waited: seconds until the batches were there.
    """

    loss: Tensor
    norm: Tensor
    rows: list[Tensor]
    samples: list[tuple[Tensor, Tensor]]
    waited: float


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
    _unchecked: int = 0
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.accelerator.device.type == "cuda":  # what encoding or drawing took before is not training's
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)

    def add(self, result: StepResult) -> None:
        self._samples += result.samples
        if len(self._samples) >= FOLD:
            self._fold()
        result.samples = []
        self._results.append(result)
        self._unchecked += 1

    def check(self, step: int, rate: float) -> None:
        """Stop at the first step since the last check whose loss, or gradient without a scaler, is not finite.

        Raises:
            NonFiniteLoss: on every process, whichever of them it happened on.
        """
        if self._unchecked == 0:
            return
        bad = self._bad().any().float().reshape(1)
        if float(self.accelerator.reduce(bad, reduction="sum")) > 0:
            self._raise(step, rate)
        self._unchecked = 0

    def read(self, step: int, rate: float) -> dict[str, float]:
        """Mean over the steps since the last reading and over all processes; empties the meter.

        One transfer from the device brings all of it.

        Raises:
            NonFiniteLoss: as `check` does.
        """
        steps, waited = len(self._results), sum(result.waited for result in self._results)
        bad, loss, norm, *parts = self._totals()
        if bad > 0:
            self._raise(step, rate)
        elapsed = max(time.monotonic() - self._started, 1e-9)
        self.last_loss = loss
        self._results, self._by_part, self._unchecked = [], None, 0
        self._started = time.monotonic()
        by_part = {
            f"train/loss_t{part}": error / count
            for part, (error, count) in enumerate(zip(parts[:PARTS], parts[PARTS:], strict=True))
            if count > 0
        }
        return {
            "train/loss": loss,
            **by_part,
            "train/lr": rate,
            "train/grad_norm": norm,
            "train/samples_per_second": steps * self.total_batch / elapsed,
            "train/step_seconds": elapsed / steps,
            "train/data_seconds": waited / steps,
            "train/peak_memory_gb": peak_memory(self.accelerator.device) / 1e9,
        }

    def _totals(self) -> list[float]:
        """Non-finite or not, mean loss, mean norm, and of each quarter of the timesteps the summed error and count."""
        self._fold()
        assert self._by_part is not None  # nosec B101 # narrows the type
        losses = torch.stack([result.loss for result in self._results])
        norms = torch.stack([result.norm for result in self._results])
        means = torch.stack([losses.mean(), norms.mean().float()]) / self.accelerator.num_processes
        flag = self._bad().any().float().reshape(1)
        mine = torch.cat([flag, means, self._by_part])
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

    def _bad(self) -> Tensor:
        """Which of the steps that nobody checked yet are not finite, on the device."""
        losses = torch.stack([result.loss for result in self._results[-self._unchecked :]])
        norms = torch.stack([result.norm for result in self._results[-self._unchecked :]])
        # A loss scaler skips steps with infinite gradients; that is its work, not a failure.
        return ~losses.isfinite() if self.accelerator.scaler is not None else ~(losses.isfinite() & norms.isfinite())

    def _raise(self, step: int, rate: float) -> None:
        bad = self._bad().tolist()
        if any(bad):
            first = bad.index(True)
            result = self._results[first - self._unchecked]
            where = f"at step {step - self._unchecked + first + 1}"
            values = f"loss {float(result.loss):.4g}, gradient norm {float(result.norm):.4g}, lr {rate:.3g}"
            details = f"{values}, samples {self._names(result.rows)}"
        else:  # that process names them
            where = f"on another process, at one of the {self._unchecked} steps up to step {step}"
            details = f"lr {rate:.3g}"
        raise NonFiniteLoss(
            f"the loss or its gradient is not finite {where} ({details}). The last checkpoint is from before. Lower "
            "optimizer.lr, raise scheduler.warmup_steps, or look at the samples"
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
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before


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
