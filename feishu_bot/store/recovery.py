"""What can still be read of a damaged SQLite file, put into a new one that is right in itself.

The damaged file is only ever copied. Rows are asked for in the order of their ids; where SQLite finds a page
malformed, the next id that can be read is looked for. What the tree no longer leads to is taken from the pages.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from feishu_bot.errors import RestoreRefused, StoreUnavailable
from feishu_bot.store import inspection, migrations
from feishu_bot.store.engine import open_engine, reason_of
from feishu_bot.store.loader import index_sqlite, remove_sqlite, settle_file, sync_folder
from feishu_bot.store.pages import open_pages
from feishu_bot.store.repair import repair
from feishu_bot.store.schema import HEAD
from feishu_bot.store.snapshot import driver_errors, kept_columns, kept_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from feishu_bot.store.archive import Progress
    from feishu_bot.store.inspection import Finding

_QUICKLY_CHECKED = 64 << 20  # bytes of a file that may be looked through at each start
_BLOCK = 1 << 16  # bytes copied at once
_SECTOR = 4096  # bytes given up where the disk cannot be read
_FARTHEST = 1 << 62  # how far beyond the last id a readable one is looked for
_TOLD_EVERY = 1000  # rows
_NOTED = 100  # places of a table that could not be read


# --------------------------------------------------------------------------------------------- is it damaged?


def damage_of(path: Path) -> str | None:
    """Return why a SQLite file cannot be relied on, or None; quick, so a large file is not read through."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as driver:
            driver.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (size,) = driver.execute("PRAGMA page_size").fetchone()
            (pages,) = driver.execute("PRAGMA page_count").fetchone()
            if size * pages <= _QUICKLY_CHECKED:
                (verdict,) = driver.execute("PRAGMA quick_check(1)").fetchone()
                return None if verdict == "ok" else " ".join(verdict.split())
    except sqlite3.OperationalError:
        return None  # locked, or no right to it: whoever opens it will be told
    except sqlite3.DatabaseError as error:
        return reason_of(error)
    return None


# ------------------------------------------------------------------------------------------------- the report


@dataclass(slots=True)
class RecoveredTable:
    """Rows that were saved of a table, how many of them from the pages alone, and what could not be read."""

    name: str
    saved: int = 0
    from_pages: int = 0
    unread: list[str] = field(default_factory=list)

    def note(self, unread: str) -> None:
        """Keep what could not be read, up to a hundred places."""
        if len(self.unread) < _NOTED:
            self.unread.append(unread)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of a damaged file.

    ``unread_bytes`` the disk did not give. ``stand_ins`` are conversations made for messages whose own was lost.
    ``findings`` are those of ``inspection.check`` on the new file.
    """

    tables: list[RecoveredTable]
    unread_bytes: int
    stand_ins: int
    findings: list[Finding]


def recover(damaged: Path, target: Path, *, now: datetime, progress: Progress | None = None) -> Recovered:
    """Save what can be read of ``damaged`` into the new SQLite file ``target``; the damaged one is not touched.

    Raises RestoreRefused when ``target`` exists, StoreUnavailable when there is no file or nothing can be written.
    """
    if not damaged.is_file():
        raise StoreUnavailable(f"there is no file {damaged}")
    if target.exists():
        raise RestoreRefused(f"{target} exists; name a file that does not")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with TemporaryDirectory(prefix=".recover-", dir=target.parent) as folder, driver_errors():
            copy = Path(folder) / "copy.db"
            unread_bytes = sum(
                _copy(damaged.with_name(damaged.name + suffix), copy.with_name(copy.name + suffix))
                for suffix in ("", "-wal")
            )
            tables = _save(copy, fresh, progress)
        migrations.upgrade(f"sqlite:///{fresh}")
        stand_ins = repair(fresh, now=now)
        with driver_errors(), closing(sqlite3.connect(fresh, isolation_level=None)) as driver:
            index_sqlite(driver)
        settle_file(fresh)
        findings = inspection.check(f"sqlite:///{fresh}")
        settle_file(fresh)
        fresh.rename(target)
        sync_folder(target.parent)
    finally:
        remove_sqlite(fresh)
    return Recovered(tables, unread_bytes, stand_ins, findings)


def _copy(source: Path, target: Path) -> int:
    """Copy what the disk gives, zeros for the rest; return the bytes it did not give."""
    if not source.exists():
        return 0
    unread = 0
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        size = os.fstat(reading).st_size
        for place in range(0, size, _BLOCK):
            length = min(_BLOCK, size - place)
            try:
                found = os.pread(reading, length, place)
            except OSError:
                found = b""
                for sector in range(place, place + length, _SECTOR):
                    wanted = min(_SECTOR, size - sector)
                    try:
                        found += os.pread(reading, wanted, sector)
                    except OSError:
                        found += bytes(wanted)
                        unread += wanted
            os.pwrite(writing, found, place)
        os.ftruncate(writing, size)
    finally:
        os.close(reading)
        os.close(writing)
    return unread


# --------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True, slots=True)
class _Layout:
    """The columns of a table in a file: name, kind of value, whether null is refused, whether it is the rowid."""

    name: str
    columns: tuple[tuple[str, str, bool, bool], ...]
    has_rowid: bool

    @property
    def names(self) -> list[str]:
        return [column[0] for column in self.columns]

    @property
    def rowid(self) -> str:
        return next(column[0] for column in self.columns if column[3])

    def fits(self, values: Sequence[Any]) -> bool:
        """Say whether this can be a row of the table: what a broken page gives may be anything."""
        return len(values) == len(self.columns) and all(
            _fits(kind, value, needed and not is_rowid)
            for value, (_, kind, needed, is_rowid) in zip(values, self.columns, strict=True)
        )


def _fits(kind: str, value: Any, needed: bool) -> bool:  # noqa: FBT001  # private, and clear in its one place
    if value is None:
        return not needed
    if kind == "int":
        return isinstance(value, int)
    if kind == "float":
        return isinstance(value, int | float)
    return isinstance(value, str) and (kind == "text" or value[4:5] == "-")


def _layout(driver: sqlite3.Connection, table: str) -> _Layout | None:
    """Return how a table is laid out; None where the file does not say."""
    found = driver.execute('SELECT name, type, "notnull", pk FROM pragma_table_info(?)', (table,)).fetchall()
    made = driver.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    if not found or made is None:
        return None
    has_rowid = "WITHOUT ROWID" not in made[0].upper()
    columns = tuple(
        (name, _kind(declared.upper()), bool(needed), has_rowid and pk == 1 and declared.upper() == "INTEGER")
        for name, declared, needed, pk in found
    )
    return _Layout(table, columns, has_rowid)


def _kind(declared: str) -> str:
    if "INT" in declared:
        return "int"
    if declared.startswith("DATE"):
        return "instant"
    return "text" if "CHAR" in declared or "TEXT" in declared else "float"


def _save(copy: Path, fresh: Path, progress: Progress | None) -> list[RecoveredTable]:
    """Fill a new file; return what was saved of each table."""
    with closing(sqlite3.connect(copy, isolation_level=None)) as source:
        source.text_factory = lambda data: data.decode("utf-8", "replace")
        for pragma in ("writable_schema=ON", "cell_size_check=ON", "wal_checkpoint(TRUNCATE)"):
            with suppress(sqlite3.DatabaseError):
                source.execute(f"PRAGMA {pragma}").fetchall()
        engine = open_engine(f"sqlite:///{fresh}")
        try:
            migrations.upgrade(engine, head=_version(source))
        finally:
            engine.dispose()
        with closing(sqlite3.connect(fresh, isolation_level=None)) as driver:
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "foreign_keys=OFF"):
                driver.execute(f"PRAGMA {pragma}")
            driver.execute("BEGIN")
            saver = _Saver(driver, progress)
            for table in kept_tables():
                saver.save_by_tree(source, str(table.name))
            source.close()  # with its log taken in, the copy is all there is
            saver.save_by_pages(copy)
            driver.execute("COMMIT")
            return list(saver.tables.values())


def _version(source: sqlite3.Connection) -> str:
    with suppress(sqlite3.DatabaseError):
        row = source.execute("SELECT version_num FROM alembic_version").fetchone()
        if row is not None and row[0] in migrations.known_versions():
            return str(row[0])
    return HEAD


class _Saver:
    """Puts rows into the new file, the first of each id."""

    def __init__(self, driver: sqlite3.Connection, progress: Progress | None) -> None:
        self._driver = driver
        self._progress = progress
        self.tables: dict[str, RecoveredTable] = {}
        self._layouts: dict[str, _Layout] = {}  # of the damaged file, as far as it says
        self._own: dict[str, list[str]] = {}  # columns of the new file

    def save_by_tree(self, source: sqlite3.Connection, name: str) -> None:
        """Take what SQLite itself can read."""
        own = _layout(self._driver, name)
        if own is None:  # a table that the database's version did not have
            return
        self._own[name] = own.names
        report = self.tables[name] = RecoveredTable(name)
        try:
            layout = _layout(source, name)
        except sqlite3.DatabaseError:
            layout = None
        self._layouts[name] = layout or own
        if layout is None:
            report.note("the list of tables")
            return
        insert = self._inserting(layout)
        read = _rows_by_id if layout.has_rowid else _rows_by_key
        for values in read(source, layout, report):
            if layout.fits(values):
                insert(values)
            else:
                report.note(f"a row that is none of this table ({values[0]!r})")
        self._tell(report, always=True)

    def save_by_pages(self, copy: Path) -> None:
        """Take from the pages what is missing of tables that could not be read as a whole."""
        missing = [self._layouts[t.name] for t in self.tables.values() if t.unread]
        wanted = [layout for layout in missing if layout.has_rowid]
        if not wanted:
            return
        inserting = {layout.name: self._inserting(layout, from_pages=True) for layout in wanted}
        with open_pages(copy) as pages:
            for rowid, values in pages.rows():
                fitting = [layout for layout in wanted if layout.fits(values)]
                if len(fitting) == 1:
                    layout = fitting[0]
                    place = layout.names.index(layout.rowid)
                    inserting[layout.name]([*values[:place], rowid, *values[place + 1 :]])

    def _inserting(self, layout: _Layout, *, from_pages: bool = False) -> Callable[[Sequence[Any]], None]:
        """Return what inserts a row of the damaged file's layout; lanes come without the leases in it."""
        report = self.tables[layout.name]
        columns = kept_columns(layout.name, [n for n in layout.names if n in self._own[layout.name]])
        places = [layout.names.index(name) for name in columns]
        names = ", ".join(f'"{name}"' for name in columns)
        values_sql = ", ".join("?" * len(columns))
        statement = f'INSERT OR IGNORE INTO "{layout.name}" ({names}) VALUES ({values_sql})'

        def insert(values: Sequence[Any]) -> None:
            added = self._driver.execute(statement, [values[place] for place in places]).rowcount
            report.saved += added
            report.from_pages += added if from_pages else 0
            self._tell(report)

        return insert

    def _tell(self, report: RecoveredTable, *, always: bool = False) -> None:
        if self._progress is not None and (always or report.saved % _TOLD_EVERY == 0):
            self._progress(report.name, report.saved, None)


def _rows_by_key(
    source: sqlite3.Connection, layout: _Layout, report: RecoveredTable
) -> Iterator[Sequence[Any]]:
    """Yield the rows of a table without rowids, from both ends as far as they can be read."""
    keys = [
        row[0]
        for row in source.execute(
            "SELECT name FROM pragma_table_info(?) WHERE pk > 0 ORDER BY pk", (layout.name,)
        )
    ]
    columns = ", ".join(f'"{name}"' for name in layout.names)
    for direction in ("ASC", "DESC"):
        order = ", ".join(f'"{key}" {direction}' for key in keys)
        try:
            yield from source.execute(f'SELECT {columns} FROM "{layout.name}" NOT INDEXED ORDER BY {order}')
        except sqlite3.DatabaseError as error:
            if direction == "ASC":
                report.note(f"a part of it ({error})")
        else:
            return


def _rows_by_id(
    source: sqlite3.Connection, layout: _Layout, report: RecoveredTable
) -> Iterator[Sequence[Any]]:
    """Yield the rows in the order of their ids, past what cannot be read."""
    columns = ", ".join(f'"{name}"' for name in layout.names)
    place = layout.names.index(layout.rowid)
    select = f'SELECT {columns} FROM "{layout.name}" NOT INDEXED WHERE "{layout.rowid}"'
    last, read_any = 0, True
    while True:
        try:
            for row in source.execute(f'{select} > ? ORDER BY "{layout.rowid}"', (last,)):
                last, read_any = row[place], True
                yield row
        except sqlite3.DatabaseError:
            found = _next_readable(source, layout, last)
        else:
            return
        if found is None:
            report.note(f"what follows id {last}")
            return
        if found > last + 1:
            report.note(f"ids {last + 1} to {found - 1}")
        elif not read_any:
            # The driver reads one row ahead, so the last row before a gap comes only when asked for by itself.
            try:
                yield from source.execute(f"{select} = ?", (found,)).fetchall()
            except sqlite3.DatabaseError:
                report.note(f"id {found}")
            found += 1
        last, read_any = found - 1, False


def _next_readable(source: sqlite3.Connection, layout: _Layout, last: int) -> int | None:
    """Return the first id after ``last`` that the tree leads to, or None; found by leaps, then by halving."""
    statement = (
        f'SELECT "{layout.rowid}" FROM "{layout.name}" NOT INDEXED '
        f'WHERE "{layout.rowid}" >= ? ORDER BY "{layout.rowid}" LIMIT 1'
    )

    def at(wanted: int) -> tuple[bool, int | None]:
        try:
            row = source.execute(statement, (wanted,)).fetchone()
        except sqlite3.DatabaseError:
            return False, None
        return True, None if row is None else row[0]

    leap = 1
    while leap < _FARTHEST:
        works, found = at(last + leap)
        if works:
            low, high = last + leap // 2, last + leap  # low does not work, unless leap is 1
            while high - low > 1:
                middle = (low + high) // 2
                works, nearer = at(middle)
                if works:
                    high, found = middle, nearer
                else:
                    low = middle
            return found
        leap *= 2
    return None
