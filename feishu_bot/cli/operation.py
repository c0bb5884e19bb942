"""``status``, ``drain``, ``pause``, ``resume``, ``reload`` and ``send``: orders by way of the database."""

from __future__ import annotations

import time
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import click
import orjson

from feishu_bot.cli.shared import config_option, json_option, load_config, open_database, open_settings
from feishu_bot.errors import BotError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from feishu_bot.cli.shared import Act
    from feishu_bot.config import BotSettings
    from feishu_bot.store.controls import Process

_LOOK_S: Final = 0.3
_ANSWER_S: Final = 15.0  # for every process to follow an order


@contextmanager
def _opened(config_file: str | None) -> Iterator[tuple[BotSettings, Act]]:
    with open_settings(config_file) as settings, open_database(settings) as act:
        yield settings, act


def _age(ms: float | None) -> str:
    """Return a length of time for people."""
    if ms is None:
        return "-"
    seconds = int(ms // 1000)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


# --------------------------------------------------------------------------------------------------- status


@click.command()
@config_option
@json_option
def status(config_file: str | None, *, as_json: bool) -> None:
    """Show every server process, what waits, what is paused and the last errors."""
    with _opened(config_file) as (_, act):
        from feishu_bot.store import console  # noqa: PLC0415  # SQLAlchemy takes longer than --help

        found = act(console.status)
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        _show_status(found)


def _show_status(found: dict[str, Any]) -> None:
    click.echo(
        f"waiting {found['waiting']} (oldest {_age(found['oldest_ms'])})   "
        f"outbox {found['outbox']} (oldest {_age(found['outbox_oldest_ms'])})   "
        f"given up: {found['dead_messages']} messages, {found['dead_parts']} parts of replies"
    )
    for pause_ in found["pauses"]:
        words = f"paused: {pause_['target'].removeprefix('account:')} since {pause_['since']}"
        words += f" by {pause_['by']}" if pause_["by"] else ""
        click.echo(words + (f", says {pause_['say']!r}" if pause_["say"] else ""))
    if not found["processes"]:
        click.echo("no server process has been heard of lately")
        return
    line = "{:<20} {:>7} {:>6} {:<9} {:>6} {:>6} {:>8} {:>5} {:>5}  {}"
    click.echo(
        line.format("host", "pid", "worker", "state", "lanes", "ready", "sending", "up", "seen", "version")
    )
    for p in found["processes"]:
        worker = "-" if p["worker"] is None else p["worker"]
        up, seen = _age(p["up_ms"]), _age(p["seen_ms"])
        cells = (p["host"][:20], p["pid"], worker, p["state"], p["lanes"], p["ready"], p["sending"])
        click.echo(line.format(*cells, up, seen, p["version"]))
    for p in found["processes"]:
        for error in p["errors"]:
            click.echo(f"{error['at']} {p['pid']} {error['level']} {error['event']}: {error['reason']}")


# ----------------------------------------------------------------------------------------- pause and resume


def _target(settings: BotSettings, account: str | None, *, models: bool) -> str | None:
    from feishu_bot.store.controls import MODELS, account_target  # noqa: PLC0415  # as above

    if models and account is not None:
        raise click.UsageError("either an account or --models")
    if models:
        return MODELS
    if account is None:
        return None
    if account not in settings.platforms:
        near = get_close_matches(account, list(settings.platforms), n=1)
        raise click.UsageError(f"no account {account!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return account_target(account)


@click.command()
@config_option
@click.argument("account", required=False)
@click.option("--models", is_flag=True, help="Only questions for a model wait; commands are answered.")
@click.option("--say", metavar="TEXT", help="What each chat that writes is told, once.")
def pause(config_file: str | None, account: str | None, say: str | None, *, models: bool) -> None:
    """Accept and keep messages, but do not answer: of everything, or of one ACCOUNT.

    Every process follows within a second. What is being answered is finished. chat.answer_within still counts.
    """
    from feishu_bot.store import controls  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    with _opened(config_file) as (settings, act):
        target = _target(settings, account, models=models) or controls.ALL
        act(partial(controls.pause, target=target, say=say, by="command line"))
    click.echo(f"paused: {target.removeprefix('account:')}; `resume` goes on")


@click.command()
@config_option
@click.argument("account", required=False)
@click.option("--models", is_flag=True, help="Only the pause of the models.")
def resume(config_file: str | None, account: str | None, *, models: bool) -> None:
    """Go on: end all pauses and drains, or the pause of one ACCOUNT."""
    from feishu_bot.store import controls  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    with _opened(config_file) as (settings, act):
        target = _target(settings, account, models=models)
        ended = act(partial(controls.resume, target=target))
    click.echo("going on" if ended else "nothing was paused")


# ---------------------------------------------------------------------------------------------------- drain


@click.command()
@config_option
@click.option("--host", metavar="NAME", help="Another machine's processes. Default: this one's.")
@click.option("--all", "all_", is_flag=True, help="The processes of all machines.")
@click.option("--no-wait", is_flag=True, help="Give the order and return.")
@click.option(
    "--timeout", type=click.FloatRange(0), default=120.0, show_default=True, help="Seconds to wait."
)
def drain(config_file: str | None, host: str | None, timeout: float, *, all_: bool, no_wait: bool) -> None:
    """Take no new messages and finish what runs; `resume` takes it back, a restart too.

    Webhooks get 503, so that platforms and load balancers go elsewhere. What waits is left to other processes;
    where there are none, it is finished first.
    """
    from feishu_bot.store import controls  # noqa: PLC0415  # SQLAlchemy takes longer than --help
    from feishu_bot.store.leases import Owner  # noqa: PLC0415  # as above

    if all_ and host is not None:
        raise click.UsageError("either --host or --all")
    name = "*" if all_ else host or Owner.current().host.partition("/")[0]
    with _opened(config_file) as (_, act):
        meant = [p.owner for p in act(controls.read_servers) if all_ or _is_of(p, name)]
        if not meant:
            raise BotError("no server process has been heard of there lately")
        act(partial(controls.drain, owners=[str(owner) for owner in meant]))
        click.echo(f"draining {len(meant)} process(es)")
        if no_wait:
            return
        end = time.monotonic() + timeout
        while left := [
            p for p in act(controls.read_servers) if p.owner in meant and p.report["state"] != "drained"
        ]:
            if time.monotonic() > end:
                raise BotError("still at work: " + ", ".join(f"pid {p.owner.pid}" for p in left))
            time.sleep(_LOOK_S)
    click.echo("drained: nothing is at work; the processes can be stopped")


def _is_of(process: Process, host: str) -> bool:
    return host in {process.owner.host, process.owner.host.partition("/")[0]}


# --------------------------------------------------------------------------------------------------- reload


@click.command()
@config_option
@json_option
def reload(config_file: str | None, *, as_json: bool) -> None:
    """Have every process read its configuration again; a bad one is refused and the old one kept."""
    from feishu_bot.store import controls  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    load_config(config_file)  # a mistake ends it here, before any server hears of it
    with _opened(config_file) as (_, act):
        meant = {p.owner for p in act(controls.read_servers)}
        if not meant:
            raise BotError("no server process has been heard of lately")
        order = act(controls.order_reload)
        end = time.monotonic() + _ANSWER_S
        while True:
            answers = [p for p in act(controls.read_servers) if p.owner in meant and _followed(p, order)]
            if len(answers) == len(meant) or time.monotonic() > end:
                break
            time.sleep(_LOOK_S)
    silent = len(meant) - len(answers)
    if as_json:
        rows = [{"pid": p.owner.pid, **p.report["reload"]} for p in answers]
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
    else:
        _show_reload(answers)
    refused = [p for p in answers if p.report["reload"].get("mistakes")]
    if refused or silent:
        raise BotError(f"{len(refused)} process(es) kept the old configuration, {silent} did not answer")


def _followed(process: Process, order: int) -> bool:
    return bool(process.report["reload"]) and process.report["reload"]["order"] >= order


def _show_reload(answers: Sequence[Process]) -> None:
    for process in answers:
        words = process.report["reload"]
        host = process.owner.host.partition("/")[0]
        click.echo(f"{host} {process.owner.pid}: " + _outcome(words))


def _outcome(words: dict[str, Any]) -> str:
    if words.get("mistakes"):
        return "refused: " + "; ".join(words["mistakes"])
    parts = []
    if words["applied"]:
        parts.append("in force: " + ", ".join(words["applied"]))
    if words["restart"]:
        parts.append("needs a restart: " + ", ".join(words["restart"]))
    return "; ".join(parts) or "nothing has changed"


# ----------------------------------------------------------------------------------------------------- send


@click.command()
@config_option
@click.option("--platform", "account", required=True, metavar="ACCOUNT", help="The account that sends.")
@click.option("--chat", metavar="ID", help="The chat, by the platform's id.")
@click.option("--user", metavar="U", help="A private chat: the platform's id, a person or a user key.")
@click.option(
    "--type",
    "chat_type",
    type=click.Choice(["group", "channel", "private"]),
    default="group",
    show_default=True,
    help="What --chat is.",
)
@click.option("--request-id", metavar="ID", help="Sent once, however often it is given.")
@click.argument("text")
def send(
    config_file: str | None,
    account: str,
    text: str,
    *,
    chat: str | None,
    user: str | None,
    chat_type: str,
    request_id: str | None,
) -> None:
    """Send TEXT to a chat or a person, through the outbox: with its order, retries and dead letters."""
    from feishu_bot.model import ChatType, make_key  # noqa: PLC0415  # SQLAlchemy takes longer than --help
    from feishu_bot.platforms.base import platform_types  # noqa: PLC0415  # as above
    from feishu_bot.push import chat_target, person_target, push_rows  # noqa: PLC0415  # as above
    from feishu_bot.store import controls, outbox  # noqa: PLC0415  # as above

    if (chat is None) == (user is None):
        raise click.UsageError("one of --chat and --user")
    if not text.strip():
        raise click.UsageError("TEXT: expected a text that is not empty")
    with _opened(config_file) as (settings, act):
        own = settings.platforms.get(account)
        platform = None if own is None else platform_types()[own.type]
        if own is None or platform is None or not own.enabled or platform.pull:
            raise click.UsageError(f"--platform: {account!r} is no account that is enabled and can send")
        try:
            target = chat_target(chat, ChatType(chat_type)) if chat else person_target(account, user or "")
        except ValueError as error:
            raise click.UsageError(f"--user: {error}") from None
        rows = push_rows(
            account,
            platform,
            source=make_key("api", account, request_id or str(uuid4())),
            target=target,
            text=text,
            max_chars=settings.chat.max_message_length,
        )
        act(partial(outbox.push, rows=rows))
        running = act(controls.count_servers)
    click.echo(f"in the outbox: {len(rows)} part(s)")
    if not running:
        click.echo("warning: no server is running; it is sent when one does", err=True)
