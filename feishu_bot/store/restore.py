"""From a backup into a database of any kind: all of it, or nothing is changed.

SQLite gets a new file that takes the old one's place by a rename; PostgreSQL does it in one transaction; MariaDB,
whose DDL has none, fills tables beside the old ones and renames all in one statement.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, inspect, literal, select, text

from feishu_bot.errors import RestoreRefused, StoreUnavailable
from feishu_bot.store import migrations, shadow
from feishu_bot.store.archive import ArchiveReader, Manifest, TableHeader, verify
from feishu_bot.store.engine import capabilities, database_now_ms, open_engine
from feishu_bot.store.leases import STALE_MS, Owner
from feishu_bot.store.loader import (
    build_sqlite,
    check_columns,
    remove_sqlite,
    settle_file,
    sync_folder,
    with_terms,
)
from feishu_bot.store.schema import (
    HEAD,
    OPEN,
    UNSENT,
    conversations,
    inbox,
    messages,
    metadata,
    outbox,
    processes,
)
from feishu_bot.store.snapshot import driver_errors, file_snapshot, kept_tables, sqlite_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import Connection, Engine

    from feishu_bot.store.archive import Progress
    from feishu_bot.store.loader import Batches, Source

_ALWAYS_THERE = frozenset({"job_runs"})  # a server that has only just been started has such rows
_LOCK_WAIT_S = 30  # for somebody who reads at this moment
_ROWS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored. ``waiting`` messages will be answered and ``unsent`` replies sent by the next start.

    ``kept``: where the SQLite file lies that was replaced.
    """

    manifest: Manifest
    waiting: int
    unsent: int
    kept: Path | None = None


def restore(
    path: Path,
    db_url: str,
    *,
    now: datetime,
    force: bool = False,
    progress: Progress | None = None,
    head: str = HEAD,
    scripts: Path = migrations.SCRIPTS,
) -> Restored:
    """Put what a backup holds into a database; ``force``: in place of what it holds now.

    ``head`` and ``scripts`` are those of ``migrations.upgrade``. Raises BackupDamaged, RestoreRefused, SchemaMismatch
    and StoreUnavailable, always with the database's rows as they were.
    """
    if not path.is_file():
        raise RestoreRefused(f"there is no file {path}")
    manifest = verify(path, progress)
    schema = manifest.header.schema
    if schema != head and schema not in migrations.known_versions(scripts):
        raise RestoreRefused(
            f"{path.name} was made by a newer program (schema {schema}, this one knows {head})"
        )
    upgrade = partial(migrations.upgrade, head=head, scripts=scripts)
    build = partial(build_sqlite, scripts=scripts)
    engine = open_engine(db_url, patient=True)
    try:
        file = sqlite_path(engine)
        if file is None and capabilities(engine).kind == "sqlite":
            raise RestoreRefused("a database in memory ends with this command; name a file")
        is_full = _refuse(engine, file, force=force)
        if file is not None:
            engine.dispose()  # our own connections are nobody else's
            with _locked(file):  # learnt now rather than when all rows have been read
                pass
        with ArchiveReader(path, progress) as reader, _at_head(reader, head, build, upgrade) as source:
            kept = None
            if file is not None:
                build_here = partial(build, source=source, schema=head, index=True)
                kept = _into_sqlite(build_here, file, now=now, keep=is_full)
            else:
                upgrade(engine)
                put = _into_postgresql if capabilities(engine).kind == "postgresql" else _into_mariadb
                with driver_errors():
                    put(engine, source)
        return Restored(manifest, *_left_to_do(engine), kept)
    finally:
        engine.dispose()


def _left_to_do(engine: Engine) -> tuple[int, int]:
    with driver_errors(), engine.execution_options(reader=True).connect() as connection:
        waiting = select(func.count()).select_from(inbox).where(inbox.c.state == OPEN)
        unsent = select(func.count()).select_from(outbox).where(outbox.c.state.in_(UNSENT))
        return connection.execute(waiting).scalar_one(), connection.execute(unsent).scalar_one()


# --------------------------------------------------------------------------------------------------- refusals


def _refuse(engine: Engine, file: Path | None, *, force: bool) -> bool:
    """Say whether the database holds anything. Raises RestoreRefused for one that must not be replaced."""
    if file is not None and not file.exists():
        return False
    try:
        with driver_errors(), engine.execution_options(reader=True).connect() as connection:
            refuse_in_use(connection)
            holds = _holds(connection)
    except StoreUnavailable as error:
        if file is None:
            raise
        holds = f"cannot be read ({error})"  # a damaged file is what a backup is for
    if holds and not force:
        raise RestoreRefused(f"the database {holds}; --force replaces it")
    return bool(holds)


def refuse_in_use(connection: Connection) -> None:
    """Raise RestoreRefused while a process of ours is at work on the database."""
    if not inspect(connection).has_table(processes.name):
        return
    here, now_ms = Owner.current().host, database_now_ms(connection)
    for row in connection.execute(select(processes.c.owner, processes.c.host, processes.c.heartbeat_at)):
        if row.heartbeat_at > now_ms - STALE_MS and not Owner.parse(row.owner).is_gone(here):
            raise RestoreRefused(
                f"process {Owner.parse(row.owner).pid} on {row.host.split('/')[0]} is using the database: stop it first"
            )


def _holds(connection: Connection) -> str:
    """Return in words what the database holds, or an empty text."""
    existing = set(inspect(connection).get_table_names())
    used = [
        table
        for table in kept_tables()
        if table.name in existing
        and table.name not in _ALWAYS_THERE
        and connection.execute(select(literal(1)).select_from(table).limit(1)).first() is not None
    ]
    if conversations in used:
        people, said = (
            connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (conversations, messages)
        )
        return f"holds {people} conversations and {said} messages"
    return "holds rows of " + ", ".join(table.name for table in used) if used else ""


# --------------------------------------------------------------------------------------------------- the rows


@contextmanager
def _at_head(
    reader: ArchiveReader, head: str, build: Callable[..., None], upgrade: Callable[[str], str]
) -> Iterator[Source]:
    """Yield the rows of a backup as tables of this program; those of an older one are migrated in a scratch file."""
    if reader.header.schema == head:
        yield reader.tables
        return
    with TemporaryDirectory(prefix="feishu-bot-") as folder:
        scratch = Path(folder) / "older.db"
        build(scratch, reader.tables, schema=reader.header.schema)
        upgrade(f"sqlite:///{scratch}")
        settle_file(scratch)
        with file_snapshot(scratch, head) as snapshot:

            def tables() -> Iterator[tuple[TableHeader, Batches]]:
                for table, columns in snapshot.tables:
                    yield snapshot.header(table, columns), _batched(snapshot.rows(table, columns))

            yield tables


def _batched(rows: Iterable[Sequence[Any]]) -> Batches:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            yield batch
            batch = []
    yield batch


# ----------------------------------------------------------------------------------------------------- SQLite


def _into_sqlite(build: Callable[[Path], None], path: Path, *, now: datetime, keep: bool) -> Path | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        build(fresh)
        _hand_over(fresh, path if path.exists() else path.parent)
        return _swap(fresh, path, now=now, keep=keep)
    finally:
        remove_sqlite(fresh)


def _hand_over(fresh: Path, example: Path) -> None:
    """Give the file to whom the old one belongs: root may restore for a server that is not root."""
    if os.geteuid() == 0:
        found = example.stat()
        os.chown(fresh, found.st_uid, found.st_gid)
    if example.is_file():
        shutil.copymode(example, fresh)


def _swap(fresh: Path, path: Path, *, now: datetime, keep: bool) -> Path | None:
    """Put ``fresh`` into the place of ``path``; the old file stays beside it where it holds anything."""
    old = path.with_name(f"{path.name}.replaced-{now:%Y%m%dT%H%M%SZ}")
    with _locked(path):
        if path.exists():
            with suppress(FileNotFoundError):
                old.unlink()
            try:
                os.link(path, old)
            except OSError:  # a file system without links
                shutil.copyfile(path, old)
        # A log that is left beside the new file would be played into it.
        for suffix in ("-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                path.with_name(path.name + suffix).replace(old.with_name(old.name + suffix))
        fresh.replace(path)
    sync_folder(path.parent)
    if keep:
        return old
    remove_sqlite(old)
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the whole file, with its log taken in. Raises RestoreRefused while anybody has it open."""
    if not path.exists():
        yield
        return
    driver = sqlite3.connect(path, timeout=2, isolation_level=None)
    try:
        # It leaves the log only when no other connection is open, idle ones included.
        driver.execute("PRAGMA journal_mode=DELETE")
        driver.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            driver.close()
            raise RestoreRefused("another program has the database open: stop it first") from error
    except sqlite3.DatabaseError:  # damaged: there is nothing to lock
        pass
    try:
        yield
    finally:
        driver.close()


# ------------------------------------------------------------------------------------------------- PostgreSQL


def _into_postgresql(engine: Engine, source: Source) -> None:
    quote = engine.dialect.identifier_preparer.quote_identifier
    with engine.connect() as connection:
        with migrations.alone(connection):
            connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_WAIT_S}s'"))
            refuse_in_use(connection)
            everything = ", ".join(quote(table.name) for table in metadata.sorted_tables)
            connection.execute(text(f"TRUNCATE {everything} CASCADE"))
            driver: Any = connection.connection.driver_connection
            look = inspect(connection)
            for found, rows in source():
                check_columns(found, [column["name"] for column in look.get_columns(found.name)])
                table, batches = with_terms("postgresql", found, rows)
                names = ", ".join(quote(name) for name in table.columns)
                with (
                    driver.cursor() as cursor,
                    cursor.copy(f"COPY {quote(table.name)} ({names}) FROM STDIN") as copy,
                ):
                    for batch in batches:
                        for row in batch:
                            copy.write_row(row)
                if table.next_id is not None:
                    connection.execute(
                        text(
                            f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), greatest(:next, "
                            f"(SELECT coalesce(max(id), 0) + 1 FROM {quote(table.name)})), false)"
                        ),
                        {"next": table.next_id},
                    )
        with connection.begin():
            connection.execute(text("ANALYZE"))


# ---------------------------------------------------------------------------------------------------- MariaDB


def _into_mariadb(engine: Engine, source: Source) -> None:
    with engine.connect() as connection, migrations.alone(connection):
        connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {_LOCK_WAIT_S}")
        refuse_in_use(connection)
        shadow.replace_rows(connection, source)
