"""A real MLflow server that goes away and comes back while a run trains, and processes that are killed meanwhile."""

import contextlib
import http.server
import json
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.server
import pytest
from commands import Forked, start
from many_points import check_all_is_recorded
from mlflow import MlflowClient
from mlflow_server import Server

from kandinsky_exp.tracking import registry
from kandinsky_exp.tracking.sender import INTERVAL, PAUSE

pytestmark = pytest.mark.slow
STEPS = 60
DUE = {
    "train/loss": [*range(2, STEPS + 1, 2)],
    "train/lr": [*range(2, STEPS + 1, 2)],
    "validation/loss": [*range(0, STEPS + 1, 30)],
}
IMAGES = ("validation/00", "validation/grid")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Takes seconds to start: one for all tests, each of which leaves it running."""
    root = tmp_path_factory.mktemp("server")
    made = Server(root, {mlflow.server.ARTIFACTS_DESTINATION_ENV_VAR: f"{root}/artifacts",
                         mlflow.server.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/"})  # fmt: skip
    made.start()
    yield made
    made.stop()


class Training:
    """The command that trains, always the same one."""

    def __init__(self, root: Path, uri: str) -> None:
        self.root, self.uri, self.experiment = root, uri, root.name
        self.process = self.start()

    def start(self) -> Forked:
        return start(self.root, "model=prior", "name=d", f"tracker.uri={self.uri}",
                     f"tracker.experiment={self.experiment}", f"trainer.max_steps={STEPS}", "validation.every=30",
                     "checkpoint.every=20", "validation.prompts=[a dog]")  # fmt: skip

    @property
    def outbox(self) -> Path:
        return self.root / "d" / "outbox"

    @property
    def log(self) -> str:
        file = self.root / "d" / "train.log"
        return file.read_text() if file.exists() else ""

    def wait_for(self, text: str) -> None:
        self.process.wait_for(text, self.root / "d" / "train.log")

    def wait_for_more(self) -> None:
        """Until it has recorded something that nobody has taken."""
        lines = len(self.log.splitlines())
        self.process.wait_until(lambda: len(self.log.splitlines()) > lines + 3)

    def pause(self) -> None:
        """Nothing is done for as long as metrics gather: what waits is due, and no steps were needed for that."""
        self.process.signal(signal.SIGSTOP)
        time.sleep(INTERVAL)
        self.process.signal(signal.SIGCONT)

    def run_again(self) -> str:
        self.process = self.start()
        return self.process.finish()


@pytest.fixture
def training(tmp_path: Path, server: Server) -> Iterator[Training]:
    made = Training(tmp_path, server.uri)
    yield made
    made.process.kill()


def check(server: Server, training: Training) -> None:
    """One run, every point and image of it once, and nothing that waits."""
    client = MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name(training.experiment).experiment_id])
    assert run.info.status == "FINISHED"
    for key, due in DUE.items():
        assert sorted(point.step for point in client.get_metric_history(run.info.run_id, key)) == due, key
    counts = Counter(name(file) for file in client.list_artifacts(run.info.run_id, "images"))
    steps = DUE["validation/loss"]
    assert counts == {(key, step, ending): 1 for key in IMAGES for step in steps for ending in ("png", "webp")}
    assert {"config.yaml", "pip_freeze.txt"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    assert run.data.params["trainer.max_steps"] == str(STEPS)
    assert not training.outbox.exists()
    assert json.loads((training.root / "d" / "run.json").read_text())["status"] == "FINISHED"


def name(file: Any) -> tuple[str, int, str]:
    match = re.fullmatch(r"images/(.+)\+step\+(\d+)\+timestamp\+.+\.(png|webp)", file.path)
    assert match
    return match[1].replace("~", "/"), int(match[2]), match[3]


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """Takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield int(listening.getsockname()[1])


@contextlib.contextmanager
def overloaded() -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Retry-After", "600")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port
        listening.shutdown()


@pytest.mark.parametrize("bad", [silent, overloaded])
def test_a_bad_server_is_found_at_once(
    bad: Callable[[], contextlib.AbstractContextManager[int]], tmp_path: Path
) -> None:
    with bad() as port:
        training = Training(tmp_path, f"http://127.0.0.1:{port}")
        began = time.monotonic()
        output = training.process.finish()
    assert training.process.code == 2, output
    assert training.uri in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 60
    assert not (tmp_path / "d").exists()


def test_a_server_that_goes_and_comes_back(server: Server, training: Training) -> None:
    training.wait_for("step 10 of")
    server.stop()
    training.wait_for_more()
    training.pause()
    training.wait_for("MLflow: metrics cannot be written for now")
    training.process.signal(signal.SIGSTOP)  # or it would be done before the server is there again
    stopped = time.monotonic()
    server.start()
    time.sleep(max(0, stopped + PAUSE - time.monotonic()))
    training.process.signal(signal.SIGCONT)
    output = training.process.finish()
    assert training.process.code == 0, output
    assert "the store is back; metrics are written again" in output
    check(server, training)


def test_a_server_that_comes_back_after_the_end(server: Server, training: Training) -> None:
    training.wait_for("step 10 of")
    server.stop()
    output = training.process.finish()
    assert training.process.code == 0, output
    assert re.search(r"MLflow: \d+ records wait in .*outbox; the same command, with name=d, delivers them", output)
    assert training.outbox.exists()
    server.start()
    output = training.run_again()
    assert training.process.code == 0, output
    assert "nothing left to do" in output
    check(server, training)


def test_a_process_that_is_killed_while_the_server_hangs(server: Server, training: Training) -> None:
    """The server may have taken what the process did not live to see taken."""
    training.wait_for("step 24 of")
    server.signal(signal.SIGSTOP)
    training.wait_for_more()
    training.pause()
    time.sleep(0.5)  # the request is on its way
    training.process.kill()
    server.signal(signal.SIGCONT)
    output = training.run_again()
    assert training.process.code == 0, output
    assert "going on from" in output
    check(server, training)


def test_processes_that_record_at_the_same_time_lose_nothing(server: Server, tmp_path: Path) -> None:
    check_all_is_recorded(server.uri, tmp_path)


def test_a_server_takes_no_result_from_outside_its_artifacts(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(server.uri, server.uri)
    run_id = client.create_run(client.create_experiment("registered")).info.run_id
    registry.register(server.uri, "mine", tmp_path, run_id)
    assert "is no version of 'mine' (INVALID_PARAMETER_VALUE: Invalid model version source" in caplog.text
    assert "a server takes only what lies in its own artifacts" in caplog.text
    assert client.search_registered_models() == []
