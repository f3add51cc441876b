"""Sweeps in this process, and what they leave behind."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from commands import start_server
from running import SMALL, client, prepare, runs

from kandinsky_exp import cli

LAUNCHERS = {"basic": [], "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
             "submitit": ["hydra/launcher=submitit_local"], "ray": ["hydra/launcher=ray"]}  # fmt: skip
PRIOR = ["model=prior", *SMALL]


def swept(root: Path, *overrides: str) -> int:
    """The exit code of a sweep in this process."""
    prepare(root, overrides, encoded=True)
    start_server()  # the process that jobs are forked from: one for all tests
    try:
        cli.main(["--multirun", *PRIOR, f"output_root={root}", *overrides])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1
    return 0


@contextlib.contextmanager
def signalled(number: signal.Signals, condition: Callable[[], bool]) -> Iterator[threading.Event]:
    """The block gets a signal as soon as a condition holds; what it is given is set if it ever did."""
    held = threading.Event()

    def send() -> None:
        with contextlib.suppress(AssertionError):
            wait(condition)
            held.set()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield held
    thread.join()


def family(root: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """The parent run and its children by name."""
    found = runs(root)
    (parent,) = (run for run in found if run.data.tags.get("sweep") == name)
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    named = {run.info.run_name: run for run in children}
    assert len(named) == len(children)
    return parent, named


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


__all__ = ["LAUNCHERS", "PRIOR", "client", "family", "signalled", "swept", "wait"]
