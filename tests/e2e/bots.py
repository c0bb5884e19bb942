"""Servers as processes, what people say to them, and what they have put on record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from sqlalchemy import func, select, text

from feishu_bot.store import schema
from feishu_bot.store.engine import database_now_ms, open_engine
from feishu_bot.testing.feishu import FakeFeishu, sign_and_encrypt, text_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy import Row, Table

    from feishu_bot.testing.model import FakeModelServer

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0  # after which a test gives up what it waits for; nothing is measured with it
KEY = "encrypt-key-of-the-tests"
SECRET = "app-secret-of-the-tests"
MODEL = "openai:gpt-4o"


async def until(condition: Callable[[], Any], what: str, *, patience_s: float = PATIENCE_S) -> Any:
    """Return what ``condition`` returns as soon as it is true."""
    began = now = time.monotonic()
    while not (found := condition()):
        assert now < began + patience_s, f"waited in vain for {what}"
        await asyncio.sleep(min(0.01 + (now - began) / 20, 0.1))  # to look takes longer than it seems
        now = time.monotonic()
    return found


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -------------------------------------------------------------------------------------------- configuration


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes`` in it, key by key and level by level."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return result


def configuration(
    db_url: str, *, feishu: FakeFeishu | None = None, model: FakeModelServer | None = None, **changes: Any
) -> dict[str, Any]:
    """Return a configuration for tests: any free port, English, no budgets, no jobs, logs as JSON."""
    base: dict[str, Any] = {
        "server": {"port": 0, "min_free_mb": 0},
        "chat": {"language": "en"},
        "ai": {"conversation_persistence": {"db_url": db_url}},
        "budgets": [],
        "platforms": {"web": {"enabled": True}},
        "plugins": {"enabled": []},
        "schedule": {"cleanup": {"enabled": False}},
        "logging": {"format": "json"},
    }
    if feishu is not None:
        base["platforms"]["feishu"] = {
            "enabled": True,
            "app_id": "cli_fake",
            "app_secret": SECRET,
            "encrypt_key": KEY,
            "base_url": feishu.url,
        }
    if model is not None:
        base["ai"] |= {"model": MODEL, "base_url": model.base_url, "api_key": "sk-fake"}
    return merged(base, changes)


# -------------------------------------------------------------------------------------------------- servers


class Nursery:
    """Starts servers quickly; see ``nursery.py``."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.e2e.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self,
        program: str,
        arguments: list[str],
        folder: Path,
        log: Path,
        *,
        reads: Path | None = None,
        errors: Path | None = None,
    ) -> int:
        """Start a program and return its pid. ``reads``: its stdin; ``errors``: its stderr, where that is no log."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"program": program, "arguments": arguments, "folder": str(folder), "log": str(log)}
        order |= {"reads": str(reads or os.devnull), "errors": str(errors or log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End every server that still runs."""
        self._process.communicate()


@dataclass
class Bot:
    """One run of a server."""

    pid: int
    log: Path
    url: str = ""
    _known: int = field(default=0, repr=False)
    _lines: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return what was logged, of one event or all; what is no JSON comes as ``{"text": line}``."""
        data = self.log.read_bytes() if self.log.exists() else b""
        whole = data[self._known : data.rfind(b"\n") + 1]
        self._known += len(whole)
        for line in whole.splitlines():
            try:
                self._lines.append(orjson.loads(line))
            except ValueError:
                self._lines.append({"text": line.decode(errors="replace")})
        return [line for line in self._lines if event is None or line.get("event") == event]

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs. Negative: the signal."""
        with contextlib.suppress(FileNotFoundError):
            return int(Path(f"{self.log}.exit").read_text())
        return None

    async def listening(self) -> Bot:
        """Return when it is ready to serve."""
        await until(lambda: self.lines("ready") or self.exit_code is not None, "the server's start")
        assert self.exit_code is None, self.log.read_text()
        self.url = self.lines("ready")[0]["url"].rstrip("/")
        return self

    def signal(self, number: int) -> None:
        """Send a signal to a server that runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def ended(self) -> int:
        """Return the exit code once the process has ended."""
        await until(lambda: self.exit_code is not None, "the server's end")
        assert self.exit_code is not None
        return self.exit_code

    async def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """End it as a power cut would."""
        self.signal(signal.SIGKILL)
        await self.ended()

    def complaints(self) -> list[dict[str, Any]]:
        """Return the lines that tell of an accident: errors, tracebacks, texts that are no log."""
        return [
            line
            for line in self.lines()
            if "text" in line or "exception" in line or line.get("level") in {"error", "critical"}
        ]


@dataclass
class Bots:
    """The servers of one test, in a folder of their own."""

    nursery: Nursery
    folder: Path
    started: list[Bot] = field(default_factory=list)

    def write(self, config: Mapping[str, Any]) -> Path:
        """Write a configuration (JSON is YAML)."""
        file = self.folder / f"config-{len(self.started)}.yaml"
        file.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
        return file

    def launch(self, config: Mapping[str, Any], *, crash: tuple[str, int] | None = None) -> Bot:
        """Start a server without waiting for it; ``crash``: kill it the n-th time a step is reached."""
        if crash is None:
            return self.launch_program("bot", ["run"], config)
        return self.launch_program("crashing_server", [crash[0], str(crash[1])], config)

    def launch_program(self, program: str, words: list[str], config: Mapping[str, Any]) -> Bot:
        """Start one of the nursery's programs with ``--config`` at the end, without waiting for it."""
        file = self.write(config)
        log = self.folder / f"log-{len(self.started)}"
        words = [*words, "--config", str(file)]
        bot = Bot(self.nursery.start(program, words, self.folder, log), log)
        self.started.append(bot)
        return bot

    async def start(self, config: Mapping[str, Any], *, crash: tuple[str, int] | None = None) -> Bot:
        """Start a server and return when it serves."""
        return await self.launch(config, crash=crash).listening()

    def end(self) -> None:
        """Kill what still runs."""
        for bot in self.started:
            if bot.exit_code is None:
                bot.signal(signal.SIGKILL)
        end = time.monotonic() + PATIENCE_S
        while any(bot.exit_code is None for bot in self.started) and time.monotonic() < end:
            time.sleep(0.005)


# --------------------------------------------------------------------------------------------------- people


@dataclass
class People:
    """Those who write to the bot on Feishu."""

    http: aiohttp.ClientSession
    feishu: FakeFeishu
    count: int = 0

    async def post(self, bot: Bot, event: Mapping[str, Any] | bytes, **signing: Any) -> int:
        """Post an event encrypted and signed; returns the status, 0 if the server went away."""
        headers, body = sign_and_encrypt(event, encrypt_key=KEY, **signing)
        return await self.send(bot, body, headers)

    async def send(self, bot: Bot, body: bytes, headers: Mapping[str, str]) -> int:
        """Post bytes as they are; returns the status, 0 if the server went away."""
        try:
            async with self.http.post(f"{bot.url}/webhook/feishu", data=body, headers=headers) as response:
                await response.read()
                return response.status
        except aiohttp.ClientError:
            return 0

    def event(
        self, text: str, *, user: str = "ann", chat: str | None = None, at_bot: bool = True, **more: Any
    ) -> dict[str, Any]:
        """Return the event of a message to the bot: in private, or in the group ``chat``."""
        self.count += 1
        message_id = more.setdefault("message_id", f"om_{user}_{self.count}")
        self.feishu.know_message(message_id, chat or f"oc_{user}")
        if chat is None:
            return text_event(text, open_id=f"ou_{user}", chat_id=f"oc_{user}", **more)
        return text_event(
            text, open_id=f"ou_{user}", chat_type="group", chat_id=chat, mention_bot=at_bot, **more
        )

    async def say(self, bot: Bot, words: str, **more: Any) -> str:
        """Say something to the bot and return the message's id, once it is acknowledged."""
        event = self.event(words, **more)
        status = await self.post(bot, event)
        assert status == 200, status
        return str(event["event"]["message"]["message_id"])

    async def replies(self, count: int, chat: str | None = None) -> list[str]:
        """Return the visible texts of a chat once there are ``count``, and none of them is being written."""

        def are_there() -> bool:
            written = {card.message_id for card in self.feishu.cards.all.values() if card.streaming}
            seen = [m for m in self.feishu.visible if chat is None or m.chat == chat]
            return sum(m.message_id not in written for m in seen) >= count

        await until(are_there, f"{count} replies, not {self.feishu.texts()}")
        return self.feishu.texts(chat)


# --------------------------------------------------------------------------------------------------- record


class Record:
    """Reads the database beside the server."""

    def __init__(self, db_url: str) -> None:
        self._engine = open_engine(db_url).execution_options(reader=True)

    def close(self) -> None:
        self._engine.dispose()

    def rows(self, table: Table, **where: Any) -> list[Row[Any]]:
        """Return a table's rows in the order in which they were made."""
        statement = select(table).order_by(*table.primary_key.columns)
        for name, value in where.items():
            statement = statement.where(table.c[name] == value)
        with self._engine.connect() as connection, connection.begin():
            return list(connection.execute(statement))

    def execute(self, statement: Any) -> None:
        """Change the database by hand, as damage does."""
        with self._engine.execution_options(reader=False).begin() as connection:
            connection.execute(statement)

    def execute_text(self, statement: str) -> list[Row[Any]]:
        """Run SQL as it stands; returns the rows of a question."""
        with self._engine.execution_options(reader=False).begin() as connection:
            result = connection.execute(text(statement))
            return list(result) if result.returns_rows else []

    def end_other_connections(self) -> None:
        """Have PostgreSQL end everybody else's connections to this database."""
        self.execute_text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    def now_ms(self) -> int:
        """Return the database's own time."""
        with self._engine.connect() as connection:
            return database_now_ms(connection)

    def count(self, table: Table, **where: Any) -> int:
        """Return the number of rows."""
        return len(self.rows(table, **where))

    def inbox(self, **where: Any) -> list[Row[Any]]:
        return self.rows(schema.inbox, **where)

    def outbox(self, **where: Any) -> list[Row[Any]]:
        return self.rows(schema.outbox, **where)

    def messages(self, **where: Any) -> list[Row[Any]]:
        return self.rows(schema.messages, **where)

    def ledger(self, **where: Any) -> list[Row[Any]]:
        return self.rows(schema.usage, **where)

    async def pause(self) -> None:
        """Let the server get on before it is asked again."""
        await asyncio.sleep(0.05)

    async def settled(self) -> None:
        """Return when every message has ended and every part of an answer has left."""
        await until(
            lambda: (
                not self.inbox(state="open")
                and all(row.state not in {"pending", "attempting"} for row in self.outbox())
            ),
            "the end of all work",
        )

    async def ended(self, count: int) -> list[Row[Any]]:
        """Return the inbox once it holds ``count`` messages that have ended."""
        await until(lambda: sum(r.state != "open" for r in self.inbox()) >= count, f"{count} ended messages")
        return self.inbox()

    def check_accounts(self) -> None:
        """Assert that nothing is reserved, and that the budgets' windows hold what the ledger says."""
        assert self.rows(schema.reservations) == []
        windows = self.rows(schema.budget_windows)
        assert [w.reserved for w in windows] == [0] * len(windows)
        used: dict[str, int] = {}
        for row in self.ledger():
            used[row.user_id] = used.get(row.user_id, 0) + row.input_tokens + row.output_tokens
        for window in windows:
            assert window.used == used.get(window.key, 0), (window, used)

    def check_ends(self) -> None:
        """Assert that the daily totals say how many messages ended in which way."""
        with self._engine.connect() as connection, connection.begin():
            totals = dict(
                connection.execute(
                    select(schema.totals.c.end, func.sum(schema.totals.c.count)).group_by(schema.totals.c.end)
                ).all()
            )
            ends = dict(
                connection.execute(
                    select(schema.inbox.c.state, func.count())
                    .where(schema.inbox.c.state != "open")
                    .group_by(schema.inbox.c.state)
                ).all()
            )
        assert {k: int(v) for k, v in totals.items() if v} == ends

    def texts(self) -> Iterator[str]:
        """Yield every text that any table holds."""
        for table in schema.metadata.sorted_tables:
            for row in self.rows(table):
                yield from (value for value in row if isinstance(value, str))
