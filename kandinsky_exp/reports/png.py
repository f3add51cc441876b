"""The pictures of a report for a README: loss curves, and the last validation images."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from kandinsky_exp.reports.figures import SMOOTHING, colour, dash, smoothed
from kandinsky_exp.reports.images import ImageGrid
from kandinsky_exp.reports.run_data import TRAIN, VALIDATION, Run, finite, rank
from kandinsky_exp.system.files import replacing
from kandinsky_exp.system.image_grid import labelled_grid
from kandinsky_exp.tracking.mlflow_names import shortened

LINES: dict[str, Literal["-", "--", ":", "-."]] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MOST_NAMES = 24  # in the legend
MOST_COLUMNS, MOST_ROWS = 8, 8  # of images
NAME = 38  # characters


def curves(runs: Sequence[Run], path: Path) -> None:
    """Training loss (smoothed) and validation loss of all runs, over the steps."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, runs, TRAIN, f"training loss (moving average, {SMOOTHING:g})")
    _draw(right, runs, VALIDATION, "validation loss (fixed noise)")
    _legend(figure, runs)
    with replacing(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # letters that the font lacks become boxes
        figure.savefig(aside, format="png", dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.12)


def _draw(axes: Axes, runs: Sequence[Run], key: str, title: str) -> None:
    is_empty = True
    for index, run in enumerate(runs):
        curve = smoothed(run.curves.get(key, [])) if key == TRAIN else finite(run.curves.get(key, []))
        if curve:
            is_empty = False
            marker = "o" if len(curve) == 1 or (key == VALIDATION and len(curve) <= 20) else ""
            steps, values = zip(*curve, strict=True)
            axes.plot(steps, values, color=colour(index), linestyle=LINES[dash(index)], marker=marker, markersize=4)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if is_empty:
        axes.text(0.5, 0.5, "none recorded", transform=axes.transAxes, ha="center", va="center", color="gray")


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Beside the panels; texts are set afterwards, for a label would be left out if it began with an underscore."""
    shown = list(enumerate(runs))[:MOST_NAMES]
    names = [shortened(run.label, NAME) for _, run in shown]
    handles = [Line2D([], [], color=colour(index), linestyle=LINES[dash(index)]) for index, _ in shown]
    if len(runs) > len(shown):
        handles.append(Line2D([], [], linestyle=""))
        names.append(f"and {len(runs) - len(shown)} more")
    legend = figure.legend(handles, ["."] * len(handles), loc="outside right upper", frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)  # a name with two `$` is no formula
        text.set_text(name)


def images(runs: Sequence[Run], grid: ImageGrid, path: Path) -> bool:
    """Prompts in rows, runs in columns, each run at its last step; where there are many, the best of each stage.

    Returns:
        Whether there was an image to show; else no file is left at `path`.
    """
    path.unlink(missing_ok=True)
    having = {run for _, run in grid.cells}
    if not having:
        return False
    columns = sorted(sorted(having, key=lambda run: rank(runs, runs[run]))[:MOST_COLUMNS])
    rows = [row for row in range(len(grid.rows)) if any((row, run) in grid.cells for run in columns)][:MOST_ROWS]
    left_out = f"{len(columns)} best of {len(having)} runs" if len(columns) < len(having) else ""
    found = [grid.last(row, run) for row in rows for run in columns]
    pictures = [Image.open(io.BytesIO(one[1])) if one else Image.new("RGB", (1, 1), "white") for one in found]
    sheet = labelled_grid(
        pictures,
        [f"step {one[0]}" if one else "–" for one in found],
        len(columns),
        heads=[left_out, *(runs[run].label for run in columns)],
        sides=[grid.rows[row].prompt or grid.rows[row].key for row in rows],
    )
    with replacing(path) as aside:
        sheet.save(aside, "PNG")
    return True
