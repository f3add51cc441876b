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
from kandinsky_exp.runs import hub
from kandinsky_exp.runs.run_folder import RunFolder
from kandinsky_exp.tracking import registry
from kandinsky_exp.training import checkpoint, ema
from kandinsky_exp.training.loop import Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest validation loss."""

    folder: Path
    step: int
    loss: float


def best(space: RunFolder) -> Best:
    """Of a run that has ended.

    Raises:
        RunFailure: none was validated.
    """
    found = checkpoint.complete(space.checkpoints)
    folder = checkpoint.best_of(found)
    if folder is None:
        raise RunFailure(
            f"checkpoint.result=best: no checkpoint in {space.checkpoints} was validated; the same command with "
            "checkpoint.result=last takes the last weights"
        )
    return Best(folder, found[folder]["step"], found[folder]["validation_loss"])


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
