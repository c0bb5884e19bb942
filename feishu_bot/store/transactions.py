"""Short transactions for programs without an event loop: from any thread, and run again where that helps."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
import weakref
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from feishu_bot.errors import StoreUnavailable, TooLarge
from feishu_bot.store import migrations
from feishu_bot.store.engine import (
    capabilities,
    is_conflict,
    is_disconnect,
    is_too_large,
    normalise_url,
    open_engine,
    reason_of,
    store_errors,
)
from feishu_bot.store.prepared import commit, run
from feishu_bot.store.schema import HEAD
from feishu_bot.store.work import Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

T = TypeVar("T")

CONFLICT_DEADLINE_S = 20.0  # how long a transaction is run again after deadlocks, locks and races
RACES = 10  # runs of a transaction that loses a race for a unique key
RECONNECTS = 3  # runs of a transaction whose connection broke, before the caller is told
KEPT_CONNECTIONS = 4
MEMORY = ":memory:"

# On SQLite these must not stand in a transaction, or begin none.
_WITHOUT_TRANSACTION = frozenset({"VACUUM", "PRAGMA", "ATTACH", "DETACH"})
_READING = frozenset({"SELECT", "WITH", "VALUES", "EXPLAIN"})


def utc_now() -> datetime:
    """Return the time of this machine."""
    return datetime.now(UTC)


class Transactions:
    """One database, for any number of threads and for processes forked from this one.

    A memory database (``sqlite://``, ``:memory:``) is a file in a folder of its own below the system's place for
    temporary files, removed by ``close``, at the program's end, or when nobody holds this object any more. SQLite's
    own memory databases are seen by one connection only, or (with a shared cache) lock whole tables so that a
    reader stops a writer; a file behaves as every other database here does, for every thread.
    """

    def __init__(
        self,
        db_url: str,
        *,
        echo: bool = False,
        pool_size: int = 5,
        max_overflow: int = 10,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.clock = clock
        folder = None
        if _in_memory(db_url):
            folder = tempfile.mkdtemp(prefix="feishu-bot-")
            db_url = f"sqlite:///{Path(folder, 'conversations.db')}"
        self.engine = open_engine(db_url, echo=echo, pool_size=pool_size, max_overflow=max_overflow)
        self.kind = capabilities(self.engine).kind
        self._pid = os.getpid()
        self._idle: list[Connection] = []
        self._finalizer = weakref.finalize(self, _close, self.engine, self._idle, folder, self._pid)
        if folder is not None:
            event.listen(self.engine, "connect", _do_not_sync)
        # SQLite lets one write at a time and tells the others to come again; threads of one process queue here
        # instead. That it is right does not depend on this lock: other processes do not hold it.
        self._exclusive = threading.Lock()
        self._sessions = self.engine
        if self.kind == "sqlite":
            self._sessions = self.engine.execution_options(late_begin=True)
            event.listen(self._sessions, "before_cursor_execute", _begin_late)
        self._short = self.engine.execution_options(late_begin=True)

    def prepare(self) -> None:
        """Bring the schema up where it is not. Raises StoreUnavailable or SchemaMismatch."""
        with store_errors(), self.engine.execution_options(reader=True).connect() as connection:
            version = migrations.current_version(connection)
        if version != HEAD:
            migrations.upgrade(self.engine)

    def close(self) -> None:
        """Close all connections; a memory database is gone then. May be called again."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return not self._finalizer.alive

    def session(self) -> Session:
        """Return a session whose records stay readable when it is closed.

        On SQLite its transaction begins with the first statement that needs one, so that ``VACUUM`` works and a
        session that only reads stops no writer.
        """
        self._check_process()
        return Session(self._sessions, expire_on_commit=False)

    def write(self, function: Callable[[Transaction], T], *, repeatable: bool = False) -> T:
        """Run ``function`` in a transaction and return its result once that is on disk.

        It is run again as a whole after a deadlock, a lock or a race for a unique key, and after a connection
        that broke before the commit was asked for. One that broke while it was: only if ``repeatable`` says that
        a second run has the same result. Raises StoreUnavailable; errors of ``function`` pass through.
        """
        self._check_process()
        retry = _Retry()
        while True:
            committing = False
            try:
                with self._writer() as connection:
                    result = function(self._transaction(connection))
                    committing = True
                    commit(connection)
                    return result
            except (DBAPIError, PoolTimeout) as error:
                if committing and is_disconnect(error) and not repeatable:
                    raise StoreUnavailable(
                        f"the connection broke in the commit, it may have been done: {reason_of(error)}",
                        outcome_unknown=True,
                    ) from error
                retry.wait_or_raise(error)

    def read(self, function: Callable[[Transaction], T]) -> T:
        """Run a function that only reads. Raises StoreUnavailable."""
        self._check_process()
        retry = _Retry()
        while True:
            try:
                with self._reader() as connection:
                    return function(self._transaction(connection))
            except (DBAPIError, PoolTimeout) as error:
                retry.wait_or_raise(error)

    @contextmanager
    def _writer(self) -> Iterator[Connection]:
        """Lend a connection on which a write may begin."""
        if self.kind != "sqlite":
            with self.engine.connect() as connection:
                yield connection
            return
        with self._exclusive, self._reader() as connection:
            run(connection, "BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _reader(self) -> Iterator[Connection]:
        """Lend a connection. On SQLite, where the pool costs as much as a statement, some are kept beside it."""
        if self.kind != "sqlite":
            with self.engine.connect() as connection:
                yield connection
            return
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._short.connect()
        try:
            yield connection
            if connection.in_transaction():  # only SQLAlchemy thinks so: statements that read began none
                connection.rollback()
        except BaseException:
            connection.close()  # rolls back
            raise
        if len(self._idle) < KEPT_CONNECTIONS and self._finalizer.alive:
            self._idle.append(connection)
        else:
            connection.close()

    def _transaction(self, connection: Connection) -> Transaction:
        return Transaction(connection, self.kind, int(self.clock().timestamp() * 1000))

    def _check_process(self) -> None:
        if not self._finalizer.alive:
            raise StoreUnavailable("the store is closed")
        if self._pid != os.getpid():  # a fork: its parent goes on using the connections
            self._pid = os.getpid()
            self._idle.clear()
            self.engine.dispose(close=False)
            self._exclusive = threading.Lock()


class _Retry:
    """Decides if a transaction is run again."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._runs = 0
        self._broken = 0

    def wait_or_raise(self, error: DBAPIError | PoolTimeout) -> None:
        self._runs += 1
        late = time.monotonic() - self._started > CONFLICT_DEADLINE_S
        if is_disconnect(error):
            self._broken += 1
            again = self._broken < RECONNECTS
        else:
            # A unique key taken by a racing transaction, or a conversation that went away: the next run sees it.
            again = not late and (
                is_conflict(error) or (isinstance(error, IntegrityError) and self._runs < RACES)
            )
        if not again:
            told = TooLarge if is_too_large(error) else StoreUnavailable
            raise told(reason_of(error)) from error
        time.sleep(random.uniform(0.001, 0.005 * min(self._runs, 10)))  # noqa: S311  # jitter, not a secret


def _in_memory(db_url: str) -> bool:
    if db_url == MEMORY:
        return True
    url = normalise_url(db_url)
    return url.drivername == "sqlite" and (
        url.database in {None, "", MEMORY} or url.query.get("mode") == "memory"
    )


def _do_not_sync(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")  # it does not outlive the process anyway


def _begin_late(_connection: Connection, cursor: Any, statement: str, *_others: Any) -> None:
    if cursor.connection.in_transaction:
        return
    word = statement.split(None, 1)[0].upper() if statement.strip() else ""
    if word not in _WITHOUT_TRANSACTION:
        cursor.connection.execute("BEGIN" if word in _READING else "BEGIN IMMEDIATE")


def _close(engine: Engine, idle: list[Connection], folder: str | None, pid: int) -> None:
    own = pid == os.getpid()  # else this is a fork that ends: connections and folder are its parent's
    while own and idle:
        idle.pop().close()
    engine.dispose(close=own)
    if folder is not None and own:
        shutil.rmtree(folder, ignore_errors=True)
