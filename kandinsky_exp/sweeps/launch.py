"""From a command line to a sweep: what launchers call for each job, and what goes around them all."""

import os
import re
import shlex
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from kandinsky_exp.config import command_line, grammar, hydra_errors
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import description
from kandinsky_exp.sweeps import check, job_process, optuna_study, supervise
from kandinsky_exp.sweeps import session as sweep
from kandinsky_exp.sweeps.outcomes import JobFolder
from kandinsky_exp.tracking import store, store_probe

Start = Callable[..., None]


@dataclass(frozen=True)
class SweptJob:
    """What a launcher calls for each job of a sweep that trains, wherever it likes. It raises nothing."""

    call: job_process.Call
    parallel: int
    session: str
    process: int  # that the user started
    desk: job_process.JobServer | None

    def __call__(self, cfg: DictConfig) -> float:
        forget_multirun()
        if os.getpid() != self.process and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which tells the jobs
        return supervise.supervise(self.call, cfg, self.parallel, self.session, self.desk)


def forget_multirun() -> bool:
    """Remove what Hydra's sweeper writes, the command line with its passwords; whether there is a sweep."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return False
    (Path(settings.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
    return True


def launch(verb: str, line: command_line.CommandLine, call: job_process.Call, start: Start) -> int:
    """Run a sweep from its first job to its last, or that part of it which the last start has left.

    Args:
        start: runs Hydra with a job and further overrides.

    Returns:
        The exit code.

    Raises:
        UserError: nothing was started.
        Interrupted: a signal came.
    """
    cfg = check.composed(line.root(verb), line)
    varied = check.checked(line.root(verb), line, cfg)
    if str(cfg.hydra.sweeper._target_).startswith("hydra_plugins.kandinsky_optuna"):
        _register_sweeper()
    _try_plugins(line, cfg, varied)
    parallel = supervise.parallel_jobs(cfg.hydra.launcher, varied.jobs)
    if os.environ.get("RANK", "0") != "0":  # the first process of each job records what it comes to
        with tempfile.TemporaryDirectory() as own, sweep.noted_signals(JobFolder(Path(own))):
            job = SweptJob(call, parallel, "", os.getpid(), None)
            start(job, check.sweep_dir(own))
        return 0
    if cfg.tracker.name != "none":
        store_probe.probe(store.chosen_uri(cfg.tracker.uri, cfg.output_root))  # before there is a folder
    folder = sweep.place(cfg)
    named = line.arguments if cfg.name is not None else [*line.arguments, f"name={folder.name}"]
    overrides = map(description.redacted_override, named)
    command = shlex.join(["kandinsky-exp", *([] if verb == "train" else [verb]), *overrides])
    with (
        sweep.occupied(folder),
        job_process.desk(call.function) as desk,  # it imports while this process asks the store
        sweep.session(cfg, folder, varied.jobs, command) as session,
    ):
        job = SweptJob(call, parallel, session.token, os.getpid(), None if parallel == 1 else desk)
        start(job, check.sweep_dir(folder), *_without_end(cfg, line))
    return sweep.exit_code(session)


def _register_sweeper() -> None:
    """Hydra finds plugins by a walk through folders, and sees none of a package that is installed to be edited."""
    if find_spec("optuna") is None:
        raise ConfigError(optuna_study.MISSING)
    from hydra_plugins.kandinsky_optuna.sweeper import OptunaSweeper

    Plugins.instance().register(OptunaSweeper)


def _try_plugins(line: command_line.CommandLine, cfg: DictConfig, varied: check.Varied) -> None:
    """Build the sweeper and the launcher once, before there is a folder: each judges its settings as it is built."""
    with command_line.composing(line) as loader:
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        try:
            sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=float, config=cfg)
        except Exception as error:  # whatever a plugin takes for wrong
            key = re.search(r"full_key: (\S+)", str(error))
            raise ConfigError(
                f"{key[1] if key else 'hydra'}: {hydra_errors.condense(error)}; correct it, or leave it out"
            ) from error
        if hasattr(sweeper, "check"):  # ours
            sweeper.check(varied.overrides)


def _without_end(cfg: DictConfig, line: command_line.CommandLine) -> list[str]:
    """Submitit ends jobs after an hour where nobody says otherwise: on this machine that would be a surprise."""
    is_local = str(cfg.hydra.launcher._target_).endswith("submitit_launcher.LocalLauncher")
    is_typed = "hydra.launcher.timeout_min" in grammar.keys(line.overrides)
    return [f"hydra.launcher.timeout_min={60 * 24 * 365}"] if is_local and not is_typed else []
