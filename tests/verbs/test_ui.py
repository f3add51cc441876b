"""`kandinsky-exp ui` over a real store: MLflow's server comes up, shows what runs left, and goes as a whole."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Forked, command, free_port
from PIL import Image
from running import composed

from kandinsky_exp.errors import ConfigError, TrackingError
from kandinsky_exp.tracking.store import artifact_root, default_uri
from kandinsky_exp.tracking.tracker import MlflowTracker
from kandinsky_exp.verbs import ui

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="module")
def output_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run, which left an image and a report."""
    root = tmp_path_factory.mktemp("a b") / "outputs"
    tracker = MlflowTracker.open(default_uri(root), "kandinsky-2-2", "a", artifact_root(root), root / "outbox")
    tracker.log_image("validation/00", Image.new("RGB", (8, 8), "red"), 0)
    tracker.log_text("<h1>a report</h1>", "report.html")
    tracker.finish("FINISHED")
    return root


def start(root: Path, *overrides: str) -> Forked:
    return Forked(command, ["ui", f"output_root={root}", *overrides])


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return bytes(answer.read())


def ask(base: str, path: str, **body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{base}/ajax-api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def check_shown(base: str, experiment_id: str) -> None:
    """What the page asks the server for is there."""
    assert b"<title>MLflow" in get(f"{base}/")
    assert json.loads(get(f"{base}/ajax-api/3.0/mlflow/server-info"))["features_enabled"] == {"gateway": False}
    (run,) = ask(base, "runs/search", experiment_ids=[experiment_id])["runs"]
    artifact = f"{base}/get-artifact?run_uuid={run['info']['run_id']}&path="
    assert get(f"{artifact}report.html") == b"<h1>a report</h1>"
    listing = get(f"{base}/ajax-api/2.0/mlflow/artifacts/list?run_id={run['info']['run_id']}&path=images")
    (picture,) = [file["path"] for file in json.loads(listing)["files"] if file["path"].endswith(".png")]
    assert get(artifact + urllib.request.quote(picture)).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_runs_are_shown_until_ctrl_c(output_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    shown = start(output_root, f"port={port}")
    shown.wait_until(lambda: "Ctrl-C ends it" in shown.printed())
    address = re.search(
        r"(http://127\.0\.0\.1:\d+)/#/experiments/(\d+)/runs\?compareRunsMode=CHART&workflowType=machine_learning"
        r"&orderByKey=metrics\.%60validation%2Floss%60&orderByAsc=true\n",
        shown.printed(),
    )
    assert address, shown.printed()
    check_shown(address[1], address[2])
    get(f"{address[1]}/", Host="localhost:8888")  # through a tunnel
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"{address[1]}/", Host="evil.example")
    with pytest.raises(ConfigError, match=rf"port: {port} is in use; take port=\d+"):
        ui.ui(composed(output_root, f"port={port}", verb="ui", small=[]))
    remote = composed(tmp_path, f"tracker.uri=http://me:secret@127.0.0.1:{port}", verb="ui", small=[])
    assert ui.ui(remote) == 1  # a server is not started, it is only said where it is
    assert capsys.readouterr().out == address[0]
    children = psutil.Process(shown.pid).children(recursive=True)
    assert len(children) >= 2
    shown.signal(signal.SIGINT)
    shown.finish(20)
    assert shown.code == 130
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert {path.name for path in output_root.iterdir()} <= {"mlflow.db", ".mlflow.db.lock", "mlartifacts"}


def test_a_start_can_be_stopped(output_root: Path) -> None:
    shown = start(output_root, f"port={free_port()}")
    shown.wait_until(lambda: psutil.Process(shown.pid).children())
    children = psutil.Process(shown.pid).children(recursive=True)
    shown.signal(signal.SIGTERM)
    shown.finish(20)
    assert shown.code == 143
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["output_root={new}"], r"tracker.uri: there are no runs in sqlite:////.*/new/mlflow.db yet; train first"),
        (["tracker=none"], "tracker: none records nothing"),
        (["tracker.experiment=other"], "there are no runs in 'other'; train first, or name one of kandinsky-2-2"),
        (["tracker.uri=databricks://mine"], "Databricks shows its runs itself"),
        (["host=192.0.2.1"], "host: nothing can listen at '192.0.2.1'"),
        (["port=0"], "port: has to be a whole number, between 1 and 65535"),
    ],
)
def test_what_cannot_be_shown_is_explained(overrides: list[str], told: str, output_root: Path, tmp_path: Path) -> None:
    settings = [f"port={free_port()}", *(text.format(new=tmp_path / "new") for text in overrides)]
    with pytest.raises(ConfigError, match=told):
        ui.ui(composed(output_root, *settings, verb="ui", small=[]))
    assert not (tmp_path / "new").exists()


def test_a_server_that_is_away(output_root: Path) -> None:
    with pytest.raises(TrackingError, match=r"tracker\.uri"):
        ui.ui(composed(output_root, f"tracker.uri=http://127.0.0.1:{free_port()}", verb="ui", small=[]))


def test_names_by_which_it_may_be_called() -> None:
    assert {"localhost", "localhost:*", "[::1]", "[[]::1]:*"} <= set(ui.allowed_hosts("127.0.0.1"))
    assert socket.gethostname() not in ui.allowed_hosts("127.0.0.1")
    assert {f"{socket.gethostname()}:*", "10.*"} <= set(ui.allowed_hosts("0.0.0.0"))


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, kandinsky_exp.verbs.ui; print(*({'torch', 'mlflow', 'accelerate'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
