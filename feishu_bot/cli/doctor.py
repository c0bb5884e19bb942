"""``doctor``: looks at everything a server needs, and at what a running one does with events of every sort."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import click
import orjson

from feishu_bot.cli.shared import config_option, json_option, open_database, open_settings
from feishu_bot.errors import BotError, DeliveryError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiohttp import ClientResponse, ClientSession

    from feishu_bot.cli.shared import Act
    from feishu_bot.config import BotSettings, PlatformSettings
    from feishu_bot.store.work import Transaction

_CLOCKS_S: Final = 2.0  # what clocks may differ by without a word
_OLD_BACKUP_S: Final = 3 * 86400
_TIMEOUT_S: Final = 10.0
_MIB: Final = 1024 * 1024
_GOOD, _WARN, _BAD = "ok", "warning", "bad"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``state``: ok, warning or bad."""

    what: str
    state: str
    found: str


@click.command()
@config_option
@click.option(
    "--url", help="Also ask the server there, as the platforms see it. Default: server.host and port."
)
@json_option
def doctor(config_file: str | None, url: str | None, *, as_json: bool) -> None:
    """Look at database, schema, disk, clocks, credentials and backups, and at a running server's answers.

    The server is sent what each enabled platform sends: signed, unsigned, tampered, repeated, encrypted and stale
    events of a kind that nobody answers. It has to take or refuse each. Exit 1 when anything is bad.
    """
    with open_settings(config_file) as settings:
        checks = list(_local(settings))
        checks += asyncio.run(_remote(settings, url))
    if as_json:
        click.echo(orjson.dumps([asdict(check) for check in checks], option=orjson.OPT_INDENT_2).decode())
    else:
        width = max(len(check.what) for check in checks)
        for check in checks:
            click.echo(f"{check.state:<7}  {check.what:<{width}}  {check.found}")
    bad = sum(check.state == _BAD for check in checks)
    if bad:
        raise BotError(f"{bad} of {len(checks)} checks are bad")


# ---------------------------------------------------------------------------------------------- this machine


def _local(settings: BotSettings) -> Iterator[Check]:
    try:
        with open_database(settings) as act:
            yield Check("database", _GOOD, act(_where))
            yield _clock(act)
            yield from _work(settings, act)
    except BotError as error:
        yield Check("database", _BAD, str(error))
    yield from _disk(settings)
    yield from _backups(settings)


def _where(tx: Transaction) -> str:
    from feishu_bot.store.schema import HEAD  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    url = tx.connection.engine.url.render_as_string(hide_password=True)
    return f"{tx.kind}, schema {HEAD}, {url}"


def _clock(act: Act) -> Check:
    before = time.time()
    there = act(lambda tx: tx.now_ms) / 1000
    off_s = there - (before + time.time()) / 2
    state = _GOOD if abs(off_s) <= _CLOCKS_S else _WARN
    return Check("clock of the database", state, f"{off_s:+.1f} s from this machine's")


def _work(settings: BotSettings, act: Act) -> Iterator[Check]:
    from feishu_bot.store import controls, leases, trouble  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    servers = act(controls.read_servers)
    versions = sorted({server.version for server in servers})
    found = f"{len(servers)} running" + (f", versions {', '.join(versions)}" if versions else "")
    yield Check("processes", _GOOD if servers and len(versions) == 1 else _WARN, found)
    depth = act(leases.depth)
    age_s = 0 if depth.oldest_at is None else (act(lambda tx: tx.now_ms) - depth.oldest_at) / 1000
    late = age_s > settings.server.max_waiting_age_s
    yield Check(
        "queue",
        _WARN if late else _GOOD,
        f"{depth.waiting} waiting, the oldest for {age_s:.0f} s; {depth.unsent} parts unsent",
    )
    messages, parts = act(lambda tx: trouble.given_up_since(tx, tx.now_ms - 86_400_000))
    words = f"{messages} messages and {parts} parts of replies given up in a day"
    yield Check("dead letters", _WARN if messages or parts else _GOOD, words)
    for pause in act(controls.read_orders).pauses:
        yield Check("pause", _WARN, f"{pause.target.removeprefix('account:')} is paused")


def _disk(settings: BotSettings) -> Iterator[Check]:
    folders = {Path(settings.schedule.backup.directory)}
    url = settings.ai.conversation_persistence.db_url
    if url.startswith("sqlite:///"):
        folders.add(Path(url.removeprefix("sqlite:///").partition("?")[0]).parent)
    for folder in sorted(folders):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / _MIB
        state = _GOOD if free >= settings.server.min_free_mb else _BAD
        yield Check(f"disk at {folder}", state, f"{free:.0f} MB free")


def _backups(settings: BotSettings) -> Iterator[Check]:
    from feishu_bot.store.backup import last_good_backup  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    folder = Path(settings.schedule.backup.directory)
    found = last_good_backup(folder) if folder.is_dir() else None
    if found is None:
        yield Check("backup", _WARN, f"there is none in {folder}")
        return
    age_s = time.time() - found.created_at.timestamp()
    state = _GOOD if age_s < _OLD_BACKUP_S else _WARN
    yield Check("backup", state, f"{found.path.name}, {age_s / 3600:.0f} hours old")


# ------------------------------------------------------------------------------------------------- elsewhere


async def _remote(settings: BotSettings, url: str | None) -> list[Check]:
    import aiohttp  # noqa: PLC0415  # takes longer than --help

    from feishu_bot.platforms.base import platform_types  # noqa: PLC0415  # as above

    types = platform_types()
    checks = [check async for check in _credentials(settings)]
    server = settings.server
    at = (url or f"http://{_reachable(server.host)}:{server.port}{server.base_path}").rstrip("/")
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        try:
            checks += [check async for check in _server(http, at)]
            for account, own in settings.platforms.items():
                if own.enabled and not types[own.type].pull:
                    checks += [check async for check in _doors(http, at, account, own, settings)]
        except (aiohttp.ClientError, TimeoutError) as error:
            words = f"{at} does not answer: {type(error).__name__}"
            checks.append(Check("server", _BAD if url else _WARN, words))
    return checks


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  # an address to ask, not to listen on


async def _credentials(settings: BotSettings) -> AsyncIterator[Check]:
    from feishu_bot.platforms.base import PlatformContext, platform_types  # noqa: PLC0415  # takes longer than --help

    types, context = platform_types(), PlatformContext(network=settings.network)
    for account, own in settings.platforms.items():
        if not own.enabled or types[own.type].pull:
            continue
        platform = types[own.type](account, own, context)
        try:
            found = await platform.check()
            yield Check(f"credentials of {account}", _GOOD, f"{own.type}: {found or 'nothing to ask'}")
        except DeliveryError as error:
            yield Check(f"credentials of {account}", _BAD, f"{own.type}: {error.reason}")
        finally:
            await platform.stop()


async def _server(http: ClientSession, at: str) -> AsyncIterator[Check]:
    async with http.get(f"{at}/healthz") as response:
        yield Check("server", _GOOD if response.status == 200 else _BAD, f"{at}: HTTP {response.status}")  # noqa: PLR2004  # alive
        there = _date(response)
        if there is not None:
            off_s = there - time.time()
            # The header is cut to whole seconds.
            state = _GOOD if abs(off_s + 0.5) <= _CLOCKS_S else _WARN
            yield Check("clock of the server", state, f"{off_s:+.0f} s from this machine's")
    async with http.get(f"{at}/readyz") as response:
        body: dict[str, Any] = {}
        with suppress(ValueError):
            body = orjson.loads(await response.read())
        words = "; ".join(body.get("reasons") or body.get("degraded") or []) or str(body.get("status", ""))
        if response.status == 403:  # noqa: PLR2004  # seen from outside it shows nothing, which is right
            yield Check("readyz", _GOOD, "shown to private networks only")
        elif response.status != 200:  # noqa: PLR2004  # not ready
            yield Check("readyz", _BAD, f"HTTP {response.status}: {words}")
        else:
            yield Check("readyz", _WARN if body.get("degraded") else _GOOD, words)


def _date(response: ClientResponse) -> float | None:
    header = response.headers.get("Date")
    try:
        return None if header is None else parsedate_to_datetime(header).timestamp()
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------- events


async def _doors(
    http: ClientSession, at: str, account: str, own: PlatformSettings, settings: BotSettings
) -> AsyncIterator[Check]:
    """Knock at an account's doors as its platform does, and as somebody else would."""
    from feishu_bot.testing.trials import trials_of  # noqa: PLC0415  # takes longer than --help

    found = trials_of(own, account, now=time.time(), key=uuid4().hex)
    for trial in found.trials:
        async with http.request(
            trial.method, f"{at}{trial.path}", data=trial.body, headers=trial.headers
        ) as response:
            answer = (await response.read()).decode(errors="replace")
        right = response.status == trial.expect and trial.echo in answer
        words = f"HTTP {response.status}" + (
            "" if right else f", expected {trial.expect} {trial.echo}".rstrip()
        )
        yield Check(f"{account}: {trial.what}", _GOOD if right else _BAD, words)
    if found.event_key is not None:
        yield _recorded(settings, account, found.event_key)
    for what, reason in found.left_out:
        yield Check(f"{account}: {what}", _WARN, f"not tried: {reason}")


def _recorded(settings: BotSettings, account: str, key: str) -> Check:
    """See in the database that the event that came twice was recorded once."""
    from feishu_bot.store.trouble import count_events  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    try:
        with open_database(settings) as act:
            count = act(lambda tx: count_events(tx, account, key))
    except BotError as error:
        return Check(f"{account}: recorded", _WARN, f"not known: {error}")
    words = f"{count} time(s)" + ("" if count == 1 else ", expected once: is this the server's database?")
    return Check(f"{account}: recorded", _GOOD if count == 1 else _BAD, words)
