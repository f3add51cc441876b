"""The list of code that a config may name. A config may have come with a checkpoint: it is data until it is checked.

A `_target_` is judged twice: its name before anything is imported, for an import runs code; and then what was found
under that name. The user adds modules by `trusted_modules`, on the command line or as an argument, never in a file.
"""

import functools
import inspect
import pkgutil
import re
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, ListConfig, flag_override

from kandinsky_exp.config import saved_config
from kandinsky_exp.errors import ConfigError, Problem

KEY = "trusted_modules"
MODULES = (
    "kandinsky_exp",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "torchao",
    "schedulefree",
    "prodigyopt",
    "lion_pytorch",
)
# What Hydra itself builds: launchers and sweepers, the one thing that samplers need, and its own two callbacks.
OF_HYDRA = (
    "hydra._internal.core_plugins",
    "hydra_plugins",
    "hydra.experimental.callbacks",
    "optuna.samplers",
    "optuna.pruners",
)
LOGGING = re.compile(
    r"(logging\.)?(StreamHandler|FileHandler|NullHandler|Formatter|handlers\.\w*RotatingFileHandler)"
    r"|colorlog\.ColoredFormatter"
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# Of the environment, only what tunes a run; others choose code, servers and credentials.
TUNING = re.compile(r"(OMP|MKL|NUMEXPR|OPENBLAS|NCCL|CUDA|CUBLAS|TOKENIZERS)_\w+")
BASES = {  # what a role's classes derive from
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "model": "kandinsky_exp.stages.base.DiffusionStage",
}
FUNCTIONS = {
    "scheduler": "kandinsky_exp.schedules",
    "data": "kandinsky_exp.data.sources",
}  # a role's, all in one module
WANTED = {
    "optimizer": "a class of optimizers (torch.optim.Optimizer)",
    "scheduler": "a class of schedules (torch.optim.lr_scheduler.LRScheduler) or a function of kandinsky_exp.schedules",
    "data": "a function of kandinsky_exp.data.sources",
    "model": "a stage of kandinsky_exp.stages",
    # Not any class: some of torch's start a process, or load a pickle, in their constructors.
    "": "a class of optimizers or schedules",
}


# --- what the user adds


def user_modules(cfg: DictConfig, typed: Collection[str] = ()) -> list[str]:
    """The modules that a config names in `trusted_modules` and the user did too, now or when it was validated."""
    return [name for name in _named(cfg) or typed if name in typed or cfg._get_flag(_flag(name))]


def refused(cfg: DictConfig, typed: Collection[str]) -> list[str]:
    """The modules that only a config file names."""
    return [name for name in _named(cfg) if name not in user_modules(cfg, typed)]


def remember(cfg: DictConfig, typed: Collection[str]) -> None:
    """Write what the user trusts into the config, and mark it as the user's: a file cannot set a flag."""
    names = user_modules(cfg, typed)
    if names != _named(cfg):
        with flag_override(cfg, ["struct", "readonly"], [False, False]):
            cfg[KEY] = names
    for name in names:
        cfg._set_flag(_flag(name), True)


def _named(cfg: DictConfig) -> list[str]:
    names = cfg.get(KEY)
    return [str(name) for name in names] if isinstance(names, ListConfig) else []


def _flag(name: str) -> str:
    return f"{KEY} {name}"


# --- names, before anything is imported


def name_problem(target: str, added: Collection[str] = ()) -> str | None:
    """What is wrong with the dotted name of a target, or None."""
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() and part.isascii() for part in parts):
        return f"has to be package.module.name, not {target!r:.200}"
    if covers(added, target):
        return None
    if not covers(MODULES, target):
        return (
            f"{target:.200} is outside of the modules that a config may name ({', '.join(MODULES)}); if you trust that "
            f"code, type {KEY}=[{parts[0]:.60}] too"
        )
    if any(part.startswith("_") for part in parts):
        return f"{target:.200} is private there; name a public class"
    return None


def covers(modules: Collection[str], name: str | None) -> bool:
    return name is not None and any(name == module or name.startswith(f"{module}.") for module in modules)


# --- what was found under a name


def object_problem(target: str, found: Any, role: str, added: Collection[str] = ()) -> str | None:
    """What is wrong with the object under an allowed name, or None.

    Args:
        role: `optimizer`, `scheduler`, `data`, `model`, or empty for an argument of a target.
        added: modules of the user's, whose own classes and functions may have any role.
    """
    module = _origin(found)
    if covers(added, module):
        if role == "model" and not _has_role(found, module, role):  # the others are called, and asked nothing
            return f"{target:.200} is no stage; derive it from {BASES[role]}, or from one of kandinsky_exp.stages"
        return None
    if not covers(MODULES, module):
        return f"{target:.200} is not that package's own, it comes from {module or 'nowhere'}; name it where it is made"
    if _has_role(found, module, role):
        return None
    return f"{target:.200} is no {WANTED[role].partition(' ')[2]}; give one, or type {KEY}=[...] for code of your own"


def _origin(found: Any) -> str | None:
    """The module that made a class, a function, or the class of any other object."""
    while isinstance(found, functools.partial):
        found = found.func
    named = inspect.isclass(found) or inspect.isroutine(found)
    module = (found if named else type(found)).__module__
    return module if isinstance(module, str) else None


def _has_role(found: Any, module: str | None, role: str) -> bool:
    if inspect.isclass(found):
        bases = [BASES[role]] if role in BASES else [] if role else [BASES["optimizer"], BASES["scheduler"]]
        return any(issubclass(found, pkgutil.resolve_name(name)) for name in bases)
    return inspect.isfunction(found) and module == FUNCTIONS.get(role)


# --- Hydra's own section, which Hydra acts on before our code runs


def check_hydra(typed: Collection[str], keys: Collection[str], section: Any) -> None:
    """Check a composed `hydra` section.

    Args:
        typed: modules that the user trusts.
        keys: that were typed.

    Raises:
        ConfigError: all that is wrong with it.
    """
    allowed = (*OF_HYDRA, *typed)
    found = [
        Problem(key, f"{value!r:.200} is nothing that Hydra may build; if you trust that code, type {KEY}=[...] too")
        for key, name, value in saved_config.walk(section, "hydra")
        if name == "_target_" and not (isinstance(value, str) and covers(allowed, value))
    ]
    for name in ("hydra_logging", "job_logging"):
        for key, last, value in saved_config.walk(section.get(name), f"hydra.{name}"):
            if _is_strange(last, value, typed):
                found.append(Problem(key, f"{value!r:.200} is no handler or formatter of logging; name one that is"))
    settings = section.get("job", {}).get("env_set") or {}
    for name in settings:
        if not TUNING.fullmatch(str(name)) and f"hydra.job.env_set.{name}" not in keys:
            found.append(Problem(f"hydra.job.env_set.{name}", "is not for a file to set; export it, or type it"))
    if found:
        raise ConfigError(found)


def _is_strange(name: str, value: Any, typed: Collection[str]) -> bool:
    if name in ("()", "class"):
        return not (isinstance(value, str) and (LOGGING.fullmatch(value) or covers(typed, value)))
    return isinstance(value, str) and "://" in value and value not in STREAMS
