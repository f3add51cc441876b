"""The result of a run: write it, read it back, share it where that is asked for."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig

from kandinsky_exp import records
from kandinsky_exp.errors import RunFailure
from kandinsky_exp.models import adapters, pipelines, weight_files
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs import hub, integrity
from kandinsky_exp.runs.run_folder import Record, RunFolder
from kandinsky_exp.tracking import registry
from kandinsky_exp.tracking.tracker import Tracker
from kandinsky_exp.training import checkpoint, ema
from kandinsky_exp.training.loop import Training
from kandinsky_exp.training.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest validation loss.

    Args:
        metrics: that its validation recorded.
    """

    folder: Path
    step: int
    loss: float
    metrics: dict[str, float]


def best(space: RunFolder) -> Best:
    """Of a run that has ended; a damaged one is passed over, and named.

    Raises:
        RunFailure: none was validated.
    """
    found = checkpoint.complete(space.checkpoints)
    for folder in checkpoint.by_loss(found):
        if (problem := integrity.damage(folder)) is None:
            state = found[folder]
            metrics = state.get("progress", {}).get("metrics", {})  # an earlier version kept none
            return Best(folder, state["step"], state["validation_loss"], metrics)
        logger.warning("%s is damaged (%s): the result cannot be of it", folder, problem)
    raise RunFailure(
        f"checkpoint.result=best: no whole checkpoint in {space.checkpoints} was validated; the same command with "
        "checkpoint.result=last takes the last weights"
    )


def save(
    accelerator: Accelerator, space: RunFolder, training: Training, weights: Weights, best: Best | None = None
) -> None:
    """`adapter/` or `pipeline/`, with the averaged weights where there are any. Main process only.

    Args:
        best: a checkpoint whose weights are taken; None = those of now.
    """
    network = accelerator.unwrap_model(training.network)
    with ema.averaged_weights(training):
        stage = training.stage
        bare = stage.snapshot(stage.network, {}).tensors

        def write(folder: Path) -> None:
            if best is None:
                stage.snapshot(network, {}).write(folder)
            else:
                averaged, last = (best.folder / name for name in (f"{stage.part}_ema", stage.part))
                shutil.copytree(averaged if averaged.is_dir() else last, folder, dirs_exist_ok=True)
            weight_files.refuse_other_names(weight_files.written(folder), bare, folder)

        if adapters.has_adapter(network):
            result = space.folder / "adapter"
            write(result)
        else:
            result = space.folder / "pipeline"
            pipelines.save_result(weights, stage.half, stage.result_pipeline, result, write)
    told = "" if best is None else f" (step {best.step}, the best: validation loss {best.loss:.5f})"
    logger.info("result: %s%s", result, told)


def note_end(record: Record, tracker: Tracker, progress: Progress, step: int, best: Best | None) -> None:
    """Tell and record why a run ended and whose weights its result holds, where that is not simply its last step.

    What was true at an earlier end, and is no longer, is corrected.
    """
    tags = {}
    if progress.ended is not None:
        tags["stopped_early"] = f"step {step}: {progress.ended}"
        logger.info("step %d: stopped early: %s", step, progress.ended)
    elif record.patience is not None:
        tags["stopped_early"] = f"no: it went on to step {step}"
    if best is not None or record.result_step is not None:
        tags["result_step"] = str(step if best is None else best.step)
    if tags:
        tracker.set_tags(tags)
    record.patience = progress.patience if progress.ended is not None else None
    record.result_step = None if best is None else best.step
    if best is None:
        return
    if progress.best is not None and progress.best < best.loss:
        logger.warning(
            "the best validation loss was %.5f at step %d, which has no whole checkpoint: the result is of step %d",
            progress.best,
            progress.best_step,
            best.step,
        )
    if progress.start is not None and best.loss > progress.start:
        logger.warning("no step has a lower validation loss than the start had (%.5f)", progress.start)


def share(cfg: DictConfig, space: RunFolder) -> None:
    """What others get of a finished run, if asked: a version in MLflow's registry, a repository on the hub."""
    result = space.folder / ("adapter" if (space.folder / "adapter").is_dir() else "pipeline")
    if cfg.tracker.register is not None and space.record.run_id is not None:
        registry.register(records.tracker_uri(cfg), cfg.tracker.register, result, space.record.run_id)
    if cfg.hub.push:
        try:
            hub.push(space.folder, cfg.hub.repo_id, cfg.hub.private)
        except RunFailure as failure:
            logger.error("%s", failure)
