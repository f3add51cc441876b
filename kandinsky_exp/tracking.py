"""Where a run is recorded: parameters, metrics, images and artifacts in an MLflow store, or nowhere.

Once a run exists, recording never ends the training: a write that fails is a warning. Whether the store answers is
asked before: by `probe`, and by the constructor of `MlflowTracker`.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kandinsky_exp.errors import Interrupted, TrackingError
from kandinsky_exp.mlflow_names import (
    MAX_DATASET_NAME,
    MAX_DIGEST,
    dataset_source,
    legal_name,
    masked,
    param_text,
    run_tags,
    shortened,
    tag_texts,
)
from kandinsky_exp.provenance import git_commit, pip_freeze
from kandinsky_exp.store import artifact_root as default_artifact_root
from kandinsky_exp.store import connect, default_uri, explained, find_experiment, probe
from kandinsky_exp.writer import BackgroundWriter

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MlflowTracker",
    "NullTracker",
    "Status",
    "Tracker",
    "default_artifact_root",
    "default_uri",
    "git_commit",
    "masked",
    "pip_freeze",
    "probe",
    "tracked",
]

Status = Literal["FINISHED", "FAILED", "KILLED"]

CHANGED_PARAMS = "changed_params"
ARTIFACT_PATIENCE = 60.0  # seconds


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

    def sync(self) -> None: ...

    def abandon(self, status: Status) -> None: ...

    def finish(self, status: Status) -> None:
        """Write all that is left and the status; later calls record nothing."""


class NullTracker:
    """Records nothing: `tracker=none`, and every process but the first."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, key: str, image: "Image", step: int, prompt: str | None = None) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def log_text(self, text: str, file: str) -> None: ...

    def log_dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def flush(self) -> None: ...

    def sync(self) -> None: ...

    def abandon(self, status: Status) -> None: ...

    def finish(self, status: Status) -> None: ...


class MlflowTracker:
    """A run in an MLflow store.

    It works on `MlflowClient` alone: no active run, no environment variable (an exported MLFLOW_RUN_ID, say) and no run
    that something else left open has a part in it.

    Args:
        uri: of the store; a relative sqlite path is made absolute.
        experiment: made where it does not exist.
        run_name: of a new run.
        artifact_root: local folder for the artifacts of a new experiment; a server decides for itself.
        run_id: the run to go on with; None makes a new one.
        tags: set at once.
        parent_run_id: of a sweep's job.

    Raises:
        TrackingError: the store cannot be used, or has no run `run_id`.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        artifact_root: Path,
        run_id: str | None = None,
        tags: Mapping[str, str] = {},
        parent_run_id: str | None = None,
        outbox: Path | None = None,
        token: str | None = None,
        redone_from: int | None = None,
    ) -> None:
        self._client, self.uri = connect(uri)
        with explained(self.uri):
            if run_id is None:
                server = self.uri.startswith(("http://", "https://", "databricks"))
                artifacts = None if server else Path(artifact_root).expanduser().resolve().as_uri()
                experiment_id = find_experiment(self._client, experiment, artifacts)
                all_tags = run_tags(tags, parent_run_id)
                run_id = self._client.create_run(experiment_id, tags=all_tags, run_name=run_name).info.run_id
            else:
                self._reopen(run_id, tags)
        self.run_id: str | None = run_id
        self._run = run_id
        self._prompts: dict[str, str] = {}
        self._prompts_file: str | None = None
        self._writer = BackgroundWriter(self._write_metrics)
        self._finished = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        texts = {legal_name(key): param_text(value) for key, value in params.items()}
        self._writer.submit("the parameters", lambda: self._write_params(texts))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        self._writer.add([(legal_name(key), float(value), now, int(step)) for key, value in metrics.items()])

    def log_image(self, key: str, image: "Image", step: int, prompt: str | None = None) -> None:
        # A copy: the caller may go on drawing. RGB: what both of the files MLflow writes (PNG, WebP) can hold.
        copy = image.convert("RGB") if image.mode != "RGB" else image.copy()
        clean, now = legal_name(key), time.time_ns() // 1_000_000

        def job() -> None:
            self._client.log_image(self._run, copy, key=clean, step=step, timestamp=now, synchronous=True)
            self._write_prompt(clean, step, prompt)

        self._writer.submit(f"the image {clean} of step {step}", job)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """As the protocol says; it waits for the copy, for the caller may remove the file.

        Raises:
            FileNotFoundError: there is nothing at `path`.
        """
        if not path.exists():
            raise FileNotFoundError(path)
        copy = self._writer.submit(
            f"the artifact {path.name}", lambda: self._client.log_artifact(self._run, str(path), folder)
        )
        copy.wait(ARTIFACT_PATIENCE)

    def log_text(self, text: str, file: str) -> None:
        self._writer.submit(f"the artifact {file}", lambda: self._client.log_text(self._run, text, file))

    def log_dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        self._writer.submit("the data set", lambda: self._write_dataset(name, digest, source, rows, context))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        texts = dict(tags)
        self._writer.submit("the tags", lambda: self._write_tags(texts))

    def flush(self) -> None:
        self._writer.flush()

    def sync(self) -> None: ...

    def abandon(self, status: Status) -> None: ...

    def finish(self, status: Status) -> None:
        if self._finished:
            return
        self._writer.submit(f"the status {status}", lambda: self._client.set_terminated(self._run, status))
        self._finished = True
        self._writer.close()

    def _reopen(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = None
        if found is None or found.info.lifecycle_stage != "active":
            raise TrackingError(
                f"tracker.uri: {masked(self.uri)} has no run {run_id} to go on with, or it was deleted there; set "
                "tracker.uri to the store the run began in, restore it (`mlflow runs restore`), or give a new name."
            )
        self._client.update_run(run_id, status="RUNNING")
        self._run = run_id
        self._write_tags(tags)

    def _write_metrics(self, points: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, timestamp, step) for key, value, timestamp, step in points]
        self._client.log_batch(self._run, metrics=metrics, synchronous=True)

    def _write_params(self, texts: dict[str, str]) -> None:
        from mlflow.entities import Param

        data = self._client.get_run(self._run).data
        new = [Param(key, text) for key, text in texts.items() if key not in data.params]
        self._client.log_batch(self._run, params=new, synchronous=True)
        changed: dict[str, list[str]] = json.loads(data.tags.get(CHANGED_PARAMS, "{}"))
        before = dict(changed)
        for key, text in texts.items():
            history = changed.get(key, [data.params.get(key, text)])
            if history[-1] != text:
                changed[key] = [*history, text]
        if changed != before:
            self._write_tags({CHANGED_PARAMS: json.dumps(changed, ensure_ascii=False)})

    def _write_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(key, text) for key, text in tag_texts(tags).items()]
        self._client.log_batch(self._run, tags=rows, synchronous=True)

    def _write_prompt(self, key: str, step: int, prompt: str | None) -> None:
        if prompt is None or prompt == self._prompts.get(key):
            return
        if self._prompts_file is None or key in self._prompts:
            self._prompts_file = f"prompts/step-{step:08d}.json"  # the prompts from this step on
        self._prompts[key] = prompt
        # Not in `images/`: one file there that is not named like an image, and the UI shows no image of the run at all.
        text = json.dumps(self._prompts, indent=2, ensure_ascii=False)
        self._client.log_text(self._run, text, self._prompts_file)

    def _write_dataset(self, name: str, digest: str, source: str, rows: int, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type, origin = dataset_source(source)
        dataset = Dataset(
            name=shortened(name, MAX_DATASET_NAME),
            digest=digest[:MAX_DIGEST],
            source_type=source_type,
            source=origin,
            profile=json.dumps({"num_rows": rows}),
        )
        entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
        self._client.log_inputs(self._run, datasets=[entry])


@contextlib.contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """Give the run its true status on every way out of the block, and let the way out be what it was.

    FINISHED on return and on `sys.exit(0)`; KILLED on `Interrupted` and Ctrl-C; FAILED on everything else.
    """
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    except SystemExit as stop:
        status = "FAILED" if stop.code else "FINISHED"
        raise
    finally:
        tracker.finish(status)
