"""What a run leaves in MLflow, read back through MLflow's own client."""

import contextlib
import http.server
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import numpy as np
import pytest
import torch
from commands import Forked
from many_points import check_all_is_recorded
from mlflow import MlflowClient
from PIL import Image
from running import train

from kandinsky_exp.data.formats.shards import Shards
from kandinsky_exp.errors import Interrupted, TrackingError
from kandinsky_exp.system.redaction import masked
from kandinsky_exp.tracking.delivery import deliver_left
from kandinsky_exp.tracking.mlflow_names import MAX_PARAM, dataset_source, param_text, value_text
from kandinsky_exp.tracking.outbox import Outbox
from kandinsky_exp.tracking.provenance import git_commit, pip_freeze
from kandinsky_exp.tracking.store import default_uri
from kandinsky_exp.tracking.store_probe import probe
from kandinsky_exp.tracking.tracker import MlflowTracker, NullTracker, Tracker, tracked

# MLflow's own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="module")
def output_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests of this file: MLflow takes seconds to make one."""
    return tmp_path_factory.mktemp("out puts#é%20")


@pytest.fixture(scope="module")
def client(output_root: Path) -> MlflowClient:
    return MlflowClient(track(output_root).uri)


@pytest.fixture
def tracker(output_root: Path) -> Iterator[MlflowTracker]:
    made = track(output_root)
    yield made
    made.finish("FINISHED")


def track(output_root: Path, outbox: Path | None = None, **options: Any) -> MlflowTracker:
    box = outbox or output_root.with_name(f"outbox-{uuid.uuid4().hex}")
    return MlflowTracker.open(default_uri(output_root), "tests", "a run", output_root / "mlartifacts", box, **options)


def red(size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), "red")


def artifacts(client: MlflowClient, run_id: str | None, folder: str | None = None) -> list[str]:
    return [file.path for file in client.list_artifacts(str(run_id), folder)]


def artifact(client: MlflowClient, run_id: str | None, file: str) -> Path:
    return Path(url2pathname(urlparse(client.get_run(str(run_id)).info.artifact_uri).path)) / file


def images(client: MlflowClient, run_id: str | None) -> set[tuple[str, int]]:
    """(key, step) of the images, read from the file names as MLflow's UI reads them."""
    found = set()
    for path in artifacts(client, run_id, "images"):
        match = re.fullmatch(r"images/(.+)\+step\+(\d+)\+timestamp\+\d+\+[0-9a-f-]+(\+compressed\.webp|\.png)", path)
        assert match, f"the UI shows no image at all of a run with {path}"
        found.add((match[1].replace("~", "/"), int(match[2])))
    return found


# The contract


def test_a_run_is_recorded(client: MlflowClient, output_root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    tracker = track(output_root, tags={"stage": "prior", "git_commit": "0" * 40}, parent_run_id="f" * 32)
    with tracked(tracker):
        tracker.log_params(
            {"optimizer.lr": 1e-5, "model.snr_gamma": None, "data.cache": True, "optimizer.betas": [0.9, 1]}
        )
        for step in (10, 20):
            tracker.log_metrics({"train/loss": 1 / step, "validation/loss": 2.0}, step)
        tracker.log_image("validation/00", red(), 500, prompt="a cat, 4k: red")
        tracker.log_image("reconstruction/00", red(), 500)
        tracker.log_artifact(tmp_path / "config.yaml")
        tracker.log_artifact(tmp_path / "config.yaml", "copies")
        tracker.log_text("torch==2\n", "requirements/freeze.txt")
        tracker.log_dataset("emoji" * 200, "a" * 64, str(tmp_path), 64, "training")
        tracker.set_tags({"weights": "tiny", "data_fingerprint": "a" * 64})
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.info.end_time
    assert run.data.params == {
        "optimizer.lr": "1e-05",
        "model.snr_gamma": "null",
        "data.cache": "true",
        "optimizer.betas": "[0.9, 1]",
    }
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (10, 0.1),
        (20, 0.05),
    ]
    assert images(client, tracker.run_id) == {("validation/00", 500), ("reconstruction/00", 500)}
    prompts = json.loads(artifact(client, tracker.run_id, "prompts/step-00000500.json").read_text())
    assert prompts == {"validation/00": "a cat, 4k: red"}
    assert set(artifacts(client, tracker.run_id)) == {"config.yaml", "copies", "images", "prompts", "requirements"}
    assert artifact(client, tracker.run_id, "copies/config.yaml").read_text() == "seed: 0\n"
    assert artifact(client, tracker.run_id, "requirements/freeze.txt").read_text() == "torch==2\n"
    wanted = {"stage": "prior", "git_commit": "0" * 40, "mlflow.parentRunId": "f" * 32}
    wanted |= {"weights": "tiny", "mlflow.source.git.commit": "0" * 40}
    assert wanted.items() <= run.data.tags.items()
    [entry] = run.inputs.dataset_inputs
    assert len(entry.dataset.name) == 500
    assert entry.dataset.digest == "a" * 36
    assert json.loads(entry.dataset.profile) == {"num_rows": 64}
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def test_the_picture_comes_back_as_it_was(client: MlflowClient, tracker: MlflowTracker) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    tracker.log_image("validation/00", noise, 0)
    wanted = np.asarray(noise).copy()
    noise.paste("black", (0, 0, 64, 64))  # the caller may go on drawing
    tracker.flush()
    [png] = [path for path in artifacts(client, tracker.run_id, "images") if path.endswith(".png")]
    assert np.array_equal(np.asarray(Image.open(artifact(client, tracker.run_id, png))), wanted)


def test_prompts_that_change_start_a_new_file(client: MlflowClient, tracker: MlflowTracker) -> None:
    for step, second in [(0, "b"), (500, "b"), (1000, "c")]:
        tracker.log_image("validation/00", red(), step, prompt="a")
        tracker.log_image("validation/01", red(), step, prompt=second)
    tracker.flush()
    texts = [
        artifact(client, tracker.run_id, path).read_text() for path in artifacts(client, tracker.run_id, "prompts")
    ]
    assert [json.loads(text)["validation/01"] for text in texts] == ["b", "c"]
    assert all(json.loads(text)["validation/00"] == "a" for text in texts)


def test_nothing_is_recorded_without_a_store(tmp_path: Path) -> None:
    tracker: Tracker = NullTracker()
    with tracked(tracker):
        tracker.log_params({"a": 1})
        tracker.log_metrics({"a": 1.0}, 0)
        tracker.log_image("a", red(), 0)
        tracker.log_artifact(tmp_path)
        tracker.log_dataset("a", "b", "c", 1, "training")
        tracker.flush()
    assert tracker.run_id is None
    assert not list(tmp_path.iterdir())


def test_mlflow_is_imported_only_where_it_is_used() -> None:
    heavy = {"mlflow", "torch", "sqlalchemy", "PIL"}
    code = f"import sys, kandinsky_exp.tracking.tracker; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Stores (pitfalls 25, 26, 32, 41)


def test_the_default_store_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri("outputs") == f"sqlite:///{tmp_path.resolve()}/outputs/mlflow.db"


def test_store_and_artifacts_are_where_they_should_be(output_root: Path, tracker: MlflowTracker) -> None:
    tracker.log_text("a", "a.txt")
    tracker.flush()
    assert (output_root / "mlartifacts" / str(tracker.run_id) / "artifacts" / "a.txt").exists()
    assert {path.name for path in output_root.iterdir()} == {"mlflow.db", "mlartifacts", ".mlflow.db.lock"}


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "file:///tmp/mlruns", "", "sqlite://", "sqlite:///:memory:", "ftp://a"]
)
def test_a_store_that_mlflow_refuses_is_refused_at_once(uri: str, tmp_path: Path) -> None:
    for attempt in (probe, lambda uri: MlflowTracker.open(uri, "tests", "a", tmp_path, tmp_path / "outbox")):
        with pytest.raises(TrackingError, match=r"(?s)tracker.uri.*sqlite:///"):
            attempt(uri)


@pytest.mark.slow
def test_processes_that_first_touch_a_store_together_lose_nothing(tmp_path: Path) -> None:
    check_all_is_recorded(default_uri(tmp_path), tmp_path)


def test_a_store_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    """It takes seconds, in the first of all runs: a likely moment for Ctrl-C."""
    code = "import sys; from kandinsky_exp.tracking.store import connect; connect(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, default_uri(tmp_path)])
    files = [tmp_path / name for name in ("mlflow.db", ".mlflow.db.part")]
    while not any(file.exists() and file.stat().st_size > 200_000 for file in files):  # of some 950,000
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    probe(default_uri(tmp_path))
    tracker = track(tmp_path)
    tracker.finish("FINISHED")
    assert MlflowClient(tracker.uri).get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def refusal(uri: str, timeout: float = 1.0) -> str:
    """The message with which `probe` refuses `uri`, quickly."""
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        probe(uri, timeout)
    assert time.monotonic() - start < timeout + 4
    message = str(caught.value)
    assert "tracker.uri" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg2", "mysql+pymysql"])
def test_a_dead_store_is_found_in_seconds(scheme: str) -> None:
    message = refusal(f"{scheme}://me:secret@127.0.0.1:{free_port()}/db")
    assert "secret" not in message
    assert "tracker=none" in message


def test_a_silent_server_is_found_in_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        refusal(f"http://127.0.0.1:{silent.getsockname()[1]}")


@contextlib.contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_server_that_is_not_mlflow_or_refuses_us() -> None:
    with server(200, b"<html>hello") as uri:
        assert "not as an MLflow server" in refusal(uri)
    with server(404, b"{}") as uri:
        assert "404" in refusal(uri)
    with server(403, b"no") as uri:
        assert "MLFLOW_TRACKING_TOKEN" in refusal(uri)
    with server(200, b'{"experiments": []}') as uri:
        probe(uri)


def test_a_file_that_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a data base " * 100)
    assert "not a database" in refusal(f"sqlite:///{tmp_path}/text.db")
    assert refusal(f"sqlite:///{tmp_path}/text.db/below/mlflow.db")
    assert refusal(f"sqlite:///{tmp_path}")


def test_probing_makes_no_store(tmp_path: Path, output_root: Path, client: MlflowClient) -> None:
    probe(default_uri(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())
    probe(default_uri(output_root))


@pytest.mark.parametrize(
    ("revision", "told"),
    [
        ("cfd24bdc0731", rf"older MLflow than the installed {mlflow.__version__}; .*`mlflow db upgrade"),
        (
            "0123456789ab",
            rf"newer MLflow than the installed {mlflow.__version__} .*; upgrade mlflow, or name a new store",
        ),
    ],
)
def test_a_store_of_another_mlflow_is_explained(
    revision: str, told: str, tmp_path: Path, output_root: Path, client: MlflowClient
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        with contextlib.closing(sqlite3.connect(output_root / "mlflow.db")) as new:
            new.backup(other)
        other.execute("UPDATE alembic_version SET version_num = ?", [revision])
        other.commit()
    with pytest.raises(TrackingError, match=told):
        train(tmp_path, "name=a")
    assert not (tmp_path / "a").exists()
    assert re.search(told, refusal(default_uri(tmp_path), 5.0))
    with pytest.raises(TrackingError, match=told):
        track(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("DROP TABLE webhooks")  # MLflow now takes it for one of its own to complete
        other.commit()
    if "newer" in told:
        with pytest.raises(TrackingError, match=told):
            track(tmp_path)


def test_a_deleted_experiment_is_explained(client: MlflowClient, output_root: Path) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        MlflowTracker.open(default_uri(output_root), "gone", "a", output_root, output_root / "outbox")


# Status (pitfall 27)

ENDINGS: list[tuple[BaseException | None, str]] = [
    (None, "FINISHED"),
    (SystemExit(), "FINISHED"),
    (SystemExit(0), "FINISHED"),
    (SystemExit(1), "FAILED"),
    (SystemExit("a message"), "FAILED"),
    (ValueError("a"), "FAILED"),
    (KeyboardInterrupt(), "KILLED"),
    (Interrupted(signal.SIGTERM), "KILLED"),
]


@pytest.mark.parametrize(("ending", "status"), ENDINGS, ids=lambda value: repr(value))
def test_the_status_is_true(client: MlflowClient, output_root: Path, ending: BaseException | None, status: str) -> None:
    tracker = track(output_root)
    expected = contextlib.nullcontext() if ending is None else pytest.raises(type(ending))
    with expected as caught, tracked(tracker):
        tracker.log_metrics({"a": 1.0}, 7)
        if ending is not None:
            raise ending
    if caught is not None:
        assert caught.value is ending
        assert ending.__context__ is None
    assert client.get_run(str(tracker.run_id)).info.status == status
    assert client.get_metric_history(str(tracker.run_id), "a")[0].step == 7


def ends(root: Path, name: str) -> None:
    def stop(number: int, _: object) -> None:
        raise Interrupted(number)

    tracker = MlflowTracker.open(
        default_uri(root), "endings", name, root / "mlartifacts", root.with_name(f"outbox-{name}")
    )
    signal.signal(signal.SIGTERM, stop)
    with tracked(tracker):
        tracker.log_metrics({"a": 1.0}, 0)
        if name == "sys.exit":
            sys.exit(3)
        print("ready", flush=True)
        time.sleep(600)


def test_the_status_is_true_in_a_process_of_its_own(client: MlflowClient, output_root: Path) -> None:
    signals = {"sys.exit": None, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
    processes = {name: Forked(ends, output_root, name) for name in signals}
    for name, number in signals.items():
        if number is not None:
            processes[name].wait_until(lambda process=processes[name]: "ready" in process.printed())
            processes[name].signal(number)
    printed = {name: process.finish() for name, process in processes.items()}
    assert processes["sys.exit"].code == 3
    assert "Interrupted" in printed["SIGTERM"]
    experiment = client.get_experiment_by_name("endings")
    runs = client.search_runs([experiment.experiment_id])
    statuses = {run.info.run_name: run.info.status for run in runs}
    assert statuses == {"sys.exit": "FAILED", "SIGTERM": "KILLED", "Ctrl-C": "KILLED"}
    assert all(run.data.metrics == {"a": 1.0} for run in runs)


def test_the_first_status_stays(client: MlflowClient, output_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = track(output_root)
    tracker.finish("FAILED")
    tracker.finish("FINISHED")
    tracker.set_tags({"late": "yes"})
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FAILED"
    assert "late" not in run.data.tags
    assert "after the end of the run" in caplog.text


# Metrics (pitfalls 28, 31)


def test_metrics_cost_the_caller_nothing_and_are_visible_in_time(client: MlflowClient, tracker: MlflowTracker) -> None:
    costs = []
    for step in range(200):
        start = time.perf_counter()
        tracker.log_metrics({"train/loss": 0.5, "train/lr": 1e-5, "train/grad_norm": 1.0}, step)
        costs.append(time.perf_counter() - start)
    logged = time.monotonic()
    while len(client.get_metric_history(str(tracker.run_id), "train/loss")) < 200:
        assert time.monotonic() - logged < 5
        time.sleep(0.1)
    assert float(np.median(costs)) < 1e-3


def test_numbers_of_every_kind(client: MlflowClient, tracker: MlflowTracker) -> None:
    numbers = {
        "tensor": torch.tensor(1.5),
        "numpy": np.float32(1.5),
        "integer": 2,
        "nan": math.nan,
        "infinite": math.inf,
    }
    tracker.log_metrics(numbers, np.int64(3))
    tracker.log_metrics({"a prompt, with: commas": 1.0, "//a/../b": 2.0}, 3)
    tracker.flush()
    metrics = client.get_run(str(tracker.run_id)).data.metrics
    assert math.isnan(metrics.pop("nan"))
    assert metrics.pop("infinite") > 1e300
    assert metrics == {"tensor": 1.5, "numpy": 1.5, "integer": 2.0, "a prompt_ with_ commas": 1.0, "b": 2.0}


def test_a_run_that_is_deleted_meanwhile_does_not_end_the_training(
    client: MlflowClient, output_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = track(output_root)
    client.delete_run(str(tracker.run_id))
    start = time.monotonic()
    with tracked(tracker):
        tracker.log_metrics({"a": 1.0}, 0)
        tracker.flush()
        tracker.set_tags({"a": "b"})
    assert time.monotonic() - start < 10
    assert "metrics cannot be written" in caplog.text
    assert "MLflow: 3 records wait in" in caplog.text


def test_records_that_neither_the_disk_nor_the_store_took_are_counted_as_lost(
    client: MlflowClient, output_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = track(output_root, outbox=tmp_path / "outbox")
    client.delete_run(str(tracker.run_id))
    (tmp_path / "outbox").write_text("in the folder's place")
    with tracked(tracker):
        tracker.log_metrics({"a": 1.0}, 0)
        tracker.set_tags({"a": "b"})
        tracker.flush()
    assert "the store did not take 2 records, and they are lost" in caplog.text


def test_an_artifact_that_is_not_there_is_a_mistake_of_ours(tracker: MlflowTracker, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tracker.log_artifact(tmp_path / "nothing")


# Images and parameters (pitfalls 29, 31)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_images_of_every_mode_and_keys_of_any_text(client: MlflowClient, output_root: Path, mode: str) -> None:
    tracker = track(output_root)
    with tracked(tracker):
        tracker.log_image("a cat, red: é?", red().convert(mode), 0, prompt="a cat, red: é?")
    assert images(client, tracker.run_id) == {("a cat_ red_ __", 0)}


def test_parameters_of_every_kind() -> None:
    values = [None, True, 1e-5, 1.0, -2.5, 1e300, float("nan"), "", "null", ["a", None], {"b": Path("c")}, [0.0, 0.9]]
    texts = ["null", "true", "1e-05", "1", "-2.5", "1e+300", "NaN", "", "null", '["a", null]', '{"b": "c"}', "[0, 0.9]"]
    assert [param_text(value) for value in values] == texts
    assert param_text(Path("d")) == "d"


def test_long_parameters_are_short_and_different() -> None:
    paths = [param_text(f"/data/{name}/{'a folder/' * 30}pictures") for name in ("mine", "yours")]
    assert all(len(path) <= MAX_PARAM and re.search(r"folder/pictures \([0-9a-f]{6}\)$", path) for path in paths)
    prompts = ["a red fox in the snow", *(f"prompt {number}" for number in range(30))]
    texts = [param_text(prompts), param_text([*prompts[:10], "another", *prompts[11:]])]
    assert all(len(text) <= MAX_PARAM and text.startswith('["a red fox in the snow", ') for text in texts)
    assert all(re.search(r"\(31 in all, [0-9a-f]{6}\)$", text) for text in texts)
    assert len({*paths, *texts}) == 4
    assert value_text(prompts) == json.dumps(prompts)


def test_many_and_long_parameters(client: MlflowClient, tracker: MlflowTracker) -> None:
    tracker.log_params({f"a.{i}": "é" * 7000 for i in range(250)} | {"empty": "", "odd, key": 1})
    tracker.flush()
    params = client.get_run(str(tracker.run_id)).data.params
    assert len(params) == 252
    assert len(params["a.0"]) <= MAX_PARAM
    assert params["empty"] == ""
    assert params["odd_ key"] == "1"


def test_a_resumed_run_goes_on(client: MlflowClient, output_root: Path) -> None:
    first = track(output_root)
    with tracked(first):
        first.log_params({"max_steps": 10, "seed": 0})
        first.log_metrics({"a": 1.0}, 0)
    for max_steps in (20, 20, 30):
        again = track(output_root, run_id=first.run_id, tags={"resumed": "yes"})
        assert again.run_id == first.run_id
        assert client.get_run(str(again.run_id)).info.status == "RUNNING"
        with tracked(again):
            again.log_params({"max_steps": max_steps, "seed": 0, "new": None})
            again.log_metrics({"a": 2.0}, max_steps)
    run = client.get_run(str(first.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.params == {"max_steps": "10", "seed": "0", "new": "null"}
    assert json.loads(run.data.tags["changed_params"]) == {"max_steps": ["10", "20", "30"]}
    assert run.data.tags["resumed"] == "yes"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "a")] == [0, 20, 20, 30]


def test_a_run_of_an_older_version_goes_on_without_changes(client: MlflowClient, output_root: Path) -> None:
    """Parameters were longer, and some are tags now; MLflow lets none be written again."""
    made, prompts = track(output_root), [f"a long prompt, number {number}" for number in range(9)]
    with tracked(made):
        stored = {"trainer.max_grad_norm": "1.0", "optimizer.betas": "[0.9, 1.0]", "hub.push": "false"}
        stored |= {"validation.prompts": json.dumps(prompts), "data.path": "/data/" + "a" * 200, "seed": "0"}
        for key, text in stored.items():
            client.log_param(str(made.run_id), key, text)
    again = track(output_root, run_id=made.run_id)
    with tracked(again):
        now = {"trainer.max_grad_norm": 1.0, "optimizer.betas": [0.9, 1.0], "validation.prompts": prompts}
        again.log_params(now | {"data.path": "/data/" + "a" * 200, "seed": 1})
    data = client.get_run(str(made.run_id)).data
    assert data.params == stored
    assert json.loads(data.tags["changed_params"]) == {"seed": ["0", "1"]}


def test_a_run_that_is_not_there_cannot_be_resumed(client: MlflowClient, output_root: Path) -> None:
    gone = track(output_root)
    gone.finish("FINISHED")
    client.delete_run(str(gone.run_id))
    for run_id, told in (("f" * 32, "has no run"), (str(gone.run_id), "mlflow runs restore --run-id")):
        with pytest.raises(TrackingError, match=f"{told} {run_id}"):
            track(output_root, run_id=run_id)


# What outlives a process: an outbox, a token, steps that are done again


def history(client: MlflowClient, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(str(run_id), key)]


def test_nothing_waits_after_a_good_end(output_root: Path, tmp_path: Path) -> None:
    tracker = track(output_root, outbox=tmp_path / "outbox")
    with tracked(tracker):
        record_all(tracker)
        tracker.sync()
        assert (tmp_path / "outbox").exists()
    assert not list(tmp_path.iterdir())


def record_all(tracker: MlflowTracker) -> None:
    """One record of each kind."""
    tracker.log_params({"seed": 0})
    tracker.log_metrics({"a": 1.0, "nan": math.nan, "infinite": math.inf}, 1)
    tracker.log_image("validation/00", red(), 1, prompt="a cat")
    tracker.log_text("a", "a/b.txt")
    tracker.log_dataset("emoji", "d" * 36, "someone/pictures", 64, "training")
    tracker.set_tags({"b": "c"})


def recorded(client: MlflowClient, run_id: str | None) -> dict[str, Any]:
    """All that a run holds."""
    run = client.get_run(str(run_id))
    return {
        "points": {
            key: [str(point) for point in client.get_metric_history(str(run_id), key)] for key in run.data.metrics
        },
        "params": run.data.params,
        "tags": run.data.tags,
        "inputs": [entry.dataset.digest for entry in run.inputs.dataset_inputs],
        "files": [file for folder in ("", "images", "a", "prompts") for file in artifacts(client, run_id, folder)],
    }


def test_what_is_delivered_twice_is_there_once(client: MlflowClient, output_root: Path, tmp_path: Path) -> None:
    """A process may be killed when the store has its records and the outbox does not know that yet."""
    client.delete_run((first := track(output_root, outbox=tmp_path / "outbox")).run_id)  # so that everything waits
    record_all(first)
    first.finish("FINISHED")
    client.restore_run(first.run_id)
    shutil.copytree(tmp_path / "outbox", tmp_path / "copy")
    assert deliver_left(first.uri, tmp_path / "outbox", str(first.run_id))
    once = recorded(client, first.run_id)
    assert once["points"].keys() == {"a", "nan", "infinite"}
    assert len(once["files"]) == 7
    assert once["inputs"] == ["d" * 36]
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert deliver_left(first.uri, tmp_path / "copy", str(first.run_id))
    assert recorded(client, first.run_id) == once
    assert not list(tmp_path.iterdir())


def killed(root: Path, outbox: Path) -> None:
    token = f"killed{outbox.name}"
    tracker = MlflowTracker.open(default_uri(root), "tests", "a run", root / "mlartifacts", outbox, token=token)
    print(tracker.run_id, flush=True)
    for step in range(0, 30, 10):
        tracker.log_metrics({"a": float(step)}, step)
        tracker.log_image("validation/00", Image.new("RGB", (64, 64)), step, "a cat")
    if outbox.name == "delivered":
        tracker.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["delivered", "waiting"])
def test_a_killed_run_is_gone_on_with(how: str, client: MlflowClient, output_root: Path, tmp_path: Path) -> None:
    """It was killed before its id was remembered; from step 10 on all is done again."""
    outbox = tmp_path / how
    process = Forked(killed, output_root, outbox)
    run_id = process.finish().strip()
    assert process.code == -signal.SIGKILL
    assert client.get_run(run_id).info.status == "RUNNING"
    again = track(output_root, outbox=outbox, token=f"killed{how}", redone_from=10)
    assert again.run_id == run_id
    with tracked(again):
        for step in range(10, 50, 10):
            again.log_metrics({"a": step + 0.5, "b": 0.0}, step)
            again.log_image("validation/00", red(), step, "a cat")
    assert history(client, run_id, "a") == [(0, 0.0), (10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5)]
    assert [step for step, _ in history(client, run_id, "b")] == [10, 20, 30, 40]
    stored = artifacts(client, run_id, "images")
    assert len(stored) == 10  # an image is two files
    assert images(client, run_id) == {("validation/00", step) for step in range(0, 50, 10)}
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not outbox.exists()


def test_without_a_token_or_with_another_there_is_a_run_of_its_own(output_root: Path) -> None:
    made = [track(output_root, token=token) for token in (None, "one", "two", "one", None)]
    ids = [tracker.run_id for tracker in made]
    assert ids[1] == ids[3]
    assert len(set(ids)) == 4
    for tracker in made:
        tracker.finish("FINISHED")


def test_a_status_that_was_left_is_not_that_of_a_run_that_goes_on(
    client: MlflowClient, output_root: Path, tmp_path: Path
) -> None:
    first = track(output_root, outbox=tmp_path / "outbox")
    client.delete_run(str(first.run_id))
    first.log_metrics({"a": 1.0}, 1)
    first.finish("KILLED")
    client.restore_run(str(first.run_id))
    again = track(output_root, outbox=tmp_path / "outbox", run_id=first.run_id)
    again.flush()
    assert client.get_run(str(again.run_id)).info.status == "RUNNING"
    assert history(client, again.run_id, "a") == [(1, 1.0)]
    again.finish("FINISHED")
    assert client.get_run(str(again.run_id)).info.status == "FINISHED"
    assert not list(tmp_path.iterdir())


def test_a_finished_run_that_was_killed_before_it_could_say_so(client: MlflowClient, output_root: Path) -> None:
    tracker = track(output_root)
    assert deliver_left(tracker.uri, output_root / "no outbox", str(tracker.run_id))
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    client.set_terminated(str(tracker.run_id), "KILLED")
    assert deliver_left(tracker.uri, output_root / "no outbox", str(tracker.run_id))
    assert client.get_run(str(tracker.run_id)).info.status == "KILLED"


def test_a_run_that_is_abandoned_ends_at_once(client: MlflowClient, output_root: Path, tmp_path: Path) -> None:
    tracker = track(output_root, outbox=tmp_path / "outbox")
    client.delete_run(str(tracker.run_id))  # nothing of it can be delivered
    tracker.log_metrics({"a": 1.0}, 1)
    began = time.monotonic()
    tracker.abandon("KILLED")
    tracker.finish("FAILED")
    assert time.monotonic() - began < 0.5
    client.restore_run(str(tracker.run_id))
    assert deliver_left(tracker.uri, tmp_path / "outbox", str(tracker.run_id))
    assert client.get_run(str(tracker.run_id)).info.status == "KILLED"
    assert history(client, tracker.run_id, "a") == [(1, 1.0)]


def test_what_the_store_refuses_is_kept_and_holds_up_nothing(
    client: MlflowClient, output_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Outbox(tmp_path / "outbox").records
    for step, key in enumerate(["a", "no, name", "a"]):
        queue.append({"kind": "metrics", "step": step, "time": 1, "values": {key: 1.0}})
    queue.append({"kind": "of a later version"})
    tracker = track(output_root, outbox=tmp_path / "outbox")
    tracker.log_metrics({"a": 3.0}, 3)
    tracker.finish("FINISHED")
    assert [step for step, _ in history(client, tracker.run_id, "a")] == [0, 2, 3]
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    lines = [json.loads(line) for line in (tmp_path / "outbox" / "refused.jsonl").read_text().splitlines()]
    assert [line["record"].get("step") for line in lines] == [1, None]
    assert "no, name" in lines[0]["reason"]
    assert "metrics of step 1 was not recorded (Invalid value" in caplog.text
    assert "2 records were refused" in caplog.text


def test_an_artifact_store_that_is_away_holds_up_no_metrics(
    client: MlflowClient, tmp_path: Path, output_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, outbox = tmp_path / "mlartifacts", tmp_path / "outbox"
    root.write_text("not a folder")
    tracker = MlflowTracker.open(default_uri(output_root), "no artifacts", "a", root, outbox)
    for name in "abc":
        tracker.log_text(name, f"{name}.txt")
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.finish("FINISHED")
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert history(client, tracker.run_id, "a") == [(1, 1.0)]
    assert "images and files cannot be written for now" in caplog.text
    assert f"3 records wait in {outbox}" in caplog.text
    root.unlink()
    (lost,) = outbox.rglob("b.txt")
    shutil.rmtree(lost.parent)
    assert deliver_left(tracker.uri, outbox, str(tracker.run_id))
    assert artifacts(client, tracker.run_id) == ["a.txt", "c.txt"]
    assert "the artifact b.txt was not recorded" in caplog.text


def test_images_are_named_as_mlflow_names_them(client: MlflowClient, tracker: MlflowTracker) -> None:
    tracker.log_image("a b/00", red(), 7)
    tracker.flush()
    ours = artifacts(client, tracker.run_id, "images")
    ours_tag = client.get_run(str(tracker.run_id)).data.tags["mlflow.loggedImages"]
    client.log_image(str(tracker.run_id), red(), key="a b/00", step=7, synchronous=True)
    theirs = set(artifacts(client, tracker.run_id, "images")) - set(ours)
    assert client.get_run(str(tracker.run_id)).data.tags["mlflow.loggedImages"] == ours_tag
    blank = {re.sub(r"\d{13}\+[0-9a-f-]{36}", "", path) for path in ours}
    assert blank == {re.sub(r"\d{13}\+[0-9a-f-]{36}", "", path) for path in theirs}
    assert {size_of(artifact(client, tracker.run_id, path)) for path in ours} == {
        size_of(artifact(client, tracker.run_id, path)) for path in theirs
    }


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_mlflows_own_patience_is_the_users_again_afterwards(output_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "77")
    first, second = track(output_root), track(output_root)
    first.finish("FINISHED")
    assert [os.environ.get(name) for name in names] == ["0", "77"]
    second.finish("FINISHED")
    assert [os.environ.get(name) for name in names] == [None, "77"]


# The environment (pitfall 30) and what else is open in the process (pitfall 17)


def test_the_environment_and_open_runs_have_no_part_in_it(
    client: MlflowClient, output_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = track(output_root)
    monkeypatch.setenv("MLFLOW_RUN_ID", str(other.run_id))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    mine = track(output_root, parent_run_id=str(other.run_id))
    with tracked(mine):
        mine.log_text("a", "a.txt")
        mine.log_image("a", red(), 0, prompt="a")
    assert mine.run_id != other.run_id
    run = client.get_run(str(mine.run_id))
    assert run.data.tags["mlflow.parentRunId"] == other.run_id
    assert run.info.status == "FINISHED"
    assert client.get_run(str(other.run_id)).info.status == "RUNNING"
    assert os.environ["MLFLOW_RUN_ID"] == other.run_id
    assert not list(tmp_path.iterdir())
    other.finish("KILLED")


# Credentials, commit, packages


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p@ss@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://token@host/path@2", "https://***@host/path@2"),
        ("mysql://host/db?ssl_key=abc&a=1", "mysql://host/db?ssl_key=***&a=1"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("a photo @ night", "a photo @ night"),
    ],
)
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert param_text(text) == shown


def test_where_the_code_comes_from() -> None:
    commit = git_commit()
    assert commit is None or re.fullmatch("[0-9a-f]{40}", commit)
    lines = pip_freeze().splitlines()
    assert any(line.startswith("torch==") for line in lines)
    assert all("==" in line for line in lines)


# Data sets


@pytest.mark.parametrize(
    ("source", "kind", "origin"),
    [
        ("https://me:secret@host/a/000.tar?token=secret", "http", {"url": "https://host/a/000.tar"}),
        ("/data/that/is/elsewhere", "local", {"uri": "file:///data/that/is/elsewhere"}),
        ("someone/pictures", "hugging_face", {"path": "someone/pictures"}),
    ],
)
def test_where_a_data_set_comes_from(source: str, kind: str, origin: dict[str, str]) -> None:
    found, text = dataset_source(source)
    assert (found, json.loads(text)) == (kind, origin)


def test_shards_are_no_data_set_of_the_hub() -> None:
    shards = ("https://me:secret@host/a/000.tar?token=secret", "https://host/a/001.tar")
    source = Shards("https://host/a/000.tar and 1 more", shards, ("jpg",), "txt")
    assert source.provenance == ("000.tar and 1 more", "https://host/a/000.tar")
    assert replace(source, name="/a/000.tar", shards=("/a/000.tar",)).provenance == ("000.tar", "/a/000.tar")
