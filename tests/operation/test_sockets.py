"""An account whose client is connected to one worker of several."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from feishu_bot.testing.onebot import FakeOneBot
from tests.e2e.bots import configuration, until
from tests.operation.operator import served_by

TOKEN = "token-of-the-tests"
SECRET = "secret-of-the-tests"


@pytest.fixture
async def qq():
    async with FakeOneBot(access_token=TOKEN, secret=SECRET) as fake:
        yield fake


def with_onebot(db_url: str, **account) -> dict:
    unlimited = {"messages_per_s": None, "messages_per_chat_per_s": None}
    settings = {"enabled": True, "access_token": TOKEN, "secret": SECRET, "api_url": None}
    return configuration(db_url, platforms={"onebot": {**settings, **unlimited, **account}})


async def posted(qq: FakeOneBot, bot, text: str, user: int) -> None:
    """Post a question by a connection of its own: any worker may get it, also one that has just been started."""
    event, status = qq.make(text, user_id=user), 0
    for _ in range(200):
        async with FakeOneBot(secret=SECRET) as client:
            with suppress(aiohttp.ClientError):
                status, _ = await client.post(f"{bot.url}/webhook/onebot", event)
        if status == 204:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"never taken: {status}")


@asynccontextmanager
async def client_of(qq: FakeOneBot, bot):
    """Keep a client connected, as implementations do."""
    connecting = asyncio.ensure_future(qq.keep_connected(f"{bot.url}/ws/onebot", pause_s=0.1))
    yield
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)


@pytest.mark.parametrize("api_url", [None, "http://127.0.0.1:9"], ids=["no API", "an API that does not run"])
async def test_answers_of_every_worker_go_out_by_the_one_socket_there_is(
    api_url, operator, qq, db_url, record
):
    bot = await operator.workers(with_onebot(db_url, api_url=api_url), 2)
    link = await qq.connect(f"{bot.url}/ws/onebot")
    for n in range(40):
        await posted(qq, bot, f"text {n}", 20000 + n)
    await until(lambda: len(qq.texts()) == 40, "all answers")
    await record.settled()
    assert sorted(qq.texts()) == sorted(f"text {n}" for n in range(40))
    assert {line["worker"] for line in bot.lines("message ended")} == {0, 1}
    (holder,) = {line["worker"] for line in bot.lines("socket opened")}
    left = {line["worker"] for line in bot.lines("reply postponed")}
    assert left == {0, 1} - {holder}, "each worker answers, and one of them has no way out"
    assert len(link.answers) == 40
    assert {row.state for row in record.outbox()} == {"sent"}


async def test_when_the_worker_with_the_socket_dies_what_waits_goes_out_by_the_next_one(
    operator, qq, db_url, record
):
    bot = await operator.workers(with_onebot(db_url), 2)
    link = await qq.connect(f"{bot.url}/ws/onebot")
    await posted(qq, bot, "before", 20001)
    await until(lambda: qq.texts() == ["before"], "the first answer")
    os.kill(served_by(bot, link.socket.get_extra_info("sockname")[1]), signal.SIGKILL)
    await until(link.closed.is_set, "the end of the socket")
    for n in range(10):
        await posted(qq, bot, f"text {n}", 20010 + n)
    async with client_of(qq, bot):
        await until(lambda: len(qq.texts()) >= 11, "what waited")
        await record.settled()
    assert sorted(qq.texts()[1:]) == sorted(f"text {n}" for n in range(10))
