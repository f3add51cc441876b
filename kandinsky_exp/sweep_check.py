"""What a sweep varies, and what is wrong with that, before any job starts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

from kandinsky_exp import command_line, config
from kandinsky_exp.errors import ConfigError

MOST_VALUES = 50  # that are checked before a sweep starts: each takes a tenth of a second
OWN_PLACE = "the jobs of a sweep share it, and are named by what they vary"
# What jobs share cannot be different in each of them.
SHARED = {
    "name": f"{OWN_PLACE}; give the sweep one name",
    "output_root": f"{OWN_PLACE}; give one folder",
    "tracker": "one store records the whole sweep; give one",
    "sweep": "it is of the sweep, not of a job; give one value",
    "hub": "all jobs would go to one repository; push the best one later, kandinsky-exp push run=...",
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


def composed(verb: str, line: command_line.CommandLine) -> DictConfig:
    """The config that a sweep's jobs start from, with Hydra's own section."""
    GlobalHydra.instance().clear()
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration(verb, [*line.search_path, *line.overrides], run_mode=RunMode.MULTIRUN)


def checked(verb: str, line: command_line.CommandLine, cfg: DictConfig) -> Varied:
    """What a sweep varies.

    Args:
        cfg: from `composed`.

    Raises:
        ConfigError: all that is wrong with it, and with each single value.
    """
    texts = sweeper_texts(cfg)
    if texts and (found := command_line.find_problems(verb, replace(line, overrides=[*line.overrides, *texts]))):
        raise ConfigError(found)
    several = varied(cfg, line.overrides)
    if found := [*problems(cfg, several)]:
        raise ConfigError(found)
    parser = OverridesParser.create()
    fixed = [text for text in line.overrides if not parser.parse_override(text).is_sweep_override()]
    wrong: dict[str, None] = {}
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        for values in single_values(several, MOST_VALUES):
            job = compose(verb, [*line.search_path, *fixed, *values])
            wrong.update(dict.fromkeys(config.problems(job, trusted=line.trusted, quick=True)))
    if wrong:
        raise ConfigError(list(wrong))
    return several


def sweep_dir(folder: str | Path) -> str:
    """Tell Hydra where a sweep lies."""
    text = str(folder).replace("\\", "\\\\").replace("'", "\\'").replace("$", "\\$")
    return f"hydra.sweep.dir='{text}'"


def varied(cfg: DictConfig, typed: list[str]) -> Varied:
    """Read what varies from what was typed and from `hydra.sweeper.params`, over which the former goes.

    Args:
        cfg: the composed root config of the sweep, with Hydra's section.
    """
    parser = OverridesParser.create()
    chosen: dict[str, Override] = {}
    for text in [*sweeper_texts(cfg), *typed]:
        override = parser.parse_override(text)
        chosen[override.get_key_element()] = override
    several = {key: override for key, override in chosen.items() if override.is_sweep_override()}
    trials = cfg.hydra.sweeper.get("n_trials")
    if trials is not None:
        return Varied(several, int(trials))
    return Varied(several, math.prod(len(values(override)) for override in several.values()))


def values(override: Override) -> list[str]:
    """The single values of a sweep override; none of an interval, which has no end of them."""
    return [*override.sweep_string_iterator()] if override.is_discrete_sweep() else []


def problems(cfg: DictConfig, found: Varied) -> Iterator[str]:
    """All that is wrong with what a sweep varies, each as `key: what is wrong; what to do`."""
    if not found.overrides:
        yield "--multirun: nothing varies; give a setting several values, optimizer.lr=1e-5,3e-5, or choose sweep=lr"
    optimizes = "n_trials" in cfg.hydra.sweeper
    for key, override in found.overrides.items():
        if (reason := _shared(key)) is not None:
            yield f"{key}: {reason}"
        single = values(override)
        if not single and not optimizes:
            yield f"{key}: an interval has no end of values; take hydra/sweeper=optuna, or list some"
        twice = sorted({value for value in single if single.count(value) > 1})
        if twice:
            yield f"{key}: {', '.join(twice)} is there more than once; each job has a folder of its own"
    most = cfg.sweep.max_jobs
    if found.jobs > most:
        yield (
            f"sweep.max_jobs: this makes {found.jobs:,} jobs, and at most {most} are allowed; vary less, or set "
            f"sweep.max_jobs={found.jobs} if you mean it"
        )


def _shared(key: str) -> str | None:
    plain = key.lstrip("+").replace("/", ".")
    return next((why for part, why in SHARED.items() if plain == part or plain.startswith(f"{part}.")), None)


def single_values(found: Varied, limit: int) -> Iterator[list[str]]:
    """Overrides that try each value once, beside the first of all others: no product, and `limit` at most."""
    firsts = {key: single[0] for key, override in found.overrides.items() if (single := values(override))}
    count = 0
    for key, override in found.overrides.items():
        for value in values(override):
            if count == limit:
                return
            count += 1
            yield [f"{name}={value if name == key else first}" for name, first in firsts.items()]


def sweeper_texts(cfg: DictConfig) -> list[str]:
    """`hydra.sweeper.params` as overrides."""
    params: dict[str, Any] = cfg.hydra.sweeper.get("params") or {}
    return [f"{key}={value}" for key, value in params.items()]
