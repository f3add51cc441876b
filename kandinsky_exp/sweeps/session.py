"""One start of a sweep: its folder, its parent run in MLflow, its signals, and the table at its end."""

import contextlib
import csv
import io
import itertools
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig
from tqdm import tqdm

from kandinsky_exp.errors import ConfigError, Interrupted
from kandinsky_exp.runs import run_folder
from kandinsky_exp.sweeps import parent_run
from kandinsky_exp.sweeps.outcomes import JobFolder, Outcome
from kandinsky_exp.system import files, redaction, signals
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import reason, short_names
from kandinsky_exp.tracking.tracker import NullTracker, Status, Tracker, tracked

logger = logging.getLogger(__name__)
LOSSES = {False: "best loss", True: "last training loss"}  # by whether nothing was held out


@dataclass
class Session:
    """One start of a sweep, in the process that the user started.

    Args:
        folder: of the sweep.
        jobs: how many there are to be.
        token: marks the outcomes of this start.
        tracker: of the parent run.
        is_study: an optimizing sweeper learns from the jobs of earlier starts: they belong to it.
    """

    folder: Path
    jobs: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    tracker: Tracker = field(default_factory=NullTracker)
    is_study: bool = False

    def outcomes(self) -> list[Outcome]:
        return JobFolder(self.folder).outcomes(None if self.is_study else self.token)

    def of_this_start(self) -> list[Outcome]:
        return JobFolder(self.folder).outcomes(self.token)

    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.of_this_start() if outcome.status not in ("FINISHED", "PRUNED")]


def sweep_folder(cfg: DictConfig) -> Path:
    """The sweep's folder: that of its name, or a new one.

    Raises:
        ConfigError: the name is that of something else.
    """
    root = files.output_root(cfg.output_root)
    files.make_root(root)
    if cfg.name is None:
        return files.fresh_folder(root, f"sweep-{datetime.now():%Y%m%d-%H%M%S}")
    folder = root / str(cfg.name)
    record = run_folder.read_record(folder)
    if record is not None and record.stage != "sweep":
        raise ConfigError(f"name: {folder} holds a {record.stage}, and no sweep; choose another name")
    if record is None and folder.is_dir() and any(path.name != ".jobs" for path in folder.iterdir()):
        raise ConfigError(f"name: {folder} exists and is no sweep; choose another name or move it away")
    return folder


@contextlib.contextmanager
def session(cfg: DictConfig, folder: Path, jobs: int, command: str) -> Iterator[Session]:
    """Open the parent run and handle signals; at the end print and record the table and the report.

    Args:
        command: that starts this sweep again, for the parent's description.

    Raises:
        TrackingError: the store does not answer.
        Interrupted: a signal came; the running jobs have ended.
    """
    job_folder = JobFolder(folder)
    job_folder.forget_signals()
    started = Session(folder, jobs, is_study="n_trials" in cfg.hydra.sweeper)
    if cfg.tracker.name != "none":
        started.tracker = parent_run.parent_run(cfg, folder, command)
    with signals_for_jobs(job_folder), tracked(_Parent(started)):
        try:
            yield started
        finally:
            tell(started)
            report(cfg, started)
            for file in (folder / ".submitit").glob("*/*.pkl"):  # they hold the whole config, passwords and all
                file.unlink(missing_ok=True)
        if numbers := job_folder.signals():
            raise Interrupted(numbers[0])


class _Parent(NullTracker):
    """Gives the parent its status: FAILED where a job did not finish, as a run that has an error has."""

    def __init__(self, started: Session) -> None:
        self.started = started

    def finish(self, status: Status) -> None:
        status = "FAILED" if status == "FINISHED" and self.started.failed() else status
        self.started.tracker.finish(status)
        parent_run.write_status(self.started.folder, status)


def signals_for_jobs(job_folder: JobFolder) -> contextlib.AbstractContextManager[None]:
    """The first signal stops the running jobs safely, the second at once, the third ends this process."""

    def handle(number: int, frame: FrameType | None) -> None:
        job_folder.ask_to_stop(number)
        if len(job_folder.signals()) > 2:
            os._exit(128 + number)

    return signals.handling(handle)


def tell(started: Session) -> None:
    """The table of all jobs: on the terminal, and with the parent run."""
    outcomes = started.outcomes()
    if not outcomes:
        return
    text = table(outcomes, len(outcomes) if started.is_study else started.jobs)
    print(f"\n{text}\n{started.folder}", flush=True)
    started.tracker.log_text(text, "jobs.txt")
    names, lines = rows(outcomes)
    file = io.StringIO()
    csv.writer(file).writerows([names, *lines])
    started.tracker.log_text(file.getvalue(), "jobs.csv")


def report(cfg: DictConfig, started: Session) -> None:
    """The jobs side by side, as `compare` shows them; what goes wrong with it is no failure of the sweep."""
    run_ids = [outcome.run_id for outcome in started.outcomes() if outcome.run_id is not None]
    parent = started.tracker.run_id
    if not run_ids or parent is None:
        return
    from kandinsky_exp.reports.report import write_report

    try:
        client, _ = store.connect(store.chosen_uri(cfg.tracker.uri, cfg.output_root))
        page = write_report(client, run_ids, started.folder / "report", f"Sweep {started.folder.name}", parent)
        print(page, flush=True)
    except Exception as error:
        words = [files.setting("sweep", started.folder), files.setting("output_root", started.folder.parent)]
        if cfg.tracker.uri is not None:
            words.append(files.setting("tracker.uri", redaction.masked(cfg.tracker.uri)))
        command = f"kandinsky-exp compare {' '.join(words)}"
        logger.warning("the report was not written (%s); once that is mended: %s", reason(error), command)


def rows(outcomes: list[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Column names and a row of texts for each job."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.varied))
    kinds = sorted({outcome.is_training for outcome in outcomes if outcome.score is not None}) or [False]
    others = [outcome.objective for outcome in outcomes if outcome.objective != Outcome.objective]
    losses = [others[0] if others else LOSSES[kind] for kind in kinds]
    names = ["job", *short_names(keys).values(), "status", *losses, "time", "run id"]
    lines = [
        [
            str(outcome.number),
            *(outcome.varied.get(key, "") for key in keys),
            outcome.status,
            *(
                "–" if outcome.score is None or outcome.is_training != kind else f"{outcome.score:.5g}"
                for kind in kinds
            ),
            tqdm.format_interval(outcome.seconds),
            outcome.run_id or "–",
        ]
        for outcome in outcomes
    ]
    return names, lines


def table(outcomes: list[Outcome], jobs: int) -> str:
    """The jobs with what they vary and their results; then why some did not finish, and the best one."""
    names, lines = rows(outcomes)
    widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in [names, *lines]]
    text += [f"{job.name}: {job.message.splitlines()[0][:300]}" for job in outcomes if job.message]
    if missing := jobs - len(outcomes):
        text.append(f"{missing} of {jobs} jobs were not started; the same command with this name goes on with them")
    return "\n".join(line.rstrip() for line in [*text, *best_jobs(outcomes)])


def best_jobs(outcomes: list[Outcome]) -> list[str]:
    """A line about the best job of each stage: losses of different stages do not compare."""
    stages = sorted({outcome.stage or "" for outcome in outcomes})
    lines = []
    for stage, is_training in itertools.product(stages, (False, True)):
        alike = [job for job in outcomes if (job.stage or "", job.is_training) == (stage, is_training)]
        scored = [(job.score, job) for job in alike if job.score is not None and job.status == "FINISHED"]
        if scored:
            best = max if scored[0][1].maximizes else min
            score, job = best(scored, key=lambda item: item[0])
            of = f" {stage}" if len(stages) > 1 and stage else ""
            lines.append(f"{'lowest last training loss' if is_training else 'best'}{of}: {job.name} ({score:.5g})")
    return lines


def exit_code(started: Session) -> int:
    """0 where every job finished or was pruned; 2 where nothing was trained for mistakes of the user's; else 1."""
    if not (failed := started.failed()):
        return 0
    return 2 if failed == started.of_this_start() and all(outcome.is_user_error for outcome in failed) else 1
