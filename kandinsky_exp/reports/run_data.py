"""Read runs from an MLflow store, and compare their parameters, curves and scores."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kandinsky_exp.tracking.mlflow_names import JOB, short_names

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAIN, VALIDATION, SPEED = "train/loss", "validation/loss", "train/samples_per_second"
QUARTILES = tuple(f"train/loss_t{part}" for part in range(4))
CURVES = (TRAIN, VALIDATION, *QUARTILES, SPEED)
OBJECTIVE, DIRECTION = "config.sweep.objective", "config.sweep.direction"  # tags
EVALUATION = "evaluation/"
PAGE = 1000  # runs in one answer of the store
SAID_ELSEWHERE = {"name", "model._target_"}  # parameters that the columns run and stage tell

Curve = list[tuple[int, float]]  # (step, value), by step; one value a step


@dataclass(frozen=True)
class Scores:
    """How a run went; None for what is not known of it.

    Args:
        best, best_step: lowest validation loss, or best value of the objective, and where it was.
        last: the last one.
        train: last training loss.
        seconds: from the run's start to its end, or to its last point where it has no end.
        speed: samples per second, median over the run's points.
    """

    best: float | None = None
    best_step: int | None = None
    last: float | None = None
    train: float | None = None
    seconds: float | None = None
    speed: float | None = None


@dataclass
class Run:
    """What the store knows of a run.

    Args:
        label: its name, made unique among the runs beside it.
        stage: prior or decoder, "" where it was never said.
        params: as MLflow has them, text by dotted key; empty where a run ended before it told any.
        curves: by metric; metrics without a point are left out.
        evaluation: what `evaluate` measured last, by metric.
        objective, maximizes: what its sweep ranks by, and whether larger is better.
        seconds: see `Scores`.
    """

    run_id: str
    label: str
    status: str
    stage: str = ""
    params: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    scores: Scores = Scores()
    evaluation: dict[str, float] = field(default_factory=dict)
    objective: str = VALIDATION
    maximizes: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class Column:
    """A parameter whose value differs; None where a run does not have it."""

    name: str
    key: str
    values: tuple[str | None, ...]


def children(client: "MlflowClient", parent_run_id: str) -> list[str]:
    """The ids of a parent's runs in the order of its jobs, or else of their start, without those that were deleted."""
    experiment = client.get_run(parent_run_id).info.experiment_id
    wanted = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    by_start = ["attributes.start_time ASC"]
    search = partial(client.search_runs, [experiment], wanted, max_results=PAGE, order_by=by_start)
    found = [*(page := search())]
    while page.token:
        found += (page := search(page_token=page.token))
    return [run.info.run_id for run in sorted(found, key=lambda run: run.data.tags.get(JOB, ""))]


def read(client: "MlflowClient", run_ids: Sequence[str]) -> list[Run]:
    """All that is compared of runs but their images, in the order of their ids.

    Raises:
        MlflowException: the store does not have one of them.
    """
    runs = [_read_run(client, run_id) for run_id in run_ids]
    if len({(run.objective, run.maximizes) for run in runs}) > 1:  # values of different metrics do not compare
        for run in runs:
            run.objective, run.maximizes = VALIDATION, False
    for run in runs:
        run.scores = scores(run.curves, run.seconds, run.objective, run.maximizes)
    names = Counter(run.label for run in runs)
    for run in runs:
        if names[run.label] > 1:
            run.label = f"{run.label} ({run.run_id[:6]})"
    return runs


def _read_run(client: "MlflowClient", run_id: str) -> Run:
    found = client.get_run(run_id)
    info, data = found.info, found.data
    curves: dict[str, Curve] = {}
    latest = 0
    objective = data.tags.get(OBJECTIVE, VALIDATION)
    for key in dict.fromkeys((*CURVES, objective)):
        if key in data.metrics:
            points = client.get_metric_history(run_id, key)
            latest = max([latest, *(point.timestamp for point in points)])
            curves[key] = in_order(points)
    run = Run(run_id, info.run_name or run_id, info.status, data.tags.get("stage", ""), dict(data.params), curves)
    run.evaluation = {
        key.removeprefix(EVALUATION): value
        for key, value in data.metrics.items()
        if key.startswith(EVALUATION) and not key.endswith(("_low", "_high"))
    }
    end = info.end_time or latest
    run.objective, run.maximizes = objective, data.tags.get(DIRECTION) == "maximize"
    run.seconds = (end - info.start_time) / 1000 if end > (info.start_time or 0) else None
    return run


def in_order(points: Sequence[Any]) -> Curve:
    """A metric's history by step; of a step that was recorded twice, by a run that went on, the later value."""
    by_step = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
    return sorted(by_step.items())


def scores(
    curves: Mapping[str, Curve], seconds: float | None, objective: str = VALIDATION, maximizes: bool = False
) -> Scores:
    validation = finite(curves.get(objective, []))
    train = finite(curves.get(TRAIN, []))
    speeds = sorted(value for _, value in finite(curves.get(SPEED, [])))
    best_step, best = (max if maximizes else min)(validation, key=lambda point: point[1], default=(None, None))
    return Scores(
        best=best,
        best_step=best_step,
        last=validation[-1][1] if validation else None,
        train=train[-1][1] if train else None,
        seconds=seconds,
        speed=speeds[len(speeds) // 2] if speeds else None,
    )


def finite(curve: Curve) -> Curve:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def varied(runs: Sequence[Run]) -> list[Column]:
    """The parameters that differ between those runs that have told any, under short names."""
    told = [run for run in runs if run.params]
    keys = list(dict.fromkeys(key for run in told for key in run.params))
    differ = [key for key in keys if key not in SAID_ELSEWHERE and len({run.params.get(key) for run in told}) > 1]
    names = short_names(differ)
    return [Column(names[key], key, tuple(_class_name(key, run.params.get(key)) for run in runs)) for key in differ]


def _class_name(key: str, value: str | None) -> str | None:
    """`torch.optim.AdamW` of an `optimizer._target_` is AdamW."""
    return value.rpartition(".")[2] if value is not None and key.endswith("._target_") else value


def has_validated(runs: Sequence[Run]) -> bool:
    return any(run.scores.best is not None for run in runs)


def rank(runs: Sequence[Run], one: Run) -> float:
    """How many runs of its own stage are better: losses of different stages do not compare."""
    if one.scores.best is None:
        return math.inf
    same = (run.scores.best for run in runs if run.stage == one.stage)
    sign = -1 if one.maximizes else 1
    return sum(best is not None and sign * best < sign * one.scores.best for best in same)


def completed(runs: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """(index, score) of the runs that are finished and have one; the last training loss where none ever validated."""
    by_validation = has_validated(runs)
    for index, run in enumerate(runs):
        value = run.scores.best if by_validation else run.scores.train
        if run.status == "FINISHED" and value is not None:
            yield index, value


def number(text: str | None) -> float | None:
    """A parameter's text as a finite number, None where it is none."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
