"""The plotly figures of a report; colours of text and paper are the page's own business."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from kandinsky_exp.reports.run_data import (
    QUARTILES,
    TRAIN,
    VALIDATION,
    Column,
    Curve,
    Run,
    completed,
    has_validated,
    number,
    varied,
)
from kandinsky_exp.tracking.mlflow_names import shortened

# Told apart by colour-blind eyes, on white and on black (Okabe and Ito 2008, without black and yellow).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
DASHES = ("solid", "dash", "dot", "dashdot")  # for the second, third and fourth round of the colours
BY_SCORE = [[0.0, "#E69F00"], [0.5, "#8C8C8C"], [1.0, "#0072B2"]]  # best to worst, readable on white and on black
SMOOTHING = 0.9  # weight of what came before, per logged point
MOST_RAW = 30  # runs; beyond, the unsmoothed curves would cover everything
MAX_POINTS = 40_000  # of all curves of one metric
DECADES = 10.0  # from this ratio of largest to smallest on an axis is logarithmic
LABEL = 40  # characters of a run's name in a figure
QUARTILE_TITLES = (
    "first quarter of the timesteps (least noise)",
    "second quarter",
    "third quarter",
    "last quarter (most noise)",
)


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Args:
        kind: `loss` (its y axis may be switched to logarithmic), `scatter` or `parallel`.
        spec: plotly's `data` and `layout`; a trace's `meta` is the index of its run.
        runs: of `parallel`, whose one trace holds all runs: their indices.
    """

    name: str
    title: str
    kind: str
    spec: dict[str, Any]
    runs: tuple[int, ...] = ()


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    return DASHES[index // len(COLOURS) % len(DASHES)]


def safe(text: str) -> str:
    """A text that plotly shows as it is: it knows some tags, and templates."""
    return html.escape(shortened(text, LABEL), quote=False).replace("%{", "%\u200b{")


def smoothed(curve: Curve) -> Curve:
    """Exponential moving average over the points that are finite, unbiased at the beginning."""
    total = weight = 0.0
    result: Curve = []
    for step, value in curve:
        if math.isfinite(value):
            total = SMOOTHING * total + (1 - SMOOTHING) * value
            weight = SMOOTHING * weight + (1 - SMOOTHING)
            result.append((step, total / weight))
    return result


def thinned(curve: Curve, limit: int) -> Curve:
    """At most about `limit` points, evenly, with the last."""
    stride = max(1, math.ceil(len(curve) / limit))
    return [*curve[:-1][::stride], *curve[-1:]]


def losses(runs: Sequence[Run]) -> list[Figure]:
    """Training loss, validation loss, training loss by quarter of the timesteps; what nobody recorded is left out."""
    figures = []
    for name, key, title in (
        ("train", TRAIN, "Training loss"),
        ("validation", VALIDATION, "Validation loss (fixed noise)"),
    ):
        figure = go.Figure(layout=_layout(title, 420))
        _add(figure, runs, key, is_smoothed=key == TRAIN)
        figure.update_xaxes(title_text="step")
        if figure.data:
            figures.append(Figure(name, title, "loss", figure.to_dict()))
    title = "Training loss by timestep"
    quarters = make_subplots(rows=2, cols=2, subplot_titles=QUARTILE_TITLES, vertical_spacing=0.16, figure=go.Figure())
    quarters.update_layout(_layout(title, 640))
    for index, key in enumerate(QUARTILES):
        _add(quarters, runs, key, is_smoothed=True, place=(index // 2 + 1, index % 2 + 1))
    if quarters.data:
        figures.append(Figure("quarters", title, "loss", quarters.to_dict()))
    return figures


def _layout(title: str, height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "title": {"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 16}},
        "height": height,
        "autosize": True,
        "margin": {"l": 64, "r": 16, "t": 56, "b": 60},
        "legend": {"groupclick": "togglegroup", "tracegroupgap": 0},
        "showlegend": True,
        "hovermode": "closest",
    }


def _add(
    figure: go.Figure, runs: Sequence[Run], key: str, *, is_smoothed: bool, place: tuple[int, int] | None = None
) -> None:
    """A metric's curve of every run that has it: the smoothed one, and the raw one faintly under it."""
    limit = max(50, min(1500, MAX_POINTS // max(1, len(runs))))
    where: dict[str, Any] = {} if place is None else {"row": place[0], "col": place[1]}
    named = {trace.meta for trace in figure.data if trace.showlegend}
    for index, run in enumerate(runs):
        curve = run.curves.get(key, [])
        if not curve:
            continue
        line = {"color": colour(index), "dash": dash(index)}
        common = {"meta": index, "legendgroup": str(index), "name": safe(run.label)}
        if is_smoothed and len(runs) <= MOST_RAW:
            faint = {"mode": "lines", "opacity": 0.28, "line": {**line, "dash": "solid", "width": 1}}
            figure.add_scatter(**_points(thinned(curve, limit)), **common, **faint, hoverinfo="skip", showlegend=False,
                               **where)  # fmt: skip
        shown = thinned(smoothed(curve) if is_smoothed else curve, limit)
        mode = "lines" if is_smoothed and len(shown) > 1 else "lines+markers"  # one point alone is no line
        hover = f"{safe(run.label)}<br>step %{{x}}: %{{y:.5g}}<extra></extra>"
        figure.add_scatter(**_points(shown), **common, mode=mode, line={**line, "width": 2}, hovertemplate=hover,
                           showlegend=index not in named, **where)  # fmt: skip


def _points(curve: Curve) -> dict[str, list[Any]]:
    return {
        "x": [step for step, _ in curve],
        "y": [float(f"{value:.6g}") if math.isfinite(value) else None for _, value in curve],
    }


@dataclass(frozen=True)
class Axis:
    """A parameter as positions along an axis.

    Args:
        positions: of each complete run; of a logarithmic one log10 of the values.
        ticks: (position, text); empty = plotly's own.
    """

    column: Column
    positions: list[float]
    ticks: list[tuple[float, str]]
    is_log: bool = False

    def marks(self) -> dict[str, list[Any]]:
        """The ticks as plotly takes them."""
        if not self.ticks:
            return {}
        return {"tickvals": [at for at, _ in self.ticks], "ticktext": [text for _, text in self.ticks]}


def scores(runs: Sequence[Run]) -> list[Figure]:
    """Hyper-parameters against the score: parallel coordinates where several differ, and a scatter for each."""
    found = list(completed(runs))
    if not found:
        return []
    indices, values = [index for index, _ in found], [value for _, value in found]
    objective = "validation loss" if runs[0].objective == VALIDATION else runs[0].objective
    title = f"best {objective}" if has_validated(runs) else "last training loss"
    columns = [Column("stage", "stage", tuple(run.stage or None for run in runs)), *varied(runs)]
    axes = [axis for column in columns if (axis := _axis(column, indices)) is not None]
    scatters = [_scatter(runs, indices, values, axis, title, number) for number, axis in enumerate(axes)]
    return [_parallel(indices, values, axes, title), *scatters] if len(axes) > 1 else scatters


def _axis(column: Column, indices: Sequence[int]) -> Axis | None:
    """None where the parameter is the same in all complete runs."""
    texts = [column.values[index] for index in indices]
    if len(set(texts)) < 2:
        return None
    numbers = [value for text in texts if (value := number(text)) is not None]
    if len(numbers) == len(texts) and min(numbers) > 0 and max(numbers) / min(numbers) >= DECADES:
        marks = sorted(set(numbers))
        if len(marks) > 8:
            marks = [
                10.0**power for power in range(math.floor(math.log10(marks[0])), math.ceil(math.log10(marks[-1])) + 1)
            ]
        ticks = [(math.log10(mark), f"{mark:g}") for mark in marks]
        return Axis(column, [math.log10(value) for value in numbers], ticks, is_log=True)
    if len(numbers) == len(texts):
        return Axis(column, numbers, [])
    order = sorted(set(texts), key=lambda text: (number(text) is not None, number(text) or 0.0, text or ""))
    ticks = [(float(place), safe("–" if text is None else text)) for place, text in enumerate(order)]
    return Axis(column, [float(order.index(text)) for text in texts], ticks)


def _scatter(
    runs: Sequence[Run], indices: Sequence[int], values: Sequence[float], axis: Axis, title: str, place: int
) -> Figure:
    figure = go.Figure(layout=_layout(f"{safe(axis.column.name)} against {title}", 420))
    for index, x, y in zip(indices, axis.positions, values, strict=True):
        told = axis.column.values[index]
        hover = f"{safe(runs[index].label)}<br>{safe(axis.column.name)} = {safe('–' if told is None else told)}"
        figure.add_scatter(
            x=[x],
            y=[y],
            mode="markers",
            marker={"color": colour(index), "size": 11, "symbol": index // len(COLOURS) % 4},
            meta=index,
            legendgroup=str(index),
            name=safe(runs[index].label),
            hovertemplate=f"{hover}<br>{title} %{{y:.5g}}<extra></extra>",
        )
    figure.update_yaxes(title_text=title)
    figure.update_xaxes(title_text=safe(axis.column.key) + (" (log)" if axis.is_log else ""), zeroline=False)
    figure.update_xaxes(axis.marks())
    return Figure(f"scatter-{place}", axis.column.name, "scatter", figure.to_dict())


def _parallel(indices: Sequence[int], values: Sequence[float], axes: Sequence[Axis], title: str) -> Figure:
    dimensions = [{"label": safe(axis.column.name), "values": axis.positions, **axis.marks()} for axis in axes]
    dimensions.append({"label": title, "values": list(values)})
    line: dict[str, Any] = {"color": list(values), "colorscale": BY_SCORE, "showscale": True}
    if max(indices) < len(COLOURS):  # each run its own colour, as everywhere
        staircase = [[at / len(COLOURS), text] for place, text in enumerate(COLOURS) for at in (place, place + 1)]
        line = {"color": [index + 0.5 for index in indices], "colorscale": staircase, "cmin": 0, "cmax": len(COLOURS)}
    trace = go.Parcoords(dimensions=dimensions, line=line)
    layout = _layout("", 440) | {"margin": {"l": 96, "r": 96, "t": 72, "b": 32}}
    return Figure("parallel", title, "parallel", go.Figure(trace, layout=layout).to_dict(), tuple(indices))
