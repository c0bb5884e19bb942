"""Opening a database, and all that differs between the three kinds: named flags and statements, nothing else."""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Insert, Table, create_engine, event, func, select, text
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    PendingRollbackError,
    ResourceClosedError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feishu_bot.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.url import URL

SQLITE_BUSY_MS = 15_000  # how long a writer waits for another process's transaction
STATEMENT_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5

_DRIVERS = {
    "sqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kind of database can do, by name."""

    kind: str  # sqlite, postgresql or mariadb
    update_returning: bool
    delete_returning: bool
    single_writer: bool  # one writing transaction at a time: one writer thread, no row locks
    notify: bool


_CAPABILITIES = {
    "sqlite": Capabilities(
        "sqlite", update_returning=True, delete_returning=True, single_writer=True, notify=False
    ),
    "postgresql": Capabilities(
        "postgresql", update_returning=True, delete_returning=True, single_writer=False, notify=True
    ),
    "mysql": Capabilities(
        "mariadb", update_returning=False, delete_returning=True, single_writer=False, notify=False
    ),
}


def capabilities(engine: Engine | Connection) -> Capabilities:
    """Return what the database behind ``engine`` can do."""
    return _CAPABILITIES[engine.dialect.name]


def normalise_url(db_url: str) -> URL:
    """Return the URL with our driver in it. Raises StoreUnavailable for a URL that no database of ours has."""
    try:
        url = make_url(db_url)
    except ArgumentError:
        raise StoreUnavailable("the database URL cannot be read (expected kind://user@host/name)") from None
    kind = url.drivername.split("+")[0]
    driver = _DRIVERS.get(kind)
    if driver is None:
        raise StoreUnavailable(f"{kind!r} databases are not supported; use sqlite, postgresql or mariadb")
    url = url.set(drivername=driver)
    if driver == "mysql+pymysql":
        url = url.update_query_dict({"charset": "utf8mb4"})
    return url


def open_engine(
    db_url: str, *, echo: bool = False, pool_size: int = 5, max_overflow: int = 10, patient: bool = False
) -> Engine:
    """Open a database; the folder of a SQLite file is made. Connects only when used.

    Writers get ``BEGIN IMMEDIATE`` on SQLite; readers take ``engine.execution_options(reader=True)``.
    ``patient``: no statement is broken off for its length; for maintenance, which may take hours.
    """
    url = normalise_url(db_url)
    if url.drivername == "sqlite":
        return _open_sqlite(url, echo=echo)
    if url.drivername == "postgresql+psycopg":
        arguments: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "options": f"-c statement_timeout={0 if patient else STATEMENT_TIMEOUT_S * 1000} -c timezone=UTC",
            "application_name": "feishu-bot",
            # A server that is cut off without a word must not hold the writer for hours.
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": STATEMENT_TIMEOUT_S * 1000,
        }
        isolation = "READ COMMITTED"
    else:
        arguments = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": None if patient else STATEMENT_TIMEOUT_S * 2,
            "write_timeout": None if patient else STATEMENT_TIMEOUT_S * 2,
            "init_command": (
                "SET SESSION time_zone='+00:00', innodb_lock_wait_timeout=10, "
                f"max_statement_time={0 if patient else STATEMENT_TIMEOUT_S}, sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"
            ),
        }
        isolation = "READ COMMITTED"  # REPEATABLE READ's gap locks deadlock nodes against each other
    engine = create_engine(
        url,
        echo=echo,
        connect_args=arguments,
        isolation_level=isolation,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=CONNECT_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,  # errors must not carry what people wrote
    )
    event.listen(engine, "handle_error", _leave_read_only)
    if url.drivername == "mysql+pymysql":
        event.listen(engine, "do_connect", _connect_bounded)
    return engine


def _connect_bounded(_dialect: Any, _record: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
    from feishu_bot.store.packets import BoundedConnection  # noqa: PLC0415  # the driver is there on MariaDB only

    return BoundedConnection(*arguments, **named)


def _leave_read_only(context: ExceptionContext) -> None:
    """Give up all connections to a server that takes no changes: a standby that answers during a failover.

    It stays reachable, so nothing else would have the next connection led to the one that took over.
    """
    error = context.original_exception
    number = error.args[0] if error.args else None
    if getattr(error, "sqlstate", None) == _READ_ONLY_SQLSTATE or number in _READ_ONLY_MARIADB:
        context.is_disconnect = True


def _write_ahead(cursor: sqlite3.Cursor) -> None:
    """Have the file written by way of a log, which stays so.

    Where another process is just making the file, SQLite does not wait for that as it does for all else.
    """
    end = time.monotonic() + SQLITE_BUSY_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def _open_sqlite(url: URL, *, echo: bool) -> Engine:
    is_file = bool(url.database) and not str(url.database).startswith(("file:", ":"))
    if is_file:
        try:
            Path(str(url.database)).expanduser().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"the folder of {url.database} cannot be made: {error.strerror}"
            ) from error
    engine = create_engine(
        url,
        echo=echo,
        connect_args={"timeout": SQLITE_BUSY_MS / 1000, "check_same_thread": False, "isolation_level": None},
        hide_parameters=True,
    )

    if is_file:
        event.listen(engine, "do_connect", _make_private)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        _write_ahead(cursor)
        cursor.execute("PRAGMA synchronous=FULL")  # an acknowledged message survives a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_MS}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # The driver would begin late and deferred: two writers could then both fail to upgrade their lock.
        options = connection.get_execution_options()
        if not options.get("late_begin", False):  # its taker begins with the first statement, or not at all
            connection.exec_driver_sql("BEGIN" if options.get("reader", False) else "BEGIN IMMEDIATE")

    return engine


def _make_private(_dialect: Any, _record: Any, arguments: Sequence[Any], _named: dict[str, Any]) -> None:
    """Make the file of a new database, for its owner alone; SQLite gives what it puts beside it the same rights.

    One that is there keeps its rights. It gets its name when it is complete: to open and close a database's file
    would end the locks that SQLite has on it in this process.
    """
    file = Path(arguments[0])
    if file.exists():
        return
    with suppress(OSError):  # SQLite makes it then, or says why it cannot
        descriptor, made = tempfile.mkstemp(prefix=".", dir=file.parent)
        os.close(descriptor)
        try:
            os.link(made, file)
        finally:
            Path(made).unlink()


# ------------------------------------------------------------------------------------------- error mapping

# SQLSTATEs and numbers after which the same transaction may succeed if it is simply run again.
_RETRY_SQLSTATES = frozenset({"40001", "40P01", "55P03", "57014"})
_RETRY_MARIADB = frozenset({1205, 1213, 1020, 1412, 1969})
# A server that takes no changes, such as a standby.
_READ_ONLY_SQLSTATE = "25006"
_READ_ONLY_MARIADB = frozenset({1290, 1836})
_TOO_LARGE_MARIADB = 1153
# Connection was killed, server is shutting down: SQLAlchemy knows only those of MySQL.
_GONE_MARIADB = frozenset({1053, 1927})


def is_disconnect(error: BaseException) -> bool:
    """Say whether the connection is gone, so that the outcome of a commit is unknown."""
    if isinstance(error, PoolTimeout | PendingRollbackError | ResourceClosedError):
        return True  # the last two: it broke between two statements of a transaction
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None) or ""
    if error.connection_invalidated or state.startswith("08") or state in {"57P01", "57P02", "57P03"}:
        return True
    return _number(error) in _GONE_MARIADB


def _number(error: DBAPIError) -> int | None:
    """Return MariaDB's error number."""
    arguments = getattr(error.orig, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else None


def is_conflict(error: BaseException) -> bool:
    """Say whether another transaction was in the way (deadlock, lock time-out, busy), so that a re-run helps."""
    if not isinstance(error, DBAPIError):
        return False
    orig = error.orig
    if getattr(orig, "sqlstate", None) in _RETRY_SQLSTATES or _number(error) in _RETRY_MARIADB:
        return True
    return "database is locked" in str(orig) or "database table is locked" in str(orig)


def is_refusal(error: BaseException) -> bool:
    """Say whether the database will never take this change: a value is wrong with it, not the database."""
    return isinstance(error, DataError | IntegrityError)


def is_too_large(error: BaseException) -> bool:
    """Say whether it is more than the database server takes at once."""
    return isinstance(error, DataError) and _number(error) == _TOO_LARGE_MARIADB


def is_hopeless(error: BaseException) -> bool:
    """Say whether waiting cannot help: wrong password, missing database, a file that is no database."""
    orig = getattr(error, "orig", None)
    if orig is None and error.__cause__ is not None:
        return is_hopeless(error.__cause__)
    words = str(orig or error).lower()
    number = orig.args[0] if orig is not None and orig.args else None
    return (
        number in {1044, 1045, 1049, 1698}
        or any(
            sign in words
            for sign in (
                "password authentication failed",
                "no password supplied",
                "not a database",
                "malformed",
                "unable to open database file",
                "readonly database",
            )
        )
        or ("does not exist" in words and ("database" in words or "role" in words))
    )


_PASSWORD_IN_URL = re.compile(r"(://[^:/@\s]*:)[^@\s]*@")


def reason_of(error: BaseException) -> str:
    """Return a database error in one line without SQL, values or passwords."""
    orig = getattr(error, "orig", None) or error
    message = str(orig).strip().splitlines()
    return _PASSWORD_IN_URL.sub(r"\1***@", message[0] if message else type(orig).__name__)[:300]


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn every error of driver and pool into StoreUnavailable with a reason."""
    try:
        yield
    except (DBAPIError, PoolTimeout, NoSuchModuleError) as error:
        raise StoreUnavailable(reason_of(error)) from error


# ---------------------------------------------------------------------------------------------- statements


@cache  # built once per table, not once per batch
def insert_ignore(kind: str, table: Table, unique: tuple[str, ...]) -> Insert:
    """Return an insert that leaves an existing row with the same ``unique`` columns as it is."""
    if kind == "mariadb":
        first = table.c[unique[0]]
        return mysql.insert(table).on_duplicate_key_update({first.name: first})
    if kind == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing(index_elements=list(unique))
    return sqlite.insert(table).on_conflict_do_nothing(index_elements=list(unique))


def _insert_or_set(
    kind: str, table: Table, unique: Sequence[str], new_values: Callable[[Any], dict[str, Any]]
) -> Insert:
    if kind == "mariadb":
        statement = mysql.insert(table)
        return statement.on_duplicate_key_update(new_values(statement.inserted))
    if kind == "postgresql":
        on_postgresql = postgresql.insert(table)
        return on_postgresql.on_conflict_do_update(
            index_elements=list(unique), set_=new_values(on_postgresql.excluded)
        )
    on_sqlite = sqlite.insert(table)
    return on_sqlite.on_conflict_do_update(index_elements=list(unique), set_=new_values(on_sqlite.excluded))


@cache  # built once per table, not once per batch
def insert_add(kind: str, table: Table, unique: tuple[str, ...], add: tuple[str, ...]) -> Insert:
    """Return an insert that, where the row exists, adds the given numbers to it."""
    return _insert_or_set(kind, table, unique, lambda new: {c: table.c[c] + new[c] for c in add})


@cache  # built once per table, not once per batch
def insert_fill(kind: str, table: Table, unique: tuple[str, ...], fill: tuple[str, ...]) -> Insert:
    """Return an insert that, where the row exists, fills the given columns only if they are null."""
    return _insert_or_set(
        kind, table, unique, lambda new: {c: func.coalesce(table.c[c], new[c]) for c in fill}
    )


@cache  # built once per table, not once per batch
def insert_set(kind: str, table: Table, unique: tuple[str, ...], columns: tuple[str, ...]) -> Insert:
    """Return an insert that, where the row exists, gives these columns their new values."""
    return _insert_or_set(kind, table, unique, lambda new: {c: new[c] for c in columns})


_NOW_MS = {
    "sqlite": "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
    "postgresql": "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
    "mariadb": "SELECT CAST(UNIX_TIMESTAMP(SYSDATE(3)) * 1000 AS SIGNED)",
}


def database_now_ms(connection: Connection) -> int:
    """Return the database's own clock in milliseconds since 1970: leases and retries go by it alone."""
    return int(connection.execute(text(_NOW_MS[capabilities(connection).kind])).scalar_one())


def ping(engine: Engine) -> None:
    """Return if the database answers. Raises StoreUnavailable otherwise."""
    with store_errors(), engine.execution_options(reader=True).connect() as connection:
        connection.execute(select(1))
