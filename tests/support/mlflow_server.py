"""MLflow's server in a forked process, which has imported all that it needs."""

import os
import signal
import time
import urllib.request
from pathlib import Path

import mlflow.server
from commands import Forked, free_port


class Server:
    """MLflow's server on the files of a folder, which outlive it.

    Args:
        settings: further variables that `mlflow server` sets for what its options say.
    """

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.settings = {mlflow.server.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{root}/mlflow.db", **settings}
        self.process: Forked | None = None

    def start(self) -> None:
        self.process = Forked(serve, self.settings, self.port)
        end = time.monotonic() + 120
        while not self.answers():
            assert time.monotonic() < end, "timed out"
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            search = f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1"  # it opens the store
            with urllib.request.urlopen(search, timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None


def serve(settings: dict[str, str], port: int) -> None:
    """What `mlflow server` does, in one process: the application, with the variables that the command sets for it."""
    import uvicorn

    given = {
        mlflow.server.SERVE_ARTIFACTS_ENV_VAR: "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    os.environ.update(given | settings)
    uvicorn.run("mlflow.server.fastapi_app:app", host="127.0.0.1", port=port, log_level="warning")
