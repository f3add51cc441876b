"""A report over runs: one HTML file that needs nothing else, and pictures for a README; a sweep's run has them too."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from tqdm import tqdm

from kandinsky_exp.reports import images, png, run_data
from kandinsky_exp.reports.figures import MOST_RAW, SMOOTHING, colour, dash, losses, scores
from kandinsky_exp.reports.run_data import Run, completed, has_validated, number, rank, varied
from kandinsky_exp.system.files import write_atomically
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPORT, CURVES, IMAGES = "report.html", "curves.png", "images.png"
ARTIFACTS = "compare"  # folder in the parent run's artifacts
DASH_ARRAYS = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
SCORES: dict[str, tuple[str, Callable[[Any], str]]] = {  # by heading: field of `Scores`, as text
    "best val. loss": ("best", "{:.5g}".format),
    "at step": ("best_step", str),
    "last val. loss": ("last", "{:.5g}".format),
    "last train loss": ("train", "{:.5g}".format),
    "time": ("seconds", tqdm.format_interval),
    "samples/s": ("speed", "{:.3g}".format),
}

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
    text = page(title, runs, pictures)
    write_atomically(folder / REPORT, text.encode("utf-8", "replace").decode("utf-8"))
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


# --- the page


@dataclass(frozen=True)
class Cell:
    """A cell of the table. It sorts by `sort`, or else by its text; one without text comes last."""

    text: str | None
    sort: str | None = None
    style: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        key: what the name is short for.
        cells: one for each run.
    """

    name: str
    key: str
    cells: Sequence[Cell]
    is_number: bool = False
    is_code: bool = False


def rendered(template: str, **values: Any) -> str:
    """A page from its template in `page/`."""
    templates = Environment(
        loader=PackageLoader("kandinsky_exp.reports", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return templates.get_template(template).render(**values)


def page(title: str, runs: Sequence[Run], grid: images.ImageGrid) -> str:
    """The whole report.

    Args:
        runs: at least one; each keeps its colour in all figures.
    """
    figures = [*losses(runs), *scores(runs)]
    return rendered(
        "page.html",
        title=title,
        summary=_summary(runs),
        notes=_notes(runs),
        runs=runs,
        columns=list(_columns(runs)),
        losses=[figure for figure in figures if figure.kind == "loss"],
        scatters=[figure for figure in figures if figure.kind == "scatter"],
        has_parallel=any(figure.kind == "parallel" for figure in figures),
        left_out=len(runs) - len(list(completed(runs))),
        grid=grid,
        pictured=sorted({run for _, run in grid.cells}),
        data={
            "labels": [run.label for run in runs],
            "figures": [asdict(figure) for figure in figures],
            "steps": grid.steps,
            "images": [images.data_uri(image) for image in grid.images],
            "cells": {f"{row},{run}": sorted(cell.items()) for (row, run), cell in grid.cells.items()},
        },
        plotly=get_plotlyjs(),
        colour=colour,
        dash=dash,
        dash_arrays=DASH_ARRAYS,
        smoothing=SMOOTHING,
        most_raw=MOST_RAW,
    )


def _summary(runs: Sequence[Run]) -> str:
    counts = {status: sum(run.status == status for run in runs) for status in sorted({run.status for run in runs})}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{len(runs)} run{'s' * (len(runs) != 1)} ({told}), as recorded on {datetime.now():%Y-%m-%d at %H:%M}"


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    if not has_validated(runs):
        notes.append("No run has validated: what counts as the score is the last training loss.")
    stages = {run.stage for run in runs if run.stage}
    if len(stages) > 1:
        notes.append(f"Losses of different stages ({', '.join(sorted(stages))}) do not compare with each other.")
    return notes


def _measured(value: float | None) -> Cell:
    return Cell(None) if value is None else Cell(f"{value:.4g}", repr(value))


def _columns(runs: Sequence[Run]) -> Iterator[Column]:
    """All columns of the table but the first, the run's name."""
    yield Column("status", "status", [Cell(run.status, style=run.status) for run in runs])
    yield Column("stage", "stage", [Cell(run.stage or None) for run in runs])
    for param in varied(runs):
        is_number = all(value is None or number(value) is not None for value in param.values)
        yield Column(param.name, param.key, [Cell(value) for value in param.values], is_number)
    objective = "val. loss" if runs[0].objective == run_data.VALIDATION else runs[0].objective
    for name, (field, as_text) in SCORES.items():
        values = [getattr(run.scores, field) for run in runs]
        texts = [None if value is None else as_text(value) for value in values]
        styles = ["best" if field == "best" and rank(runs, run) == 0 else "" for run in runs]
        shown = name.replace("val. loss", objective)
        yield Column(shown, shown, [*map(Cell, texts, map(repr, values), styles)], is_number=True)
    for name in dict.fromkeys(name for run in runs for name in run.evaluation):
        found = [run.evaluation.get(name) for run in runs]
        yield Column(name, f"evaluation/{name}", [_measured(value) for value in found], is_number=True)
    yield Column("MLflow run id", "MLflow run id", [Cell(run.run_id) for run in runs], is_code=True)
