"""All rows of a database as they were at one instant, while others go on writing.

PostgreSQL and MariaDB read in one transaction that sees one instant. A SQLite file is copied first, in one read
transaction: reading rows takes ten times as long as copying pages, and for so long the write-ahead log could not
be taken into the file.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sqlalchemy import DateTime, create_engine, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feishu_bot.errors import SchemaMismatch, StoreUnavailable
from feishu_bot.store import migrations
from feishu_bot.store.archive import TableHeader
from feishu_bot.store.engine import capabilities, open_engine, reason_of
from feishu_bot.store.schema import HEAD, metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import URL, Connection, Engine, Table

    from feishu_bot.store.archive import Progress

# Who runs and what is derived from other tables is no part of a backup, and neither are leases.
NOT_KEPT = frozenset({"processes", "controls"})
_LEFT_OUT: dict[str, frozenset[str]] = {
    "lanes": frozenset(
        {"lease_owner", "lease_until", "lease_token", "send_owner", "send_until", "send_token"}
    ),
    "messages": frozenset({"search_terms"}),
}
_PAGES = 2048  # of a SQLite file copied between two looks at who wants to stop
_FETCH = 200  # rows per round trip; a row may have megabytes

_AS_TEXT = {
    "sqlite": "{}",  # kept as such a text
    "postgresql": "to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')",
    "mariadb": "DATE_FORMAT({}, '%Y-%m-%d %H:%i:%s.%f')",
}


@contextmanager
def driver_errors() -> Iterator[None]:
    """Turn the errors of drivers that are used without SQLAlchemy into StoreUnavailable with a reason."""
    try:
        yield
    except _errors_of_drivers() as error:  # asked for when something is raised, and not before
        raise StoreUnavailable(reason_of(error)) from error


def _errors_of_drivers() -> tuple[type[Exception], ...]:
    import psycopg  # noqa: PLC0415  # a bot on SQLite needs no other database's driver
    import pymysql  # noqa: PLC0415  # as above

    return (sqlite3.Error, psycopg.Error, pymysql.Error, DBAPIError, PoolTimeout)


def is_kept(table: Table) -> bool:
    """Say whether a backup holds the rows of this table."""
    return table.name not in NOT_KEPT and not table.info.get("derived", False)


def kept_tables() -> list[Table]:
    """Return the tables of a backup, referenced ones first."""
    return [table for table in metadata.sorted_tables if is_kept(table)]


def kept_columns(table: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of a table's columns that a backup holds, in their order."""
    left_out = _LEFT_OUT.get(table, frozenset())
    return tuple(name for name in names if name not in left_out)


class Snapshot:
    """A database at one instant. Made by ``open_snapshot``, or over a connection in a transaction of its own."""

    def __init__(self, connection: Connection, head: str = HEAD) -> None:
        self._connection = connection
        self.kind = capabilities(connection).kind
        self._quote: Callable[[str], str] = connection.dialect.identifier_preparer.quote_identifier
        version = migrations.current_version(connection)
        if version is None:
            raise StoreUnavailable("the database has no tables; `bot.py db upgrade` makes them")
        if version != head and version not in migrations.known_versions():
            raise SchemaMismatch(
                f"the database has schema version {version}: use the newer program that made it"
            )
        self.schema = version
        inspector = inspect(connection)
        existing = set(inspector.get_table_names())
        # A database that was not upgraded yet may lack columns of this program, or whole tables.
        self._instants: dict[str, set[str]] = {}
        self.tables: list[tuple[Table, tuple[str, ...]]] = []
        for table in kept_tables():
            if table.name in existing:
                columns = inspector.get_columns(table.name)
                self._instants[table.name] = {c["name"] for c in columns if isinstance(c["type"], DateTime)}
                left_out = _LEFT_OUT.get(table.name, frozenset())
                self.tables.append(
                    (table, tuple(str(c["name"]) for c in columns if c["name"] not in left_out))
                )
        self._next_ids = self._read_next_ids()

    def header(self, table: Table, columns: Sequence[str]) -> TableHeader:
        """Return the table's line in a backup."""
        return TableHeader(str(table.name), tuple(columns), self._next_ids.get(table.name))

    def rows(self, table: Table, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
        """Yield the rows in the order of their primary key, the same order and values on every kind of database.

        Raises StoreUnavailable.
        """
        instants = self._instants[table.name]
        wanted = ", ".join(
            _AS_TEXT[self.kind].format(self._quote(name)) if name in instants else self._quote(name)
            for name in columns
        )
        # PostgreSQL sorts texts by its locale; the others, as we set them up, by their bytes.
        suffix = ' COLLATE "C"' if self.kind == "postgresql" else ""
        order = ", ".join(
            self._quote(c.name) + (suffix if c.type.python_type is str else "") for c in table.primary_key
        )
        statement = f"SELECT {wanted} FROM {self._quote(table.name)} ORDER BY {order}"
        with driver_errors():
            cursor = self._cursor()
            try:
                cursor.execute(statement)
                yield from cursor
            finally:
                cursor.close()

    def _cursor(self) -> Any:
        driver: Any = self._connection.connection.driver_connection
        if self.kind == "postgresql":
            cursor = driver.cursor(name="snapshot")
            cursor.itersize = _FETCH
            return cursor
        if self.kind == "mariadb":
            from pymysql.cursors import SSCursor  # noqa: PLC0415  # on MariaDB only

            return driver.cursor(SSCursor)
        return driver.cursor()

    def _read_next_ids(self) -> dict[str, int]:
        """Return the next id of each table that makes its own; ids of removed rows are not used again."""
        return read_next_ids(
            self._connection, [table.name for table, columns in self.tables if "id" in columns]
        )


def read_next_ids(connection: Connection, tables: Sequence[str]) -> dict[str, int]:
    """Return the id that the next row of each table would get."""
    kind, run = capabilities(connection).kind, connection.exec_driver_sql
    if kind == "sqlite":
        used = {row.name: int(row.seq) for row in run("SELECT name, seq FROM sqlite_sequence")}
        return {name: used.get(name, 0) + 1 for name in tables}
    if kind == "mariadb":
        statement = (
            "SELECT table_name AS name, auto_increment AS next_id FROM information_schema.tables "
            "WHERE table_schema = DATABASE()"
        )
        found = {row.name: int(row.next_id or 1) for row in run(statement)}
        return {name: found.get(name, 1) for name in tables}
    next_ids = {}
    for name in tables:
        sequence = run(f"SELECT pg_get_serial_sequence('{name}', 'id')").scalar_one()
        last, is_called = run(f"SELECT last_value, is_called FROM {sequence}").one()
        next_ids[name] = last + 1 if is_called else last
    return next_ids


# ---------------------------------------------------------------------------------------------------- opening


@contextmanager
def open_snapshot(db_url: str, folder: Path, progress: Progress | None = None) -> Iterator[Snapshot]:
    """Yield the database as it is now. ``folder`` takes the copy of a SQLite file meanwhile.

    Raises StoreUnavailable, and SchemaMismatch for a database that is newer than this program.
    """
    engine = open_engine(db_url, patient=True)
    try:
        path = sqlite_path(engine)
        if path is None:
            with one_instant(engine) as connection:
                yield Snapshot(connection)
        else:
            copy = folder / f".{path.name}.{os.getpid()}.partial"
            try:
                copy_sqlite(path, copy, progress)
                with file_snapshot(copy) as snapshot:
                    yield snapshot
            finally:
                copy.unlink(missing_ok=True)
    finally:
        engine.dispose()


def sqlite_path(engine: Engine) -> Path | None:
    """Return where a SQLite database lies; None for a server's, or for one in memory."""
    return _path(engine.url)


def _path(url: URL) -> Path | None:
    database = url.database or ""
    if url.get_backend_name() != "sqlite" or not database or database.startswith((":", "file:")):
        return None
    return Path(database).expanduser()


def check_exists(url: URL) -> None:
    """Raise StoreUnavailable where this is a SQLite file that does not exist, which opening it would make."""
    path = _path(url)
    if path is not None and not path.exists():
        raise StoreUnavailable(f"there is no database at {path}")


@contextmanager
def one_instant(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that sees one instant; on a SQLite file the write-ahead log grows meanwhile.

    Raises StoreUnavailable, also for a SQLite file that does not exist.
    """
    check_exists(engine.url)
    kind = capabilities(engine).kind
    options: dict[str, Any] = {"reader": True}
    if kind != "sqlite":
        options["isolation_level"] = "REPEATABLE READ"
    if kind == "postgresql":
        options["postgresql_readonly"] = True
    with driver_errors(), engine.connect().execution_options(**options) as connection, connection.begin():
        if kind == "mariadb":
            connection.exec_driver_sql("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        yield connection


@contextmanager
def file_snapshot(path: Path, head: str = HEAD) -> Iterator[Snapshot]:
    """Yield the rows of a SQLite file that nobody writes to, at schema ``head`` or an older one."""
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True),
        hide_parameters=True,
    )
    try:
        with driver_errors(), engine.connect() as connection:
            yield Snapshot(connection, head)
    finally:
        engine.dispose()


def copy_sqlite(path: Path, copy: Path, progress: Progress | None = None) -> None:
    """Copy a SQLite database that others may be writing to. Raises StoreUnavailable."""
    if not path.exists():
        raise StoreUnavailable(f"there is no database at {path}")
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    with driver_errors():
        source, target = (
            sqlite3.connect(path, isolation_level=None),
            sqlite3.connect(copy, isolation_level=None),
        )
        try:
            target.execute("PRAGMA synchronous=OFF")
            # Within one read transaction the copy need not begin again whenever somebody has written.
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_master").fetchone()

            def tell(_status: int, remaining: int, total: int) -> None:
                if progress is not None:
                    progress("copying", total - remaining, total)

            source.backup(target, pages=_PAGES, progress=tell)
            source.execute("COMMIT")
        finally:
            source.close()
            target.close()
