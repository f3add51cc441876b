"""What the environment and launchers may not decide, and how several processes start, wait and end."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from kandinsky_exp import redaction, store
from kandinsky_exp.errors import TrackingError


@contextmanager
def changing_environment() -> Iterator[None]:
    """A thread that sets and removes a variable, as MLflow's telemetry does."""
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            os.environ["_SOME_SESSION_ID"] = "x" * 32
            os.environ.pop("_SOME_SESSION_ID", None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_texts_are_masked_while_a_thread_changes_the_environment() -> None:
    with changing_environment():
        assert {redaction.masked("a word") for _ in range(4000)} == {"a word"}


def test_a_mistake_of_our_own_is_not_blamed_on_the_store() -> None:
    def mistaken() -> None:
        redaction.masked(None)  # type: ignore[arg-type]

    with pytest.raises(TypeError), store.explained("sqlite:///x.db"):
        mistaken()
    with pytest.raises(TrackingError), store.explained("sqlite:///x.db"):
        SqlAlchemyStore.get_run(None, None)  # a library's


TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize("chosen", [{}, {"MLFLOW_DISABLE_TELEMETRY": "false", "RAY_USAGE_STATS_ENABLED": "1"}])
def test_libraries_report_their_use_only_if_the_user_says_so(chosen: dict[str, str]) -> None:
    code = f"""import os, kandinsky_exp.cli, huggingface_hub.constants as hub
print(hub.HF_HUB_DISABLE_TELEMETRY, *map(os.getenv, {list(TELEMETRY)}))"""
    environment = {name: value for name, value in os.environ.items() if name not in TELEMETRY} | chosen
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", *(TELEMETRY | chosen).values()]
