"""What the tracker is told of a run: where it belongs, what it is made of, what it reads."""

import logging
from pathlib import Path

from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kandinsky_exp import build, config, tracking, workspace
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
        run_id=space.record.run_id,
        tags=tags,
        parent_run_id=sweep_parent(cfg, space.folder.parent) if HydraConfig.initialized() else None,
    )
    space.record.run_id = tracker.run_id
    return tracker


def sweep_parent(cfg: DictConfig, folder: Path) -> str | None:
    """The MLflow run that holds a sweep's jobs together: made by the first job, found by the others."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    with workspace.locked(folder / ".sweep.lock"):
        record = workspace.read_record(folder) or workspace.Record()
        if record.run_id is None:
            parent = tracking.MlflowTracker(
                tracker_uri(cfg),
                cfg.tracker.experiment,
                folder.name,
                tracking.default_artifact_root(cfg.output_root),
                tags={"sweep": folder.name},
            )
            # It trains nothing itself: there is nothing that could still go wrong with it.
            parent.finish("FINISHED")
            record = workspace.Record(parent.run_id, "FINISHED", stage="sweep")
            workspace.Workspace(folder, record).write_record()
        return record.run_id


def describe(
    cfg: DictConfig,
    accelerator: Accelerator,
    tracker: tracking.Tracker,
    space: workspace.Workspace,
    weights: Weights,
    data: Readers,
) -> None:
    """Parameters, origins and the data set, for whoever compares this run later."""
    for note in data.notes:
        logger.warning(note)
    if accelerator.is_main_process:
        workspace.write_atomically(space.folder / "config.yaml", config.to_yaml(cfg))
    if isinstance(tracker, tracking.NullTracker):
        return
    tracker.log_params(config.flatten(cfg))
    side = PARTS[build.stage_class(cfg).part][0]
    revision = weights.revision(side)
    tags = {
        "weights": cfg.weights[side] + (f"@{revision}" if revision else ""),
        "data_fingerprint": data.train.fingerprint,
        "git_commit": tracking.git_commit() or "unknown",
    }
    tracker.set_tags(tags)
    tracker.log_artifact(space.folder / "config.yaml")
    tracker.log_text(tracking.pip_freeze(), "pip_freeze.txt")
    if data.skipped:
        tracker.log_text("\n".join([*data.skipped, ""]), "skipped.txt")
    for context, reader in (("training", data.train), ("validation", data.held_out)):
        if reader is not None:
            name, origin = reader.source.name, reader.source.name.rpartition("/")[0]  # <hub id>/<split>
            if Path(name).exists():
                name, origin = Path(name).name, name
            tracker.log_dataset(name, reader.fingerprint, origin, len(reader), context)
