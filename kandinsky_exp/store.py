"""The MLflow store behind a URI: where it is by default, whether it answers, and how it is opened."""

import contextlib
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kandinsky_exp import store_schema
from kandinsky_exp.errors import TrackingError, UserError
from kandinsky_exp.mlflow_names import masked, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar for each file
}
TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # or the UI opens it as one of language models
UNREAD = "?"  # in place of a schema's revision that could not be read

Result = TypeVar("Result")

_lock = threading.Lock()
_impatient: list[int] = []
_set_by_us: set[str] = set()


def chosen_uri(uri: str | None, output_root: str | Path) -> str:
    """`tracker.uri`, or where it is not given the store in `output_root`."""
    return uri or default_uri(output_root)


def default_uri(output_root: str | Path) -> str:
    """The absolute sqlite URI of `<output_root>/mlflow.db`, the same from every working directory."""
    return _sqlite_uri(Path(output_root).expanduser().resolve() / "mlflow.db")


def artifact_root(output_root: str | Path) -> Path:
    """The folder for the artifacts of a store that has no artifact store of its own."""
    return Path(output_root).expanduser().resolve() / "mlartifacts"


def artifact_location(uri: str, root: Path) -> str | None:
    """The artifact folder for a new experiment, None where a server decides."""
    server = uri.startswith(("http://", "https://", "databricks"))
    return None if server else Path(root).expanduser().resolve().as_uri()


def probe(uri: str, timeout: float = 5.0) -> bool:
    """Ask the store at `uri` for a sign of life, and whether the installed MLflow can use it.

    MLflow's own client retries a dead server for minutes, so this is asked before any weights load.

    Args:
        uri: as `tracker.uri`.
        timeout: seconds until a silent store counts as dead.

    Returns:
        Whether anything may have been recorded: False for a data base that nobody has made a store of yet.

    Raises:
        TrackingError: the store does not answer, cannot be written, is of a kind MLflow refuses, or of another MLflow.
    """
    kind = kind_of(uri)
    if kind == "http":
        from mlflow.utils import rest_utils  # noqa: F401  (imported here, so that the clock runs on the server alone)

        _within(timeout, uri, lambda: _probe_server(uri, timeout))
    elif kind in PROBES:
        revision = _within(timeout, uri, lambda: PROBES[kind](uri, timeout))
        if revision != UNREAD and (problem := store_schema.problem(revision)) is not None:
            raise TrackingError(f"tracker.uri: {masked(uri)} {problem}.")
        return revision is not None
    return True


def connect(uri: str) -> "tuple[MlflowClient, str]":
    """Open the store at `uri`, making an sqlite store (once, whoever comes first) where there is none.

    Returns:
        The client and the absolute URI it uses.

    Raises:
        TrackingError: the store cannot be opened.
    """
    kind = kind_of(uri)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise TrackingError(f"tracker: mlflow cannot be imported ({error}); install it or set tracker=none.") from error
    # Lines about tables being made, and the traceback of whatever we are going to say in a line, would only puzzle.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with explained(uri):
        if kind != "sqlite":
            with store_schema.made_once(uri) if kind == "postgresql" else contextlib.nullcontext():
                return MlflowClient(tracking_uri=uri, registry_uri=uri), uri
        from filelock import FileLock

        path = sqlite_path(uri)
        absolute = _sqlite_uri(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that first touch a fresh store together race in MLflow's schema creation, and most of them die.
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=store_schema.LOCK_TIMEOUT):
            if not path.exists():
                _make_sqlite(path)
            return MlflowClient(tracking_uri=absolute, registry_uri=absolute), absolute


def _make_sqlite(path: Path) -> None:
    """Make a store, whole or not at all: MLflow takes seconds for it, and cannot use one that was left half-made."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = path.with_name(f".{path.name}.part")
    for left in (aside, aside.with_name(f"{aside.name}-journal")):
        left.unlink(missing_ok=True)
    store = SqlAlchemyStore(_sqlite_uri(aside), "./mlruns")  # type: ignore[no-untyped-call]  # MLflow's default, not made
    store.engine.dispose()
    aside.replace(path)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let MLflow's client try a request once, and for half a minute, where the user has not said otherwise.

    By itself it goes on for minutes, and a `create_run` whose answer is lost it sends again, which makes a second run.
    What we send is tried again by `writer`. These are settings of the process, and undone when nobody needs them.
    """
    with _lock:
        for name in IMPATIENT.keys() - os.environ.keys() if not _impatient else ():
            os.environ[name] = IMPATIENT[name]
            _set_by_us.add(name)
        _impatient.append(1)
    try:
        yield
    finally:
        with _lock:
            _impatient.pop()
            while _set_by_us and not _impatient:
                os.environ.pop(_set_by_us.pop(), None)


def find_experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """The id of the experiment called `name`, made with the folder `artifacts` (None: the server's) if it is new."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=TRAINING))
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracker.experiment: '{name}' was deleted in this store; choose another name, or bring it back with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`."
        )
    return str(found.experiment_id)


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn whatever a store throws into a TrackingError of one paragraph, without credentials."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (problem := store_schema.problem_of(error)) is not None:
            raise TrackingError(f"tracker.uri: {masked(uri)} {problem}.") from error
        raise TrackingError(f"tracker.uri: {masked(uri)} cannot be used: {reason(error)}. {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            "Install that driver, or name the one you have in the URI: postgresql:// wants psycopg (version 3), "
            "postgresql+psycopg2:// wants psycopg2."
        )
    return "Correct tracker.uri, start the server, or set tracker=none."


def kind_of(uri: str) -> str:
    """`sqlite`, `http`, `databricks` or one of DATABASE_PORTS; raises TrackingError for all else."""
    scheme = uri.partition(":")[0].lower() if "://" in uri or uri.startswith("file:") else ""
    kind = scheme.partition("+")[0]
    if kind in ("http", "https"):
        return "http"
    if kind == "sqlite" or kind in DATABASE_PORTS or scheme == "databricks" or uri == "databricks":
        return kind or uri
    if kind in ("", "file"):
        problem = "is a folder, and MLflow no longer takes a folder as its store"
    else:
        problem = "is of a kind that MLflow does not know"
    raise TrackingError(
        f"tracker.uri: '{masked(uri)}' {problem}; use sqlite:///<absolute path>.db, http(s)://<server>:<port> "
        "or postgresql://…, or leave it out for a store in output_root."
    )


def _sqlite_uri(path: Path) -> str:
    return "sqlite:///" + path.as_posix().replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path:
    """The file of an sqlite store; raises TrackingError where the URI names none."""
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    if not database or database == ":memory:":
        raise TrackingError(f"tracker.uri: '{uri}' names no file; use sqlite:///<absolute path>.db.")
    return Path(database).expanduser().resolve()


def _within(timeout: float, uri: str, check: Callable[[], Result]) -> Result:
    """What `check` gives, in no longer than `timeout`: name look-ups and network file systems know no time-outs."""
    problems: list[Exception] = []
    results: list[Result] = []

    def run() -> None:
        try:
            with explained(uri):
                results.append(check())
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=run, name="probe", daemon=True)
    thread.start()
    thread.join(timeout + 0.5)
    if thread.is_alive():
        raise TrackingError(
            f"tracker.uri: {masked(uri)} did not answer within {timeout:g} s. Correct tracker.uri, start the server, "
            "or set tracker=none."
        )
    if problems:
        raise problems[0]
    return results[0]


def _probe_sqlite(uri: str, timeout: float) -> str | None:
    import sqlite3

    path = sqlite_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # not made here: whoever does that holds the lock
        tempfile.TemporaryFile(dir=path.parent).close()
        return None
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            found = connection.execute(store_schema.REVISION).fetchone() if "alembic_version" in tables else None
            connection.rollback()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # locked: somebody is writing, so it is alive
                raise
            return UNREAD
    return None if found is None else str(found[0])


def _probe_server(uri: str, timeout: float) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    search = "/api/2.0/mlflow/experiments/search"
    options = {"max_retries": 0, "timeout": timeout, "raise_on_status": False}
    server = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    answer = http_request(server, search, "GET", params={"max_results": 1}, **options)  # type: ignore[no-untyped-call]
    if answer.status_code in (401, 403):
        raise ValueError(
            f"the server refused the request ({answer.status_code}: {answer.text[:100]!r}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if answer.status_code != 200 or not answer.text.lstrip().startswith("{"):
        raise ValueError(f"something answers there, but not as an MLflow server does (status {answer.status_code})")


def _probe_database(uri: str, timeout: float) -> str | None:
    import sqlalchemy

    url = sqlalchemy.engine.make_url(uri)
    if url.host:
        port = url.port or DATABASE_PORTS[url.get_backend_name()]
        socket.create_connection((url.host, port), timeout=timeout).close()
    return store_schema.read_revision(sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool))


PROBES = {"sqlite": _probe_sqlite, **dict.fromkeys(DATABASE_PORTS, _probe_database)}
