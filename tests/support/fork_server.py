"""The process that `commands.py` forks others from: it takes seconds to import, so that one serves all workers."""

import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest

PRELOADED = "preloaded"
ADDRESS = "TESTS_FORK_SERVER"  # the variable that tells workers and forked processes where it is


def start() -> None:
    """Start it where no process has, and do not wait. What it imports it looks for in PYTHONPATH only."""
    if ADDRESS in os.environ:
        return
    forkserver.set_forkserver_preload([PRELOADED])
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has ignored
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forkserver.ensure_running()
    signal.signal(signal.SIGINT, before)
    os.environ[ADDRESS] = forkserver._forkserver._forkserver_address
