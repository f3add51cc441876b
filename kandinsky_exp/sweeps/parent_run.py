"""What MLflow is told of a sweep and of its jobs, also where a job's own process could not tell it any more."""

import logging
import uuid
from pathlib import Path

from omegaconf import DictConfig

from kandinsky_exp.errors import TrackingError
from kandinsky_exp.runs import description, run_folder
from kandinsky_exp.sweeps.outcomes import Outcome
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import JOB
from kandinsky_exp.tracking.store import artifact_root
from kandinsky_exp.tracking.tracker import MlflowTracker, Status, Tracker

logger = logging.getLogger(__name__)


def parent_run(cfg: DictConfig, folder: Path, command: str | None = None) -> Tracker:
    """The MLflow run that holds the jobs together, new or gone on with; its id lies in the folder, for the jobs.

    Args:
        command: that starts the sweep again, for the description; None where it was started from Python.
    """
    uri = store.chosen_uri(cfg.tracker.uri, cfg.output_root)
    record = run_folder.read_record(folder) or run_folder.Record(stage="sweep", token=uuid.uuid4().hex)
    space = run_folder.RunFolder(folder, record)
    space.write_record()  # the token first: whatever is killed now, the next start finds the same run
    tracker = MlflowTracker.open(
        uri,
        cfg.tracker.experiment,
        folder.name,
        artifact_root(cfg.output_root),
        outbox=folder / "outbox",
        run_id=record.run_id,
        token=record.token,
        tags={"sweep": folder.name, "run_folder": str(folder)},
    )
    if record.run_id is None and tracker.run_id is not None:  # later the description is the user's
        tracker.set_tags(description.tags(command, [report_link(uri, tracker.run_id)]))
    record.run_id = tracker.run_id
    space.write_record()
    return tracker


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

    A job that came to no run, because its configuration or its data is wrong or it was killed before, gets an MLflow
    run here, which a later start goes on with: its token is noted.
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
    parent = run_folder.read_record(folder.parent)
    uri = store.chosen_uri(cfg.tracker.uri, cfg.output_root)
    try:
        tracker = MlflowTracker.open(
            uri,
            cfg.tracker.experiment,
            outcome.name,
            artifact_root(cfg.output_root),
            outbox=folder / "outbox",
            run_id=None if record is None else record.run_id,
            token=outcome.token if record is None else record.token,
            tags={**job_tags(outcome), "run_folder": str(folder), "error": outcome.message},
            parent_run_id=None if parent is None else parent.run_id,
        )
    except TrackingError as error:
        logger.warning("%s: its status is not in MLflow: %s", outcome.name, error)
        return
    tracker.finish(status)
    outcome.run_id = tracker.run_id
