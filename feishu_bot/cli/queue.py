"""``cleanup`` and ``dead``."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import orjson

from feishu_bot.cli.shared import closing, config_option, json_option, load_config, open_store, progress
from feishu_bot.errors import BotError
from feishu_bot.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.cleanup import DeadLetter
    from feishu_bot.store.store import Store


@click.command()
@config_option
@click.option(
    "--days",
    type=click.IntRange(0, 36500),
    help="Instead of ai.conversation_persistence.cleanup_days; 0: for ever.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
def cleanup(config_file: str | None, days: int | None, *, dry_run: bool, as_json: bool) -> None:
    """Remove conversations that have been idle for N days, and queue rows nobody needs any more.

    Where schedule.retention or chats say something else of a chat, that holds.
    """
    from feishu_bot import schedule  # noqa: PLC0415  # APScheduler takes longer than --help

    retention = Retention.of(load_config(config_file).settings, days)
    with open_store(config_file) as store, progress() as show:
        result = asyncio.run(
            closing(store, schedule.cleanup(store, retention, dry_run=dry_run, progress=show))
        )
    if as_json:
        click.echo(orjson.dumps(result).decode())
    else:
        would = "would remove" if dry_run else "removed"
        idle = "never removed for their age" if retention.days is None else f"idle for {retention.days} days"
        rules = f", or as {len(retention.rules)} rule(s) say" if retention.rules else ""
        click.echo(f"{would} {result.conversations} conversation(s) ({idle}{rules})")


@click.group()
def dead() -> None:
    """List, retry or drop what was given up or expired (in-7: a message, out-9: a reply)."""


@dead.command("list")
@config_option
@json_option
def dead_list(config_file: str | None, *, as_json: bool) -> None:
    """List dead letters, newest first, with their reasons."""
    from feishu_bot.store import cleanup as store_cleanup  # noqa: PLC0415  # as above

    with open_store(config_file) as store:
        letters = asyncio.run(closing(store, store.read(store_cleanup.dead_letters)))
    if as_json:
        click.echo(orjson.dumps([_letter(letter) for letter in letters], option=orjson.OPT_INDENT_2).decode())
        return
    if not letters:
        click.echo("no dead letters")
    for letter in letters:
        row = _letter(letter)
        click.echo(
            f"{row['id']:<10} {row['ended_at']}  {row['account']:<10} {row['state']:<8} {row['reason']}"
        )


def _letter(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "account": letter.account,
        "state": letter.state,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "ended_at": datetime.fromtimestamp(letter.ended_at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@dead.command("retry")
@config_option
@click.argument("ids", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every dead letter.")
def dead_retry(config_file: str | None, ids: Sequence[str], *, all_: bool) -> None:
    """Have messages answered anew and replies sent again; a running server goes on with them at once."""
    from feishu_bot.store import cleanup as store_cleanup  # noqa: PLC0415  # as above

    _change_letters(config_file, ids, store_cleanup.retry_dead, "retried", all_=all_)


@dead.command("drop")
@config_option
@click.argument("ids", nargs=-1, required=True)
def dead_drop(config_file: str | None, ids: Sequence[str]) -> None:
    """Remove dead letters for good."""
    from feishu_bot.store import cleanup as store_cleanup  # noqa: PLC0415  # as above

    _change_letters(config_file, ids, store_cleanup.drop_dead, "dropped", all_=False)


def _change_letters(
    config_file: str | None, ids: Sequence[str], change: Any, word: str, *, all_: bool
) -> None:
    from feishu_bot.store import cleanup as store_cleanup  # noqa: PLC0415  # as above

    if not all_ and not ids:
        raise click.UsageError("name one or more ids, or --all")
    for name in ids:
        side, _, number = name.partition("-")
        if side not in {"in", "out"} or not number.isdecimal():
            raise click.UsageError(f"{name!r} is no dead letter's id; ids look like in-7 and out-9")

    async def work(store: Store) -> list[str]:
        wanted = list(ids)
        if all_:
            letters = await store.read(lambda tx: store_cleanup.dead_letters(tx, limit=100_000))
            wanted = [letter.id for letter in letters]
        done: list[str] = []
        for start in range(0, len(wanted), 100):
            done += await store.run(partial(change, ids=wanted[start : start + 100], shard=store.shard))
        return done

    with open_store(config_file) as store:
        done = asyncio.run(closing(store, work(store)))
    click.echo(f"{word}: {len(done)}")
    missing = [name for name in ids if name not in done]
    if missing:
        raise BotError(f"not dead: {', '.join(missing)}")
