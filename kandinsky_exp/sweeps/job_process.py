"""A process for each job of a sweep, forked from a server that has imported everything: imports take ten seconds.

Launchers that have processes of their own ask the sweep's first process for a start: one server serves a machine.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kandinsky_exp.sweeps.outcomes import JobFolder, Status

POLL = 0.2  # seconds
# Beside the function's own module: what a run imports when it needs it, which takes seconds.
PRELOADED = (
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "diffusers.pipelines.kandinsky2_2",
    "mlflow.tracking.multimedia",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.artifact.local_artifact_repo",
)

UNREACHABLE = (OSError, EOFError, multiprocessing.AuthenticationError)

_starting = threading.Lock()


@dataclass(frozen=True)
class Task:
    """What the process of a job gets, pickled.

    Args:
        variables: of its environment: its share of the devices.
    """

    call: "Call"
    cfg: DictConfig
    hydra: DictConfig
    variables: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """How a job ended."""

    status: Status
    value: float | None = None
    message: str = ""
    is_user_error: bool = False


@dataclass(frozen=True)
class Call:
    """What a job does.

    Args:
        answer: takes the call itself and a config; raises nothing.
        verb: whose config it is.
        function: `module:function`, taking the config.
        trusted: modules that `_target_` may name too.
        verbose: show the traceback of a user's mistake as well.
    """

    answer: "Callable[[Call, DictConfig], Answer]"
    verb: str
    function: str
    trusted: tuple[str, ...]
    verbose: bool


def warm_up(function: str) -> None:
    """Start the server that jobs are forked from, without waiting for its imports."""
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)  # joblib's workers have one that a job would not know
    # Whether CUDA is there is asked without starting it: it cannot be used in a fork of a process that has.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.set_forkserver_preload([function.partition(":")[0], __name__, *PRELOADED])
    forkserver.ensure_running()


def in_own_process(task: Task, jobs: JobFolder, caller: connection.Connection | None = None) -> Answer:
    """Run a task to its end; signals that the sweep was sent are handed on.

    Args:
        caller: waits for the answer; the job is stopped when this connection closes.
    """
    warm_up(task.call.function)
    context = multiprocessing.get_context("forkserver")
    receiving, sending = context.Pipe(duplex=False)
    # The server's own standard output may be somebody else's by now.
    output = [connection.Connection(os.dup(number), readable=False) for number in (1, 2)]
    process = context.Process(target=_work, args=(task, sending, output), name=str(task.hydra.hydra.sweep.subdir))
    with _starting:
        process.start()
    sending.close()
    handed_on = 0
    while True:
        connection.wait([process.sentinel], POLL)
        with _starting:  # a process that starts looks after all the others: one thread at a time
            if not process.is_alive():
                break
        signals = jobs.signals()[handed_on:]
        handed_on += len(signals)
        if caller is not None and caller.poll():
            caller, signals = None, [signal.SIGTERM]
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
    with contextlib.suppress(EOFError, OSError):
        if receiving.poll():
            answer: Answer = receiving.recv()
            return answer
    return _without_words(process.exitcode)


def _without_words(code: int | None) -> Answer:
    """A process that said nothing: it was killed, or left in the middle of something."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; perhaps the machine had no memory left" if -code == signal.SIGKILL else ""
        return Answer("KILLED", message=f"killed by {name}{memory}")
    return Answer("FAILED", message=f"the process ended with exit code {code}")


def _work(task: Task, sending: connection.Connection, output: list[connection.Connection]) -> None:
    """What the process of a job does."""
    for number, copied in zip((1, 2), output, strict=True):
        os.dup2(copied.fileno(), number)
    # Its own is how this one was started: workers that read images would import all anew, which takes seconds each.
    multiprocessing.set_start_method(None, force=True)
    os.setpgid(0, 0)  # Ctrl-C reaches the sweep, which hands it on: twice would mean `at once`
    os.environ.update(task.variables)
    if "MASTER_PORT" in os.environ:  # several processes a job; the launcher's store is full of an earlier job's keys
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1 + int(task.hydra.hydra.job.num))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    _end_with_parent()
    HydraConfig.instance().cfg = task.hydra  # type: ignore[assignment]  # a part of it
    if threads := task.variables.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    answer = task.call.answer(task.call, task.cfg)
    sys.stdout.flush()
    sending.send(answer)
    sending.close()


def _end_with_parent() -> None:
    """Stop as for SIGTERM when the supervising process is gone: nobody would wait for this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # nosec B101 # narrows the type

    def watch() -> None:
        connection.wait([parent.sentinel])
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@dataclass(frozen=True)
class JobServer:
    """Where the jobs of other processes on this machine are started: one server has imported all there is for them."""

    host: str
    address: str
    key: bytes

    def connect(self) -> connection.Connection:
        return connection.Client(self.address, "AF_UNIX", authkey=self.key)


@contextlib.contextmanager
def job_server(function: str) -> Iterator[JobServer]:
    """Start jobs for other processes, from threads of this one, for the time of a sweep."""
    warm_up(function)
    with tempfile.TemporaryDirectory(prefix="kandinsky_exp-") as folder:
        server = JobServer(socket.gethostname(), f"{folder}/socket", os.urandom(32))
        with connection.Listener(server.address, "AF_UNIX", backlog=64, authkey=server.key) as listener:
            closing = threading.Event()
            threading.Thread(target=_accept, args=(listener, closing), name="jobs", daemon=True).start()
            try:
                yield server
            finally:
                closing.set()
                with contextlib.suppress(*UNREACHABLE):
                    server.connect().close()  # so that it looks at `closing`


def _accept(listener: connection.Listener, closing: threading.Event) -> None:
    while not closing.is_set():
        with contextlib.suppress(*UNREACHABLE):
            caller = listener.accept()
            threading.Thread(target=_serve, args=(caller,), name="job", daemon=True).start()


def _serve(caller: connection.Connection) -> None:
    with caller, contextlib.suppress(OSError, EOFError):
        task, sweep = caller.recv()
        caller.send(in_own_process(task, JobFolder(sweep), caller))


def run_job(task: Task, jobs: JobFolder, server: JobServer | None) -> Answer:
    """Run a task where the sweep's first process can start it; else, on another machine, from here."""
    caller = None
    if server is not None and server.host == socket.gethostname() and "SLURM_JOB_ID" not in os.environ:
        with contextlib.suppress(*UNREACHABLE):
            caller = server.connect()
    if caller is None:
        return in_own_process(task, jobs)
    with caller:
        try:
            caller.send((task, jobs.sweep))
            answer: Answer = caller.recv()
        except (OSError, EOFError):
            return Answer("KILLED", message="the sweep's first process ended")
        return answer
