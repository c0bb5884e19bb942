"""The schema's versions: a fresh database is made at the newest, an older one is brought there by Alembic."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, MetaData, String, Table, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from feishu_bot.errors import SchemaMismatch, StoreUnavailable
from feishu_bot.store.engine import capabilities, open_engine, store_errors
from feishu_bot.store.schema import HEAD, metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

_version_table = Table(
    "alembic_version", MetaData(), Column("version_num", String(32), primary_key=True, nullable=False)
)
_LOCK = 7_264_301  # any number, the same in every process
_LOCK_WAIT_S = 3600  # another process's migration may take long
SCRIPTS = Path(__file__).parent


def current_version(connection: Connection) -> str | None:
    """Return the version of the database's schema; None for a database without our tables."""
    if not inspect(connection).has_table(_version_table.name):
        return None
    return connection.execute(select(_version_table.c.version_num)).scalar_one_or_none()


def upgrade(
    engine: Engine | str,
    *,
    head: str = HEAD,
    scripts: Path = SCRIPTS,
    step: Callable[[str], None] | None = None,
) -> str:
    """Bring the schema to this program's version; safe when several processes start at once.

    ``head`` and ``scripts`` name another version and folder of migrations; ``step`` is told each version that
    was reached. Returns ``created``, ``upgraded`` or ``current``. Raises SchemaMismatch for a database that is newer,
    StoreUnavailable when a migration fails: then the old schema is still there and the old program works with it
    (on MariaDB, whose DDL has no transactions, because migrations only add there; running it again goes on).
    """
    if isinstance(engine, str):
        own = open_engine(engine)
        try:
            return upgrade(own, head=head, scripts=scripts, step=step)
        finally:
            own.dispose()
    with store_errors(), engine.execution_options(reader=True).connect() as connection:
        if current_version(connection) == head:
            return "current"
    if capabilities(engine).kind == "sqlite":
        return _upgrade(engine, head, scripts, step)
    patient = open_engine(engine.url.render_as_string(hide_password=False), patient=True)
    try:
        return _upgrade(patient, head, scripts, step)
    finally:
        patient.dispose()


def _upgrade(engine: Engine, head: str, scripts: Path, step: Callable[[str], None] | None) -> str:
    with store_errors(), engine.connect() as connection, alone(connection):
        version = current_version(connection)
        if version == head:
            return "current"
        if version is None and head == HEAD:
            _create(connection)
        else:
            _migrate(connection, version, head=head, scripts=scripts, step=step)
        return "created" if version is None else "upgraded"


def _create(connection: Connection) -> None:
    """Make all tables; also those, with their indexes, that a start which was cut off has left to be made."""
    begun = set(inspect(connection).get_table_names())
    metadata.create_all(connection)
    for table in metadata.sorted_tables:
        if table.name in begun:
            for index in table.indexes:
                index.create(connection, checkfirst=True)
    _version_table.create(connection, checkfirst=True)
    connection.execute(insert(_version_table), {"version_num": HEAD})


def remove_schema(engine: Engine) -> None:
    """Remove all tables with everything in them. Raises StoreUnavailable."""
    with store_errors(), engine.connect() as connection, alone(connection):
        metadata.drop_all(connection)
        _version_table.drop(connection, checkfirst=True)


def known_versions(scripts: Path = SCRIPTS) -> set[str]:
    """Return the versions that this program can bring to its own."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415  # slow to import, and hardly any start needs it

    return {HEAD} | {script.revision for script in ScriptDirectory(str(scripts)).walk_revisions()}


def check(engine: Engine) -> None:
    """Return if the schema is this program's. Raises SchemaMismatch with what to do otherwise."""
    with store_errors(), engine.execution_options(reader=True).connect() as connection:
        version = current_version(connection)
    if version != HEAD:
        found = "no tables" if version is None else f"version {version}"
        raise SchemaMismatch(f"the database has {found}, this program needs {HEAD}: run `bot.py db upgrade`")


@contextmanager
def alone(connection: Connection) -> Iterator[None]:
    """Hold a lock that other starting processes wait for, and one transaction."""
    with _without_cascades(connection), _lock_of_mariadb(connection), connection.begin():
        # On SQLite BEGIN IMMEDIATE is the lock.
        if capabilities(connection).kind == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        yield


@contextmanager
def _lock_of_mariadb(connection: Connection) -> Iterator[None]:
    """Hold a lock around the transaction, not in it: who gets the lock must see what was committed under it."""
    if capabilities(connection).kind != "mariadb":
        yield
        return
    name = f"CONCAT('feishu-bot-{_LOCK}-', DATABASE())"
    got = connection.execute(text(f"SELECT GET_LOCK({name}, {_LOCK_WAIT_S})")).scalar()
    connection.commit()
    if got != 1:
        raise StoreUnavailable("another process has been changing the schema for too long")
    try:
        yield
    finally:
        with suppress(DBAPIError):  # the connection is gone, and the lock with it
            connection.execute(text(f"SELECT RELEASE_LOCK({name})"))
            connection.commit()


@contextmanager
def _without_cascades(connection: Connection) -> Iterator[None]:
    """Switch SQLite's foreign keys off: it alters a table by dropping it, which would take the rows of others."""
    if capabilities(connection).kind != "sqlite":
        yield
        return
    driver: Any = connection.connection.driver_connection  # a pragma counts only outside a transaction
    driver.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def _migrate(
    connection: Connection,
    version: str | None,
    *,
    head: str,
    scripts: Path,
    step: Callable[[str], None] | None,
) -> None:
    # Alembic takes a quarter of a second to import, and hardly any start needs it.
    from alembic import command  # noqa: PLC0415  # see above
    from alembic.config import Config  # noqa: PLC0415  # see above
    from alembic.util import CommandError  # noqa: PLC0415  # see above

    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["step"] = step
    if version is not None and version not in known_versions(scripts):
        raise SchemaMismatch(
            f"the database has schema version {version}, which this program does not know (it knows {head}): "
            "use the newer program that made it"
        )
    try:
        command.upgrade(config, head)
    except CommandError as error:
        raise SchemaMismatch(f"the schema cannot be brought from {version} to {head}: {error}") from error
