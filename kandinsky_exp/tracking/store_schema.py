"""The schema of a store's database: whether the installed MLflow fits it, and a lock under which it is made once."""

import contextlib
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

MAKING = 0x6B616E64  # the advisory lock of whoever makes a schema: any number that nobody else takes
LOCK_TIMEOUT = 300  # seconds; the first process makes the schema, the others wait for it
# What MLflow and Alembic say of a schema that is not theirs; MLflow calls a newer one out of date as well.
STRANGE = re.compile(r"schema \(found version (\w+)|Can't locate revision identified by '(\w+)'")
REVISION = "SELECT version_num FROM alembic_version"


def problem(revision: str | None, address: str) -> str | None:
    """What keeps the installed MLflow from using a store of this Alembic revision, and what to do; None if nothing.

    Args:
        revision: None = there is no schema yet.
        address: the store's address, without a password.
    """
    import mlflow

    script = _migrations()
    if revision is None or revision in script.get_heads():
        return None
    if revision in {known.revision for known in script.walk_revisions()}:
        return (
            f"was made by an older MLflow than the installed {mlflow.__version__}; back it up and run `mlflow db "
            f"upgrade {shlex.quote(address)}`, or name a new store"
        )
    return (
        f"was made by a newer MLflow than the installed {mlflow.__version__} (its schema {revision} is unknown here); "
        "upgrade mlflow, or name a new store"
    )


@functools.cache
def _migrations() -> "ScriptDirectory":
    """MLflow's, which are read once in a process."""
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))


def problem_of(error: Exception, address: str) -> str | None:
    """`problem` of the store that MLflow refused with this error; None where it is about something else."""
    found = STRANGE.search(str(error))
    return problem(found[1] or found[2], address) if found else None


def read_revision(engine: Any) -> str | None:
    """The Alembic revision of the data base behind an SQLAlchemy engine, None where nothing has been made in it."""
    import sqlalchemy

    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table("alembic_version"):
            return None
        found = connection.execute(sqlalchemy.text(REVISION)).scalar()
    return None if found is None else str(found)


@contextlib.contextmanager
def made_once(uri: str) -> Iterator[None]:
    """Lets one process at a time make the schema of a PostgreSQL data base; MLflow's own lock is a file of one machine.

    The lock belongs to a transaction, for a pooler may give the next statement another session.
    """
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'"))
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({MAKING})"))
        yield
