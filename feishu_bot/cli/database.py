"""``backup``, ``restore`` and ``db``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from feishu_bot import __version__
from feishu_bot.cli.shared import config_option, json_option, open_settings, progress
from feishu_bot.errors import BotError

if TYPE_CHECKING:
    from feishu_bot.store.inspection import Finding
    from feishu_bot.store.recovery import Recovered


def _print_json(value: Any) -> None:
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())


def _size(count: int | None) -> str:
    """Return a number of bytes for people."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:  # noqa: PLR2004  # the next unit
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@click.command()
@config_option
@click.option("--to", "folder", type=click.Path(file_okay=False), help="Default: schedule.backup.directory.")
@click.option(
    "--try", "trial", is_flag=True, help="Also restore it into a scratch database and compare all rows."
)
@click.option(
    "--keep", type=click.IntRange(1), help="Then remove all but the newest N. Default: remove none."
)
@json_option
def backup(
    config_file: str | None, folder: str | None, keep: int | None, *, trial: bool, as_json: bool
) -> None:
    """Back the database up into one compressed file, beside a running server or without one.

    The file is read back before it gets its name.
    """
    from feishu_bot.store import backup as making  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    with open_settings(config_file) as settings, progress() as show:
        target = Path(folder or settings.schedule.backup.directory)
        db_url = settings.ai.conversation_persistence.db_url
        now = datetime.now(UTC)
        made, manifest = making.backup(
            db_url, target, now=now, program=__version__, trial=trial, progress=show
        )
        removed = [] if keep is None else making.rotate(target, keep)
    if as_json:
        rows = {name: table.rows for name, table in manifest.tables.items()}
        _print_json(
            {"path": made.path, "bytes": made.size, "rows": rows, "removed": [str(p) for p in removed]}
        )
        return
    proved = "read back and tried out" if trial else "read back"
    click.echo(f"wrote {made.path}: {manifest.rows} rows, {_size(made.size)}, {proved}")
    if removed:
        click.echo(f"removed: {len(removed)}")


@click.command()
@config_option
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace what the database holds.")
def restore(config_file: str | None, file: str, *, force: bool) -> None:
    """Put a backup into the configured database, of whatever kind: all of it, or nothing changes.

    The server has to be stopped.
    """
    from feishu_bot.store import restore as restoring  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings, progress() as show:
        db_url = settings.ai.conversation_persistence.db_url
        done = restoring.restore(Path(file), db_url, now=datetime.now(UTC), force=force, progress=show)
    header, tables = done.manifest.header, done.manifest.tables
    click.echo(
        f"restored {tables['conversations'].rows} conversations and {tables['messages'].rows} messages "
        f"of {header.created_at:%Y-%m-%d %H:%M:%S} UTC (from {header.kind})"
    )
    if done.waiting or done.unsent:
        click.echo(
            f"{done.waiting} messages were waiting for an answer then and {done.unsent} replies to be sent; "
            "the next start takes them up"
        )
    if done.kept is not None:
        click.echo(f"what was there before is kept in {done.kept}")


@click.group()
def db() -> None:
    """Look after the database: upgrade, stats, vacuum, check, recover."""


@db.command()
@config_option
def upgrade(config_file: str | None) -> None:
    """Make the tables, or bring them to this program's version."""
    from feishu_bot.store import migrations  # noqa: PLC0415  # as above
    from feishu_bot.store.schema import HEAD  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings:
        done = migrations.upgrade(
            settings.ai.conversation_persistence.db_url,
            step=lambda version: click.echo(f"reached {version}", err=True),
        )
    click.echo(f"the schema was {HEAD} already" if done == "current" else f"{done}: schema {HEAD}")


@db.command()
@config_option
@json_option
def stats(config_file: str | None, *, as_json: bool) -> None:
    """Print rows and bytes of each table."""
    from feishu_bot.store import inspection  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings:
        found = inspection.sizes(settings.ai.conversation_persistence.db_url)
    if as_json:
        _print_json(asdict(found))
        return
    for table in sorted(found.tables, key=lambda table: table.rows, reverse=True):
        click.echo(f"{table.name:<16} {table.rows:>12,} rows {_size(table.size):>10}")
    click.echo(f"{found.kind}, schema {found.schema}, {_size(found.size)}")
    if found.free is not None:
        click.echo(f"free within it: {_size(found.free)}")
    if found.log is not None:
        click.echo(f"write-ahead log: {_size(found.log)}")


@db.command()
@config_option
def vacuum(config_file: str | None) -> None:
    """Give the space of removed rows back. On SQLite and MariaDB a running server waits meanwhile."""
    from feishu_bot.store import inspection  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings, progress() as show:
        told = None if show is None else (lambda step: show(step, 0, 0))
        before, after = inspection.vacuum(settings.ai.conversation_persistence.db_url, told)
    click.echo(f"{_size(before)} before, {_size(after)} now")


@db.command()
@config_option
@json_option
def check(config_file: str | None, *, as_json: bool) -> None:
    """Compare everything that can be computed twice; exit 1 if anything is wrong."""
    from feishu_bot.store import inspection  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings:
        told = None if as_json else _print_finding
        found = inspection.check(settings.ai.conversation_persistence.db_url, told)
    if as_json:
        _print_json([{"check": finding.name, "wrong": finding.wrong or None} for finding in found])
    wrong = [finding.name for finding in found if finding.wrong]
    if wrong:
        raise BotError(f"wrong: {', '.join(wrong)}")


def _print_finding(finding: Finding) -> None:
    click.echo(f"{finding.name:<14} {finding.wrong or 'right'}")


@db.command()
@config_option
@click.option("--to", "target", required=True, type=click.Path(dir_okay=False), help="A new SQLite file.")
@json_option
def recover(config_file: str | None, target: str, *, as_json: bool) -> None:
    """Save what can be read of a damaged SQLite file into a new one; the damaged file is not touched."""
    from feishu_bot.store import recovery  # noqa: PLC0415  # as above
    from feishu_bot.store.engine import open_engine  # noqa: PLC0415  # as above
    from feishu_bot.store.snapshot import sqlite_path  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings, progress() as show:
        damaged = sqlite_path(open_engine(settings.ai.conversation_persistence.db_url))
        if damaged is None:
            raise BotError("only a SQLite file can be recovered; database servers have tools of their own")
        done = recovery.recover(damaged, Path(target), now=datetime.now(UTC), progress=show)
    if as_json:
        _print_json(asdict(done))
    else:
        _print_recovered(done, target)


def _print_recovered(done: Recovered, target: str) -> None:
    for table in done.tables:
        from_pages = f", {table.from_pages} of them from the pages alone" if table.from_pages else ""
        click.echo(f"{table.name:<16} {table.saved:>10,} rows saved{from_pages}")
        for unread in table.unread:
            click.echo(f"{'':<16} not read: {unread}")
    if done.unread_bytes:
        click.echo(f"the disk did not give {_size(done.unread_bytes)}")
    if done.stand_ins:
        click.echo(f"{done.stand_ins} conversations were made for messages whose own was lost")
    for finding in done.findings:
        if finding.wrong:
            _print_finding(finding)
    click.echo(f"wrote {target}; put it into the place of the damaged file while the server is stopped")
