"""What MLflow is told of a sweep's job, also where its own process could not tell it any more."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from kandinsky_exp import store, tracking, workspace
from kandinsky_exp.errors import TrackingError
from kandinsky_exp.sweep_jobs import Outcome

logger = logging.getLogger(__name__)


def token(sweep: Path, folder: str) -> str | None:
    """What marks the MLflow run of a job: the same in every start, also before the job has a record of its own."""
    record = workspace.read_record(sweep)
    return None if record is None or record.run_id is None else f"{record.run_id}/{folder}"


def job_tags(outcome: Outcome) -> dict[str, str]:
    """Tags of a job's run: its place in the sweep, and each of its overrides."""
    overrides = {f"override.{key}": value for key, value in outcome.varied.items()}
    return {"sweep.job": f"{outcome.number:04d}", **overrides}


def report_link(uri: str, parent_run_id: str) -> str:
    """Where MLflow's pages show the report of a sweep, in Markdown."""
    client, _ = store.connect(uri)
    experiment_id = client.get_run(parent_run_id).info.experiment_id
    return f"[Report of the sweep](#/experiments/{experiment_id}/runs/{parent_run_id}/artifacts/compare/report.html)"


def settle(cfg: DictConfig, folder: Path, outcome: Outcome) -> None:
    """Give a job that failed or was killed its true status, in its folder and in MLflow, with the reason.

    A run that came to no MLflow run of its own, because its configuration or its data is wrong, gets one here.
    """
    status: tracking.Status = "KILLED" if outcome.status == "KILLED" else "FAILED"
    record = workspace.read_record(folder)
    if record is not None and outcome.is_user_error:
        return  # nothing was trained: what the run was before, it still is
    if record is not None and record.status == "RUNNING":
        record.status = status
        workspace.Workspace(folder, record).write_record()
    if cfg.tracker.name == "none":
        return
    sweep = folder.parent
    parent = workspace.read_record(sweep)
    uri = str(cfg.tracker.uri or tracking.default_uri(cfg.output_root))
    try:
        tracker = tracking.MlflowTracker(
            uri,
            cfg.tracker.experiment,
            outcome.name,
            tracking.default_artifact_root(cfg.output_root),
            outbox=folder / "outbox",
            run_id=None if record is None else record.run_id,
            token=token(sweep, outcome.folder) or (None if record is None else record.token),
            tags={**job_tags(outcome), "run_folder": str(folder), "error": outcome.message},
            parent_run_id=None if parent is None else parent.run_id,
        )
    except TrackingError as error:
        logger.warning("%s: its status is not in MLflow: %s", outcome.name, error)
        return
    tracker.finish(status)
    outcome.run_id = tracker.run_id
