"""What `evaluate` is asked to measure: a run, a checkpoint, the jobs of a sweep, or any pair."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.config import allowlist, saved_config
from kandinsky_exp.config.schema import Data
from kandinsky_exp.errors import ConfigError, cut
from kandinsky_exp.models.components import NETWORKS, PipelineHalf
from kandinsky_exp.runs import lookup, run_folder
from kandinsky_exp.runs.lookup import is_sweep, no_result, run_of
from kandinsky_exp.runs.model_sources import ModelSource, find_origins
from kandinsky_exp.system import files

UNFIT = re.compile(r"[^\w.=,-]+")  # in the name of a folder


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Args:
        cfg: settings of the data, the precision and the seed of what is held out: those of its run, where it has one.
        by_row: its run held out rows, not pictures.
        step: of its run's training.
    """

    name: str
    cfg: DictConfig
    origins: Mapping[PipelineHalf, ModelSource]
    by_row: bool = False
    step: int = 0
    run_id: str | None = None


def find_subjects(cfg: DictConfig, trusted: Collection[str], typed: Collection[str]) -> tuple[list[Subject], list[str]]:
    """The models, and what the user should know of those that are left out.

    Args:
        typed: the keys that were.

    Raises:
        ConfigError: what is named is no run, or has no result.
    """
    if cfg.run is None:
        sides = [str(cfg[side]) for side in NETWORKS if cfg[side] is not None] or [str(cfg.weights.decoder)]
        return [Subject("-".join(UNFIT.sub("_", Path(side).name) for side in sides), cfg, find_origins(cfg))], []
    if own := [word for word in typed if word.partition(".")[0] in ("data", "model", "validation")]:
        raise ConfigError(f"{own[0]}: a run is evaluated with its own data; leave it out, or give prior= and decoder=")
    folder = _place(cfg)
    if not is_sweep(folder):
        return [_subject(cfg, folder, trusted, typed)], []
    found, notes = [], []
    for job in sorted(one for one in folder.iterdir() if run_folder.read_record(one) is not None):
        try:
            found.append(_subject(cfg, job, trusted, typed))
        except ConfigError as error:
            notes.append(f"{job.name} is left out: {error}")
    if not found:
        raise ConfigError(f"run: no job of {folder} has a result; {notes[0] if notes else 'give another'}")
    return found, notes


def _place(cfg: DictConfig) -> Path:
    """Of a run, a checkpoint or a sweep: a path, a name below the outputs, or an MLflow run id."""
    text = str(cfg.run)
    for folder in (files.expanded(text), files.output_root(cfg.output_root) / text):
        if run_folder.read_record(folder) is not None:
            return folder
    return lookup.located(cfg, "run", text, None)


def _subject(cfg: DictConfig, folder: Path, trusted: Collection[str], typed: Collection[str]) -> Subject:
    home = run_of(folder)
    record = None if home is None else run_folder.read_record(home)
    if home is None or record is None:
        raise ConfigError(
            f"run: '{cut(str(cfg.run))}' is no run, checkpoint or sweep; give one, or prior=, decoder= and data.path="
        )
    if folder.absolute() == home.absolute() and not any((folder / name).is_dir() for name in ("pipeline", "adapter")):
        raise ConfigError(f"run: {no_result(home, 'run', NETWORKS[record.half])}")
    if cfg[record.half] is not None:
        raise ConfigError(f"{record.half}: run={folder} is the {record.half}; leave one of them out")
    asked = OmegaConf.merge(cfg, {record.half: str(folder)})
    assert isinstance(asked, DictConfig)  # nosec B101 # narrows the type
    inside = [part for part in (folder, *folder.parents) if re.fullmatch(r"step-\d+", part.name)]
    name = home.name if not inside else f"{home.name}-{inside[0].name}"
    step = record.result_step or record.step
    if inside:
        step = int(inside[0].name.removeprefix("step-"))
    settings = _settings_of_run(cfg, home, typed)
    allowlist.remember(settings, allowlist.user_modules(cfg, trusted))
    return Subject(name, settings, find_origins(asked), record.split is None, step, record.run_id)


def _settings_of_run(cfg: DictConfig, home: Path, typed: Collection[str]) -> DictConfig:
    """The config of a run as far as it tells what its data is, at the place of this command's outputs."""
    saved = saved_config.read(home)
    saved = saved if isinstance(saved, dict) else {}
    if not all(isinstance(saved.get(key), dict) for key in ("data", "model", "validation", "precision")):
        raise ConfigError(f"run: {home / saved_config.NAME} is not the config of a run; give another")
    known = {key: cfg.data[key] for key in Data.beside if key in cfg.data}
    of_run = {
        "data": {**known, **saved["data"]},  # an earlier version had fewer keys
        "model": saved["model"],
        "validation": {"fraction": saved["validation"].get("fraction", 0.0)},
        "precision": saved["precision"],
        "seed": saved.get("seed", 0),
    }
    if "${" in str(of_run):  # a run writes none, and what is in a file resolves nothing
        raise ConfigError(f"run: {home / saved_config.NAME} has interpolations; write their values instead")
    if any(word.partition(".")[0] == "precision" for word in typed):
        of_run["precision"] = cfg.precision
    return OmegaConf.create({**of_run, "weights": cfg.weights, "output_root": cfg.output_root})
