"""The command line: every command with ``--help``, exit 0 / 1 (failed) / 2 (wrong use or configuration)."""

from __future__ import annotations

import asyncio
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from feishu_bot import __version__, log
from feishu_bot.config import commented_config, load
from feishu_bot.errors import BotError, ConfigError
from feishu_bot.reference import platform_settings

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from feishu_bot.app import App
    from feishu_bot.config import Loaded
    from feishu_bot.store.cleanup import DeadLetter
    from feishu_bot.store.store import Store

_config = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="The configuration; default: config.yaml in the working directory, if there is one.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="feishu-bot")
@click.pass_context
def bot(context: click.Context) -> None:
    """Run and look after a chat-bot webhook server for Feishu/Lark and others.

    Without a command: run.
    """
    if context.invoked_subcommand is None:
        context.invoke(run)


def main() -> None:
    """Run the command line; errors end in one line on stderr."""
    try:
        bot(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(1)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ConfigError as error:
        for mistake in error.mistakes:
            click.echo(mistake, err=True)
        sys.exit(2)
    except (BotError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _load(config_file: str | None, overrides: dict[str, Any] | None = None) -> Loaded:
    return load(config_file, platform_settings=platform_settings(), overrides=overrides)


# ---------------------------------------------------------------------------------------------------- server


@bot.command()
@_config
@click.option("--host", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0 takes any free one.")
def run(config_file: str | None = None, host: str | None = None, port: int | None = None) -> None:
    """Run the server until SIGTERM or Ctrl-C."""
    loaded = _load(config_file, {"server.host": host, "server.port": port})
    logging = log.configure(loaded.settings.logging, secrets=loaded.secret_values())
    try:
        for warning in loaded.warnings:
            getLogger(__name__).warning("configuration", extra={"warning": warning})
        # What follows takes most of the start's time; --help and check need none of it.
        from feishu_bot.app import App  # noqa: PLC0415  # see above

        asyncio.run(App(loaded.settings).run(ready=_say_where))
    finally:
        logging.close()


def _say_where(app: App) -> None:
    if app.settings.platforms and sys.stderr.isatty():
        click.echo(
            f"\n  Open http://{app.settings.server.host}:{app.port}/ and say hello. Ctrl-C stops.\n", err=True
        )


@bot.command()
@_config
@_json
def check(config_file: str | None, *, as_json: bool) -> None:
    """Validate the configuration and print it, secrets hidden, with where each value comes from."""
    loaded = _load(config_file)
    click.echo(loaded.to_json() if as_json else loaded.render())
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)


@bot.command()
@click.argument("file", default="config.yaml", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(file: str, *, force: bool) -> None:
    """Write a commented configuration to FILE (default: config.yaml)."""
    path = Path(file)
    if path.exists() and not force:
        raise click.UsageError(f"{file} exists; --force replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commented_config(platform_settings()), encoding="utf-8")
    click.echo(f"wrote {file}; `bot.py check --config {file}` shows what it means")


# ------------------------------------------------------------------------------------------------- operation


class _Outside:
    """A planner for commands that begin no messages."""

    history_turns = 0

    def tenant(self, account: str) -> str:  # noqa: ARG002  # the planner's signature
        return "default"

    def plan(self, *_args: Any, **_keywords: Any) -> Any:
        raise AssertionError("commands begin no messages")


@contextmanager
def _store(config_file: str | None) -> Iterator[Store]:
    """Open the configured store beside a running server, or without one."""
    from feishu_bot.store.store import Store  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    loaded = _load(config_file)
    logging = log.configure(
        loaded.settings.logging.model_copy(update={"level": "WARNING"}), secrets=loaded.secret_values()
    )
    persistence = loaded.settings.ai.conversation_persistence
    store = Store(persistence.db_url, auto_migrate=persistence.auto_migrate)
    try:
        store.open(_Outside(), version=__version__)
        yield store
    finally:
        logging.close()


async def _closing(store: Store, coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    finally:
        await store.close()


@bot.command()
@_config
@click.option("--days", type=click.IntRange(0), help="Default: ai.conversation_persistence.cleanup_days.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@_json
def cleanup(config_file: str | None, days: int | None, *, dry_run: bool, as_json: bool) -> None:
    """Remove conversations that have been idle for N days, and queue rows nobody needs any more."""
    from feishu_bot import schedule  # noqa: PLC0415  # APScheduler takes longer than --help

    settings = _load(config_file).settings.ai.conversation_persistence
    wanted = settings.cleanup_days if days is None else days
    with _store(config_file) as store:
        result = asyncio.run(
            _closing(store, schedule.cleanup(store, days=wanted, dry_run=dry_run, progress=_progress()))
        )
    if as_json:
        click.echo(orjson.dumps(result).decode())
    else:
        would = "would remove" if dry_run else "removed"
        click.echo(f"{would} {result.conversations} conversation(s) idle for {wanted} days")


def _progress() -> Any:
    if not sys.stderr.isatty():
        return None

    def show(rows: int) -> None:
        click.echo(f"\r{rows} rows removed", nl=False, err=True)

    return show


@bot.group()
def dead() -> None:
    """List, retry or drop what was given up or expired (in-7: a message, out-9: a reply)."""


@dead.command("list")
@_config
@_json
def dead_list(config_file: str | None, *, as_json: bool) -> None:
    """List dead letters, newest first, with their reasons."""
    from feishu_bot.store import cleanup as store_cleanup  # noqa: PLC0415  # as above

    with _store(config_file) as store:
        letters = asyncio.run(_closing(store, store.read(store_cleanup.dead_letters)))
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
@_config
@click.argument("ids", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every dead letter.")
def dead_retry(config_file: str | None, ids: Sequence[str], *, all_: bool) -> None:
    """Have messages answered anew and replies sent again; a running server goes on with them at once."""
    from feishu_bot.store import cleanup as store_cleanup  # noqa: PLC0415  # as above

    _change_letters(config_file, ids, store_cleanup.retry_dead, "retried", all_=all_)


@dead.command("drop")
@_config
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

    with _store(config_file) as store:
        done = asyncio.run(_closing(store, work(store)))
    click.echo(f"{word}: {len(done)}")
    missing = [name for name in ids if name not in done]
    if missing:
        raise BotError(f"not dead: {', '.join(missing)}")
