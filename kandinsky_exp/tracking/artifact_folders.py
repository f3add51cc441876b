"""The local artifact folders of a store, put right after an outputs folder was moved or copied.

MLflow writes absolute paths into its data base and has no call that changes them.
"""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from kandinsky_exp.system.redaction import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "mlartifacts"  # in the outputs folder, beside `mlflow.db`
BUSY = 30.0  # seconds to wait for whoever writes to an sqlite store

log = logging.getLogger(__name__)


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location names, None where it is an address of another kind."""
    if location.startswith("file:"):
        return Path(url2pathname(urlsplit(location).path))
    return None if "://" in location else Path(location)


def is_out_of_place(location: str, wanted: str) -> bool:
    """Whether artifacts that go to `location` should go to `wanted`.

    So where another outputs folder is named, whether it is still there (a copy) or not (a move), or a path that is
    relative or gone. A folder of another name that exists is somebody's choice.
    """
    folder, right = local_folder(location), local_folder(wanted)
    if folder is None or right is None or folder == right:
        return False
    return folder.name == FOLDER or not folder.is_absolute() or not folder.exists()


def correct_sqlite(file: Path) -> None:
    """Let the runs of an sqlite store that was moved or copied name the artifacts that lie beside it."""
    import sqlite3

    here = file.parent / FOLDER
    if not here.is_dir():
        return
    prefix = here.as_uri() + "/"
    with contextlib.closing(sqlite3.connect(file, timeout=BUSY)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone():
            return  # an empty file: MLflow makes its tables
        query = "SELECT run_uuid, artifact_uri FROM runs WHERE substr(artifact_uri, 1, ?) != ?"
        moved = [
            (_of_run(here.as_uri(), run_id), run_id)
            for run_id, uri in connection.execute(query, (len(prefix), prefix)).fetchall()
            if uri is not None and local_folder(uri) is not None and (here / run_id / "artifacts").is_dir()
        ]
        connection.executemany("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", moved)
    if moved:
        log.info("MLflow: %s was moved: %d runs have their images and files in %s again", file, len(moved), here)


def correct_experiment(client: "MlflowClient", experiment_id: str, wanted: str | None) -> None:
    """Let new runs of an experiment keep their artifacts in `wanted`; None leaves it to a server."""
    location = client.get_experiment(experiment_id).artifact_location
    if wanted is not None and is_out_of_place(location, wanted):
        change = "UPDATE experiments SET artifact_location = :to WHERE experiment_id = :id"
        _execute(client.tracking_uri, change, to=wanted, id=int(experiment_id))


def correct_run(client: "MlflowClient", run_id: str, wanted: str | None) -> None:
    """Let a run that goes on keep its artifacts in `wanted`, and say what of it stays elsewhere."""
    uri = client.get_run(run_id).info.artifact_uri
    location = uri.removesuffix(f"/{run_id}/artifacts")
    if wanted is None or location == uri or not is_out_of_place(location, wanted):
        return
    before, now = local_folder(uri), local_folder(_of_run(wanted, run_id))
    _execute(client.tracking_uri, "UPDATE runs SET artifact_uri = :to WHERE run_uuid = :id",
             to=_of_run(wanted, run_id), id=run_id)  # fmt: skip
    if before is not None and before.is_dir() and now is not None and not now.is_dir():
        log.warning(
            "MLflow: this run's images and files up to now lie in %s and stay there; new ones go to %s. Copy the "
            "first into the second to see all of them",
            before,
            now,
        )


def what_is_gone(client: "MlflowClient", run_id: str) -> str | None:
    """The folder of a run's images where there should be some and there is no folder, for a message."""
    run = client.get_run(run_id)
    folder = local_folder(run.info.artifact_uri)
    has_images = run.data.tags.get("mlflow.loggedImages") is not None
    return str(folder) if has_images and folder is not None and not folder.is_dir() else None


def _of_run(location: str, run_id: str) -> str:
    return f"{location.rstrip('/')}/{run_id}/artifacts"


def _execute(uri: str, statement: str, **values: object) -> None:
    import sqlalchemy

    options = {"connect_args": {"timeout": BUSY}} if uri.startswith("sqlite") else {}
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool, **options)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement), values)
    log.debug("%s: %s", masked(uri), statement)
