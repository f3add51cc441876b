"""What the tracker is told of a run: where it belongs, what it is made of, what it reads."""

import logging
from pathlib import Path

from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

        token=space.record.token,
        redone_from=redone_from(space),
from kandinsky_exp.data import download
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.shards import Shards
from kandinsky_exp.readers import Readers
from kandinsky_exp.weights import PARTS, Weights

logger = logging.getLogger(__name__)


def tracker_uri(cfg: DictConfig) -> str:
    return str(cfg.tracker.uri or tracking.default_uri(cfg.output_root))


def start_tracker(cfg: DictConfig, accelerator: Accelerator, space: workspace.Workspace) -> tracking.Tracker:
    """The MLflow run, new or gone on with; only the main process records."""
    if cfg.tracker.name == "none" or not accelerator.is_main_process:
        return tracking.NullTracker()
    tags = {"stage": build.stage_class(cfg).name, "run_folder": str(space.folder)}
    if space.parent_run_id is not None:
        tags["resumed_from"] = space.parent_run_id
    tracker = tracking.MlflowTracker(
        tracker_uri(cfg),
        cfg.tracker.experiment,
        space.folder.name,
        tracking.default_artifact_root(cfg.output_root),
        outbox=space.folder / "outbox",
        run_id=space.record.run_id,
        tags=tags,
        parent_run_id=sweep_parent(cfg, space.folder.parent) if HydraConfig.initialized() else None,
def redone_from(space: workspace.Workspace) -> int | None:
    """The step from which on a run that goes on may have been recorded already, by a process that was killed.

    None where what is done again comes to other numbers: then both are recorded.
    """
    if not space.repeats:
        return None
    return 0 if space.start is None else int(integrity.read_state(space.start)["step"])


def deliver_left(cfg: DictConfig, space: workspace.Workspace) -> None:
    """What an earlier start of a finished run could not deliver, and the true status."""
    if cfg.tracker.name != "none" and space.record.run_id is not None:
        tracking.deliver_left(tracker_uri(cfg), space.folder / "outbox", space.record.run_id)
    )
    space.record.run_id = tracker.run_id
    return tracker


