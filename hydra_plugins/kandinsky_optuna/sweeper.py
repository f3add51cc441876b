"""`hydra/sweeper=optuna`: Optuna asks, a launcher runs, the validation loss is told; the study is on disk.

Hydra looks for plugins in this namespace only. The published Optuna plugin is for Optuna 2, whose data bases do not
work with a current SQLAlchemy. Optuna itself is imported once it is used: Hydra imports this module at every start.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kandinsky_exp import studies
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.sweep_jobs import JobFolder, Outcome

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

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
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.sweep_dir, self.loader = Path(config.hydra.sweep.dir), hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has as many as it should, beginning with those that were interrupted."""
        parser = OverridesParser.create(self.loader)
        texts = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        chosen = {override.get_key_element(): override for override in parser.parse_overrides(texts)}
        fixed = [str(override.input_line) for override in chosen.values() if not override.is_sweep_override()]
        space = {key: distribution(item) for key, item in chosen.items() if item.is_sweep_override()}
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        study = self._study(space)
        jobs = JobFolder(self.sweep_dir)
        waiting = left_over(study)
        started = 0
        while not jobs.signals():
            wanted = min(self.n_jobs, len(waiting) + self.n_trials - begun(study))
            batch = [waiting.pop(0) if waiting else self._ask(study, space) for _ in range(wanted)]
            if not batch:
                return
            overrides = [[*fixed, *trial.user_attrs[STARTED], f"sweep.trial={trial.number}"] for trial in batch]
            self.validate_batch_is_legal(overrides)
            assert self.launcher is not None
            returned = self.launcher.launch(overrides, initial_job_idx=started)
            started += len(batch)
            for trial, job in zip(batch, returned, strict=True):
                folder = str(job.hydra_cfg.hydra.sweep.subdir) if job.hydra_cfg is not None else ""
                tell(study, trial, jobs.read(folder), job.return_value, is_stopped=bool(jobs.signals()))

    def _study(self, space: "dict[str, BaseDistribution]") -> "optuna.Study":
        place = studies.storage(self.storage)
        import optuna

        study = optuna.create_study(
            storage=place, study_name=self.study_name, direction=self.direction, load_if_exists=True
        )
        if not callable(self.sampler):
            study.sampler = self.sampler
        elif self.sampler.func is optuna.samplers.GridSampler:  # it works in Optuna's own loop only
            grid = [grid_values(key, values) for key, values in space.items()]
            self.n_trials = min(self.n_trials, math.prod(map(len, grid)))
            for values in itertools.product(*grid):
                study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)
        else:
            # A study that goes on would draw its first values once more with the same seed.
            study.sampler = self.sampler(seed=None if self.seed is None else self.seed + begun(study))
        return study

    def _ask(self, study: "optuna.Study", space: "dict[str, BaseDistribution]") -> "optuna.trial.FrozenTrial":
        trial = study.ask(space)
        trial.set_user_attr(STARTED, [f"{key}={value}" for key, value in trial.params.items()])
        return study.get_trials(deepcopy=False)[trial.number]


def begun(study: "optuna.Study") -> int:
    """Trials that were asked for, in this start or an earlier one."""
    from optuna.trial import TrialState

    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def distribution(override: Override) -> "BaseDistribution":
    """What an override draws from: choices, `range(a,b)`, `interval(a,b)`; `tag(log, …)` for orders of magnitude."""
    from optuna import distributions

    value = override.value()
    is_log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        if isinstance(value.start, int) and isinstance(value.end, int):
            return distributions.IntDistribution(value.start, value.end, log=is_log)
        return distributions.FloatDistribution(float(value.start), float(value.end), log=is_log)
    if isinstance(value, RangeSweep) and not value.shuffle and not is_log:
        values = [*value.range()]
        if all(isinstance(number, int) for number in values):
            return distributions.IntDistribution(int(values[0]), int(values[-1]), step=int(value.step))
        return distributions.FloatDistribution(float(values[0]), float(values[-1]), step=float(value.step))
    return distributions.CategoricalDistribution([*override.sweep_string_iterator()])


def grid_values(key: str, values: "BaseDistribution") -> Sequence[Any]:
    """All values of a distribution.

    Raises:
        ConfigError: there is no end of them.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, CategoricalDistribution):
        return list(values.choices)
    if isinstance(values, IntDistribution):
        return list(range(values.low, values.high + 1, values.step))
    if isinstance(values, FloatDistribution) and values.step is not None:
        count = round((values.high - values.low) / values.step) + 1
        return [values.low + number * values.step for number in range(count)]
    raise ConfigError(f"{key}: a grid needs single values; give a list of them, or range(start,stop,step)")


def left_over(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials that an earlier start has asked for and was stopped in."""
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if STARTED in trial.user_attrs]


def tell(
    study: "optuna.Study",
    trial: "optuna.trial.FrozenTrial",
    outcome: Outcome | None,
    value: float | None,
    is_stopped: bool,
) -> None:
    """What a trial came to. One that was stopped with the sweep, or before it started, waits for the next start."""
    from optuna.trial import TrialState

    if is_stopped and (outcome is None or outcome.status not in ("FINISHED", "PRUNED")):
        return
    if outcome is None:
        outcome = Outcome(0, "", "", status="FAILED")
    if outcome.status == "PRUNED":
        study.tell(trial.number, state=TrialState.PRUNED)
    elif outcome.status == "FINISHED" and value is not None and math.isfinite(value):
        study.tell(trial.number, value)
    else:
        study.tell(trial.number, state=TrialState.FAIL)
