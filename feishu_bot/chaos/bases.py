"""The database of a run: a scratch file, a throw-away server, or an empty database that somebody names."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import urlsplit

from feishu_bot.chaos.scenario import AWAY, CUT, FREEZE, LOCK, RESTART
from feishu_bot.config import absolute_database
from feishu_bot.errors import BotError, StoreError, StoreUnavailable
from feishu_bot.store.engine import capabilities, open_engine, store_errors
from feishu_bot.store.migrations import remove_schema
from feishu_bot.store.snapshot import sqlite_path
from feishu_bot.testing.clusters import Cluster, start_mariadb, start_postgres

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

_PORTS = {"postgresql": 5432, "mariadb": 3306}
_PATIENCE_S = 60.0  # for a lock that others want as well
_HOLD = {  # what another writer holds while he is at it
    "postgresql": "LOCK TABLE lanes IN EXCLUSIVE MODE",
    "mariadb": "SELECT count(*) FROM lanes FOR UPDATE",
}
_TABLES = {
    "sqlite": "SELECT name FROM sqlite_master",
    "postgresql": (
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')"
    ),
    "mariadb": "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()",
}


class Base:
    """An empty database. ``possible`` are the accidents that can happen to it."""

    possible: ClassVar[frozenset[str]] = frozenset({LOCK})

    def __init__(self, url: str) -> None:
        self.url = url
        engine = open_engine(url)
        self.kind = capabilities(engine).kind
        engine.dispose()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens; None for a file, or a socket that no proxy can stand before."""
        parts = urlsplit(self.url)
        return (parts.hostname, parts.port or _PORTS[self.kind]) if parts.hostname else None

    def through(self, host: str, port: int) -> str:
        """Return the URL that leads there over another address."""
        parts = urlsplit(self.url)
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}@{host}:{port}" if login else f"{host}:{port}").geturl()

    def hold(self, seconds: float) -> None:
        """Hold what every writer needs, as another program at work on the database does."""
        engine = open_engine(self.url, patient=True)
        with suppress(StoreUnavailable), store_errors(), engine.begin() as connection:
            if self.kind in _HOLD:
                connection.exec_driver_sql(_HOLD[self.kind])
            time.sleep(seconds)
        engine.dispose()

    def restart(self, how: Literal["at once", "orderly"], away_s: float) -> None:
        """End the server and start it again."""
        raise NotImplementedError

    def freeze(self, *, frozen: bool) -> None:
        """Have the server hang, or go on."""
        raise NotImplementedError

    def close(self, *, keep: bool = False) -> None:
        """Remove what the run has made; ``keep``: leave what somebody may want to look at."""


class Scratch(Base):
    """A SQLite file in the run's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"sqlite:///{folder / 'chaos.db'}")


class Own(Base):
    """A server of this run's own."""

    possible = frozenset({LOCK, RESTART, FREEZE, CUT, AWAY})

    def __init__(self, kind: str) -> None:
        """Start it. Raises Unavailable where it is not installed."""
        self._cluster: Cluster = start_postgres() if kind == "postgresql" else start_mariadb()
        try:
            super().__init__(self._cluster.url)
            if kind == "mariadb":
                engine = open_engine(self._cluster.url)
                with store_errors(), engine.begin() as connection:
                    connection.exec_driver_sql("CREATE DATABASE chaos CHARACTER SET utf8mb4")
                engine.dispose()
                self._cluster.url = self.url = self._cluster.url + "chaos"
        except BaseException:
            self._cluster.stop()
            raise

    def restart(self, how: Literal["at once", "orderly"], away_s: float) -> None:
        self._cluster.restart(how, away_s=away_s)

    def freeze(self, *, frozen: bool) -> None:
        self._cluster.freeze(frozen=frozen)

    def close(self, *, keep: bool = False) -> None:  # noqa: ARG002  # the server ends with us
        self._cluster.stop()


class Given(Base):
    """An empty database that somebody names. Raises BotError if it is not empty, StoreUnavailable if it is away."""

    def __init__(self, url: str) -> None:
        super().__init__(absolute_database(url, Path.cwd()))
        self._made = False
        engine = open_engine(self.url)
        try:
            self._file = sqlite_path(engine)
            if self.kind == "sqlite" and self._file is None:
                raise BotError("several processes need a database in a file")
            self._made = self._file is not None and not self._file.exists()
            found = [] if self._made else _tables(engine)
        finally:
            engine.dispose()
        if found:
            raise BotError(f"this database is not empty: it holds {found[0]}; name an empty one")
        self.possible = self.possible | ({CUT, AWAY} if self.address is not None else set())  # type: ignore[misc]

    def close(self, *, keep: bool = False) -> None:
        if keep:
            return
        if self._file is not None and self._made:
            for name in (self._file, *(Path(f"{self._file}-{end}") for end in ("wal", "shm", "turn"))):
                name.unlink(missing_ok=True)
            return
        with suppress(StoreError):
            engine = open_engine(self.url, patient=True)
            remove_schema(engine)
            engine.dispose()


def _tables(engine: Engine) -> list[str]:
    with store_errors(), engine.execution_options(reader=True).connect() as connection:
        return _names(connection)


def _names(connection: Connection) -> list[str]:
    statement = _TABLES[capabilities(connection).kind]
    return sorted(str(name) for name in connection.exec_driver_sql(statement).scalars())
