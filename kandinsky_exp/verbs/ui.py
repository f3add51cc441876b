"""`kandinsky-exp ui`: MLflow's own pages over the project's store."""

import contextlib
import errno
import os
import signal
import socket
import subprocess  # nosec B404 # starts mlflow alone
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import IO
from urllib.parse import quote, urlencode

from omegaconf import DictConfig

from kandinsky_exp.config import validation
from kandinsky_exp.errors import ConfigError, Interrupted, RunFailure
from kandinsky_exp.system import redaction, signals
from kandinsky_exp.tracking import mlflow_names, store, store_probe

PATIENCE = 180.0  # seconds until MLflow has to answer; it may take thirty
GRACE = 5.0  # seconds for it to end
POLL = 0.1  # seconds
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # nosec B104 # what means all addresses, and one of them
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PRIVATE = ("10.*", "192.168.*", *(f"172.{number}.*" for number in range(16, 32)))
BEST_FIRST = {"orderByKey": "metrics.`validation/loss`", "orderByAsc": "true"}
UNASKED = ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_ENABLE_AI_GATEWAY")  # services, on unless a variable says no
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ui(cfg: DictConfig) -> float:
    """Show the runs of `cfg.tracker.experiment` at an address that is printed, until a signal comes.

    Returns:
        1.0 at once where a server shows them already (Hydra jobs return numbers).

    Raises:
        ConfigError: there are no runs yet, the port is taken, or tracker=none.
        TrackingError: the store cannot be used.
        RunFailure: MLflow's server does not start, or ended by itself.
        Interrupted: a signal came; the server has ended.
    """
    validation.validate(cfg, "ui")
    if cfg.tracker.name == "none":
        raise ConfigError("tracker: none records nothing, so there is nothing to show; leave tracker=none out")
    uri = store.chosen_uri(cfg.tracker.uri, cfg.output_root)
    if (note := store.unused_variable(uri)) is not None:
        print(note, file=sys.stderr)
    is_server = store.kind_of(uri) == "http"
    if not is_server:
        check_address(cfg.host, cfg.port)
    came: list[int] = []  # noted and no more, so that no signal comes between a process and its end
    with signals.handling(lambda number, _: came.append(number), STOPS):
        uri, experiment_id = find_experiment(uri, cfg.tracker.experiment)
        if is_server:
            print(page(mlflow_names.bare_address(uri).rstrip("/"), experiment_id))
            return 1.0
        serve(cfg, uri, experiment_id, came)
    raise Interrupted(came[0])


def find_experiment(uri: str, name: str) -> tuple[str, str]:
    """(absolute URI, id of the experiment called `name`); looking makes neither a store nor an experiment."""
    kind = store.kind_of(uri)
    if kind == "databricks":
        raise ConfigError("tracker.uri: Databricks shows its runs itself; open your workspace there")
    if (kind == "sqlite" and not store.sqlite_path(uri).exists()) or not store_probe.probe(uri):
        raise ConfigError(
            f"tracker.uri: there are no runs in {redaction.masked(uri)} yet; train first, or name where they are with "
            "output_root=<folder> or tracker.uri=<store>"
        )
    with store.impatient():
        client, uri = store.connect(uri)
        with store.explained(uri):
            found = client.get_experiment_by_name(name)
            there = [experiment.name for experiment in client.search_experiments() if experiment.name != "Default"]
    if found is None or found.lifecycle_stage != "active":
        others = f"one of {', '.join(there)}" if there else "a store that has some"
        raise ConfigError(f"tracker.experiment: there are no runs in '{name}'; train first, or name {others}")
    return uri, str(found.experiment_id)


def page(base: str, experiment_id: str) -> str:
    """The page with the curves of the training runs, the best run first.

    Without a workflow type MLflow opens the page for language models. In the order of creation it folds a sweep's jobs
    under their parent, which has no curves: an order by a metric lays all runs side by side.
    """
    query = urlencode({"compareRunsMode": "CHART", "workflowType": "machine_learning", **BEST_FIRST}, quote_via=quote)
    return f"{base}/#/experiments/{experiment_id}/runs?{query}"


def check_address(host: str, port: int) -> None:
    """Raises ConfigError where nothing can listen there, with a port that is free."""
    if (problem := listening_problem(host, port)) is None:
        return
    if problem.errno in (errno.EADDRINUSE, errno.EACCES):
        free = next((near for near in range(max(port, 1024) + 1, 65536) if not listening_problem(host, near)), None)
        why = "is in use" if problem.errno == errno.EADDRINUSE else "is for the system's own services"
        raise ConfigError(f"port: {port} {why}; take port={free or '<another>'}")
    raise ConfigError(f"host: nothing can listen at '{host}' ({problem.strerror}); leave it out, or give 0.0.0.0")


def listening_problem(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if probe.connect_ex(address) == 0:
                return OSError(errno.EADDRINUSE, "in use")
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: what has ended is free
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def serve(cfg: DictConfig, uri: str, experiment_id: str, came: list[int]) -> None:
    """Run MLflow's server until a signal came."""
    address = ANYWHERE.get(cfg.host, cfg.host)
    base = f"http://{f'[{address}]' if ':' in address else address}:{cfg.port}"
    if cfg.host not in LOOPBACK:
        print(f"host: whoever reaches port {cfg.port} can read and change the runs", file=sys.stderr)
    print("starting MLflow, which takes up to half a minute …", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile() as log, server(cfg, uri, log) as process:
        await_start(process, base, came, log)
        if not came:
            print(f"{page(base, experiment_id)}\nCtrl-C ends it", flush=True)
        while not came:
            check_alive(process, log)
            time.sleep(POLL)


@contextlib.contextmanager
def server(cfg: DictConfig, uri: str, log: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    """MLflow's server, which starts processes of its own: in a group that ends as one."""
    process = subprocess.Popen(  # nosec B603 # a list of words, without a shell
        command(cfg),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        # The address may hold a password, and command lines are for everybody to read.
        env={**dict.fromkeys(UNASKED, "false"), **os.environ, "MLFLOW_BACKEND_STORE_URI": uri},
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


def command(cfg: DictConfig) -> list[str]:
    """What starts the server, but for the store."""
    root = store.artifact_root(cfg.output_root)
    options = {
        "--host": cfg.host,
        "--port": str(cfg.port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
        # What runs left lies under file: addresses, which the server reads itself. These are for what it makes.
        "--default-artifact-root": root.as_uri(),
        "--artifacts-destination": str(root),
    }
    if "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        options["--allowed-hosts"] = ",".join(allowed_hosts(cfg.host))
    return [sys.executable, "-m", "mlflow", "server", *(part for pair in options.items() for part in pair)]


def allowed_hosts(host: str) -> list[str]:
    """The names by which a browser may call the server: others are another site's way to read the runs."""
    names = ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
    if host in ANYWHERE:
        names += [socket.gethostname(), socket.getfqdn()]
    names = list(dict.fromkeys(names))
    with_ports = [name.replace("[", "[[]") + ":*" for name in names]  # any port: it may be reached through a tunnel
    return [*names, *with_ports, *(PRIVATE if host in ANYWHERE else ())]


def await_start(process: "subprocess.Popen[bytes]", base: str, came: list[int], log: IO[bytes]) -> None:
    """Returns once the server answers, or a signal came."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + PATIENCE
    while not came:
        check_alive(process, log)
        with contextlib.suppress(OSError), direct.open(f"{base}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        if time.monotonic() > deadline:
            raise RunFailure(f"MLflow's server did not answer within {PATIENCE:g} s{last_words(log)}")
        time.sleep(POLL)


def check_alive(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    if process.poll() is not None:
        raise RunFailure(f"MLflow's server ended with exit code {process.returncode}{last_words(log)}")


def last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").splitlines()[-10:]
    return redaction.masked("\n  ".join([":", *lines])) if lines else ""
