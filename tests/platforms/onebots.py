"""What the tests of OneBot share: an account, real doors before it, and a record that can be away."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from feishu_bot.config import ServerSettings
from feishu_bot.errors import StoreUnavailable
from feishu_bot.intake import IntakeCounts
from feishu_bot.metrics import Metrics
from feishu_bot.model import ChatType, InboundMessage, Outgoing, Target
from feishu_bot.platforms.base import PlatformContext
from feishu_bot.platforms.onebot import OneBot, OneBotSettings
from feishu_bot.store.work import Recorded
from feishu_bot.web.doors import Doors as Web
from feishu_bot.web.health import Health
from feishu_bot.web.server import IDLE_S, Server
from feishu_bot.web.sockets import Sockets
from feishu_bot.web.webhooks import READ_TIMEOUT_S, Webhooks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

VECTORS = orjson.loads(Path(__file__).with_name("vectors").joinpath("onebot.json").read_bytes())
SECRET = "secret-of-the-tests"
TOKEN = "token-of-the-tests"
NOW = 1767225600.0
PATIENCE_S = 20.0  # after which a test gives up what it waits for; nothing is measured with it


async def until(condition: Callable[[], Any], what: str = "it") -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.005)
    return found


def onebot(
    *, context: PlatformContext | None = None, waits: dict[str, float] | None = None, **keys: Any
) -> OneBot:
    chosen = OneBotSettings(
        **{
            "type": "onebot",
            "enabled": True,
            "secret": SECRET,
            "access_token": TOKEN,
            "api_url": None,
            **keys,
        }
    )
    waits = {"call_timeout_s": 5.0, "ask_after_s": 0.05, "away_s": 0.05, **(waits or {})}
    return OneBot("onebot", chosen, context or PlatformContext(), **waits)


def group(**keys: Any) -> Target:
    base = {"chat_id": "30003", "sender_id": "20002", "reply_to": "7", "extra": {"self_id": "10001"}}
    return Target(ChatType.GROUP, **{**base, **keys})


def private(**keys: Any) -> Target:
    return Target(ChatType.PRIVATE, **{"sender_id": "20002", "extra": {"self_id": "10001"}, **keys})


def part(text: str = "hello", *, target: Target | None = None, number: int = 0, **options: Any) -> Outgoing:
    return Outgoing("onebot", "in:7", "answer", number, target or group(), text, **options)


@dataclass
class Record:
    """Stands for the intake: what was recorded, in order; a repeat is none. ``away`` refuses everything."""

    messages: list[InboundMessage] = field(default_factory=list)
    away: bool = False
    refused: frozenset[str] = frozenset()  # texts that the database will never take
    calls: int = 0
    repeats: int = 0

    async def record(self, messages: Sequence[InboundMessage]) -> list[Recorded]:
        self.calls += 1
        await asyncio.sleep(0)
        if self.away or any(m.text in self.refused for m in messages):
            raise StoreUnavailable("away")
        results = []
        for message in messages:
            known = any(m.event_key == message.event_key for m in self.messages)
            results.append(Recorded.REPEAT if known else Recorded.NEW)
            self.repeats += known
            if not known:
                self.messages.append(message)
        return results

    @property
    def texts(self) -> list[str]:
        return [m.text for m in self.messages if m.kind == "message"]


@dataclass
class Gate:
    reason: str | None = None
    draining: bool = False

    def closed(self) -> str | None:
        return "stopping" if self.draining else self.reason


class Nothing:
    async def handle(self, _request: Any) -> Any:
        raise AssertionError("no test asks here")

    stop = pending = agents = handle


@dataclass
class Doors:
    """The server's real doors before one account."""

    platform: OneBot
    record: Record
    gate: Gate
    metrics: Metrics
    sockets: Sockets
    port: int = 0

    @property
    def ws(self) -> str:
        return f"http://127.0.0.1:{self.port}/ws/onebot"

    @property
    def webhook(self) -> str:
        return f"http://127.0.0.1:{self.port}/webhook/onebot"


@asynccontextmanager
async def doors(
    platform: OneBot,
    *,
    now: float = NOW,
    idle_s: float = IDLE_S,
    body_s: float = READ_TIMEOUT_S,
    **limits: Any,
) -> AsyncIterator[Doors]:
    record, gate, metrics = Record(), Gate(), Metrics(IntakeCounts(), dict)
    platforms = {platform.account: platform}
    sockets = Sockets(platforms, record, gate, metrics, **limits)
    server = Server(
        ServerSettings(port=0),
        send=Nothing(),
        doors=Web(
            Nothing(), ServerSettings(), account=None, language=lambda: "en", chat=Nothing, inside=Nothing()
        ),
        webhooks=Webhooks(platforms, record, gate, metrics, clock=lambda: now),
        sockets=sockets,
        chat=Nothing(),
        health=Health(metrics, broken=list, degraded=list),
        idle_s=idle_s,
        body_s=body_s,
    )
    await server.start()
    await platform.start()
    made = Doors(platform, record, gate, metrics, sockets, server.port)
    try:
        yield made
    finally:
        await platform.stop()
        await server.stop()
