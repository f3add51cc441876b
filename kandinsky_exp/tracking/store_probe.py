"""Ask an MLflow store, within seconds, whether it answers and fits the installed MLflow."""

import contextlib
import socket
import tempfile

from kandinsky_exp.errors import TrackingError
from kandinsky_exp.system.redaction import masked
from kandinsky_exp.system.threads import within
from kandinsky_exp.tracking import store_schema
from kandinsky_exp.tracking.store import explained, kind_of, sqlite_path

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
UNREAD = "?"  # in place of a schema's revision that could not be read


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
    if kind == "databricks":
        return True
    if kind == "http":
        from mlflow.utils import rest_utils  # noqa: F401  (imported here, so that the clock runs on the server alone)

    def ask() -> str | None:
        with explained(uri):
            return PROBES[kind](uri, timeout)

    try:
        revision = within(timeout + 0.5, ask, "probe")
    except TimeoutError as error:
        raise TrackingError(
            f"tracker.uri: {masked(uri)} did not answer within {timeout:g} s. Correct tracker.uri, start the server, "
            "or set tracker=none."
        ) from error
    if revision != UNREAD and (problem := store_schema.problem(revision, masked(uri))) is not None:
        raise TrackingError(f"tracker.uri: {masked(uri)} {problem}.")
    return revision is not None


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


def _probe_server(uri: str, timeout: float) -> str:
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
    return UNREAD


def _probe_database(uri: str, timeout: float) -> str | None:
    import sqlalchemy

    url = sqlalchemy.engine.make_url(uri)
    if url.host:
        port = url.port or DATABASE_PORTS[url.get_backend_name()]
        socket.create_connection((url.host, port), timeout=timeout).close()
    return store_schema.read_revision(sqlalchemy.create_engine(url, poolclass=sqlalchemy.pool.NullPool))


PROBES = {"http": _probe_server, "sqlite": _probe_sqlite, **dict.fromkeys(DATABASE_PORTS, _probe_database)}
