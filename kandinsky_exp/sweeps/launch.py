"""Run a sweep from the command line: check it, open its session, hand its jobs to a launcher."""

import os
import shlex
import tempfile
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from kandinsky_exp import hydra_adapter
from kandinsky_exp.config import command_line, grammar
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import description
from kandinsky_exp.sweeps import check, job_process, optuna_study, session, supervise
from kandinsky_exp.sweeps.outcomes import JobFolder
from kandinsky_exp.system import files
from kandinsky_exp.tracking import store, store_probe


def launch(line: command_line.CommandLine, call: job_process.Call) -> int:
    """Run a sweep from its first job to its last, or that part of it which the last start has left.

    Returns:
        The exit code.

    Raises:
        UserError: nothing was started.
        Interrupted: a signal came.
    """
    cfg, varied = check.checked(line)
    _try_plugins(line, cfg, varied)
    parallel = supervise.parallel_jobs(cfg.hydra.launcher, varied.jobs)
    if os.environ.get("RANK", "0") != "0":  # the first process of each job records it
        with tempfile.TemporaryDirectory() as own, session.signals_for_jobs(JobFolder(Path(own))):
            job = supervise.SweptJob(call, parallel, "", os.getpid(), None)
            line.start(job, check.sweep_dir(own))
        return 0
    if cfg.tracker.name != "none":
        store_probe.probe(store.chosen_uri(cfg.tracker.uri, cfg.output_root))  # before there is a folder
    folder = session.sweep_folder(cfg)
    (folder / ".jobs").mkdir(parents=True, exist_ok=True)
    named = line.arguments if cfg.name is not None else [*line.arguments, f"name={folder.name}"]
    verb = [] if line.verb == "train" else [line.verb]
    command = shlex.join(["kandinsky-exp", *verb, *map(description.redacted_override, named)])
    with (
        files.occupied(folder, ".jobs/lock", "runs a sweep in"),
        job_process.job_server(call.function) as server,  # it imports while this process asks the store
        session.session(cfg, folder, varied.jobs, command) as started,
    ):
        job = supervise.SweptJob(call, parallel, started.token, os.getpid(), None if parallel == 1 else server)
        line.start(job, check.sweep_dir(folder), *_without_end(cfg, line))
    return session.exit_code(started)


def _try_plugins(line: command_line.CommandLine, cfg: DictConfig, varied: check.Varied) -> None:
    """Build the sweeper and the launcher once, before there is a folder: each judges its settings as it is built."""
    if "kandinsky_optuna" in str(cfg.hydra.sweeper._target_) and find_spec("optuna") is None:
        raise ConfigError(optuna_study.MISSING)
    with line.composing() as loader:
        sweeper = hydra_adapter.make_sweeper(loader, cfg)
        if hasattr(sweeper, "check"):  # ours
            sweeper.check(varied.overrides)


def _without_end(cfg: DictConfig, line: command_line.CommandLine) -> list[str]:
    """Submitit ends jobs after an hour where nobody says otherwise: on this machine that would be a surprise."""
    is_local = str(cfg.hydra.launcher._target_).endswith("submitit_launcher.LocalLauncher")
    is_typed = "hydra.launcher.timeout_min" in grammar.keys(line.overrides)
    return [f"hydra.launcher.timeout_min={60 * 24 * 365}"] if is_local and not is_typed else []
