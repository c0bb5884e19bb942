"""``search``, ``export``, ``import``, ``forget`` and ``usage``."""

from __future__ import annotations

import csv
import io
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

from feishu_bot.cli.shared import config_option, json_option, open_settings, progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from zoneinfo import ZoneInfo

    from feishu_bot.config.settings import BotSettings
    from feishu_bot.store.erasure import Receipt
    from feishu_bot.store.transactions import Transactions

FORMATS: Final = ("json", "jsonl", "csv", "md")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_user_option = click.option("--user", metavar="U", help="Only this person or user key.")


@contextmanager
def _open_database(
    config_file: str | None, *, make: bool = False
) -> Iterator[tuple[Transactions, BotSettings]]:
    """Open the configured database beside a running server, or without one; ``make``: also where there is none.

    Else a wrong path would be an empty database, in which there is nobody to forget.
    """
    from feishu_bot.store import migrations  # noqa: PLC0415  # SQLAlchemy takes longer than --help
    from feishu_bot.store.engine import normalise_url  # noqa: PLC0415  # as above
    from feishu_bot.store.snapshot import check_exists  # noqa: PLC0415  # as above
    from feishu_bot.store.transactions import Transactions  # noqa: PLC0415  # as above

    with open_settings(config_file) as settings:
        persistence = settings.ai.conversation_persistence
        if not make:
            check_exists(normalise_url(persistence.db_url))
        database = Transactions(persistence.db_url)
        try:
            if persistence.auto_migrate:
                database.prepare()
            else:
                migrations.check(database.engine)
            yield database, settings
        finally:
            database.close()


def _instant(value: str | None, zone: ZoneInfo, option: str, *, end: bool = False) -> datetime | None:
    """Return a date or ISO time of ``zone``; ``end``: of a date, the end of that day."""
    if value is None:
        return None
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
            day = date.fromisoformat(value) + timedelta(days=end)
            return datetime.combine(day, time(), zone).astimezone(UTC)
        instant = datetime.fromisoformat(value)
        return (instant.replace(tzinfo=zone) if instant.tzinfo is None else instant).astimezone(UTC)
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"{option}: {value!r} is no date like 2025-01-31 and no time like 2025-01-31T18:00"
        ) from None


def _print_json(value: Any) -> None:
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _plain(text: object) -> str:
    """Return text on one line that changes nothing about the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def _print_table(rows: Sequence[Sequence[object]], *, right: frozenset[int]) -> None:
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    for row in cells:
        parts = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(parts).rstrip())


# --------------------------------------------------------------------------------------------------- search


@click.command()
@config_option
@click.argument("text")
@_user_option
@click.option("--platform", metavar="P", help="Only this account.")
@click.option("--since", metavar="D", help="From this date or ISO time, in schedule.timezone.")
@click.option("--until", metavar="D", help="Up to the end of this date, or before this time.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def search(
    *,
    config_file: str | None,
    text: str,
    user: str | None,
    platform: str | None,
    since: str | None,
    until: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Find messages in which every word of TEXT occurs, newest first.

    A word is found from its beginning, Chinese anywhere; "a phrase" in quotation marks word for word.
    """
    if not text.strip():
        raise click.UsageError("TEXT is empty")
    from feishu_bot.store.search import search_messages  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    with _open_database(config_file) as (database, settings):
        zone = settings.schedule.zone
        first, last = _instant(since, zone, "--since"), _instant(until, zone, "--until", end=True)
        hits = database.read(
            lambda tx: search_messages(
                tx.connection,
                tx.kind,
                text,
                person=user,
                platform=platform,
                since=first,
                until=last,
                limit=limit,
            )
        )
    if as_json:
        _print_json(hits)
        return
    for hit in hits:
        at = datetime.fromisoformat(hit["timestamp"]).astimezone(zone)
        click.echo(
            f"{at:%Y-%m-%d %H:%M:%S}  #{hit['conversation_id']}  {_plain(hit['user_key'])}  {hit['role']}\n"
            f"    {_plain(hit['snippet'])}"
        )
    if not hits:
        click.echo("nothing found", err=True)


# ----------------------------------------------------------------------------------------- export and import


@click.command()
@config_option
@_user_option
@click.option(
    "--format", "kind", type=click.Choice(FORMATS), help="Default: what --out ends with, else json."
)
@click.option(
    "--out", metavar="FILE|DIR/", help="Default: stdout. A directory gets one file per conversation."
)
def export(config_file: str | None, user: str | None, kind: str | None, out: str | None) -> None:
    """Write conversations as JSON, JSONL, CSV or Markdown.

    Of a person: his conversations, and what he said in those of others.
    """
    from feishu_bot.store import transfer  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    suffix = Path(out or "").suffix.lower().removeprefix(".")
    chosen = kind or (suffix if suffix in FORMATS else "json")
    with progress() as show, _open_database(config_file) as (database, _):

        def told(done: int, total: int) -> None:
            if show is not None:
                show("messages", done, total)

        if out is None:
            file = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
            try:
                transfer.write_all(database, file, chosen, user=user, progress=told)
                file.flush()
            finally:
                file.detach()
            return
        done = transfer.export_all(database, out, chosen, user=user, progress=told)
    where = f"{done.files} file(s) in {out}" if done.files != 1 or Path(out).is_dir() else out
    click.echo(f"wrote {done.conversations} conversation(s) with {done.messages} message(s) to {where}")


@click.command("import")
@config_option
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@json_option
def import_(config_file: str | None, file: Path, *, as_json: bool) -> None:
    """Store the conversations of a JSON, JSONL or CSV file, or of a directory of them.

    A conversation that is there already is left as it is, so an import can be repeated. A damaged file is refused
    with the line; a conversation is stored as a whole or not at all.
    """
    from feishu_bot.store import transfer  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    with progress() as show, _open_database(config_file, make=True) as (database, _):

        def told(done: int, total: int) -> None:
            if show is not None:
                show("of the file", done, total)

        done = transfer.import_all(database, file, progress=told)
    if as_json:
        _print_json(asdict(done))
        return
    known = f"; {done.known} known already" if done.known else ""
    click.echo(f"imported {done.conversations} conversation(s) with {done.messages} message(s){known}")


# --------------------------------------------------------------------------------------------------- forget


@click.command()
@config_option
@click.argument("user", metavar="U")
@click.option("--dry-run", is_flag=True, help="Only say what would be erased.")
@json_option
def forget(config_file: str | None, user: str, *, dry_run: bool, as_json: bool) -> None:
    """Erase the person U (or the person of the user key U) everywhere, and print the receipt.

    Messages wherever they were written, conversations, search index, summaries and queues; the ledger keeps its
    sums and no name. There is no way back but a backup.
    """
    from feishu_bot.store import erasure  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    if not user.strip():
        raise click.UsageError("U is empty")
    with progress() as show, _open_database(config_file) as (database, _):

        def told(field: str, done: int) -> None:
            if show is not None:
                show(field.replace("_", " "), done)

        receipt = erasure.forget(database, user, dry_run=dry_run, progress=told)
    if as_json:
        _print_json(receipt.to_dict())
    else:
        _print_receipt(receipt)


def _print_receipt(receipt: Receipt) -> None:
    would = "would be erased" if receipt.dry_run else "erased"
    click.echo(f"{_plain(receipt.person)}: {would} at {receipt.at}")
    cost = "" if receipt.usage_cost_usd is None else f", {receipt.usage_cost_usd:.4f} USD"
    _print_table(
        [
            ("conversations", receipt.conversations, f"with {receipt.messages} message(s)"),
            ("messages", receipt.messages_elsewhere, "in conversations of others"),
            ("summaries", receipt.summaries, "of conversations of others"),
            ("inbox", receipt.inbox, "event(s) received"),
            ("outbox", receipt.outbox, "part(s) of answers"),
            ("budgets", receipt.budget_windows, "window(s)"),
            ("lanes", receipt.lanes, ""),
            (
                "ledger",
                receipt.usage_rows,
                f"row(s) without a name; kept: {receipt.usage_tokens} token(s){cost}",
            ),
        ],
        right=frozenset({1}),
    )
    if not receipt.dry_run:
        click.echo("Backups and exports made before still hold what they held then.")


# ---------------------------------------------------------------------------------------------------- usage


@click.command()
@config_option
@click.option(
    "--by",
    type=click.Choice(("user", "chat", "platform", "model", "day")),
    help="Default: the sum only. Days are those of schedule.timezone.",
)
@click.option("--since", metavar="D", help="From this date or ISO time, in schedule.timezone.")
@click.option("--until", metavar="D", help="To before this date or ISO time.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: the rows without a sum, costs exact.")
@json_option
def usage(
    config_file: str | None,
    by: str | None,
    since: str | None,
    until: str | None,
    *,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Print what model calls have used: tokens and cost, from the ledger."""
    from feishu_bot.store import ledger  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    if as_csv and as_json:
        raise click.UsageError("--csv and --json: choose one")
    with _open_database(config_file) as (database, settings):
        zone = settings.schedule.zone
        first, last = _instant(since, zone, "--since"), _instant(until, zone, "--until")
        total = database.read(lambda tx: ledger.usage_total(tx, since=first, until=last))
        rows: list[dict[str, Any]] = []
        if by is not None:
            rows = database.read(
                lambda tx: ledger.usage_by(tx, by, zone, since=first, until=last, limit=100_000)
            )
    if as_csv:
        _print_csv(by, rows if by is not None else [total])
        return
    if as_json:
        _print_json({"by": by, "rows": rows, "total": total})
        return
    titles = (by or "", "calls", "input", "output", "tokens", "cost USD")
    nobody = "(forgotten)" if by == "user" else "(none)"
    lines = [_usage_line(nobody if row[by or ""] is None else row[by or ""], row) for row in rows]
    _print_table([titles, *lines, _usage_line("total", total)], right=frozenset(range(1, 6)))


def _print_csv(by: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = (
        *("calls", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "total_tokens"),
        "cost_usd",
    )
    from feishu_bot.store.formats import to_cell  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow((by, *columns) if by is not None else columns)
    for row in rows:
        name = () if by is None else (to_cell(row[by]),)
        cost = "" if row["cost_usd"] is None else f"{row['cost_usd']:.6f}"
        writer.writerow((*name, *(row[column] for column in columns[:-1]), cost))
    click.echo(file.getvalue(), nl=False)


def _usage_line(name: object, sums: Mapping[str, Any]) -> tuple[object, ...]:
    cost = sums["cost_usd"]
    return (
        name,
        sums["calls"],
        sums["input_tokens"],
        sums["output_tokens"],
        sums["total_tokens"],
        "-" if cost is None else f"{cost:.4f}",
    )
