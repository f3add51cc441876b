"""Delivery of an outbox to its MLflow run, in background threads."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky_exp.errors import TrackingError
from kandinsky_exp.tracking.mlflow_run import MlflowRun
from kandinsky_exp.tracking.outbox import Outbox
from kandinsky_exp.tracking.sender import Sender
from kandinsky_exp.tracking.store import connect, explained, impatient

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

DELIVER_PATIENCE = 600.0  # seconds


class Delivery:
    """Two threads, one for each queue, that bring an outbox to the run."""

    def __init__(self, client: "MlflowClient", run_id: str, outbox: Outbox) -> None:
        self.outbox = outbox
        run = MlflowRun(client, run_id)
        records, artifacts = outbox.records, outbox.artifacts

        def end() -> None:
            status = outbox.status()
            if status is not None:
                run.end(status)
                outbox.remove_status()
            outbox.tidy()

        self.records = Sender("metrics", records, run.send, lambda *refused: outbox.refuse(records, *refused), end)
        self.artifacts = Sender(
            "images and files",
            artifacts,
            lambda batch: run.send_files(batch[0], artifacts.files(batch[0])),
            lambda *refused: outbox.refuse(artifacts, *refused),
            outbox.tidy,
            interval=0,
        )

    @property
    def is_failing(self) -> bool:
        return bool(self.records.failures or self.artifacts.failures)

    def flush(self, timeout: float) -> bool:
        """Wait until nothing waits, a try of each queue is over, or `timeout` seconds are; True if nothing waits."""
        end = time.monotonic() + timeout
        tries = [sender.hurry() for sender in (self.records, self.artifacts)]
        over = [tried.wait(max(0.0, end - time.monotonic())) for tried in tries]
        return all(over) and not self.is_failing


def settle(delivery: Delivery, patience: float) -> None:
    """Give the store some seconds for what waits, end the threads, and say what is left and what becomes of it."""
    done = delivery.flush(patience)
    delivery.records.close()
    delivery.artifacts.close()
    outbox, refusals = delivery.outbox, delivery.records.refusals + delivery.artifacts.refusals
    if not done:
        log.warning(
            "MLflow: %d records wait in %s; the same command, with name=%s, delivers them once the store is there",
            outbox.waiting(),
            outbox.folder,
            outbox.folder.parent.name,
        )
    if not done and outbox.held():
        log.warning("MLflow: the store did not take %d records, and they are lost", outbox.held())
    if refusals:
        log.warning("MLflow: %d records were refused; they are in %s", refusals, outbox.folder)


def deliver_left(uri: str, outbox: Path, run_id: str) -> bool:
    """Deliver what waits for a run that has finished, and say so where its process was killed before it could.

    Returns:
        Whether nothing waits any more. A problem is a warning.
    """
    with impatient():
        try:
            client, _ = connect(uri)
            with explained(uri):
                is_running = client.get_run(run_id).info.status == "RUNNING"
        except TrackingError as error:
            log.warning("MLflow: what waits in %s cannot be delivered: %s", outbox, error)
            return False
        box = Outbox(outbox)
        box.open()
        if is_running and box.status() is None:
            box.set_status({"status": "FINISHED", "time": time.time_ns() // 1_000_000})
        delivery = Delivery(client, run_id, box)
        settle(delivery, DELIVER_PATIENCE)
        return box.waiting() == 0
