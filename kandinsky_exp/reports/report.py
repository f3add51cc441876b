"""A report over runs: one HTML file and pictures for a README, in a folder and in the parent run's artifacts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky_exp.reports import html, images, png, run_data
from kandinsky_exp.system.files import write_atomically
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPORT, CURVES, IMAGES = "report.html", "curves.png", "images.png"
ARTIFACTS = "compare"  # folder in the parent run's artifacts

log = logging.getLogger(__name__)


def write_report(
    client: "MlflowClient", run_ids: Sequence[str], folder: Path, title: str, parent_run_id: str | None = None
) -> Path:
    """Write `report.html`, `curves.png` and, where there are images, `images.png`; an earlier report is replaced.

    Runs may have ended in any way, or still be running: what is not known of one is left open.

    Args:
        run_ids: at least one; their order is that of the report.
        folder: made where it does not exist.
        parent_run_id: the run of the sweep that the runs belong to, which gets the files as artifacts below `compare/`;
            where it does not take them, that is a warning.

    Returns:
        The HTML file.

    Raises:
        ValueError: there is no run.
        MlflowException: the store does not answer, or does not have one of the runs.
        OSError: the folder cannot be written.
    """
    if not run_ids:
        raise ValueError("write_report: no runs")
    with store.impatient():
        runs = run_data.read(client, run_ids)
        pictures = images.collect(client, runs)
    folder.mkdir(parents=True, exist_ok=True)
    page = html.page(title, runs, pictures)
    write_atomically(folder / REPORT, page.encode("utf-8", "replace").decode("utf-8"))
    png.curves(runs, folder / CURVES)
    png.images(runs, pictures, folder / IMAGES)
    if parent_run_id is not None:
        _log(client, parent_run_id, files(folder))
    return folder / REPORT


def files(folder: Path) -> list[Path]:
    """What a report left in its folder."""
    return [path for name in (REPORT, CURVES, IMAGES) if (path := folder / name).is_file()]


def _log(client: "MlflowClient", run_id: str, paths: Sequence[Path]) -> None:
    try:
        for path in paths:
            client.log_artifact(run_id, str(path), ARTIFACTS)
    except Exception as error:  # of whatever kind of artifact store it is: the files are here all the same
        log.warning("MLflow: the report was not added to the artifacts of run %s (%s)", run_id, reason(error))
