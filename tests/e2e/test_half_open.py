"""A QQ client whose connection is half open: it sends, and nothing reaches it. With the server's own patience.

The event loop's clock is handed in: it runs sixty times as fast as others, so that a minute passes in a second.
"""

from __future__ import annotations

import asyncio
import selectors
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from feishu_bot.app import App
from feishu_bot.config import BotSettings
from feishu_bot.platforms.onebot import OneBotSettings
from feishu_bot.store.schema import inbox, outbox
from feishu_bot.testing.onebot import Failure, FakeOneBot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

TOKEN = "token-of-the-tests"
FASTER = 60.0
PATIENCE_S = 30.0 * FASTER  # after which a test gives up what it waits for; nothing is measured with it


class FastSelector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> Any:
        return super().select(None if timeout is None else timeout / FASTER)


class FastLoop(asyncio.SelectorEventLoop):
    """An event loop for which a second is over in a sixtieth of one."""

    def __init__(self) -> None:
        super().__init__(FastSelector())

    def time(self) -> float:
        return super().time() * FASTER


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=FastLoop) as runner:
        runner.run(work)


async def until(condition: Callable[[], Any], what: str) -> None:
    end = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.1)


@asynccontextmanager
async def serving(folder: Any, fake: FakeOneBot) -> AsyncIterator[App]:
    account = {"type": "onebot", "enabled": True, "access_token": TOKEN, "api_url": None}
    app = App(
        BotSettings.model_validate(
            {
                "server": {"port": 0, "min_free_mb": 0},
                "ai": {"conversation_persistence": {"db_url": f"sqlite:///{folder}/bot.db"}},
                "budgets": [],
                "plugins": {"enabled": []},
                "schedule": {"cleanup": {"enabled": False}, "backup": {"enabled": False}},
                "platforms": {"onebot": OneBotSettings.model_validate(account)},
            }
        )
    )
    await app.start()
    try:
        yield app
    finally:
        await fake.stop()
        await app.stop()


async def rows(app: App, table: Any) -> list[Any]:
    statement = select(table).order_by(*table.primary_key)
    return await app.store.read(lambda tx: list(tx.connection.execute(statement)))


def url(app: App) -> str:
    return f"http://127.0.0.1:{app.port}/ws/onebot"


@pytest.mark.parametrize("arrived", [True, False], ids=["the call arrived", "the call was lost"])
def test_a_connection_half_open_for_a_minute_costs_no_event_and_shows_no_answer_twice(tmp_path, arrived):
    async def scenario() -> None:
        fake = FakeOneBot(access_token=TOKEN)
        await fake.start()
        async with serving(tmp_path, fake) as app:
            link = await fake.connect(url(app))
            await fake.say("one")
            await until(lambda: fake.texts() == ["one"], "the first answer")
            fake.fail(Failure(silent=True, sent=arrived))
            await fake.say("two")
            await until(lambda: len(fake.calls) == 2, "the call that nobody answers")
            link.freeze()
            await fake.say("three", user_id=20003)
            # The server finds the silence by itself, closes the socket, and keeps what it could not send.
            await until(app.platforms["onebot"].problems, "the end of the silent connection")
            assert [r.state for r in await rows(app, outbox)].count("sent") == 1
            assert len(await rows(app, inbox)) == 3, "what the client said on it is recorded"
            await asyncio.sleep(60)
            await asyncio.gather(*(fake.connect(url(app)) for _ in range(2)))
            await until(lambda: sorted(fake.texts()) == ["one", "three", "two"], "what waited")
            await asyncio.sleep(60)
            assert sorted(fake.texts()) == ["one", "three", "two"]
            assert [r.state for r in await rows(app, outbox)] == ["sent"] * 3

    run(scenario())
