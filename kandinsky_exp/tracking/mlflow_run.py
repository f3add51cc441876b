"""A run in an MLflow store: find or create it, and send records to it. What is sent twice is there once."""

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky_exp.errors import TrackingError
from kandinsky_exp.system.redaction import masked
from kandinsky_exp.tracking import artifact_folders
from kandinsky_exp.tracking.disk_queue import Record
from kandinsky_exp.tracking.mlflow_names import (
    IMAGE,
    MAX_DATASET_NAME,
    MAX_DIGEST,
    same_param,
    shortened,
    tag_texts,
)
from kandinsky_exp.tracking.outbox import Outbox
from kandinsky_exp.tracking.sender import Refused
from kandinsky_exp.tracking.store import check_active, find_run, restore_command

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

TOKEN = "kandinsky_exp.token"  # tag of a run: the folder it belongs to knows the same text  # nosec B105
CHANGED_PARAMS = "changed_params"
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "NOT_IMPLEMENTED"}
BREAKDOWNS = {"INTERNAL_ERROR", "BAD_REQUEST"}  # a data base that cannot hold a text says this, and one in trouble too
REFUSED_STATUS = {400, 405, 411, 413, 414, 415, 422}  # of HTTP
TRIES = 5  # of a parameter, tag or data set, over a minute, that breaks a store which is otherwise well


def find_or_make(
    client: "MlflowClient", experiment_id: str, run_name: str, token: str | None, tags: Mapping[str, str]
) -> str:
    """The id of the run with this token, or of a new one with these tags."""
    if token is not None:
        wanted = f"tags.`{TOKEN}` = '{token}'"
        found = client.search_runs([experiment_id], wanted, max_results=1, order_by=["attributes.start_time ASC"])
        if found:
            return str(found[0].info.run_id)
        tags = {**tags, TOKEN: token}
    return str(client.create_run(experiment_id, tags=dict(tags), run_name=run_name).info.run_id)


def reopen(client: "MlflowClient", run_id: str, tags: Mapping[str, str], artifacts: str | None) -> None:
    """Go on with a run, however its last process ended.

    Args:
        artifacts: folder of the store's artifacts, None where a server decides.

    Raises:
        TrackingError: it, or its experiment, is not there.
    """
    found = find_run(client, run_id)
    if found is None:
        raise TrackingError(
            f"tracker.uri: {masked(client.tracking_uri)} has no run {run_id} to go on with; set tracker.uri to the "
            "store the run began in, or give a new name."
        )
    check_active(client, client.get_experiment(found.info.experiment_id))
    if found.info.lifecycle_stage != "active":
        raise TrackingError(
            f"tracker.uri: the run {run_id} was deleted in this store; give a new name, or bring it back: "
            f"{restore_command(client.tracking_uri, f'runs restore --run-id {run_id}')}"
        )
    artifact_folders.correct_run(client, run_id, artifacts)
    client.update_run(run_id, status="RUNNING")
    if "error" in found.data.tags and "error" not in tags:  # of an earlier start
        client.delete_tag(run_id, "error")
    MlflowRun(client, run_id).set_tags(tags)


class MlflowRun:
    """One run, as records are sent to it."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client, self._run = client, run_id
        self._images: dict[tuple[str, int], str] | None = None
        self._tried: tuple[Record, int] | None = None

    def send(self, batch: list[Record]) -> None:
        """Metrics, or one record of another kind."""
        kind = str(batch[0].get("kind"))
        senders: dict[str, Callable[..., None]] = {
            "metrics": self._send_metrics,
            "params": self._send_params,
            "tags": lambda record: self.set_tags(record["texts"]),
            "dataset": self._send_dataset,
        }
        if kind not in senders:
            raise Refused("it cannot be read")
        try:
            senders[kind](*batch)
        except Exception as error:
            if self._is_refusal(error) or (kind != "metrics" and self._breaks_the_store(batch[0], error)):
                raise Refused(str(error)) from error
            raise

    def send_files(self, record: Record, folder: Path) -> None:
        """Everything in `folder`, below the artifact folder `record["to"]`."""
        if record.get("kind") != "files":
            raise Refused("it cannot be read")
        check_readable(folder)
        image = (record["key"], record["step"]) if "key" in record else None
        try:
            if image and record["redone"] and self._stored_images().get(image, record["name"]) != record["name"]:
                return
            self._client.log_artifacts(self._run, str(folder), record["to"])
        except Exception as error:
            if self._is_refusal(error):
                raise Refused(str(error)) from error
            raise
        if image and self._images is not None:
            self._images[image] = record["name"]

    def end(self, status: Record) -> None:
        self._client.set_terminated(self._run, status["status"], status["time"])

    def _send_metrics(self, *batch: Record) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["time"], record["step"])
            for record in batch
            for key, value in record["values"].items()
        ]
        self._client.log_batch(self._run, metrics=metrics, synchronous=True)

    def _send_params(self, record: Record) -> None:
        from mlflow.entities import Param

        texts: dict[str, str] = record["texts"]
        data = self._client.get_run(self._run).data
        new = [Param(key, text) for key, text in texts.items() if key not in data.params]
        self._client.log_batch(self._run, params=new, synchronous=True)
        changed: dict[str, list[str]] = json.loads(data.tags.get(CHANGED_PARAMS, "{}"))
        before = dict(changed)
        for key, text in texts.items():
            history = changed.get(key, [data.params.get(key, text)])
            if not same_param(history[-1], text):
                changed[key] = [*history, text]
        if changed != before:
            self.set_tags({CHANGED_PARAMS: json.dumps(changed, ensure_ascii=False)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(key, text) for key, text in tag_texts(tags).items()]
        self._client.log_batch(self._run, tags=rows, synchronous=True)

    def _send_dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source_type, origin = record["source"]
        dataset = Dataset(
            name=shortened(record["name"], MAX_DATASET_NAME),
            digest=record["digest"][:MAX_DIGEST],
            source_type=source_type,
            source=origin,
            profile=json.dumps({"num_rows": record["rows"]}),
        )
        entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", record["context"])])
        self._client.log_inputs(self._run, datasets=[entry])

    def _stored_images(self) -> dict[tuple[str, int], str]:
        """Names without their ending, by key and step, of the images that the run has."""
        if self._images is None:
            found = [IMAGE.fullmatch(file.path) for file in self._client.list_artifacts(self._run, "images")]
            pictures = [one for one in found if one is not None and one["kind"] == ".png"]
            self._images = {(one["key"].replace("~", "/"), int(one["step"])): one["name"] for one in pictures}
        return self._images

    def _is_refusal(self, error: Exception) -> bool:
        """Whether the store has looked at what was sent and does not want it; not so while the run is deleted."""
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException):
            return error.error_code in REFUSALS and self._is_active()
        return getattr(getattr(error, "response", None), "status_code", None) in REFUSED_STATUS

    def _breaks_the_store(self, record: Record, error: Exception) -> bool:
        """Whether nothing but this record can be what goes wrong: it must not hold up the metrics behind it."""
        from mlflow.exceptions import MlflowException

        if not isinstance(error, MlflowException) or error.error_code not in BREAKDOWNS or not self._is_active():
            return False
        tries = self._tried[1] if self._tried is not None and self._tried[0] is record else 0
        self._tried = (record, tries + 1)
        return tries + 1 >= TRIES

    def _is_active(self) -> bool:
        return bool(self._client.get_run(self._run).info.lifecycle_stage == "active")


def image_record(key: str, step: int, redone: bool) -> Record:
    """An image under the file name, here without its ending, by which MLflow's UI knows key and step.

    MLflow's own `log_image` makes another name whenever it is called: an image that is sent twice would be there twice.
    """
    now = time.time_ns() // 1_000_000
    name = f"{key.replace('/', '~')}+step+{step}+timestamp+{now}+{uuid.uuid4()}"
    fields = {"key": key, "step": step, "name": name, "redone": redone}
    return {"what": f"the image {key} of step {step}", "to": "images", **fields}


def images_to(name: str, image: "Image") -> Callable[[Path], None]:
    """Write `image` into a folder as the two files that MLflow's UI wants: as it is, and a small one."""

    def fill(folder: Path) -> None:
        from mlflow.tracking.multimedia import compress_image_size

        picture = image if image.mode == "RGB" else image.convert("RGB")  # what both PNG and WebP can hold
        picture.save(folder / f"{name}.png", compress_level=1)  # the caller waits
        compress_image_size(picture).save(folder / f"{name}+compressed.webp")

    return fill


def check_readable(folder: Path) -> None:
    """Raise `Refused` where what is to be sent cannot be read: no later try will change that."""
    if not folder.is_dir():
        raise Refused(f"{folder} is gone")
    for path in folder.rglob("*"):
        if not os.access(path, os.R_OK):
            raise Refused(f"{path} cannot be read")


def steps_logged(client: "MlflowClient", run_id: str, outbox: Outbox, since: int | None) -> set[tuple[str, int]]:
    """(key, step) of all metrics from step `since` on that the run or the outbox has; none for None."""
    if since is None:
        return set()
    found = {
        (key, record["step"])
        for record in outbox.records.on_disk()
        if record.get("kind") == "metrics" and record["step"] >= since
        for key in record["values"]
    }
    for key in client.get_run(run_id).data.metrics:
        found.update((key, point.step) for point in client.get_metric_history(run_id, key) if point.step >= since)
    return found
