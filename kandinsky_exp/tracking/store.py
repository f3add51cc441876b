"""The MLflow store behind a URI: where it is by default, and how it is opened."""

import contextlib
import logging
import os
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky_exp.errors import TrackingError, UserError, is_own_mistake
from kandinsky_exp.system.files import replacing
from kandinsky_exp.system.redaction import masked
from kandinsky_exp.tracking import artifact_folders, store_schema
from kandinsky_exp.tracking.mlflow_names import reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

DATABASES = ("postgresql", "mysql", "mssql")
IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar for each file
}
TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # or the UI opens it as one of language models

_lock = threading.Lock()
_impatient: list[int] = []
_set_by_us: set[str] = set()


def chosen_uri(uri: str | None, output_root: str | Path) -> str:
    """`tracker.uri`, or where it is not given the store in `output_root`."""
    return uri or default_uri(output_root)


def unused_variable(uri: str) -> str | None:
    """What to say of MLFLOW_TRACKING_URI where it names another store than the one at `uri`; None where it does not."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if not named or named == uri:
        return None
    return f"MLFLOW_TRACKING_URI is not used ({masked(named)}); tracker.uri='${{oc.env:MLFLOW_TRACKING_URI}}' uses it"


def default_uri(output_root: str | Path) -> str:
    """The absolute sqlite URI of `<output_root>/mlflow.db`, the same from every working directory."""
    return _sqlite_uri(Path(output_root).expanduser().resolve() / "mlflow.db")


def artifact_root(output_root: str | Path) -> Path:
    """The folder for the artifacts of a store that has no artifact store of its own."""
    return Path(output_root).expanduser().resolve() / artifact_folders.FOLDER


def artifact_location(uri: str, root: Path) -> str | None:
    """The artifact folder for a new experiment, None where a server decides."""
    return None if kind_of(uri) in ("http", "databricks") else root.expanduser().resolve().as_uri()


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
            artifact_folders.correct_sqlite(path)
            return MlflowClient(tracking_uri=absolute, registry_uri=absolute), absolute


def _make_sqlite(path: Path) -> None:
    """Make a store, whole or not at all: MLflow takes seconds for it, and cannot use one that was left half-made."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with replacing(path) as aside:
        aside.with_name(f"{aside.name}-journal").unlink(missing_ok=True)
        store = SqlAlchemyStore(_sqlite_uri(aside), "./mlruns")  # type: ignore[no-untyped-call]  # MLflow's default
        store.engine.dispose()


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let MLflow's client try a request once, and for half a minute, where the user has not said otherwise.

    By itself it goes on for minutes, and a `create_run` whose answer is lost it sends again, which makes a second run.
    What we send is tried again by `sender`. These are settings of the process, and undone when nobody needs them.
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


def find_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """A run, a deleted one too; None where the store has none of this id."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


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
    check_active(client, found)
    artifact_folders.correct_experiment(client, found.experiment_id, artifacts)
    return str(found.experiment_id)


def check_active(client: "MlflowClient", experiment: "Experiment") -> None:
    """Refuse an experiment that was deleted: nothing that goes there is shown.

    Raises:
        TrackingError: with what brings it back.
    """
    if experiment.lifecycle_stage != "active":
        words = f"experiments restore --experiment-id {experiment.experiment_id}"
        raise TrackingError(
            f"tracker.experiment: '{experiment.name}' was deleted in this store; choose another name, or bring it back "
            f"with its runs: {restore_command(client.tracking_uri, words)}"
        )


def restore_command(uri: str, words: str) -> str:
    """The command of MLflow that acts on this store, as a shell takes it; a password in the address is not shown."""
    shown = uri if masked(uri) == uri else "<tracker.uri>"
    return f"MLFLOW_TRACKING_URI={shlex.quote(shown)} mlflow {words}"


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn whatever a store throws into a TrackingError of one paragraph, without credentials."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_own_mistake(error):
            raise
        if (problem := store_schema.problem_of(error, masked(uri))) is not None:
            raise TrackingError(f"tracker.uri: {masked(uri)} {problem}.") from error
        raise TrackingError(f"tracker.uri: {masked(uri)} cannot be used: {reason(error)}. {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            "Install that driver, or name the one you have in the URI: postgresql:// wants psycopg (version 3), "
            "postgresql+psycopg2:// wants psycopg2."
        )
    if "database is locked" in str(error):
        return (
            "Another program has been writing to that file all the time: wait for it or end it. For many writers at "
            "once take a server (tracker.uri=http://…) or PostgreSQL."
        )
    return "Correct tracker.uri, start the server, or set tracker=none."


def kind_of(uri: str) -> str:
    """`sqlite`, `http`, `databricks` or one of DATABASES; raises TrackingError for all else."""
    scheme = uri.partition(":")[0].lower() if "://" in uri or uri.startswith("file:") else ""
    kind = scheme.partition("+")[0]
    if kind in ("http", "https"):
        return "http"
    if kind == "sqlite" or kind in DATABASES or scheme == "databricks" or uri == "databricks":
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
