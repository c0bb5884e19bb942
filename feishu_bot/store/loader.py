"""Rows of a backup put into tables, and into a SQLite file made for them."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, StaticPool, create_engine

from feishu_bot.errors import BackupDamaged
from feishu_bot.store import migrations, search
from feishu_bot.store.archive import TableHeader
from feishu_bot.store.engine import open_engine
from feishu_bot.store.schema import HEAD
from feishu_bot.store.snapshot import driver_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    Batches = Iterable[Sequence[Sequence[Any]]]
    Source = Callable[[], Iterator[tuple[TableHeader, Batches]]]

_ROWS_AT_ONCE = 500


def check_columns(table: TableHeader, existing: Iterable[str]) -> None:
    """Raise BackupDamaged where the database has no such table, or lacks columns of it."""
    unknown = set(table.columns) - set(existing)
    if unknown:
        raise BackupDamaged(
            f"the backup's table {table.name} has columns unknown here: {', '.join(sorted(unknown))}"
        )


def with_terms(kind: str, table: TableHeader, batches: Batches) -> tuple[TableHeader, Batches]:
    """Add what the search index of a database server keeps beside each text."""
    if table.name != "messages":
        return table, batches
    place = table.columns.index("content")
    value = partial(search.column_value, kind)
    filled = ([[*row, value(row[place])] for row in batch] for batch in batches)
    return TableHeader(table.name, (*table.columns, "search_terms"), table.next_id), filled


def insert_rows(
    driver: Any, sign: str, quote: Callable[[str], str], table: TableHeader, batches: Batches
) -> None:
    """Insert rows, batch by batch; ``sign`` stands for a value in this driver's statements."""
    names = ", ".join(quote(name) for name in table.columns)
    values = ", ".join([sign] * len(table.columns))
    statement = f"INSERT INTO {quote(table.name)} ({names}) VALUES ({values})"
    with closing(driver.cursor()) as cursor:
        for batch in batches:
            if batch:
                cursor.executemany(statement, batch)


def build_sqlite(
    path: Path, source: Source, *, schema: str = HEAD, scripts: Path = migrations.SCRIPTS, index: bool = False
) -> None:
    """Make a SQLite file of these rows and prove that it is sound; ``index``: with the search index.

    Raises BackupDamaged when references or the file are not sound, StoreUnavailable when it cannot be written.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    engine = open_engine(URL.create("sqlite", database=str(path)).render_as_string())
    try:
        migrations.upgrade(engine, head=schema, scripts=scripts)
    finally:
        engine.dispose()
    with driver_errors(), closing(sqlite3.connect(path, isolation_level=None)) as driver:
        # Until it takes its place nobody cares for this file, and then it is whole and on the disk.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "foreign_keys=OFF", "cache_size=-65536"):
            driver.execute(f"PRAGMA {pragma}")
        driver.execute("BEGIN")
        for table, batches in source():
            existing = driver.execute("SELECT name FROM pragma_table_info(?)", (table.name,))
            check_columns(table, [name for (name,) in existing])
            insert_rows(driver, "?", lambda name: f'"{name}"', table, batches)
            if table.next_id is not None:
                _continue_sqlite(driver, table)
        driver.execute("COMMIT")
        if index:
            index_sqlite(driver)
        orphan = driver.execute("PRAGMA foreign_key_check").fetchone()
        if orphan is not None:
            raise BackupDamaged(
                f"row {orphan[1]} of {orphan[0]} refers to a row of {orphan[2]} that is missing"
            )
        verdict = driver.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise BackupDamaged(f"the rows do not make a sound database: {verdict}")
    settle_file(path)


def _continue_sqlite(driver: sqlite3.Connection, table: TableHeader) -> None:
    highest = driver.execute(f'SELECT max(id) FROM "{table.name}"').fetchone()[0] or 0
    used = max((table.next_id or 1) - 1, highest)
    driver.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table.name,))
    driver.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table.name, used))


def index_sqlite(driver: sqlite3.Connection) -> None:
    """Enter all messages into the search index."""
    engine = create_engine("sqlite://", creator=lambda: driver, poolclass=StaticPool)
    with engine.connect() as connection:
        after: int | None = 0
        driver.execute("BEGIN")
        while after is not None:
            after = search.index_missing(connection, "sqlite", after=after, most=_ROWS_AT_ONCE)
        driver.execute("COMMIT")


def settle_file(path: Path) -> None:
    """Have all of a SQLite database in its one file, and on the disk."""
    with driver_errors(), closing(sqlite3.connect(path, isolation_level=None)) as driver:
        driver.execute("PRAGMA journal_mode=DELETE")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_sqlite(path: Path) -> None:
    """Remove a SQLite file and what lies beside it, as far as there is any."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
