"""A sweeper's word on a job that is under way: worth going on with, by its validation losses so far?"""

import math
import warnings
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kandinsky_exp import build

Judge = Callable[[int, float], bool]


def judge(cfg: DictConfig, steps: int) -> Judge | None:
    """What tells whether to give the run up after a validation; None for a run that is no trial of such a sweep.

    Args:
        steps: of the whole run. After the last one nothing is left to save.
    """
    if cfg.sweep.trial is None or not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    import optuna

    settings = HydraConfig.get().sweeper
    pruner = build.pruner(settings.pruner)
    from kandinsky_exp.sweeps.optuna_study import storage

    study = optuna.load_study(study_name=settings.study_name, storage=storage(settings.storage), pruner=pruner)
    numbered = study.get_trials(deepcopy=False)[cfg.sweep.trial]
    trial = optuna.trial.Trial(study, numbered._trial_id)

    def is_hopeless(step: int, loss: float) -> bool:
        if step == 0 or not math.isfinite(loss):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run that goes on reports some steps once more
            trial.report(loss, step)
        return step < steps and trial.should_prune()

    return is_hopeless
