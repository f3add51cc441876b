"""Processes that record at the same time in one store, and what is in it afterwards."""

import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path

from commands import FORKS, Forked
from mlflow import MlflowClient

from kandinsky_exp.tracking.store_probe import probe
from kandinsky_exp.tracking.tracker import MlflowTracker, tracked

PROCESSES = 4
STEPS = 600  # of two metrics each: more than one request may hold
EXPERIMENT = "points"


def value(key: str, number: int, step: int) -> float:
    return number + step / 7 if key == "train/loss" else 1e-5 / (1 + step + number)


def record(uri: str, root: Path, number: int, together: Barrier) -> None:
    """What one of the processes does; as if on a machine of its own, which shares no lock files."""
    tempfile.tempdir = str(root / f"tmp-{number}")
    Path(tempfile.tempdir).mkdir()
    probe(uri, 60)  # loads MLflow
    together.wait()
    tracker = MlflowTracker.open(uri, EXPERIMENT, str(number), root / "mlartifacts", root / f"outbox-{number}")
    with tracked(tracker):
        for step in range(STEPS):
            tracker.log_metrics({key: value(key, number, step) for key in ("train/loss", "train/lr")}, step)


def check_all_is_recorded(uri: str, root: Path) -> None:
    """Four processes touch the store together, and every point of each is there once, with its value."""
    together = FORKS.Barrier(PROCESSES)
    processes = [Forked(record, uri, root, number, together) for number in range(PROCESSES)]
    printed = [process.finish() for process in processes]
    assert [process.code for process in processes] == [0] * PROCESSES, printed
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(run.info.run_name for run in runs) == [str(number) for number in range(PROCESSES)]
    for run in runs:
        assert run.info.status == "FINISHED"
        for key in ("train/loss", "train/lr"):
            found = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)}
            assert found == {(step, value(key, int(run.info.run_name), step)) for step in range(STEPS)}
            assert len(client.get_metric_history(run.info.run_id, key)) == STEPS
