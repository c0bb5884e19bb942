"""Backups of any database into a folder: written, read back, tried out, and the oldest removed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from feishu_bot.errors import BackupDamaged, RestoreRefused
from feishu_bot.store.archive import ArchiveReader, ArchiveWriter, Header, Manifest, digest_rows, verify
from feishu_bot.store.loader import build_sqlite, remove_sqlite, sync_folder
from feishu_bot.store.snapshot import file_snapshot, open_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from feishu_bot.store.archive import Progress, TableHeader

_NAME = re.compile(r"feishu-bot-(\d{8}T\d{6}Z)(?:-(\d+))?\.jsonl\.gz", re.ASCII)
_TIME = "%Y%m%dT%H%M%SZ"
_PARTIAL = re.compile(r"\..+\.partial(-wal|-shm|-journal)?")
_ABANDONED_S = 24 * 3600  # an unfinished file that nobody has written to for so long


@dataclass(frozen=True, slots=True)
class Backup:
    """A file that was read back after it was written, and therefore has its name."""

    path: Path
    created_at: datetime
    size: int  # bytes


def backup(
    db_url: str,
    folder: Path,
    *,
    now: datetime,
    program: str,
    trial: bool = False,
    progress: Progress | None = None,
) -> tuple[Backup, Manifest]:
    """Write what a database holds now into a new file of ``folder``, while others go on writing.

    Only a file that was read back gets its name, with ``trial`` only one that was also restored into a scratch
    database in which every row is as it was. Raises StoreUnavailable, SchemaMismatch, BackupDamaged, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder, now)
    path = _free_name(folder, now)
    partial = folder / f".{path.name}.partial"
    try:
        manifest = _write(db_url, partial, now=now, program=program, progress=progress)
        found = verify(partial, _named("verifying", progress))
        if found != manifest:
            raise BackupDamaged("what was read back is not what was written")
        if trial:
            try_out(partial, _named("trying", progress))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(folder)
    return Backup(path, now, path.stat().st_size), manifest


def _write(db_url: str, path: Path, *, now: datetime, program: str, progress: Progress | None) -> Manifest:
    with open_snapshot(db_url, path.parent, progress) as snapshot:
        header = Header(snapshot.schema, snapshot.kind, program, now.astimezone(UTC).replace(microsecond=0))
        writer = ArchiveWriter(path, header)
        try:
            for table, columns in snapshot.tables:
                writer.table(snapshot.header(table, columns), snapshot.rows(table, columns), progress)
            return writer.close()
        finally:
            writer.abandon()


def _named(what: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda _table, done, total: progress(what, done, total)


def _free_name(folder: Path, now: datetime) -> Path:
    stem = f"feishu-bot-{now.astimezone(UTC):{_TIME}}"
    path, number = folder / f"{stem}.jsonl.gz", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.jsonl.gz"
    return path


def _remove_abandoned(folder: Path, now: datetime) -> None:
    """Remove what a backup or restore that was cut off has left."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name) and path.stat().st_mtime < now.timestamp() - _ABANDONED_S:
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- a trial of it


def try_out(path: Path, progress: Progress | None = None) -> Manifest:
    """Restore a backup into a scratch SQLite file beside it, prove that file sound and compare all rows.

    Raises BackupDamaged with what is wrong, StoreUnavailable or OSError where there was no place to try it.
    """
    scratch = path.with_name(f".{path.name}.trial.partial")
    tables: list[TableHeader] = []
    try:
        with ArchiveReader(path, progress) as reader:

            def source() -> Iterator[tuple[TableHeader, Iterator[Sequence[Sequence[Any]]]]]:
                for table, batches in reader.tables():
                    tables.append(table)
                    yield table, batches

            build_sqlite(scratch, source, schema=reader.header.schema)
            manifest = reader.manifest
        if manifest is None:
            raise BackupDamaged(f"{path.name} is damaged: its last line is missing")
        with file_snapshot(scratch) as snapshot:
            known = {table.name: table for table, _columns in snapshot.tables}
            for header in tables:
                found = digest_rows(header.name, snapshot.rows(known[header.name], header.columns))
                if found != manifest.tables[header.name]:
                    raise BackupDamaged(
                        f"of {manifest.tables[header.name].rows} rows of {header.name} "
                        f"{found.rows} were restored, not all as they were"
                    )
    finally:
        remove_sqlite(scratch)
    return manifest


# --------------------------------------------------------------------------------------------- what there is


def list_backups(folder: Path) -> list[Backup]:
    """Return the backups in a folder, the newest first; cheap, nothing is read but names and sizes."""
    found: list[tuple[str, int, Backup]] = []
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                created_at = datetime.strptime(match[1], _TIME).replace(tzinfo=UTC)
                backup_there = Backup(path, created_at, path.stat().st_size)
                found.append((match[1], int(match[2] or 1), backup_there))
    return [entry[2] for entry in sorted(found, key=lambda entry: entry[:2], reverse=True)]


def last_good_backup(folder: Path) -> Backup | None:
    """Return the newest backup; cheap. That it has its name says that it was good when it was written."""
    return next(iter(list_backups(folder)), None)


def newest_readable(folder: Path) -> Backup | None:
    """Return the newest backup that is still as it was written; reads it to its end."""
    for found in list_backups(folder):
        try:
            verify(found.path)
        except (BackupDamaged, RestoreRefused, OSError):
            continue
        return found
    return None


def rotate(folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` backups, at least one; return what was removed."""
    old = [found.path for found in list_backups(folder)[max(keep, 1) :]]
    for path in old:
        path.unlink(missing_ok=True)
    return old
