"""What a terminal, a log file and the tracker see of a training run between its steps."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from kandinsky_exp.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


def report(metrics: dict[str, float], step: int, total: int, tracker: Tracker, bar: "tqdm[Any]") -> None:
    tracker.log_metrics(metrics, step)
    bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", lr=f"{metrics['train/lr']:.1e}")
    if bar.disable:
        logger.info(
            "step %d of %d: loss %.4f, lr %.2e, gradient norm %.3f, %.1f samples/s, about %s left",
            step,
            total,
            metrics["train/loss"],
            metrics["train/lr"],
            metrics["train/grad_norm"],
            metrics["train/samples_per_second"],
            tqdm.format_interval((total - step) * metrics["train/step_seconds"]),
        )


@contextmanager
def progress_bar(step: int, total: int, shown: bool) -> Iterator["tqdm[Any]"]:
    """A bar with steps/s, ETA and loss on a terminal; elsewhere `report` writes plain lines."""
    with tqdm(total=total, initial=step, unit="step", disable=not shown, dynamic_ncols=True) as bar:
        yield bar
