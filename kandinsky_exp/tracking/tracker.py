"""Trackers: record parameters, metrics, images and artifacts of a run in MLflow, or nowhere.

Once a run exists, recording never ends the training: a write that fails is a warning, and what could not be written
waits in the run's folder. Whether the store answers is asked before: by `probe`, and by `MlflowTracker.open`.
"""

import contextlib
import json
import logging
import posixpath
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kandinsky_exp.errors import Interrupted, Pruned
from kandinsky_exp.tracking import mlflow_run
from kandinsky_exp.tracking.delivery import Delivery, settle
from kandinsky_exp.tracking.disk_queue import Record
from kandinsky_exp.tracking.mlflow_names import dataset_source, legal_name, param_text, reason, run_tags, tag_texts
from kandinsky_exp.tracking.outbox import Outbox
from kandinsky_exp.tracking.sender import name_of
from kandinsky_exp.tracking.store import artifact_location, connect, explained, find_experiment, impatient

if TYPE_CHECKING:
    from PIL.Image import Image

Status = Literal["FINISHED", "FAILED", "KILLED"]

FLUSH_PATIENCE = 10.0  # seconds
PATIENCE = 60.0
KILLED_PATIENCE = 5.0  # a machine that is taken away has no time

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What `loop` and `run` know of a store."""

    run_id: str | None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record flattened parameters; on a resumed run the first values stay, and what changed becomes a tag."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics without waiting; they can be read from the store within 5 s. NaN and infinity are recorded."""

    def log_image(self, key: str, image: "Image", step: int, prompt: str | None = None) -> None:
        """Record an image by key and step; prompts go to `prompts/step-<step>.json`, by key."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or folder into the run's artifacts, below `folder`."""

    def log_text(self, text: str, file: str) -> None:
        """Record `text` as the artifact `file`, a relative POSIX path."""

    def log_dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        """Record a data set as an input of the run, by path, URL or hub id; `context` is such as `training`."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a tag that exists is replaced."""

    def flush(self) -> None:
        """Wait (some seconds at most) until what was handed over is in the store."""

    def sync(self) -> None:
        """Wait until what was handed over survives a power cut: it is in the store, or on this machine's disk."""

    def finish(self, status: Status) -> None:
        """Write all that is left and the status, within a minute (some seconds if KILLED); later calls record nothing.

        What the store does not take is kept, and is delivered when the run is gone on with.
        """

    def abandon(self, status: Status) -> None:
        """Note the status and return at once, also in a signal's handler; nothing may be delivered any more."""


class NullTracker:
    """Records nothing: `tracker=none`, and every process but the first."""

    run_id: str | None = None

    def _ignore(self, *values: Any, **named: Any) -> None: ...

    log_params = log_metrics = log_image = log_artifact = log_text = log_dataset = set_tags = _ignore
    flush = sync = finish = abandon = _ignore


@dataclass(eq=False)
class MlflowTracker:
    """A run in an MLflow store.

    It works on `MlflowClient` alone: no active run, no environment variable (an exported MLFLOW_RUN_ID, say) and no run
    that something else left open has a part in it. All that is recorded goes to the outbox first, and from there to
    the store; what an earlier process left in the outbox goes before it.
    """

    uri: str
    run_id: str | None
    _delivery: Delivery
    _logged: Collection[tuple[str, int]]
    _redone_from: int | None
    _held: contextlib.ExitStack
    _prompts: dict[str, str] = field(default_factory=dict)
    _prompts_file: str = ""
    _has_images: bool = False
    _finished: bool = False

    @classmethod
    def open(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        artifact_root: Path,
        outbox: Path,
        run_id: str | None = None,
        token: str | None = None,
        tags: Mapping[str, str] = {},
        parent_run_id: str | None = None,
        redone_from: int | None = None,
    ) -> "MlflowTracker":
        """Make a run in a store, or go on with one.

        Args:
            uri: of the store; a relative sqlite path is made absolute.
            experiment: made where it does not exist.
            run_name: of a new run.
            artifact_root: local folder for the artifacts of a new experiment; a server decides for itself.
            outbox: folder for what the store has not taken yet.
            run_id: the run to go on with; None makes a new one.
            token: becomes a tag of a new run. Where there is a run with it already, that one is gone on with: its
                process was killed before it could remember the id.
            tags: set at once. `parent_run_id`: of a sweep's job.
            redone_from: what is there of this step and later ones is not recorded again; None: all is recorded.

        Raises:
            TrackingError: the store cannot be used, or has no run `run_id`.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(impatient())
            client, uri = connect(uri)
            box = Outbox(outbox)
            with explained(uri):
                artifacts = artifact_location(uri, artifact_root)
                if run_id is None:
                    place, every = find_experiment(client, experiment, artifacts), run_tags(tags, parent_run_id)
                    run_id = mlflow_run.find_or_make(client, place, run_name, token, every)
                mlflow_run.reopen(client, run_id, tags, artifacts)
                logged = mlflow_run.steps_logged(client, run_id, box, redone_from)
            box.open()
            box.remove_status()  # of an earlier process: this one's will come
            return cls(uri, run_id, Delivery(client, run_id, box), logged, redone_from, held.pop_all())

    def log_params(self, params: Mapping[str, Any]) -> None:
        texts = {legal_name(key): param_text(value) for key, value in params.items()}
        self._record({"kind": "params", "what": "the parameters", "texts": texts}, seal=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now, step = time.time_ns() // 1_000_000, int(step)
        values = {legal_name(key): float(value) for key, value in metrics.items()}
        new = {key: value for key, value in values.items() if (key, step) not in self._logged}
        if new:
            self._record({"kind": "metrics", "step": step, "time": now, "values": new}, points=len(new))

    def log_image(self, key: str, image: "Image", step: int, prompt: str | None = None) -> None:
        clean, step = legal_name(key), int(step)
        record = mlflow_run.image_record(clean, step, self._redone_from is not None and step >= self._redone_from)
        self._attach(record, mlflow_run.images_to(record["name"], image))
        if not self._has_images:
            self._has_images = True
            self.set_tags({"mlflow.loggedImages": "True"})  # the UI looks for images where this is set
        self._log_prompt(clean, step, prompt)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """As the protocol says; the caller may remove the file afterwards.

        Raises:
            FileNotFoundError: there is nothing at `path`.
        """
        if not path.exists():
            raise FileNotFoundError(path)
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        self._attach({"what": f"the artifact {path.name}", "to": folder}, lambda to: copy(path, to / path.name))

    def log_text(self, text: str, file: str) -> None:
        to, name = posixpath.split(file)
        data = text.encode("utf-8", "replace")
        self._attach({"what": f"the artifact {file}", "to": to or None}, lambda place: (place / name).write_bytes(data))

    def log_dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        fields = {"name": name, "digest": digest, "source": dataset_source(source), "rows": rows, "context": context}
        self._record({"kind": "dataset", "what": f"the data set {name[:100]}", **fields})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._record({"kind": "tags", "what": "the tags", "texts": tag_texts(tags)})

    def sync(self) -> None:
        self._delivery.outbox.sync()

    def flush(self) -> None:
        self.sync()
        if not self._delivery.is_failing:  # else it is tried in its own time
            self._delivery.flush(FLUSH_PATIENCE)

    def finish(self, status: Status) -> None:
        if self._finished:
            return
        self._end(status)
        settle(self._delivery, KILLED_PATIENCE if status == "KILLED" else PATIENCE)
        self._held.close()

    def abandon(self, status: Status) -> None:
        if not self._finished:
            self._end(status)

    def _end(self, status: Status) -> None:
        self._delivery.outbox.set_status({"status": status, "time": time.time_ns() // 1_000_000})
        self._finished = True
        self._delivery.records.notify()

    def _record(self, record: Record, points: int = 1, seal: bool = False) -> None:
        if self._is_late(record):
            return
        self._delivery.outbox.records.append(record, seal)
        self._delivery.records.notify(points)

    def _attach(self, record: Record, fill: Callable[[Path], object]) -> None:
        if self._is_late(record):
            return
        try:
            self._delivery.outbox.artifacts.attach({"kind": "files", **record}, fill)
            self._delivery.artifacts.notify()
        except Exception as error:
            log.warning("MLflow: %s was not recorded (%s)", record["what"], reason(error))

    def _is_late(self, record: Record) -> bool:
        if self._finished:
            log.warning("MLflow: %s came after the end of the run and was not recorded", name_of(record))
        return self._finished

    def _log_prompt(self, key: str, step: int, prompt: str | None) -> None:
        if prompt is None or prompt == self._prompts.get(key):
            return
        if not self._prompts_file or key in self._prompts:
            self._prompts_file = f"prompts/step-{step:08d}.json"  # the prompts from this step on
        self._prompts[key] = prompt
        # Not in `images/`: one file there that is not named like an image, and the UI shows no image of the run at all.
        self.log_text(json.dumps(self._prompts, indent=2, ensure_ascii=False), self._prompts_file)


@contextlib.contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """Give the run its true status on every way out of the block, and let the way out be what it was.

    FINISHED on return and on `sys.exit(0)`; KILLED on `Interrupted`, `Pruned` and Ctrl-C; FAILED on everything else.
    """
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Interrupted, Pruned, KeyboardInterrupt):
        status = "KILLED"
        raise
    except SystemExit as stop:
        status = "FAILED" if stop.code else "FINISHED"
        raise
    finally:
        tracker.finish(status)
