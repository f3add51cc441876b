"""What the steps since the last log point came to; nothing here waits for the device before it is read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from kandinsky_exp.errors import NonFiniteLoss


@dataclass
class Meter:
    """Losses stay on the device until they are read, every `log_every` steps."""

    accelerator: Accelerator
    total_batch: int
    step: int
    last_loss: float | None = None
    _losses: list[Tensor] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)
    _rows: list[list[Tensor]] = field(default_factory=list)
    _unchecked: int = 0
    _started: float = field(default_factory=time.monotonic)

    def add(self, loss: Tensor, norm: Tensor, rows: list[Tensor]) -> None:
        self._losses.append(loss)
        self._norms.append(torch.as_tensor(norm, device=loss.device))
        self._rows.append(rows)
        self._unchecked += 1

    def check(self, step: int, lr: float) -> None:
        """Stop at the first step since the last check whose loss, or gradient without a scaler, is not finite."""
        if self._unchecked == 0:
            return
        losses, norms = (torch.stack(values[-self._unchecked :]) for values in (self._losses, self._norms))
        # A loss scaler skips steps with infinite gradients; that is its work, not a failure.
        bad = ~losses.isfinite() if self.accelerator.scaler is not None else ~(losses.isfinite() & norms.isfinite())
        worst = self.accelerator.gather(bad.any().reshape(1))
        if bool(worst.any()):
            first = int(bad.nonzero()[0]) if bool(bad.any()) else 0
            rows = torch.cat([part.flatten() for part in self._rows[first - self._unchecked]]).tolist()
            where = f"step {step - self._unchecked + first + 1}"
            values = f"loss {float(losses[first]):.4g}, gradient norm {float(norms[first]):.4g}"
            raise NonFiniteLoss(
                f"the loss or its gradient is not finite at {where} ({values}, lr {lr:.3g}, rows {rows}). The last "
                "checkpoint is from before. Lower optimizer.lr, raise scheduler.warmup_steps, or look at the rows"
            )
        self._unchecked = 0

    def read(self, step: int, rate: float) -> dict[str, float]:
        """Mean over the steps since the last reading and over all processes; empties the meter."""
        means = torch.stack([torch.stack(self._losses).mean(), torch.stack(self._norms).mean().float()])
        loss, norm = self.accelerator.reduce(means, reduction="mean").tolist()
        elapsed = max(time.monotonic() - self._started, 1e-9)
        steps = step - self.step
        self.last_loss, self.step = loss, step
        self._losses, self._norms, self._rows = [], [], []
        self._started = time.monotonic()
        return {
            "train/loss": loss,
            "train/lr": rate,
            "train/grad_norm": norm,
            "train/samples_per_second": steps * self.total_batch / elapsed,
            "steps_per_second": steps / elapsed,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before
