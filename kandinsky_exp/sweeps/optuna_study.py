"""Optuna's study, in a journal file or a data base, and pruning: stop a trial early by its validation losses."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.sweeps.outcomes import hydra_of_job

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage

Judge = Callable[[int, float], bool]
MISSING = 'hydra/sweeper: optuna is not installed; pip install "kandinsky-exp[sweep]"'

OBJECTIVE = "objective"  # attribute of a study: the metric that its values are


def storage(location: str) -> "BaseStorage":
    """The storage at a data base's URL, or in a journal file, which parallel jobs may share over a network's disk too.

    Raises:
        ConfigError: Optuna is not installed, or the location cannot be used.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError(MISSING) from error
    if problem := location_problem(location):
        raise ConfigError(problem)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if "://" in location:
            return optuna.storages.RDBStorage(location)
        Path(location).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(location))
    except Exception as error:  # a driver, a server, a schema or a disk: whatever it is
        raise ConfigError(
            f"hydra.sweeper.storage: cannot be used ({first_line(error)}); correct it, or leave it out"
        ) from error


def location_problem(location: str) -> str | None:
    """What is wrong with a location, before anything is made there."""
    path = Path(location)
    if "://" in location or path.is_file():
        return None
    if path.is_dir():
        return f"hydra.sweeper.storage: {location} is a folder; give a file in it, {location}/study.journal"
    if re.match(r"\w{2,}:", location) or (path.name == location and not path.suffix):
        return (
            f"hydra.sweeper.storage: {location} is no data base's URL, and a journal needs an ending or a folder; "
            "write sqlite:///studies.db or studies/my.journal, or leave it out"
        )
    return None


def begun(location: str, name: str) -> "optuna.Study | None":
    """The study that an earlier start has made; where there is none, nothing is made."""
    if "://" not in location and not Path(location).is_file():
        return None
    found = storage(location)
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=found)
    except KeyError:
        return None


def differences(
    study: "optuna.Study", direction: str, space: "Mapping[str, BaseDistribution]", objective: str
) -> list[str]:
    """What this start cannot go on with, as `key: ...` messages."""
    from optuna.distributions import check_distribution_compatibility

    before, problems = study.direction.name.lower(), {}
    if before != direction:
        problems["hydra.sweeper.direction"] = f"the study began with {before}; keep that, or choose another name"
    if (known := study.user_attrs.get(OBJECTIVE, "validation/loss")) != objective:
        problems["sweep.objective"] = f"the study began with {known}; keep that, or choose another name"
    for trial in study.get_trials(deepcopy=False):
        for key in trial.distributions.keys() & space.keys():
            try:
                check_distribution_compatibility(trial.distributions[key], space[key])
            except ValueError:
                problems[key] = "the study began with other values, and cannot change them; choose another name"
    return [f"{key}: {problem}" for key, problem in problems.items()]


def judge(cfg: DictConfig, steps: int) -> Judge | None:
    """What tells whether to give the run up after a validation; None for a run that is no trial of such a sweep.

    Args:
        steps: of the whole run. After the last one nothing is left to save.
    """
    hydra = hydra_of_job()
    if cfg.sweep.trial is None or hydra is None:
        return None
    import optuna

    from kandinsky_exp import build  # it imports torch, which a command line does without

    settings = hydra.sweeper
    pruner = build.pruner(settings.pruner)
    study = optuna.load_study(study_name=settings.study_name, storage=storage(settings.storage), pruner=pruner)
    numbered = study.get_trials(deepcopy=False)[cfg.sweep.trial]
    trial = optuna.trial.Trial(study, numbered._trial_id)
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1  # a loss is better where it is lower

    def is_hopeless(step: int, loss: float) -> bool:
        if step == 0 or not math.isfinite(loss):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run that goes on reports some steps once more
            trial.report(sign * loss, step)
        return step < steps and trial.should_prune()

    return is_hopeless
