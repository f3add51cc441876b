"""What a launcher calls for each job of a sweep: note its begin and its end; `job_process` starts the process."""

import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.config import grammar, recorded_paths, saved_config
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import run_folder
from kandinsky_exp.sweeps import devices, parent_run
from kandinsky_exp.sweeps.job_process import Answer, Call, JobServer, Task, run_job
from kandinsky_exp.sweeps.outcomes import JobFolder, Outcome, hydra_of_job, job_name


@dataclass(frozen=True)
class SweptJob:
    """What a launcher calls for each job of a sweep that trains, in whatever process it likes. It raises nothing.

    Args:
        parallel: jobs at a time.
        session: of the sweep's start.
        process: that the user started.
        server: asked to start the jobs; None = they are started from here.
    """

    call: Call
    parallel: int
    session: str
    process: int
    server: JobServer | None

    def __call__(self, cfg: DictConfig) -> float:
        """Run a job to its end, whatever that is; what the function returned, NaN where it did not finish."""
        forget_multirun()
        if os.getpid() != self.process and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which tells the jobs
        settings = plain(HydraConfig.get())
        sweep = Path(settings.hydra.sweep.dir)
        jobs = JobFolder(sweep)
        outcome = begun(jobs, cfg, settings.hydra, self.session)
        folder = sweep / outcome.folder
        if (loss := finished(cfg, folder)) is not None:
            answer = Answer("FINISHED", loss)
        else:
            with devices.held(cfg.sweep.devices, self.parallel, jobs.folder, lambda: bool(jobs.signals())) as variables:
                if variables is None or jobs.signals():
                    return math.nan
                jobs.write(outcome)
                began = time.monotonic()
                answer = run_job(Task(self.call, cfg, settings, variables), jobs, self.server)
                outcome.seconds += time.monotonic() - began
        complete(outcome, answer, cfg, folder)
        jobs.write(outcome)
        return math.nan if answer.value is None else answer.value


def forget_multirun() -> bool:
    """Remove what Hydra's sweeper writes, the command line with its passwords; whether there is a sweep."""
    hydra = hydra_of_job()
    if hydra is not None:
        (Path(hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
    return hydra is not None


def plain(settings: Any) -> DictConfig:
    """Hydra's own section as far as jobs read it, without the plugins' classes, which each start imports anew."""
    names = ("mode", "sweep", "sweeper", "launcher", "job", "overrides", "runtime")
    section = {name: OmegaConf.select(settings, name) for name in names}
    resolved = {
        name: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        for name, node in section.items()
    }
    return OmegaConf.create({"hydra": resolved})


def begun(jobs: JobFolder, cfg: DictConfig, settings: DictConfig, session: str) -> Outcome:
    """What is known of a job before it starts; its time goes on from an earlier start's."""
    folder = str(settings.sweep.subdir)
    before = jobs.read(folder)
    changes = varied(settings)
    # The values themselves, so that 1e-5 and 0.00001 are called the same; of a group the option's name.
    values = {key: OmegaConf.select(cfg, key) for key in changes}
    name = job_name({key: changes[key] if OmegaConf.is_config(value) else value for key, value in values.items()})
    seconds, token = (0.0, None) if before is None else (before.seconds, before.token)
    number = settings.job.num
    if cfg.sweep.trial is not None:  # a trial that draws what an earlier one has is that job again
        number = cfg.sweep.trial if before is None else min(before.number, cfg.sweep.trial)
    return Outcome(int(number), folder, name, changes, seconds=seconds, session=session, token=token)


def varied(settings: DictConfig) -> dict[str, str]:
    """{dotted key: what was typed} of what tells this job from the others."""
    fixed = {*settings.job.config.override_dirname.exclude_keys, "sweep.trial"}
    return {
        override.key_or_group if override.package is None else f"{override.key_or_group}@{override.package}": (
            override.get_value_string()
        )
        for override in grammar.readable(settings.overrides.task)
        if override.key_or_group not in fixed and not override.is_delete()
    }


def finished(cfg: DictConfig, folder: Path) -> float | None:
    """The loss of a job that an earlier start of this very sweep has finished; None where there is something to do."""
    record = run_folder.read_record(folder)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None  # its processes have to decide together
    if record is None or record.status != "FINISHED" or (folder / "outbox").exists() or cfg.checkpoint.resume != "auto":
        return None
    try:
        before = saved_config.flatten_saved(folder)
    except ConfigError:
        return None  # the job itself will say it
    elsewhere = ("output_root", "name", "sweep.")
    saved, now = (
        {key: value for key, value in values.items() if not key.startswith(elsewhere)}
        for values in (before, recorded_paths.as_before(saved_config.flatten(cfg), before))
    )
    if saved != now:
        return None
    value = record.objective(cfg.sweep.objective)
    return math.nan if value is None else value


def complete(outcome: Outcome, answer: Answer, cfg: DictConfig, folder: Path) -> None:
    """Fill in an outcome, and the run's own records where its process was killed before it could."""
    outcome.status, outcome.message, outcome.is_user_error = answer.status, answer.message, answer.is_user_error
    if answer.status in ("FAILED", "KILLED"):
        parent_run.settle(cfg, folder, outcome)
    record = run_folder.read_record(folder)
    if record is not None:
        outcome.run_id, outcome.score, outcome.token = record.run_id, record.best_loss, None
        outcome.stage = record.stage
    outcome.objective, outcome.maximizes = cfg.sweep.objective, cfg.sweep.direction == "maximize"
    if outcome.objective != Outcome.objective:
        outcome.score = None if record is None else record.objective(outcome.objective)
        return
    outcome.is_training = outcome.score is None and answer.value is not None and math.isfinite(answer.value)
    if outcome.is_training:
        outcome.score = answer.value


def parallel_jobs(launcher: Mapping[str, Any], jobs: int) -> int:
    """How many jobs a launcher runs at a time on one machine, as far as its settings tell."""
    target = str(launcher.get("_target_", ""))
    if target.endswith("BasicLauncher"):
        return 1
    count = launcher.get("n_jobs")
    return min(jobs, count) if isinstance(count, int) and count > 0 else jobs
