"""The metrics and the report of an evaluation in the MLflow record of the run that was evaluated."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from kandinsky_exp.evaluation.report import Row, flat
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import reason

FOLDER = "evaluate"  # of the report, in a run's artifacts
logger = logging.getLogger(__name__)


def record(uri: str, told: Sequence[tuple[str, int, Row]], written: Sequence[Path]) -> None:
    """Add them to each run; a run or a store that does not take them now is a warning, for all of it is on disk.

    Args:
        uri: of the store.
        told: (id, step, row) of the runs.
        written: the files of the report.
    """
    from mlflow.entities import Metric

    client, _ = store.connect(uri)
    for run_id, step, row in told:
        try:
            now = time.time_ns() // 1_000_000
            client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in flat(row).items()])
            for path in written:
                client.log_artifact(run_id, str(path), f"{FOLDER}/{path.parent.name}")
        except Exception as error:  # of whatever kind of store it is
            logger.warning("MLflow: run %s did not get all of this evaluation (%s)", run_id, reason(error))
