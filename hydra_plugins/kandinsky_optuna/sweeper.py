"""`hydra/sweeper=optuna`: trials of a study on disk, asked from Optuna and run by any launcher of Hydra.

Hydra looks for plugins in this namespace only. The published Optuna plugin is for Optuna 2, whose data bases do not
work with a current SQLAlchemy. Optuna itself is imported once it is used: Hydra imports this module at every start.
"""

import itertools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kandinsky_exp.config import grammar
from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.sweeps import optuna_study, search_space
from kandinsky_exp.sweeps.outcomes import JobFolder, Outcome

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

log = logging.getLogger(__name__)
STARTED = "overrides"  # attribute of a trial: what its job was started with


class OptunaSweeper(Sweeper):
    """Trials in batches through any launcher.

    Args:
        n_trials: of the whole study, over all starts.
        n_jobs: trials at a time.
        direction: minimize or maximize what the jobs return.
        storage: a journal file or a data base's URL.
        sampler: takes `seed`; or a sampler.
        pruner: used by the jobs.
        seed: of the sampler.
        params: what varies, beside what is typed.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        direction: str,
        storage: str,
        study_name: str,
        sampler: Any,
        pruner: Any = None,
        seed: int | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.direction: Any = direction
        self.storage, self.study_name, self.seed = storage, study_name, seed
        self.sampler, self.params = sampler, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.objective = str(config.sweep.objective)
        self.sweep_dir, self.loader = Path(config.hydra.sweep.dir), hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def check(self, varied: Mapping[str, Override]) -> None:
        """Look at what would go wrong later, before there is a folder.

        Args:
            varied: what the sweep draws.

        Raises:
            ConfigError: all of it.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = search_space.space(varied)
        sampler, _ = self._sampler(space, 0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the sweep itself will warn
                optuna.create_study(sampler=sampler).ask(space)
        except Exception as error:  # whatever it takes for wrong, once it draws
            raise ConfigError(f"hydra.sweeper.sampler: {first_line(error)}; correct it, or leave it out") from error
        if problem := optuna_study.location_problem(self.storage):
            raise ConfigError(problem)
        study = optuna_study.begun(self.storage, self.study_name)
        if study is not None and (found := optuna_study.differences(study, self.direction, space, self.objective)):
            raise ConfigError(found)

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has as many as it should, beginning with those that were interrupted."""
        texts = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        chosen = {override.get_key_element(): override for override in (grammar.read(t, self.loader) for t in texts)}
        fixed = [str(override.input_line) for override in chosen.values() if not override.is_sweep_override()]
        space = search_space.space({key: item for key, item in chosen.items() if item.is_sweep_override()})
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        study = self._study(space)
        jobs = JobFolder(self.sweep_dir)
        waiting = left_over(study)
        started = 0
        while not jobs.signals():
            wanted = min(self.n_jobs, len(waiting) + self.n_trials - count_asked(study))
            batch = [waiting.pop(0) if waiting else self._ask(study, space) for _ in range(wanted)]
            if not batch:
                return
            # Two jobs of the same values would share a folder: one runs for both.
            alike = {values: [*trials] for values, trials in itertools.groupby(sorted(batch, key=drawn), drawn)}
            overrides = [[*fixed, *values, f"sweep.trial={trials[0].number}"] for values, trials in alike.items()]
            tell_repeats(study, batch)
            self.validate_batch_is_legal(overrides)
            assert self.launcher is not None
            returned = self.launcher.launch(overrides, initial_job_idx=started)
            started += len(alike)
            for trials, job in zip(alike.values(), returned, strict=True):
                folder = str(job.hydra_cfg.hydra.sweep.subdir) if job.hydra_cfg is not None else ""
                for trial in trials:
                    tell(study, trial, jobs.read(folder), job.return_value, is_stopped=bool(jobs.signals()))

    def _study(self, space: "dict[str, BaseDistribution]") -> "optuna.Study":
        storage = optuna_study.storage(self.storage)
        import optuna

        study = optuna.create_study(
            storage=storage, study_name=self.study_name, direction=self.direction, load_if_exists=True
        )
        study.set_user_attr(optuna_study.OBJECTIVE, self.objective)
        # A study that goes on would draw its first values once more with the same seed.
        sampler, grid = self._sampler(space, count_asked(study))
        if sampler is not None:
            study.sampler = sampler
            return study
        self.n_trials = min(self.n_trials, math.prod(map(len, grid)))
        for values in itertools.product(*grid):
            study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)
        return study

    def _sampler(self, space: "dict[str, BaseDistribution]", drawn: int) -> "tuple[BaseSampler | None, list[Any]]":
        """(the sampler, nothing), or (None, all values of each setting): Optuna's grid works in its own loop only.

        Args:
            drawn: trials that there are already.
        """
        import optuna

        if not callable(self.sampler):
            return self.sampler, []
        if self.sampler.func is optuna.samplers.GridSampler:
            return None, [search_space.grid_values(key, values) for key, values in space.items()]
        try:
            return self.sampler(seed=None if self.seed is None else self.seed + drawn), []
        except Exception as error:  # whatever it takes for wrong
            raise ConfigError(f"hydra.sweeper.sampler: {first_line(error)}; correct it, or leave it out") from error

    def _ask(self, study: "optuna.Study", space: "dict[str, BaseDistribution]") -> "optuna.trial.FrozenTrial":
        trial = study.ask(space)
        trial.set_user_attr(STARTED, [f"{key}={value}" for key, value in trial.params.items()])
        return study.get_trials(deepcopy=False)[trial.number]


def count_asked(study: "optuna.Study") -> int:
    """Trials that were asked for, in this start or an earlier one."""
    return sum(trial.state.name != "WAITING" for trial in study.get_trials(deepcopy=False))


def drawn(trial: "optuna.trial.FrozenTrial") -> tuple[str, ...]:
    """What a trial's job is started with."""
    return tuple(trial.user_attrs.get(STARTED, ()))


def tell_repeats(study: "optuna.Study", batch: "Sequence[optuna.trial.FrozenTrial]") -> None:
    """Say which trials draw what another has drawn: of the jobs in one folder, what is finished is not run again."""
    first: dict[tuple[str, ...], int] = {}
    for trial in study.get_trials(deepcopy=False):
        first.setdefault(drawn(trial), trial.number)
    for trial in batch:
        if (number := first[drawn(trial)]) < trial.number:
            values = " ".join(drawn(trial))
            log.warning("trial %d draws what trial %d has: %s; one job counts for both", trial.number, number, values)


def left_over(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials that an earlier start has asked for and was stopped in."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.name == "RUNNING" and STARTED in trial.user_attrs]


def tell(
    study: "optuna.Study",
    trial: "optuna.trial.FrozenTrial",
    outcome: Outcome | None,
    value: float | None,
    is_stopped: bool,
) -> None:
    """Tell how a trial ended. One that was stopped with the sweep, or before it started, waits for the next start."""
    from optuna.trial import TrialState

    status = "FAILED" if outcome is None else outcome.status
    if is_stopped and status not in ("FINISHED", "PRUNED"):
        return
    if status == "FINISHED" and value is not None and math.isfinite(value):
        study.tell(trial.number, value)
    else:
        study.tell(trial.number, state=TrialState.PRUNED if status == "PRUNED" else TrialState.FAIL)
