"""One HTML file that needs nothing else: table, figures and images of runs that are compared."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import resources
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs
from tqdm import tqdm

from kandinsky_exp.reports.figures import MOST_RAW, SMOOTHING, Figure, colour, dash, losses, scores
from kandinsky_exp.reports.images import ImageGrid
from kandinsky_exp.reports.run_data import Column, Run, completed, has_validated, number, varied

MISSING = "–"
DASH_ARRAYS = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
SCORES = ("best val. loss", "at step", "last val. loss", "last train loss", "time", "samples/s")


def page(title: str, runs: Sequence[Run], album: ImageGrid, notes: Sequence[str] = ()) -> str:
    """The whole report.

    Args:
        runs: at least one; each keeps its colour in all figures.
        notes: what a reader should know first, a sentence each.
    """
    folder = resources.files("kandinsky_exp.reports") / "page"
    text = {name: (folder / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    figures = [*losses(runs), *scores(runs)]
    data = {
        "labels": [run.label for run in runs],
        "figures": [asdict(figure) for figure in figures],
        "steps": album.steps,
        "images": [f"data:image/webp;base64,{base64.b64encode(image).decode()}" for image in album.images],
        "cells": {f"{row},{run}": sorted(cell.items()) for (row, run), cell in album.cells.items()},
    }
    return Template(text["html"]).substitute(
        title=html.escape(title),
        summary=_summary(runs),
        notes="".join(f'<p class="note">{html.escape(note)}</p>\n' for note in [*notes, *_notes(runs)]),
        css=text["css"],
        table=_table(runs, varied(runs)),
        losses=_losses(figures, runs),
        parameters=_parameters(figures, runs),
        images=_images(album, runs),
        data=_json(data),
        plotly=get_plotlyjs(),
        script=text["js"],
    )


def _json(data: Any) -> str:
    """For a script element, which the text `</script` would end."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _summary(runs: Sequence[Run]) -> str:
    counts = {status: sum(run.status == status for run in runs) for status in sorted({run.status for run in runs})}
    told = ", ".join(f"{count} {html.escape(status)}" for status, count in counts.items())
    return f"{len(runs)} run{'s' * (len(runs) != 1)} ({told}), as recorded on {datetime.now():%Y-%m-%d at %H:%M}"


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    if not has_validated(runs):
        notes.append("No run has validated: what counts as the score is the last training loss.")
    stages = {run.stage for run in runs if run.stage}
    if len(stages) > 1:
        notes.append(f"Losses of different stages ({', '.join(sorted(stages))}) do not compare with each other.")
    return notes


# --- the table


def _table(runs: Sequence[Run], columns: Sequence[Column]) -> str:
    numeric = [all(value is None or number(value) is not None for value in column.values) for column in columns]
    heads = [("run", "run", False), ("status", "status", False), ("stage", "stage", False)]
    heads += [(column.name, column.key, is_number) for column, is_number in zip(columns, numeric, strict=True)]
    heads += [*((name, name, True) for name in SCORES), ("MLflow run id", "MLflow run id", False)]
    best = _best(runs)
    rows = []
    for index, run in enumerate(runs):
        params = [_cell(column.values[index], is_number) for column, is_number in zip(columns, numeric, strict=True)]
        cells = [_name(index, run), _cell(run.status, style=run.status), _cell(run.stage or None), *params]
        cells += [*_score_cells(run, index in best), _cell(run.run_id, code=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="runs"><thead><tr>{"".join(_head(*head) for head in heads)}</tr></thead>\n<tbody>\n' + (
        "\n".join(rows) + "\n</tbody></table>"
    )


def _best(runs: Sequence[Run]) -> set[int]:
    """The runs with the lowest validation loss of their stage."""
    lowest: dict[str, float] = {}
    for run in runs:
        if run.scores.best is not None:
            lowest[run.stage] = min(run.scores.best, lowest.get(run.stage, run.scores.best))
    return {
        index for index, run in enumerate(runs) if run.scores.best is not None and run.scores.best == lowest[run.stage]
    }


def _head(name: str, key: str, is_number: bool) -> str:
    style = ' class="number"' if is_number else ""
    return (
        f'<th scope="col" aria-sort="none"{style} title="{html.escape(key)}">'
        f'<button type="button">{html.escape(name)}</button></th>'
    )


def _name(index: int, run: Run) -> str:
    label = html.escape(run.label)
    return (
        f'<th scope="row" data-sort="{label}"><label><input type="checkbox" value="{index}" checked '
        f'aria-label="show {label}">{_swatch(index)}<span>{label}</span></label></th>'
    )


def _swatch(index: int) -> str:
    """The line that a run has in the figures."""
    return (
        f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" '
        f'stroke="{colour(index)}" stroke-width="4" stroke-dasharray="{DASH_ARRAYS[dash(index)]}"/></svg>'
    )


def _score_cells(run: Run, is_best: bool) -> list[str]:
    found = run.scores
    time = None if found.seconds is None else tqdm.format_interval(found.seconds)
    shown = [
        (found.best, f"{found.best:.5g}" if found.best is not None else None),
        (found.best_step, f"{found.best_step}"),
        (found.last, f"{found.last:.5g}" if found.last is not None else None),
        (found.train, f"{found.train:.5g}" if found.train is not None else None),
        (found.seconds, time),
        (found.speed, f"{found.speed:.3g}" if found.speed is not None else None),
    ]
    return [
        _cell(None if value is None else text, True, "best" if is_best and place == 0 else "", repr(value))
        for place, (value, text) in enumerate(shown)
    ]


def _cell(
    text: str | None, is_number: bool = False, style: str = "", sort: str | None = None, *, code: bool = False
) -> str:
    """A cell that sorts by `sort`, or else by its text; one without text comes last."""
    names = " ".join(name for name in ("number" if is_number else "", style) if name)
    mark = f' class="{html.escape(names)}"' if names else ""
    if text is None:
        return f"<td{mark}>{MISSING}</td>"
    shown = html.escape(text)
    inner = f"<code>{shown}</code>" if code else shown
    return f'<td{mark} data-sort="{html.escape(sort or text)}" title="{shown}">{inner}</td>'


# --- the figures


def _losses(figures: Sequence[Figure], runs: Sequence[Run]) -> str:
    shown = [figure for figure in figures if figure.kind == "loss"]
    if not shown:
        return '<p class="note">No run has recorded a loss.</p>'
    raw = (
        "the faint lines are as recorded"
        if len(runs) <= MOST_RAW
        else f"with more than {MOST_RAW} runs what was recorded is not drawn as well"
    )
    return (
        '<div class="controls"><button type="button" id="log" aria-pressed="false">logarithmic losses</button></div>'
        f'<p class="hint">Training losses are smoothed by an exponential moving average over the logged points (weight '
        f"{SMOOTHING:g} of what came before); {raw}. Long curves are drawn with every n-th point.</p>"
        f"{''.join(_plot(figure.name, figure.title) for figure in shown)}"
    )


def _plot(name: str, title: str) -> str:
    return f'<div class="plot" id="plot-{name}" role="group" aria-label="{html.escape(title)}"></div>'


def _parameters(figures: Sequence[Figure], runs: Sequence[Run]) -> str:
    parts = []
    left_out = len(runs) - len(list(completed(runs)))
    if left_out:
        parts.append(
            f'<p class="note">{left_out} of {len(runs)} runs are left out here: not finished, or without a score.</p>'
        )
    scatters = [figure for figure in figures if figure.kind == "scatter"]
    if not scatters:
        parts.append("<p>There are no two finished runs that differ in a hyper-parameter.</p>")
        return "".join(parts)
    plots = []
    if any(figure.kind == "parallel" for figure in figures):
        parts.append(
            '<p class="hint">Drag along an axis to choose a range; drag a name to move its axis. Axes of values that '
            "span a factor of ten or more are logarithmic.</p>"
        )
        plots.append(_plot("parallel", "parallel coordinates"))
    plots.append(_plot("scatter", "hyper-parameter against score"))
    if len(scatters) > 1:
        options = "".join(f"<option>{html.escape(figure.title)}</option>" for figure in scatters)
        choice = f'<div class="controls"><label>Hyper-parameter <select id="parameter">{options}</select></label></div>'
        plots.insert(-1, choice)
    return "".join([*parts, *plots])


# --- the images


def _images(album: ImageGrid, runs: Sequence[Run]) -> str:
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in album.notes)
    if not album.cells:
        return f"{notes}<p>The runs have no validation images.</p>"
    shown = sorted({run for _, run in album.cells})
    heads = "".join(
        f'<th scope="col" data-run="{run}">{_swatch(run)} {html.escape(runs[run].label)}</th>' for run in shown
    )
    last = len(album.steps) - 1
    slider = (
        f'<div class="controls"><label for="step">Step</label><input type="range" id="step" min="0" max="{last}" '
        f'value="{last}"><output id="step-shown" for="step"></output></div>'
        '<p class="hint">Arrow keys move the slider. Where a run has no image of that step, its nearest earlier one is '
        "shown in grey, with its own step.</p>"
    )
    rows = []
    for index, row in enumerate(album.rows):
        prompt = html.escape(row.prompt or row.key)
        cells = "".join(
            f'<td data-run="{run}"><figure data-cell="{index},{run}" data-prompt="{prompt}"><img alt="" hidden>'
            "<figcaption></figcaption></figure></td>"
            for run in shown
        )
        rows.append(f'<tr><th scope="row">{prompt}<small>{html.escape(row.key)}</small></th>{cells}</tr>')
    grid = (
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="images"><table class="grid"><thead><tr>'
        f'<th scope="col">prompt</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return f"{notes}{slider}{grid}"
