"""The folder of a run: its name, what an earlier start left there, and the record of how far it came.

<output_root>/<name>/  config.yaml  run.json  train.log  checkpoints/  samples/  pipeline/ or adapter/
"""

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from tqdm import tqdm

from kandinsky_exp import checkpoint
from kandinsky_exp.errors import CheckpointError, ConfigError

RECORD = "run.json"
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass
class Record:
    """What must outlive a process: the MLflow run to go on in, and how far the run came.

    Args:
        status: RUNNING, FINISHED, FAILED or KILLED.
        stage: what trains in the folder; `sweep` for a folder of jobs.
        validation_loss: what `run` returned, once finished.
        rows: images that train; None before they were counted.
        data: fingerprint of what trains; None before it was read.
    """

    run_id: str | None = None
    status: Status = "RUNNING"
    step: int = 0
    validation_loss: float | None = None
    stage: str | None = None
    rows: int | None = None
    data: str | None = None


@dataclass
class Workspace:
    """A claimed run folder.

    Args:
        start: the checkpoint to go on from, None to start from the pretrained weights.
        parent_run_id: MLflow run that `start` belongs to, where that is another run.
    """

    folder: Path
    record: Record
    start: Path | None = None
    parent_run_id: str | None = None
    is_resumed: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def write_record(self) -> None:
        write_atomically(self.folder / RECORD, json.dumps(asdict(self.record), indent=2) + "\n")


def claim(output_root: Path, name: str | None, stage: str, resume: str) -> Workspace:
    """Find or make the run's folder; nothing in an existing one is changed.

    Args:
        name: null for `<stage>-<date>-<time>`, with a suffix where that is taken.
        resume: `auto`, `never`, or a checkpoint's or run's folder to start a new run from.

    Raises:
        ConfigError: the name is taken and may not be resumed, or the place cannot be written.
        CheckpointError: there is no checkpoint where `resume` says.
    """
    make_root(output_root)
    try:
        if name is None:
            workspace = Workspace(_fresh_folder(output_root, f"{stage}-{datetime.now():%Y%m%d-%H%M%S}"), Record())
        else:
            workspace = _named(output_root / name, resume)
    except OSError as error:
        raise ConfigError(f"name: {output_root} takes no folder {name} ({error.strerror}); choose another") from error
    if workspace.record.stage not in (None, stage):
        raise ConfigError(
            f"name: {workspace.folder} holds a {workspace.record.stage}, with which model={stage} cannot go on; choose "
            "another name"
        )
    workspace.record.stage = stage
    if resume not in ("auto", "never") and workspace.start is None:
        # Also where this very run was stopped before its first checkpoint: it began there.
        workspace.start, workspace.parent_run_id = _starting_point(Path(resume).expanduser())
    return workspace


def make_root(folder: Path) -> None:
    """Make the folder that everything is written to.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output_root: {folder} cannot be written ({error.strerror}); choose another") from error


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder by a lock on its `train.log`, which goes when this process does.

    Raises:
        ConfigError: another process is training there.
    """
    with (folder / "train.log").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"name: another process is training in {folder}; wait for it, stop it, or choose another name"
            ) from error
        except (ImportError, OSError):  # Windows, or a file system without locks: then nobody is kept out
            pass
        yield


def _fresh_folder(output_root: Path, name: str) -> Path:
    for suffix in ("", *(f"-{count}" for count in range(2, 1000))):
        folder = output_root / f"{name}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"name: a thousand runs are called {name}; set name=…")


def _named(folder: Path, resume: str) -> Workspace:
    if not folder.exists():
        folder.mkdir(parents=True)
        return Workspace(folder, Record())
    record = read_record(folder)
    if record is None:
        if any(folder.iterdir()):
            why = f"its {RECORD} cannot be read" if (folder / RECORD).exists() else "is not a run"
            raise ConfigError(f"name: {folder} exists and {why}; choose another name or move it away")
        return Workspace(folder, Record())
    if resume == "never":
        raise ConfigError(
            f"name: the run {folder} exists and checkpoint.resume=never; choose another name, or go on with it by "
            "checkpoint.resume=auto"
        )
    return Workspace(folder, record, start=checkpoint.newest(folder / "checkpoints"), is_resumed=True)


def read_record(folder: Path) -> Record | None:
    """The record of a run folder, None where there is none that can be read."""
    try:
        record = Record(**json.loads((folder / RECORD).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if isinstance(record.step, int) else None


def _starting_point(source: Path) -> tuple[Path, str | None]:
    """The checkpoint that `checkpoint.resume=<folder>` means, and the MLflow run that made it."""
    run_folder = source if (source / "checkpoints").is_dir() else source.parent.parent
    found = checkpoint.newest(source / "checkpoints") if run_folder == source else source
    if found is None or not found.is_dir():
        raise CheckpointError(f"checkpoint.resume: there is no checkpoint in {source}; give a run or a step-… folder")
    checkpoint.read_state(found)
    record = read_record(run_folder)
    return found, record.run_id if record is not None else None


def locked(file: Path) -> FileLock:
    """A lock that other processes of this machine respect."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, whole."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, "utf-8")
    aside.replace(path)


class _Terminal(logging.Handler):
    """Lines on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to(file: Path | None, is_main: bool) -> Iterator[None]:
    """Our own log records, in a file such as `train.log` and on stderr, from the main process only."""
    root = logging.getLogger("kandinsky_exp")
    level, propagate = root.level, root.propagate
    root.setLevel(logging.INFO if is_main else logging.ERROR)
    root.propagate = False
    handlers: list[logging.Handler] = []
    if is_main:
        handlers = [_Terminal()]
        handlers[0].setFormatter(logging.Formatter("%(message)s"))
    if is_main and file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        root.propagate = propagate
