"""The MLflow runs of a sweep: the parent, and those of jobs whose own process died before it could record."""

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kandinsky_exp.errors import TrackingError
from kandinsky_exp.runs import description, run_folder
from kandinsky_exp.sweeps.outcomes import Outcome
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import JOB
from kandinsky_exp.tracking.tracker import MlflowTracker, Status, Tracker

logger = logging.getLogger(__name__)


def parent_run(cfg: DictConfig, folder: Path, command: str | None = None) -> Tracker:
    """The parent of all jobs, new or continued; its id lies in the folder, for the jobs.

    Args:
        command: that starts the sweep again, for the description; None where it was started from Python.
    """
    record = run_folder.read_record(folder) or run_folder.Record(stage="sweep", token=uuid.uuid4().hex)
    space = run_folder.RunFolder(folder, record)
    space.write_record()  # the token first: whatever is killed now, the next start finds the same run
    tracker = open_tracker(cfg, folder, record, folder.name, {"sweep": folder.name})
    if record.run_id is None and tracker.run_id is not None:  # later the description is the user's
        tracker.set_tags(description.tags(command, [report_link(tracker.uri, tracker.run_id)]))
    record.run_id = tracker.run_id
    space.write_record()
    return tracker


def open_tracker(
    cfg: DictConfig, folder: Path, record: run_folder.Record, name: str, tags: Mapping[str, str], **others: Any
) -> MlflowTracker:
    """The MLflow run of a folder, new or continued.

    Args:
        name: of a new one.
        others: `parent_run_id` and `redone_from`, as of `MlflowTracker.open`.
    """
    return MlflowTracker.open(
        store.chosen_uri(cfg.tracker.uri, cfg.output_root),
        cfg.tracker.experiment,
        name,
        store.artifact_root(cfg.output_root),
        outbox=folder / "outbox",
        run_id=record.run_id,
        token=record.token,
        tags={"run_folder": str(folder), **tags},
        **others,
    )


def write_status(folder: Path, status: run_folder.Status) -> None:
    """Note how a sweep ended, in its folder."""
    record = run_folder.read_record(folder) or run_folder.Record(stage="sweep")
    record.status = status
    run_folder.RunFolder(folder, record).write_record()


def job_tags(outcome: Outcome) -> dict[str, str]:
    """Tags of a job's run: its place in the sweep, and each of its overrides."""
    overrides = {f"override.{key}": value for key, value in outcome.varied.items()}
    return {JOB: f"{outcome.number:04d}", **overrides}


def report_link(uri: str, parent_run_id: str) -> str:
    """Where MLflow's pages show the report of a sweep, in Markdown."""
    client, _ = store.connect(uri)
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    return f"[Report of the sweep](#/experiments/{experiment_id}/runs/{parent_run_id}/artifacts/compare/report.html)"


def settle(cfg: DictConfig, folder: Path, outcome: Outcome) -> None:
    """Give a job that failed or was killed its true status, in its folder and in MLflow, with the reason.

    A job without a run, because its configuration or its data is wrong or it was killed at once, gets an MLflow run
    here. A later start finds it by the token.
    """
    status: Status = "KILLED" if outcome.status == "KILLED" else "FAILED"
    record = run_folder.read_record(folder)
    if record is not None and outcome.is_user_error and record.status != "FAILED":
        return  # nothing was trained: what the run was before, it still is
    if record is not None and record.status == "RUNNING":
        record.status = status
        run_folder.RunFolder(folder, record).write_record()
    if cfg.tracker.name == "none":
        return
    if record is None:
        outcome.token = outcome.token or uuid.uuid4().hex
        record = run_folder.Record(token=outcome.token)
    parent = run_folder.read_record(folder.parent) or run_folder.Record()
    tags = {**job_tags(outcome), "error": outcome.message}
    try:
        tracker = open_tracker(cfg, folder, record, outcome.name, tags, parent_run_id=parent.run_id)
    except TrackingError as error:
        logger.warning("%s: its status is not in MLflow: %s", outcome.name, error)
        return
    tracker.finish(status)
    outcome.run_id = tracker.run_id
