"""Read and check what a sweep varies, before any job starts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.config import command_line, grammar, hydra_errors, validation
from kandinsky_exp.config.schema import Count, Seed, Text
from kandinsky_exp.config.types import Rule, type_problem
from kandinsky_exp.errors import ConfigError, Problem
from kandinsky_exp.sweeps import devices

MOST_VALUES = 50  # that are checked before a sweep starts: each takes a tenth of a second
MOST_LISTED = 1000  # that are looked through for what is there twice
ON_THIS_MACHINE = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")
# Settings of Hydra's plugins, which judge them late or not at all.
PLUGINS: dict[str, dict[str, Any]] = {
    "sweeper": {
        "n_trials": Count,
        "n_jobs": Count,
        "direction": Literal["minimize", "maximize"],
        "seed": Seed | None,
        "study_name": Text,
        "storage": Text,
        "max_batch_size": Count | None,
        "params": dict[str, Any] | None,
    },
    "launcher": {"n_jobs": Annotated[int, Rule(lambda count: count != 0, "other than 0 (-1: all cores)")]},
}
OWN_PLACE = "the jobs of a sweep share it, and are named by what they vary"
# What jobs share cannot be different in each of them.
SHARED = {
    "name": f"{OWN_PLACE}; give the sweep one name",
    "output_root": f"{OWN_PLACE}; give one folder",
    "tracker": "one store records the whole sweep; give one",
    "sweep": "it is of the sweep, not of a job; give one value",
    "hub": "all jobs would go to one repository; leave it out, and push the best one later (kandinsky-exp push --help)",
    "checkpoint.resume": "it is of the whole sweep; give one value",
}


@dataclass(frozen=True)
class Varied:
    """What a sweep varies.

    Args:
        overrides: by dotted key, those with several values.
        jobs: how many they make.
    """

    overrides: dict[str, Override]
    jobs: int


def checked(line: command_line.CommandLine) -> tuple[DictConfig, Varied]:
    """(the config that a sweep's jobs start from, with Hydra's own section; what the sweep varies).

    Raises:
        ConfigError: all that is wrong with these, and with each single value.
    """
    with line.composing() as loader:
        try:
            cfg = loader.load_configuration(line.root, line.overrides, run_mode=RunMode.MULTIRUN)
        except HydraException as error:
            raise hydra_errors.explain(error, line) from error
    if found := [*_wrong_settings(cfg)]:
        raise ConfigError(found)
    texts = sweeper_texts(cfg)
    if texts and (found := hydra_errors.find_problems(replace(line, overrides=[*line.overrides, *texts]))):
        raise ConfigError(found)
    with line.composing() as loader:
        several = varied(cfg, line.overrides, loader)
        if found := [*problems(cfg, several)]:
            raise ConfigError(found)
        fixed = [text for text in line.overrides if not grammar.read(text).is_sweep_override()]
        jobs = (replace(line, overrides=[*fixed, *single]) for single in single_values(several, MOST_VALUES))
        wrong = list(dict.fromkeys(problem for job in jobs for problem in _of_job(job)))
    if wrong:
        raise ConfigError(wrong)
    return cfg, several


def _wrong_settings(cfg: DictConfig) -> Iterator[Problem]:
    for plugin, settings in PLUGINS.items():
        node = cfg.hydra[plugin]
        for name, annotation in settings.items():
            if name not in node or (name == "seed" and OmegaConf.is_interpolation(node, name)):
                continue  # what is taken from a setting of the run is judged there
            if problem := type_problem(_listed(node[name]), annotation):
                yield Problem(f"hydra.{plugin}.{name}", problem)


def _of_job(job: command_line.CommandLine) -> list[str]:
    """What is wrong with one job."""
    try:
        cfg = compose(job.root, job.overrides)
    except HydraException as error:
        return hydra_errors.explain(error, job).problems
    return [str(problem) for problem in validation.problems(cfg, job.verb, job.trusted, quick=True)]


def sweep_dir(folder: str | Path) -> str:
    """Tell Hydra where a sweep lies."""
    text = str(folder).replace("\\", "\\\\").replace("'", "\\'").replace("$", "\\$")
    return f"hydra.sweep.dir='{text}'"


def varied(cfg: DictConfig, typed: list[str], loader: ConfigLoader) -> Varied:
    """Read what varies from what was typed and from `hydra.sweeper.params`, over which the former goes.

    Args:
        cfg: the composed root config of the sweep, with Hydra's section.
        loader: knows the files of a group.
    """
    chosen: dict[str, Override] = {}
    for text in [*sweeper_texts(cfg), *typed]:
        override = grammar.read(text, loader)
        chosen[override.get_key_element()] = override
    several = {key: override for key, override in chosen.items() if override.is_sweep_override()}
    trials = cfg.hydra.sweeper.get("n_trials")
    return Varied(several, trials or math.prod(grammar.count(override) or 1 for override in several.values()))


def problems(cfg: DictConfig, found: Varied) -> Iterator[Problem]:
    """All that is wrong with what a sweep varies."""
    if not found.overrides:
        several = "give a setting several values, optimizer.lr=1e-5,3e-5, or choose sweep=lr"
        yield Problem("--multirun", f"nothing varies; {several}")
    optimizes = "n_trials" in cfg.hydra.sweeper
    for key, override in found.overrides.items():
        plain = override.key_or_group.replace("/", ".")
        yield from (Problem(key, reason) for part, reason in SHARED.items() if f"{plain}.".startswith(f"{part}."))
        if grammar.count(override) is None and not optimizes:
            yield Problem(key, "an interval has no end of values; take hydra/sweeper=optuna, or list some")
        single = grammar.values(override, MOST_LISTED)
        twice = sorted({value for value in single if single.count(value) > 1})
        if twice:
            yield Problem(key, f"{', '.join(twice)} is there more than once; each job has a folder of its own")
    if str(cfg.hydra.launcher._target_).rpartition(".")[2] in ON_THIS_MACHINE and (
        problem := devices.problem(_listed(cfg.sweep.devices))
    ):
        yield Problem("sweep.devices", problem)
    most = cfg.sweep.max_jobs
    if found.jobs > most:
        allowed = f"this makes {found.jobs:,} jobs, and at most {most} are allowed"
        yield Problem("sweep.max_jobs", f"{allowed}; vary less, or set sweep.max_jobs={found.jobs} if you mean it")


def _listed(node: Any) -> Any:
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def single_values(found: Varied, limit: int) -> Iterator[list[str]]:
    """Overrides that try each value once, beside the first of all others: no product, and `limit` at most."""
    firsts = {key: single[0] for key, override in found.overrides.items() if (single := grammar.values(override, 1))}
    count = 0
    for key, override in found.overrides.items():
        for value in grammar.values(override, limit):
            if count == limit:
                return
            count += 1
            yield [f"{name}={value if name == key else first}" for name, first in firsts.items()]


def sweeper_texts(cfg: DictConfig) -> list[str]:
    """`hydra.sweeper.params` as overrides."""
    params: dict[str, Any] = cfg.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in params.items()]
