"""``selftest``: the chaos driver, for operators before they trust the server, and after they have moved it."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from feishu_bot.cli.shared import progress
from feishu_bot.errors import BotError, StoreUnavailable

if TYPE_CHECKING:
    from feishu_bot.chaos.bases import Base


@click.command()
@click.option(
    "--chaos", is_flag=True, help="Everything that can go wrong, not only processes that are killed."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.1, 24 * 60),
    default=1.0,
    show_default=True,
    help="How long messages are sent.",
)
@click.option(
    "--db",
    "db_url",
    metavar="URL",
    help="An empty database to run on; it is emptied again afterwards. Default: a scratch SQLite file.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Server processes.")
@click.option(
    "--rate", type=click.FloatRange(0.1, 1000), default=15.0, show_default=True, help="Messages a second."
)
@click.option("--seed", type=click.IntRange(0), help="Repeat the accidents of an earlier run.")
@click.option("--keep", is_flag=True, help="Keep the database and the servers' logs, and say where they are.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def selftest(
    db_url: str | None,
    seed: int | None,
    *,
    chaos: bool,
    minutes: float,
    workers: int,
    rate: float,
    keep: bool,
    as_json: bool,
) -> None:
    """Start servers with platforms and a model of their own, kill them at random moments, and check the record.

    The configured database and accounts are not touched. Ctrl-C ends the run early, with its report; a second one
    at once. Exit 1 when a message was lost, doubled or out of order, or anything else is not as promised.
    """
    from feishu_bot.chaos import driver, report  # noqa: PLC0415  # --help needs none of it
    from feishu_bot.chaos.scenario import EVERYTHING, KILLS, Scenario  # noqa: PLC0415  # as above

    scenario = Scenario(
        seed=secrets.randbelow(1_000_000) if seed is None else seed,
        seconds=minutes * 60,
        workers=workers,
        rate=rate,
        faults=EVERYTHING if chaos else KILLS,
    )
    folder = Path(tempfile.mkdtemp(prefix="feishu-bot-selftest-"))
    base = _base(db_url, folder)
    click.echo(f"seed {scenario.seed}", err=True)
    good = False
    try:
        with progress() as show:
            tell = (lambda words: show(words, 0, 0)) if show is not None else (lambda _words: None)
            result = asyncio.run(driver.run(scenario, base, folder, tell=tell))
        good = result.verdict.kept
    except asyncio.CancelledError:
        raise click.Abort from None
    finally:
        base.close(keep=keep or not good)
        if not keep and good:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            click.echo(f"logs and configurations are in {folder}", err=True)
    if as_json:
        click.echo(orjson.dumps(report.document(result), option=orjson.OPT_INDENT_2).decode())
    else:
        click.echo(report.page(result))
    if not good:
        raise BotError("the promise was not kept")


def _base(db_url: str | None, folder: Path) -> Base:
    from feishu_bot.chaos.bases import Given, Scratch  # noqa: PLC0415  # as above

    if db_url is None:
        return Scratch(folder)
    try:
        return Given(db_url)
    except StoreUnavailable:
        folder.rmdir()
        raise
    except BotError as error:
        folder.rmdir()
        raise click.UsageError(f"--db: {error}") from None
