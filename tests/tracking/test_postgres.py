"""A PostgreSQL server of our own as the store: its schema, its revision, and many processes at once."""

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy
from many_points import check_all_is_recorded
from running import composed

from kandinsky_exp.errors import ConfigError, TrackingError
from kandinsky_exp.tracking.store_probe import probe
from kandinsky_exp.tracking.tracker import MlflowTracker
from kandinsky_exp.verbs import ui

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def find_programs() -> Path:
    """The folder with initdb and pg_ctl, which Debian keeps off the path."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")), *filter(None, [shutil.which("initdb")])]
    if not found:
        pytest.skip("LOUD: PostgreSQL is not installed: nothing is known of PostgreSQL as a store")
    return Path(found[0]).parent


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where a server listens that has nothing in it."""
    programs, home = find_programs(), Path(tempfile.mkdtemp(prefix="postgres-"))
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it does not run as root
    if user:
        shutil.chown(home, "postgres")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = int(taken.getsockname()[1])

    def call(program: str, *arguments: str) -> None:
        command = [*user, str(programs / program), "-D", str(home / "data"), *arguments]
        with (home.parent / f"{home.name}.txt").open("ab") as output:  # a pipe would stay open as long as the server
            subprocess.run(command, check=True, stdout=output, stderr=output, cwd=home)

    try:
        call("initdb", "-U", "tester", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        settings = f"-c port={free} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home} -c fsync=off"
        call("pg_ctl", "start", "--wait", "-o", settings, "-l", str(home / "log"))
        yield free
        call("pg_ctl", "stop", "--wait", "-m", "immediate")
    finally:
        shutil.rmtree(home, ignore_errors=True)
        (home.parent / f"{home.name}.txt").unlink(missing_ok=True)


@pytest.fixture
def uri(port: int) -> str:
    """A data base that nobody has used."""
    name = f"d{uuid.uuid4().hex}"
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="tester", dbname="postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    connection.close()
    return f"postgresql+psycopg2://tester:a-password@127.0.0.1:{port}/{name}"


@pytest.mark.slow
def test_processes_that_first_touch_a_data_base_together_lose_nothing(uri: str, tmp_path: Path) -> None:
    check_all_is_recorded(uri, tmp_path)


def test_looking_makes_no_store(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no runs in postgresql\+psycopg2://\*\*\*@.* yet"):
        ui.ui(composed(tmp_path, f"tracker.uri={uri}", verb="ui", small=[]))
    engine = sqlalchemy.create_engine(uri)
    assert sqlalchemy.inspect(engine).get_table_names() == []
    engine.dispose()


def test_a_data_base_of_a_newer_mlflow_is_explained(uri: str, tmp_path: Path) -> None:
    MlflowTracker.open(uri, "tests", "a", tmp_path, tmp_path / "outbox").finish("FINISHED")
    assert probe(uri)
    engine = sqlalchemy.create_engine(uri)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = '0123456789ab'"))
    engine.dispose()
    anew = f"{uri}?application_name=another"  # MLflow keeps what it has opened
    for use in (lambda: probe(uri), lambda: MlflowTracker.open(anew, "tests", "b", tmp_path, tmp_path / "outbox")):
        with pytest.raises(TrackingError, match=r"was made by a newer MLflow than .*; upgrade mlflow") as caught:
            use()
        assert "a-password" not in str(caught.value)


def test_a_data_base_that_is_not_there(uri: str) -> None:
    with pytest.raises(TrackingError, match=r'database "nowhere" does not exist'):
        probe(uri.rpartition("/")[0] + "/nowhere")
