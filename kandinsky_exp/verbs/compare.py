"""`kandinsky-exp compare`: one report over several runs, or over a sweep."""

import logging
import re
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from kandinsky_exp.config import validation
from kandinsky_exp.errors import ConfigError, cut
from kandinsky_exp.reports import report, run_data
from kandinsky_exp.runs import run_folder
from kandinsky_exp.runs.lookup import RUN_ID, names_of
from kandinsky_exp.system import files, logs, redaction
from kandinsky_exp.tracking import store, store_probe

if TYPE_CHECKING:
    from mlflow import MlflowClient


def compare(cfg: DictConfig) -> float:
    """Write a report over `cfg.runs` or `cfg.sweep.source`, and print where it is.

    Returns:
        The number of runs (Hydra jobs return numbers).

    Raises:
        ConfigError: something that is named is no run, or is not in the store.
        TrackingError: the store does not answer.
    """
    validation.validate(cfg, "compare")
    check_choice(cfg)
    root = files.output_root(cfg.output_root)
    key = "runs" if cfg.sweep.source is None else "sweep"
    named = find_ids(root, key, names_of(cfg.runs if key == "runs" else cfg.sweep.source))
    if cfg.tracker.uri is None and not (root / "mlflow.db").is_file():  # it would be made, empty
        raise ConfigError(f"output_root: there is no MLflow store in {root}; give that of the runs, or tracker.uri")
    uri = store.chosen_uri(cfg.tracker.uri, cfg.output_root)
    if (note := store.unused_variable(uri)) is not None:
        print(note, file=sys.stderr)
    store_probe.probe(uri)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with store.impatient(), store.explained(uri):
        client, uri = store.connect(uri)
        if problems := [f"{key}: {problem}" for problem in missing(client, uri, named)]:
            raise ConfigError(problems)
        run_ids, parent, name = named, None, f"compare-{datetime.now():%Y%m%d-%H%M%S}"
        if cfg.sweep.source is not None:
            parent = named[0]
            run_ids, name = run_data.children(client, parent), folder_name(client, cfg.sweep.source, parent)
            if not run_ids:
                shown = cut(cfg.sweep.source)
                raise ConfigError(f"sweep: '{shown}' has no jobs in MLflow; give another, or runs=<run>,<run>")
        files.make_root(root)
        name = cfg.name or name
        folder = root / "compare" / name
        with logs.logging_to(None, is_main=True):
            report.write_report(client, run_ids, folder, name, parent)
    print(*report.files(folder), sep="\n")
    return float(len(run_ids))


def check_choice(cfg: DictConfig) -> None:
    problems = []
    if (cfg.runs is None or len(cfg.runs) == 0) == (cfg.sweep.source is None):
        problems.append(
            "runs: give either runs=<run>,<run> or sweep=<sweep>"
            + (", not both" if cfg.sweep.source is not None else "; nothing is named that could be compared")
        )
    if cfg.tracker.name == "none":
        problems.append("tracker: none has recorded nothing that could be compared; leave it at mlflow")
    if problems:
        raise ConfigError(problems)


def find_ids(root: Path, key: str, texts: Iterable[str]) -> list[str]:
    """The MLflow runs of all that is named, each once.

    Raises:
        ConfigError: with all that is wrong.
    """
    found, problems = [], []
    for text in texts:
        try:
            found.append(find_id(root, text, key == "sweep"))
        except ConfigError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(found))


def find_id(root: Path, text: str, is_sweep: bool) -> str:
    """The MLflow run of a folder, of a name under `root`, or of an id."""
    place = next((one for one in (Path(text).expanduser(), root / text) if (one / run_folder.RECORD).is_file()), None)
    if place is None and RUN_ID.fullmatch(text):
        return text
    shown = f"'{cut(text)}'"
    if place is None:
        kind = "sweep" if is_sweep else "run"
        raise ConfigError(f"{shown} is no {kind}; give its folder, its name under {root}, or its MLflow run id")
    record = run_folder.read_record(place)
    if record is None:
        raise ConfigError(f"{shown}: its {run_folder.RECORD} cannot be read; give its MLflow run id")
    if (record.stage == "sweep") != is_sweep:
        hint = "is one run; give it in runs=" if is_sweep else "is a sweep; give it as sweep=, or give its jobs"
        raise ConfigError(f"{shown} {hint}")
    if record.run_id is None:
        raise ConfigError(f"{shown} was never recorded in MLflow; leave it out")
    return record.run_id


def missing(client: "MlflowClient", uri: str, run_ids: Iterable[str]) -> list[str]:
    """The runs that the store does not have, or has deleted, as problems."""
    runs = {run_id: store.find_run(client, run_id) for run_id in run_ids}
    return [
        f"the store {redaction.masked(uri)} has no run {run_id}; set tracker.uri, or leave it out"
        for run_id, run in runs.items()
        if run is None or run.info.lifecycle_stage != "active"
    ]


def folder_name(client: "MlflowClient", sweep: str, parent: str) -> str:
    """What a sweep is called: its folder's name, or its run's, made fit for a folder."""
    name = client.get_run(parent).info.run_name if RUN_ID.fullmatch(sweep) else Path(sweep).expanduser().absolute().name
    return re.sub(r'[/\\:*?"<>|\s]+', "_", str(name)).strip("._ ") or parent
