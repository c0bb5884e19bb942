"""The file of a backup: gzip around lines of JSON, the same for every kind of database.

::

    {"format": "feishu-bot backup", "version": 1, "schema": "0001", "kind": "sqlite", "program": …, "created_at": …}
    {"table": "conversations", "columns": ["id", …], "next_id": 8}
    [1, …]
    …
    {"end": {"conversations": {"rows": 7, "sha256": …}, …}, "sha256": …}

Instants are texts in UTC, ``2025-06-18 12:00:00.000000``. The last line's ``sha256`` is that of all lines before it,
so that ``zcat FILE | head -n -1 | sha256sum`` proves a file without this program. Nothing is held in memory but
about a megabyte of rows.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, Self

import orjson

from feishu_bot.errors import BackupDamaged, RestoreRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    Progress = Callable[[str, int, int | None], None]  # what is done, how far it is, how far it goes

FORMAT = "feishu-bot backup"
VERSION = 1
_LEVEL = 1  # gzip's quickest: a third larger than its best, in a sixth of the time
_CHUNK = 1 << 18  # bytes handed to gzip at once
_BATCH = 1 << 19  # bytes of rows handed to a database at once


@dataclass(frozen=True, slots=True)
class Header:
    """What a backup is of. ``schema`` is the migration its tables were at."""

    schema: str
    kind: str
    program: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class TableHeader:
    """One table of a backup. ``next_id``: a database that makes ids goes on with this one."""

    name: str
    columns: tuple[str, ...]
    next_id: int | None = None


@dataclass(frozen=True, slots=True)
class TableEnd:
    """What a table held: the number of its rows and the SHA-256 of their lines."""

    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds, known when it has been written or read to its end."""

    header: Header
    tables: dict[str, TableEnd]

    @property
    def rows(self) -> int:
        """The rows of all tables."""
        return sum(table.rows for table in self.tables.values())


class ArchiveWriter:
    """Writes a backup. Only after ``close`` it is whole, and on the disk."""

    def __init__(self, path: Path, header: Header) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it holds what people said
        self._raw = os.fdopen(descriptor, "wb")
        self._file = gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", compresslevel=_LEVEL, mtime=0)
        self._digest = hashlib.sha256()
        self._header = header
        self._ends: dict[str, TableEnd] = {}
        created_at = header.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._write(
            _line(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "schema": header.schema,
                    "kind": header.kind,
                    "program": header.program,
                    "created_at": created_at,
                }
            )
        )

    def table(
        self,
        table: TableHeader,
        rows: Iterable[Sequence[Any]],
        progress: Progress | None = None,
    ) -> None:
        """Write a table. Raises BackupDamaged for a row that holds what no table of ours holds."""
        self._write(_line({"table": table.name, "columns": table.columns, "next_id": table.next_id}))
        digest, count = hashlib.sha256(), 0
        for chunk, number in _chunks(table.name, rows):
            digest.update(chunk)
            self._write(chunk)
            count += number
            if progress is not None:
                progress(table.name, count, None)
        self._ends[table.name] = TableEnd(count, digest.hexdigest())

    def close(self) -> Manifest:
        """Write the last line and wait for the disk."""
        ends = {name: {"rows": end.rows, "sha256": end.sha256} for name, end in self._ends.items()}
        self._file.write(_line({"end": ends, "sha256": self._digest.hexdigest()}))
        self._file.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()
        return Manifest(self._header, self._ends)

    def abandon(self) -> None:
        """Close the unfinished file without caring for what is in it."""
        self._raw.close()

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


def _line(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _chunks(table: str, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[bytes, int]]:
    """Yield rows as lines, some hundred kilobytes at a time, and their number."""
    lines: list[bytes] = []
    size = 0
    dumps, option = orjson.dumps, orjson.OPT_APPEND_NEWLINE
    for row in rows:
        try:
            line = dumps(row, option=option)
        except TypeError as error:
            raise BackupDamaged(
                f"a row of {table} cannot be written (first column {row[0]!r}): {error}"
            ) from error
        lines.append(line)
        size += len(line)
        if size >= _CHUNK:
            yield b"".join(lines), len(lines)
            lines.clear()
            size = 0
    if lines:
        yield b"".join(lines), len(lines)


def digest_rows(table: str, rows: Iterable[Sequence[Any]]) -> TableEnd:
    """Return what a backup of these rows would say at its end."""
    digest, count = hashlib.sha256(), 0
    for chunk, number in _chunks(table, rows):
        digest.update(chunk)
        count += number
    return TableEnd(count, digest.hexdigest())


# ---------------------------------------------------------------------------------------------------- reading


class ArchiveReader:
    """Reads a backup once, from its beginning; what it reads is checked against the file's last line.

    After the last table ``manifest`` is set; before that nothing of the file is proved.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self._path = path
        self._progress = progress
        self._size = path.stat().st_size
        self._raw: IO[bytes] = path.open("rb")
        self._lines = iter(gzip.GzipFile(fileobj=self._raw, mode="rb"))
        self._digest = hashlib.sha256()
        self._line: bytes = b""
        self._ends: dict[str, TableEnd] = {}
        self.manifest: Manifest | None = None
        try:
            with self._naming_damage():
                self.header = self._read_header()
        except BaseException:
            self._raw.close()
            raise

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tables(self) -> Iterator[tuple[TableHeader, Iterator[list[list[Any]]]]]:
        """Yield each table with its rows in batches, to be used up before the next table is asked for.

        Raises BackupDamaged where the file is not as it was written, at the latest at the end of the table.
        """
        with self._naming_damage():
            self._next()
            while not self._line.startswith(b'{"end"'):
                found = orjson.loads(self._line)
                table = TableHeader(found["table"], tuple(found["columns"]), found["next_id"])
                yield table, self._batches(table, parse=True)
            self._read_end()

    def verify(self) -> Manifest:
        """Read the file to its end. Raises BackupDamaged."""
        with self._naming_damage():
            self._next()
            while not self._line.startswith(b'{"end"'):
                found = orjson.loads(self._line)
                table = TableHeader(found["table"], tuple(found["columns"]), found["next_id"])
                for _ in self._batches(table, parse=False):
                    pass
            self._read_end()
        if self.manifest is None:
            raise self._damage("its last line is missing")
        return self.manifest

    # -------------------------------------------------------------------------------------------- inside

    def _read_header(self) -> Header:
        self._next()
        found = orjson.loads(self._line)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise BackupDamaged(f"{self._path.name} is no backup of this program")
        if found["version"] > VERSION:
            raise RestoreRefused(
                f"{self._path.name} was written by a newer program (format {found['version']}, "
                f"this one reads {VERSION})"
            )
        created_at = datetime.strptime(found["created_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        return Header(found["schema"], found["kind"], found["program"], created_at)

    def _next(self) -> None:
        """Read one more line of the part that the last line's checksum is of."""
        line = next(self._lines, b"")
        if not line.endswith(b"\n"):
            raise self._damage("it is cut off")
        self._line = line
        if not line.startswith(b'{"end"'):
            self._digest.update(line)

    def _batches(self, table: TableHeader, *, parse: bool) -> Iterator[list[list[Any]]]:
        digest, count, size = hashlib.sha256(), 0, 0
        batch: list[list[Any]] = []
        loads, width = orjson.loads, len(table.columns)
        with self._naming_damage():
            self._next()
            while self._line.startswith(b"["):
                digest.update(self._line)
                count += 1
                size += len(self._line)
                if parse:
                    row = loads(self._line)
                    if len(row) != width:
                        raise self._damage(
                            f"row {count} of {table.name} has {len(row)} columns instead of {width}"
                        )
                    batch.append(row)
                if size >= _BATCH:
                    yield batch
                    batch, size = [], 0
                    self._tell(table.name)
                self._next()
        if batch:
            yield batch
        self._tell(table.name)
        self._ends[table.name] = TableEnd(count, digest.hexdigest())

    def _read_end(self) -> None:
        end = orjson.loads(self._line)
        told = {name: TableEnd(table["rows"], table["sha256"]) for name, table in end["end"].items()}
        for name in sorted(told.keys() | self._ends.keys()):
            if told.get(name) != self._ends.get(name):
                raise self._damage(f"the rows of {name} are not those that were written")
        if end["sha256"] != self._digest.hexdigest():
            raise self._damage("its checksum is wrong")
        if next(self._lines, b""):
            raise self._damage("something follows its last line")
        self.manifest = Manifest(self.header, self._ends)

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._raw.tell(), self._size)

    def _damage(self, how: str) -> BackupDamaged:
        return BackupDamaged(f"{self._path.name} is damaged: {how}")

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except EOFError:
            raise self._damage("it is cut off") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self._damage(f"it cannot be unpacked ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON that we did not write
            raise self._damage("it has a line that cannot be read") from error


def verify(path: Path, progress: Progress | None = None) -> Manifest:
    """Read a backup to its end and return what it holds.

    Raises BackupDamaged, RestoreRefused for a newer format, OSError where there is no such file.
    """
    with ArchiveReader(path, progress) as reader:
        return reader.verify()
