"""The schema's versions: a fresh database is made at the newest, an older one is brought there by Alembic."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Column, MetaData, String, Table, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from feishu_bot.errors import SchemaMismatch
from feishu_bot.store.engine import capabilities, open_engine, store_errors
from feishu_bot.store.schema import HEAD, metadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

_version_table = Table(
    "alembic_version", MetaData(), Column("version_num", String(32), primary_key=True, nullable=False)
)
_LOCK = 7_264_301  # any number, the same in every process


def current_version(connection: Connection) -> str | None:
    """Return the version of the database's schema; None for a database without our tables."""
    if not inspect(connection).has_table(_version_table.name):
        return None
    return connection.execute(select(_version_table.c.version_num)).scalar_one_or_none()


def upgrade(engine: Engine | str) -> str:
    """Bring the schema to this program's version; safe when several processes start at once.

    Returns ``created``, ``upgraded`` or ``current``. Raises SchemaMismatch for a database that is newer.
    """
    if isinstance(engine, str):
        own = open_engine(engine)
        try:
            return upgrade(own)
        finally:
            own.dispose()
    with store_errors(), engine.connect() as connection, _alone(connection):
        version = current_version(connection)
        if version == HEAD:
            return "current"
        if version is None:
            metadata.create_all(connection)
            _version_table.create(connection)
            connection.execute(insert(_version_table), {"version_num": HEAD})
            return "created"
        _migrate(connection, version)
        return "upgraded"


def check(engine: Engine) -> None:
    """Return if the schema is this program's. Raises SchemaMismatch with what to do otherwise."""
    with store_errors(), engine.execution_options(reader=True).connect() as connection:
        version = current_version(connection)
    if version != HEAD:
        found = "no tables" if version is None else f"version {version}"
        raise SchemaMismatch(f"the database has {found}, this program needs {HEAD}: run `bot.py db upgrade`")


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Hold a lock that other starting processes wait for, and one transaction."""
    kind = capabilities(connection).kind
    with connection.begin():  # on SQLite BEGIN IMMEDIATE is the lock
        if kind == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        elif kind == "mariadb":
            connection.execute(text(f"SELECT GET_LOCK('feishu-bot-{_LOCK}', 60)"))
        try:
            yield
        finally:
            if kind == "mariadb":
                with suppress(DBAPIError):  # the connection is gone, and the lock with it
                    connection.execute(text(f"SELECT RELEASE_LOCK('feishu-bot-{_LOCK}')"))


def _migrate(connection: Connection, version: str) -> None:
    # Alembic takes a quarter of a second to import, and hardly any start needs it.
    from alembic import command  # noqa: PLC0415  # see above
    from alembic.config import Config  # noqa: PLC0415  # see above
    from alembic.util import CommandError  # noqa: PLC0415  # see above

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaMismatch(
            f"the database has schema version {version}, which this program does not know (it knows {HEAD}): "
            "use the newer program that made it"
        ) from error
