"""Processes forked from one that has imported all there is: imports, which take longer, are no part of a test."""

import atexit
import functools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import fork_server
import torch
from running import SMALL, prepare

from kandinsky_exp import cli

FORKS = multiprocessing.get_context("forkserver")
# Said only where there is a GPU: several processes without one are to find that out by themselves.
USE_CPU = str(torch.cuda.is_available()).lower()
PATIENCE = 240.0  # seconds until a test gives up
# What a test that failed has left running: multiprocessing would wait for its end, which may never come.
atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])


def main(
    function: Callable[..., object], arguments: tuple[Any, ...], output: Path, environment: dict[str, str]
) -> None:
    """What the forked process does."""
    print_into(output)
    assert fork_server.PRELOADED in sys.modules  # a server that cannot import it says nothing
    os.environ.clear()
    os.environ.update(environment)
    start_server()
    multiprocessing.set_start_method(None, force=True)  # of what it starts: as in a process that nobody forked
    function(*arguments)


def print_into(output: Path) -> None:
    with output.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


@functools.cache
def start_server() -> None:
    """The server, one for all workers of the tests and for all processes that come from it: of each its own, which
    Python would start, imports all anew."""
    fork_server.start()
    server = forkserver._forkserver
    if server._forkserver_pid is None:  # another process has started it
        server._forkserver_address = os.environ[fork_server.ADDRESS]
        server._forkserver_alive_fd = server._forkserver_alive_fd or os.open(os.devnull, os.O_RDONLY)
        server.ensure_running = forkserver.ensure_running = lambda: None


def command(arguments: Sequence[str], limit: Callable[[], object] | None = None) -> None:
    """What `kandinsky-exp ARGUMENTS` does.

    Args:
        limit: called before all else.
    """
    if limit is not None:
        limit()
    sys.argv = ["kandinsky-exp", *arguments]
    cli.main(list(arguments))


class Forked:
    """A process that calls a module's function.

    Args:
        environment: further variables; those of this process count as well.
    """

    def __init__(
        self, function: Callable[..., object], *arguments: Any, environment: dict[str, str] | None = None
    ) -> None:
        descriptor, path = tempfile.mkstemp(prefix="forked-", suffix=".txt")
        os.close(descriptor)
        self._output, self._printed = Path(path), ""
        start_server()
        settings = (function, arguments, self._output, {**os.environ, **(environment or {})})
        self._process = FORKS.Process(target=main, args=settings)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def lives_until(self, condition: Callable[[], object]) -> bool:
        """Wait for something; False where the process ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.code is not None:
                return False
            assert time.monotonic() < deadline, self.finish(0)
            time.sleep(0.002)
        return True

    def wait_until(self, condition: Callable[[], object]) -> None:
        assert self.lives_until(condition), self.finish()

    def wait_for(self, text: str, log: Path) -> None:
        self.wait_until(lambda: log.is_file() and text in log.read_text())

    def kill(self) -> None:
        """At once, whatever it does."""
        self.finish(0)

    def printed(self) -> str:
        """Up to now."""
        return self._output.read_text("utf-8") if self._output.exists() else self._printed

    def finish(self, seconds: float = PATIENCE) -> str:
        """Wait for its end; all that it printed. It is killed where that takes longer."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        self._printed = self.printed()
        self._output.unlink(missing_ok=True)
        return self._printed


def start(root: Path, *overrides: str, limit: Callable[[], object] | None = None, **environment: str) -> Forked:
    """The command with a small run under `root`."""
    prepare(root, overrides)
    return Forked(command, [*SMALL, f"output_root={root}", *overrides], limit, environment=environment)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def launched(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each of several processes on this machine."""
    count, port = str(processes), free_port()
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": USE_CPU}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_two(root: Path, *overrides: str, limit: Callable[[], object] | None = None) -> list[Forked]:
    """Two processes that train one small run."""
    return [start(root, *overrides, limit=limit, **told) for told in launched(2)]
