"""What happens between the steps of a run: validation, pruning and checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import Pruned
from kandinsky_exp.runs import run_folder
from kandinsky_exp.system import distributed, host_memory
from kandinsky_exp.training import checkpoint, loop
from kandinsky_exp.training.async_checkpoint import CheckpointWriter
from kandinsky_exp.training.progress import Progress
from kandinsky_exp.training.validation import Validator

logger = logging.getLogger(__name__)


class Callbacks:
    """Validation and checkpoints at the steps that the loop calls them.

    Args:
        keep: how many checkpoints stay, besides the best one.
        behind: write them in a thread while training goes on.
        order: of the visits, for `state.json`.
        judge: whether to give the run up, by a step and its validation loss.
        progress: of the validation losses.
        keeps_best: write a checkpoint wherever the validation loss is the best so far.
    """

    def __init__(
        self,
        space: run_folder.RunFolder,
        validator: Validator,
        settings: loop.LoopSettings,
        *,
        keep: int,
        behind: bool,
        order: dict[str, Any],
        judge: Callable[[int, float], bool] | None = None,
        progress: Progress | None = None,
        keeps_best: bool = False,
    ) -> None:
        self.space, self.validator, self.settings, self.judge = space, validator, settings, judge
        self.order, self.progress, self.keeps_best = order, progress or Progress(), keeps_best
        self.training, self.accelerator, self.tracker = validator.training, validator.accelerator, validator.tracker
        self.writer = CheckpointWriter(space.checkpoints, keep, behind, self.recorded)
        self.settled = self.writer.settled
        self.validated: int | None = None  # the last step that was

    def restored(self, state: dict[str, Any]) -> None:
        """Know what was measured at the checkpoint that is gone on from; that of another run counts for nothing."""
        if not self.space.is_fork and "progress" in state:
            self.progress.restore(state["progress"])
        if state["validated"] and not self.space.is_fork:
            self.validated = self.training.step
            self.validator.loss = state["validation_loss"]

    def owes_validation(self, step: int) -> bool:
        """Before the first step of a start: at the very beginning, and where a stop came before a validation."""
        last = step >= self.settings.max_steps
        return self.validated != step and (self.space.is_fork or loop.due(step, self.settings.validate_every, last))

    def validate(self, step: int) -> None:
        """Measure and draw.

        Raises:
            Pruned: a sweeper gives the run up.
        """
        host_memory.give_back_blocks()  # what the steps left is room for what draws
        self.validator(step)
        self.validated = step
        loss, best = self.validator.loss, self.space.record.best_loss
        self.progress.metrics = dict(self.validator.measured)
        if loss is not None:
            self.space.record.best_loss = loss if best is None else min(loss, best)
            self.progress.validated(step, loss)
            judge = self.judge
            if judge is not None and distributed.on_main_process(lambda: judge(step, loss)):
                self.tracker.set_tags({"pruned": f"step {step}"})
                raise Pruned(step, loss)

    @property
    def wants_checkpoint(self) -> bool:
        """Of a step that was validated: it is the best, or the last one."""
        return self.ended or (self.keeps_best and self.progress.best is not None and self.progress.stale == 0)

    @property
    def ended(self) -> bool:
        return self.progress.ended is not None

    def trained(self, loss: float) -> None:
        self.progress.trained(loss)

    def checkpoint(self, step: int) -> None:
        distributed.on_main_process(lambda: self._save(self.validated == step))

    def _save(self, validated: bool) -> None:
        host_memory.give_back_blocks()  # of what the steps left, for the copy
        self.tracker.sync()  # no checkpoint is there whose records could still be lost
        self.writer.save(
            checkpoint.snapshot(
                self.training,
                self.accelerator,
                validated=validated,
                validation_loss=self.validator.loss if validated else None,
                total_batch=self.settings.total_batch,
                order=self.order,
                progress=self.progress.state(),
            )
        )

    def wait(self) -> None:
        distributed.on_main_process(self.writer.wait)

    def recorded(self, folder: Path, step: int) -> None:
        self.space.record.step = step
        self.space.write_record()
        self.tracker.flush()
        logger.info("step %d: checkpoint %s", step, folder)
