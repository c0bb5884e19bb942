"""Databases for the tests: finds or starts the servers, and gives each test a database of its own.

To make and drop a database costs a third of a second on a server, more than most tests take. So one whose schema
a test has left alone is emptied, its numbers start again at one, and the next test gets it.

A server is looked for once, when the first test asks for it: the URL in ``TEST_POSTGRES_URL`` or
``TEST_MARIADB_URL`` (the word ``new`` means a throw-away server), else the standard local port, else a
throw-away server made with the programs that are installed. Names of databases hold the host and the process,
so that runs beside each other do not meet, and the leftovers of a run that was killed are dropped by the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import socket
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pymysql
from sqlalchemy.engine import make_url

from feishu_bot.testing.clusters import Cluster, Unavailable, start_mariadb, start_postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine.url import URL

KINDS = ("sqlite", "postgresql", "mariadb")
CONNECT_TIMEOUT_S = 3


def make_template(url: str) -> None:
    """Give an empty database the product's schema. Runs once per kind; every test gets a copy."""
    try:
        from feishu_bot.store.migrations import upgrade  # noqa: PLC0415 - only tests with a database need it
    except ModuleNotFoundError as error:
        if error.name != "feishu_bot.store.migrations":
            raise
        return
    upgrade(url)


class Server(ABC):
    """One kind of database. ``create`` returns the URL of a new one, ``drop`` removes it, ``close`` all else."""

    @abstractmethod
    def create(self, *, blank: bool = False) -> str: ...

    @abstractmethod
    def drop(self, url: str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def empty(self, url: str) -> bool:
        """Bring a database back to what ``create`` made; False where that is not possible or not worth it."""
        del url
        return False


class Databases:
    """All kinds of databases of one test session."""

    def __init__(self, folder: Path) -> None:
        self._makers: dict[str, Callable[[], Server]] = {
            "sqlite": lambda: Sqlite(folder),
            "postgresql": Postgres.find,
            "mariadb": Mariadb.find,
        }
        self._servers: dict[str, Server | Unavailable] = {}
        self._emptied: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def server(self, kind: str) -> Server:
        """Return the server of this kind. Raises Unavailable, each time for the same reason."""
        if kind not in self._servers:
            try:
                self._servers[kind] = self._makers[kind]()
            except Unavailable as error:
                self._servers[kind] = error
        found = self._servers[kind]
        if isinstance(found, Unavailable):
            raise found
        return found

    @contextlib.contextmanager
    def database(self, kind: str, *, blank: bool = False) -> Iterator[str]:
        """Yield the URL of an empty database that exists as long as the block; ``blank``: without schema."""
        server = self.server(kind)
        emptied = self._emptied[kind]
        url = emptied.pop() if emptied and not blank else server.create(blank=blank)
        try:
            yield url
        finally:
            if not blank and server.empty(url):
                emptied.append(url)
            else:
                server.drop(url)

    def close(self) -> None:
        """Drop what is left and stop the servers that were started."""
        for kind, server in self._servers.items():
            if isinstance(server, Server):
                for url in self._emptied[kind]:
                    server.drop(url)
                server.close()


# ------------------------------------------------------------------------------------------------- SQLite


_MEMORY = Path("/dev/shm")
_MEMORY_ENOUGH_BYTES = 2**30


def folder_for_files(otherwise: Path) -> Path:
    """Return a folder in memory, where no commit waits for a disk; ``otherwise`` where there is not enough of it.

    Its name holds the process, so that what a run that was killed has left is removed by the next.
    """
    if not os.access(_MEMORY, os.W_OK) or shutil.disk_usage(_MEMORY).free < _MEMORY_ENOUGH_BYTES:
        return otherwise
    for left in _MEMORY.glob("feishu-bot-test-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    made = _MEMORY / f"feishu-bot-test-{os.getpid()}"
    made.mkdir(mode=0o700)
    return made


class Sqlite(Server):
    """Files, each in a folder of its own, copied from one that was migrated once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._template: Path | None = None

    def create(self, *, blank: bool = False) -> str:
        path = self._folder / str(next(self._numbers)) / "bot.db"
        path.parent.mkdir(parents=True)
        if not blank:
            self._copy_template(path)
        return f"sqlite:///{path}"

    def _copy_template(self, path: Path) -> None:
        if self._template is None:
            self._template = self._folder / "template" / "bot.db"
            self._template.parent.mkdir()
            make_template(f"sqlite:///{self._template}")
        for file in self._template.parent.glob("bot.db*"):  # with a WAL, should one be left
            shutil.copyfile(file, path.parent / file.name)

    def drop(self, url: str) -> None:
        shutil.rmtree(Path(url.removeprefix("sqlite:///")).parent, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


# ------------------------------------------------------------------------------------- names on a server


class Names:
    """The names of this run's databases on a shared server."""

    def __init__(self) -> None:
        host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
        self._prefix = f"feishu_bot_test_{host}_"
        self._numbers = itertools.count(1)
        self.like = self._prefix.replace("_", r"\_") + "%"
        self.template = f"{self._prefix}{os.getpid()}_template"

    def new(self) -> str:
        return f"{self._prefix}{os.getpid()}_{next(self._numbers)}"

    def is_leftover(self, name: str) -> bool:
        """Tell if ``name`` belongs to a run on this host that has ended; asked before this run makes any."""
        match = re.fullmatch(re.escape(self._prefix) + r"(\d+)_\w+", name)
        if match is None:
            return False
        pid = int(match[1])
        return pid == os.getpid() or not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --------------------------------------------------------------------------------------------- PostgreSQL


# Tables, columns, indexes and constraints; and whether the files have grown, which only a new database undoes.
POSTGRES_SHAPE = """
SELECT 'column', attrelid::regclass::text, attname::text, atttypid::int, attnotnull
  FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
 WHERE relnamespace = 'public'::regnamespace AND NOT attisdropped
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname::text, 0, convalidated
  FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'version', version_num, '', 0, true FROM alembic_version
UNION ALL
SELECT 'large', '', '', 0, pg_database_size(current_database()) > 24 * 1024 * 1024
ORDER BY 1, 2, 3
"""

# All tables but the schema's version, without their triggers of references, so in any order.
POSTGRES_EMPTY = """
DO $$
DECLARE name text;
BEGIN
  SET LOCAL session_replication_role = replica;
  FOR name IN SELECT oid::regclass::text FROM pg_class
               WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'alembic_version'
  LOOP
    EXECUTE 'DELETE FROM ' || name;
  END LOOP;
  PERFORM setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false)
     FROM pg_sequences WHERE last_value IS NOT NULL;
END $$
"""


class Postgres(Server):
    """PostgreSQL: each database is a copy of a template database."""

    def __init__(self, admin_url: str, cluster: Cluster | None = None) -> None:
        self._url = make_url(admin_url)
        self._cluster = cluster
        self._names = Names()
        self._admin = self._connect()
        self._template_made = False
        self._shape: list[tuple[Any, ...]] = []
        rows = self._admin.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE %s", [self._names.like]
        ).fetchall()
        for (name,) in rows:
            if self._names.is_leftover(name):
                self._drop(name)

    @classmethod
    def find(cls) -> Postgres:
        """Return a server that works. Raises Unavailable."""
        given = os.environ.get("TEST_POSTGRES_URL", "")
        if given and given != "new":
            try:
                return cls(given)
            except psycopg.Error as error:
                raise Unavailable(f"TEST_POSTGRES_URL does not work: {_one_line(error)}") from None
        if not given and _listens(5432):
            for user, database in itertools.product(("postgres", "root"), ("postgres", "test", "root")):
                with contextlib.suppress(psycopg.Error):
                    return cls(f"postgresql://{user}@127.0.0.1:5432/{database}")
        try:
            cluster = start_postgres("-c", "synchronous_commit=off")
        except Unavailable as error:
            raise Unavailable(f"nothing usable on port 5432, no TEST_POSTGRES_URL; {error}") from None
        return cls(cluster.url, cluster)

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        admin = psycopg.connect(**_arguments(self._url, name="dbname"), autocommit=True)
        row = admin.execute(
            "SELECT rolsuper OR rolcreatedb FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
        if row is None or not row[0]:
            admin.close()
            raise psycopg.OperationalError("the user may not create databases")
        return admin

    def create(self, *, blank: bool = False) -> str:
        name = self._names.new()
        if blank:
            self._create(name)
            return self._url_of(name)
        if not self._template_made:
            self._create(self._names.template)
            make_template(self._url_of(self._names.template))
            self._disconnect(self._names.template)  # a database in use cannot be copied
            self._template_made = True
        self._admin.execute(f"CREATE DATABASE {name} TEMPLATE {self._names.template}")
        self._relax(name)
        return self._url_of(name)

    def _create(self, name: str) -> None:
        self._admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        self._relax(name)

    def empty(self, url: str) -> bool:
        parsed = make_url(url)
        self._disconnect(parsed.database or "")
        try:
            with psycopg.connect(**_arguments(parsed, name="dbname")) as connection:
                shape = connection.execute(POSTGRES_SHAPE).fetchall()
                self._shape = self._shape or self._shape_of_template()
                if shape != self._shape:
                    return False
                connection.execute(POSTGRES_EMPTY)
        except psycopg.Error:
            return False
        return True

    def _shape_of_template(self) -> list[tuple[Any, ...]]:
        template = self._url.set(database=self._names.template)
        with psycopg.connect(**_arguments(template, name="dbname")) as connection:
            return connection.execute(POSTGRES_SHAPE).fetchall()

    def _relax(self, name: str) -> None:
        # What a test commits need not survive a power cut.
        self._admin.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")

    def _disconnect(self, name: str) -> None:
        self._admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )

    def _url_of(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        self._drop(make_url(url).database)

    def _drop(self, name: str | None) -> None:
        self._admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def close(self) -> None:
        if self._cluster is None:
            self._drop(self._names.template)
        self._admin.close()
        if self._cluster is not None:
            self._cluster.stop()


# ------------------------------------------------------------------------------------------------ MariaDB


class Mariadb(Server):
    """MariaDB: each database gets the statements that the template's tables were made with."""

    def __init__(self, admin_url: str, cluster: Cluster | None = None) -> None:
        self._url = make_url(admin_url)
        self._cluster = cluster
        self._names = Names()
        self._admin = pymysql.connect(
            **_arguments(self._url, name="database"), charset="utf8mb4", autocommit=True
        )
        ((version,),) = self._run("SELECT version()")
        if "MariaDB" not in version:
            self._admin.close()
            raise pymysql.OperationalError(f"the server is not MariaDB but {version}")
        self._run("SET SESSION lock_wait_timeout = 10")
        self._statements: list[str] | None = None
        self._shape: list[str] = []
        self._version: tuple[tuple[Any, ...], ...] = ()
        for (name,) in self._run(
            "SELECT schema_name FROM information_schema.schemata WHERE schema_name LIKE %s", self._names.like
        ):
            if self._names.is_leftover(name):
                self._drop(name)

    @classmethod
    def find(cls) -> Mariadb:
        """Return a server that works. Raises Unavailable."""
        given = os.environ.get("TEST_MARIADB_URL", "")
        if given and given != "new":
            try:
                return cls(given)
            except pymysql.Error as error:
                raise Unavailable(f"TEST_MARIADB_URL does not work: {_one_line(error)}") from None
        if not given and _listens(3306):
            with contextlib.suppress(pymysql.Error):
                return cls("mariadb://root@127.0.0.1:3306/")
        try:
            cluster = start_mariadb()
        except Unavailable as error:
            raise Unavailable(f"nothing usable on port 3306, no TEST_MARIADB_URL; {error}") from None
        return cls(cluster.url, cluster)

    def _run(self, statement: str, *values: Any) -> tuple[tuple[Any, ...], ...]:
        with self._admin.cursor() as cursor:
            cursor.execute(statement, values or None)
            return tuple(cursor.fetchall())

    def create(self, *, blank: bool = False) -> str:
        if not blank and self._statements is None:
            self._create(self._names.template)
            make_template(self._url_of(self._names.template))
            self._statements = self._dump()
        name = self._names.new()
        self._create(name)
        if not blank:
            self._run(f"USE {name}")
            for statement in self._statements or ():
                self._run(statement)
        return self._url_of(name)

    def empty(self, url: str) -> bool:
        name = make_url(url).database
        self._disconnect(name)
        self._run(f"USE {name}")
        tables = [table for (table,) in self._run("SHOW TABLES")]
        made = {table: self._run(f"SHOW CREATE TABLE `{table}`")[0][1] for table in tables}
        if sorted(map(_without_number, made.values())) != self._shape:
            return False
        if self._run("SELECT * FROM alembic_version") != self._version:
            return False
        self._run("SET SESSION foreign_key_checks = 0")
        try:
            self._run("BEGIN")
            for table in tables:
                if table != "alembic_version":
                    self._run(f"DELETE FROM `{table}`")
            self._run("COMMIT")
            for table, statement in made.items():
                if _without_number(statement) != statement:
                    self._run(f"ALTER TABLE `{table}` AUTO_INCREMENT = 1")
        except pymysql.Error:
            return False
        self._run("SET SESSION foreign_key_checks = 1")
        return True

    def _create(self, name: str) -> None:
        self._run(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")

    def _dump(self) -> list[str]:
        """Return what makes the template again in the current database: tables, then the rows they hold."""
        template = self._names.template
        self._run(f"USE {template}")
        tables = [name for (name,) in self._run("SHOW TABLES")]
        statements = ["SET SESSION foreign_key_checks = 0"]  # tables come by name, not by reference
        made = [self._run(f"SHOW CREATE TABLE `{table}`")[0][1] for table in tables]
        self._shape = sorted(map(_without_number, made))
        self._version = self._run("SELECT * FROM alembic_version")
        statements += made
        statements.append("SET SESSION foreign_key_checks = 1")
        for table in tables:
            if self._run(f"SELECT 1 FROM `{table}` LIMIT 1"):
                statements.append(f"INSERT INTO `{table}` SELECT * FROM {template}.`{table}`")
        return statements

    def _url_of(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        self._drop(make_url(url).database)

    def _drop(self, name: str | None) -> None:
        self._disconnect(name)
        self._run(f"DROP DATABASE IF EXISTS {name}")

    def _disconnect(self, name: str | None) -> None:
        # A transaction that a test left open would hold the tables.
        for (thread,) in self._run("SELECT id FROM information_schema.processlist WHERE db = %s", name):
            if thread != self._admin.thread_id():
                with contextlib.suppress(pymysql.OperationalError):  # gone in the meantime
                    self._run(f"KILL {thread}")

    def close(self) -> None:
        if self._cluster is None:
            self._drop(self._names.template)
        self._admin.close()
        if self._cluster is not None:
            self._cluster.stop()


def _without_number(statement: str) -> str:
    """Return the statement that makes a table, whatever number its next row gets."""
    return re.sub(r" AUTO_INCREMENT=\d+", "", statement)


# -------------------------------------------------------------------------------------------- connections


def _arguments(url: URL, *, name: str) -> dict[str, Any]:
    """Return the URL as a driver's arguments; ``name`` is what that driver calls the database."""
    arguments = {
        "host": url.host,
        "port": url.port,
        "user": url.username,
        "password": url.password,
        name: url.database,
        "connect_timeout": CONNECT_TIMEOUT_S,
        **url.query,
    }
    return {key: value for key, value in arguments.items() if value not in {None, ""}}


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
