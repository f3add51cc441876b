"""What happens between the steps of a run: validation and checkpoints, and what is owed of them when it goes on."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig

from kandinsky_exp import run_settings
from kandinsky_exp.errors import Pruned
from kandinsky_exp.runs import run_folder
from kandinsky_exp.system import distributed, host_memory
from kandinsky_exp.tracking.tracker import Tracker
from kandinsky_exp.training import checkpoint, loop
from kandinsky_exp.training.async_checkpoint import CheckpointWriter
from kandinsky_exp.training.feature_loader import FeatureReader
from kandinsky_exp.training.validation import Validator

logger = logging.getLogger(__name__)


class Callbacks:
    """What happens between steps: validation, checkpoints."""

    def __init__(
        self,
        cfg: DictConfig,
        accelerator: Accelerator,
        space: run_folder.RunFolder,
        training: loop.Training,
        tracker: Tracker,
        reader: FeatureReader | None,
        judge: Callable[[int, float], bool] | None = None,
    ) -> None:
        self.accelerator, self.space, self.training, self.tracker = accelerator, space, training, tracker
        self.writer = CheckpointWriter(space.checkpoints, cfg.checkpoint.keep, cfg.checkpoint.behind, self.recorded)
        self.settled = self.writer.settled
        self.judge = judge
        self.validated: int | None = None  # the last step that was
        self.validate_every = cfg.validation.every
        self.total_batch = run_settings.total_batch(cfg, accelerator.num_processes)
        self.validator = Validator(
            training,
            accelerator,
            tracker,
            space.folder / "samples",
            reader,
            run_settings.prompts(cfg.validation.prompts),
            run_settings.sample_settings(cfg),
            draws=cfg.validation.draws,
            reconstructions=cfg.validation.reconstructions,
        )

    def restored(self, state: dict[str, Any]) -> None:
        """Know what was measured at the checkpoint that is gone on from; that of another run counts for nothing."""
        if state["validated"] and not self.space.is_fork:
            self.validated = self.training.step
            self.validator.loss = state["validation_loss"]

    def owes_validation(self, step: int, steps: int) -> bool:
        """Before the first step of a start: at the very beginning, and where a stop came before a validation."""
        begins = self.space.is_fork or step == 0
        return self.validated != step and (begins or loop.due(step, self.validate_every, step >= steps))

    def validate(self, step: int) -> None:
        """Measure and draw.

        Raises:
            Pruned: a sweeper gives the run up.
        """
        host_memory.trim()  # what the steps left is room for what draws
        self.validator(step)
        self.validated = step
        loss, best = self.validator.loss, self.space.record.best_loss
        if loss is not None:
            self.space.record.best_loss = loss if best is None else min(loss, best)
            if self.judge is not None and distributed.on_main_process(lambda: self._is_hopeless(step, loss)):
                raise Pruned(step, loss)

    def _is_hopeless(self, step: int, loss: float) -> bool:
        hopeless = self.judge is not None and self.judge(step, loss)
        if hopeless:
            self.tracker.set_tags({"pruned": f"step {step}"})
        return hopeless

    def checkpoint(self, step: int) -> None:
        distributed.on_main_process(lambda: self._save(self.validated == step))

    def _save(self, validated: bool) -> None:
        host_memory.trim()  # of what the steps left, for the copy
        self.tracker.sync()  # no checkpoint is there whose records could still be lost
        self.writer.save(
            checkpoint.snapshot(
                self.training,
                self.training.stage.part,
                self.accelerator,
                validated=validated,
                validation_loss=self.validator.loss if validated else None,
                total_batch=self.total_batch,
            )
        )

    def wait(self) -> None:
        distributed.on_main_process(self.writer.wait)

    def recorded(self, folder: Path, step: int) -> None:
        self.space.record.step = step
        self.space.write_record()
        self.tracker.flush()
        logger.info("step %d: checkpoint %s", step, folder)
