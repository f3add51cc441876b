"""The folder of a run: its name, what an earlier start left there, and the record of how far it came.

<output_root>/<name>/  config.yaml  run.json  train.log  checkpoints/  samples/  pipeline/ or adapter/
"""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from kandinsky_exp.errors import CheckpointError, ConfigError, UserError
from kandinsky_exp.models.components import NETWORKS, PARTS, PipelineHalf
from kandinsky_exp.runs import integrity
from kandinsky_exp.system.files import LOG, fresh_folder, make_root, occupied, write_atomically

RECORD = "run.json"
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass
class Record:
    """What must outlive a process: the MLflow run to go on in, and how far the run came.

    Args:
        status: RUNNING, FINISHED, FAILED or KILLED.
        stage: what trains in the folder; `sweep` for a folder of jobs.
        part: of Kandinsky that trains; None of a run from before it was recorded.
        patience: `validation.patience`, where it ended the run before its last step.
        result_step: whose weights the result holds, where it is not the last step.
        metrics: of these weights, as they were recorded, once finished.
        validation_loss: what `run` returned, once finished.
        best_loss: the lowest validation loss so far.
        rows: images that train; None before they were counted.
        data: fingerprint of what trains; None before it was read.
        token: marks the MLflow run from its first moment on, before `run_id` is known.
        source, encoders: fingerprints of the data set as it was given, and of the frozen encoders' files.
        split: `picture` where held-out rows share none with those that train; None of a run that has held out rows.
        revision: the commit that the trained network's base on the hub resolved to.
        rules: by which its pictures were read, `PICTURE_RULES`; None for the first ones.
    """

    run_id: str | None = None
    status: Status = "RUNNING"
    step: int = 0
    validation_loss: float | None = None
    best_loss: float | None = None
    stage: str | None = None
    rows: int | None = None
    data: str | None = None
    token: str | None = None
    source: str | None = None
    encoders: str | None = None
    revision: str | None = None
    split: str | None = None
    rules: int | None = None
    part: str | None = None
    patience: int | None = None
    result_step: int | None = None
    metrics: dict[str, float] | None = None

    def objective(self, key: str) -> float | None:
        """What a sweep ranks a finished run by; None where it was not measured."""
        return self.validation_loss if key == "validation/loss" else (self.metrics or {}).get(key)

    @property
    def half(self) -> PipelineHalf:
        """The half of Kandinsky that trains."""
        before = NETWORKS["prior" if self.stage == "prior" else "decoder"]  # of runs that recorded their stage alone
        return PARTS.get(str(self.part), PARTS[before])[0]


@dataclass
class RunFolder:
    """A claimed run folder.

    Args:
        start: the checkpoint to go on from, None to start from the pretrained weights.
        is_fork: `start` belongs to another run; `parent_run_id` is its MLflow run.
        notes: what a user should know of it, a line each.
        changed: settings that are not what they were, {key: (before, now)}.
        repeats: whether the steps that are done again come to the very numbers that are recorded of them.
    """

    folder: Path
    record: Record
    start: Path | None = None
    is_fork: bool = False
    parent_run_id: str | None = None
    is_resumed: bool = False
    notes: list[str] = field(default_factory=list)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    repeats: bool = False
    _writing: threading.RLock = field(default_factory=threading.RLock, repr=False)  # a signal may come while it writes

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def write_record(self) -> None:
        with self._writing:
            write_atomically(self.folder / RECORD, json.dumps(asdict(self.record), indent=2) + "\n")

    def __getstate__(self) -> dict[str, Any]:
        """For the other processes of a run, which write nothing."""
        return {name: value for name, value in vars(self).items() if name != "_writing"}


def claim(output_root: Path, name: str | None, stage: str, resume: str, held: ExitStack) -> RunFolder:
    """Find or make the run's folder and keep others out; nothing in an existing one is changed.

    Args:
        name: null for `<stage>-<date>-<time>`, with a suffix where that is taken.
        resume: `auto`, `never`, or a checkpoint's or run's folder to start a new run from.
        held: gives the folder back.

    Raises:
        ConfigError: the name is taken and may not be resumed, or the place cannot be written.
        CheckpointError: there is no good checkpoint where there should be one.
    """
    make_root(output_root)
    try:
        if name is None:
            folder = fresh_folder(output_root, f"{stage}-{datetime.now():%Y%m%d-%H%M%S}")
        else:
            folder = output_root / name
            _look(folder, stage, resume)
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"name: {output_root} takes no folder {name} ({error.strerror}); choose another") from error
    held.enter_context(occupied(folder))
    # Only now is it known what an earlier start left: it may have gone on until a moment ago.
    record = _look(folder, stage, resume)
    workspace = RunFolder(folder, record or Record(), is_resumed=record is not None)
    workspace.record.stage = stage
    workspace.start = integrity.newest_good(workspace.checkpoints, workspace.notes.append)
    if resume not in ("auto", "never") and workspace.start is None:
        # Also where this very run was stopped before its first checkpoint: it began there.
        with given_back(workspace):
            _fork(workspace, Path(resume).expanduser())
    return workspace


def _look(folder: Path, stage: str, resume: str) -> Record | None:
    """The record of the run in a folder, None where there is none yet; changes nothing.

    Raises:
        ConfigError: the folder is something else, or holds a run that this one cannot go on with.
    """
    record = read_record(folder)
    if record is None:
        # A start that was killed at once leaves these two.
        strangers = [path for path in folder.iterdir() if not _is_beginning(path)] if folder.is_dir() else []
        if strangers:
            why = f"its {RECORD} cannot be read" if (folder / RECORD).exists() else "is not a run"
            raise ConfigError(f"name: {folder} exists and {why}; choose another name or move it away")
        return None
    if record.stage not in (None, stage):
        raise ConfigError(
            f"name: {folder} holds a {record.stage}, with which model={stage} cannot go on; choose another name"
        )
    if resume == "never":
        raise ConfigError(
            f"name: the run {folder} exists and checkpoint.resume=never; choose another name, or go on with it by "
            "checkpoint.resume=auto"
        )
    return record


@contextmanager
def given_back(space: RunFolder) -> Iterator[None]:
    """A new run's folder is taken back where what is asked for turns out to be impossible."""
    try:
        yield
    except UserError:
        if not space.is_resumed:
            (space.folder / LOG).unlink()
            with suppress(OSError):
                space.folder.rmdir()
        raise


def _is_beginning(path: Path) -> bool:
    return path.name == f".{RECORD}.part" or (path.name == LOG and path.stat().st_size == 0)


def read_record(folder: Path) -> Record | None:
    """The record of a run folder, None where there is none that can be read."""
    try:
        record = Record(**json.loads((folder / RECORD).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return record if isinstance(record.step, int) else None


def _fork(workspace: RunFolder, source: Path) -> None:
    """Let the run begin at the checkpoint that `checkpoint.resume=<folder>` means, and know whose it is."""
    run_folder = source if (source / "checkpoints").is_dir() else source.parent.parent
    if run_folder == source:
        workspace.start = integrity.newest_good(source / "checkpoints", workspace.notes.append)
    elif source.is_dir():
        problem = integrity.damage(source)
        if problem is not None:
            raise CheckpointError(
                f"checkpoint.resume: {source} is no whole checkpoint ({problem}); give another step-… folder, or a run"
            )
        workspace.start = source
    if workspace.start is None:
        raise CheckpointError(f"checkpoint.resume: there is no checkpoint in {source}; give a run or a step-… folder")
    workspace.is_fork = True
    workspace.parent_run_id = (read_record(run_folder) or Record()).run_id
