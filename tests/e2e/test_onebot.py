"""A QQ client on a real socket before a real server: what dies in between, and what is seen in the chat."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress

import pytest

from feishu_bot.testing.onebot import Failure, FakeOneBot
from tests.e2e.bots import Record, configuration, until
from tests.e2e.proxy import Proxy

TOKEN = "token-of-the-tests"
SECRET = "secret-of-the-tests"
GROUP = "group:30003"
PRIVATE = "private:20002"


@pytest.fixture
async def qq():
    async with FakeOneBot(access_token=TOKEN, secret=SECRET) as fake:
        yield fake


def with_onebot(db_url: str, **account) -> dict:
    settings = {"enabled": True, "access_token": TOKEN, "secret": SECRET, "api_url": None, **account}
    return configuration(db_url, platforms={"onebot": settings})


async def connected(qq: FakeOneBot, bot):
    return await qq.connect(f"{bot.url}/ws/onebot")


async def shown(qq: FakeOneBot, count: int, chat: str | None = None) -> list[str]:
    await until(lambda: len(qq.texts(chat)) >= count, f"{count} messages, not {qq.texts()}")
    return qq.texts(chat)


async def test_a_group_and_a_private_chat_are_answered_over_one_socket(bots, qq, sqlite_url, sqlite_record):
    bot = await bots.start(with_onebot(sqlite_url))
    await connected(qq, bot)
    question = await qq.say("in the group", group_id=30003, at=True)
    await qq.say("not for the bot", group_id=30003)
    await qq.say("in private")
    assert await shown(qq, 1, GROUP) == ["in the group"]
    assert await shown(qq, 1, PRIVATE) == ["in private"]
    await sqlite_record.settled()
    assert qq.visible[0].quotes == str(question["message_id"])
    assert sorted(r.state for r in sqlite_record.inbox()) == ["answered", "answered", "ignored"]
    assert not any("not for the bot" in text for text in sqlite_record.texts())
    assert bot.complaints() == []


async def test_who_quotes_the_bot_is_answered_and_who_quotes_others_is_not(
    bots, qq, sqlite_url, sqlite_record
):
    bot = await bots.start(with_onebot(sqlite_url))
    await connected(qq, bot)
    other = await qq.say("somebody's words", group_id=30003)
    await qq.say("a question", group_id=30003, at=True)
    await shown(qq, 1)
    await sqlite_record.settled()
    for quoted, text in ((other["message_id"], "to him"), (qq.visible[0].message_id, "to the bot")):
        quote = {"type": "reply", "data": {"id": str(quoted)}}
        await qq.say([quote, {"type": "text", "data": {"text": text}}], group_id=30003)
    assert (await shown(qq, 2))[1].endswith("to the bot")
    await sqlite_record.ended(4)
    assert not any("to him" in text for text in sqlite_record.texts())


@pytest.mark.parametrize("step", ["recorded", "claimed", "begun", "answered", "committed", "sent"])
async def test_wherever_the_server_dies_after_the_record_the_answer_is_seen_once(
    step, bots, qq, sqlite_url, sqlite_record
):
    config = with_onebot(sqlite_url)
    bot = await bots.start(config, crash=(step, 1))
    await connected(qq, bot)
    with suppress(ConnectionError):
        await qq.say("hello", group_id=30003, at=True)
    assert await bot.ended() == -9
    bot = await bots.start(config)
    await connected(qq, bot)
    assert await shown(qq, 1) == ["hello"]
    await sqlite_record.settled()
    assert qq.texts() == ["hello"]
    assert [row.state for row in sqlite_record.outbox()] == ["sent"]


@pytest.mark.parametrize("sent", [True, False])
async def test_a_socket_that_breaks_in_the_middle_of_a_call_costs_no_answer_and_shows_none_twice(
    sent, bots, qq, sqlite_url, sqlite_record
):
    bot = await bots.start(with_onebot(sqlite_url))
    link = await connected(qq, bot)
    qq.fail(Failure(drop=True, sent=sent))
    await qq.say("hello")
    await until(link.closed.is_set, "the end of the socket")
    await until(lambda: [r.state for r in sqlite_record.outbox()] == ["pending"], "a part that waits")
    await connected(qq, bot)
    await sqlite_record.settled()
    assert qq.texts() == ["hello"]
    assert [row.state for row in sqlite_record.outbox()] == ["sent"]


async def test_answers_that_found_nobody_connected_go_out_when_somebody_connects(
    bots, qq, sqlite_url, sqlite_record
):
    bot = await bots.start(with_onebot(sqlite_url))
    for n in range(5):
        event = qq.make(f"text {n}", user_id=20000 + n)
        assert (await qq.post(f"{bot.url}/webhook/onebot", event))[0] == 204
    await until(lambda: [r.state for r in sqlite_record.outbox()] == ["pending"] * 5, "parts that wait")
    assert qq.texts() == []
    await connected(qq, bot)
    assert sorted(await shown(qq, 5)) == [f"text {n}" for n in range(5)]


async def test_an_http_client_alone_is_answered_by_its_api(bots, qq, sqlite_url):
    bot = await bots.start(with_onebot(sqlite_url, api_url=qq.url))
    assert (await qq.post(f"{bot.url}/webhook/onebot", qq.make("hello")))[0] == 204
    assert await shown(qq, 1, PRIVATE) == ["hello"]


async def test_where_the_outcome_cannot_be_known_the_answer_is_kept_for_a_person(
    bots, qq, sqlite_url, sqlite_record
):
    qq.no_history = True
    config = with_onebot(sqlite_url)
    bot = await bots.start(config, crash=("sent", 1))
    await connected(qq, bot)
    await qq.say("hello")
    assert await bot.ended() == -9
    bot = await bots.start(config)
    await connected(qq, bot)
    await sqlite_record.settled()
    (row,) = sqlite_record.outbox()
    assert (row.state, qq.texts()) == ("refused", ["hello"])
    assert "outcome unknown" in row.last_error


async def test_a_server_that_stops_says_goodbye_and_keeps_what_it_has_read(
    bots, qq, sqlite_url, sqlite_record
):
    config = with_onebot(sqlite_url)
    bot = await bots.start(config)
    link = await connected(qq, bot)
    for n in range(50):
        await qq.say(f"text {n}")
    await until(sqlite_record.inbox, "a record")
    assert await bot.stop() == 0
    await until(link.closed.is_set, "the end of the socket")
    assert link.close_code == 1001
    read = len(sqlite_record.inbox())
    bot = await bots.start(config)
    await connected(qq, bot)
    await sqlite_record.settled()
    assert qq.texts() == [f"text {n}" for n in range(read)]


async def test_a_thousand_silent_connections_keep_nobody_from_being_answered(
    bots, qq, sqlite_url, sqlite_record
):
    bot = await bots.start(with_onebot(sqlite_url))
    resource.prlimit(bot.pid, resource.RLIMIT_NOFILE, (256, 256))
    link = await connected(qq, bot)
    held = []

    async def hold() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(bot.url.rpartition(":")[2]))
        held.append(writer)
        writer.write(b"POST /webhook/onebot HTTP/1.1\r\nHost: x\r\n")

    for _ in range(10):
        await asyncio.gather(*(hold() for _ in range(100)), return_exceptions=True)
    await qq.say("by the socket")
    assert await shown(qq, 1) == ["by the socket"]
    assert (await qq.post(f"{bot.url}/webhook/onebot", qq.make("by the webhook")))[0] == 204
    assert (await shown(qq, 2))[1] == "by the webhook"
    assert not link.closed.is_set()
    for writer in held:
        writer.close()
    assert bot.lines("connections ended")
    assert bot.complaints() == []


@pytest.mark.parametrize("database", ["postgresql_url", "mariadb_url"])
async def test_what_is_said_while_the_database_is_away_is_answered_in_order_and_once(
    database, bots, qq, request
):
    url = request.getfixturevalue(database)
    async with Proxy(url) as proxy:
        bot = await bots.start(with_onebot(proxy.url))
        link = await connected(qq, bot)
        await qq.say("before")
        await shown(qq, 1)
        proxy.up = False
        proxy.cut()
        said = [await qq.say(f"text {n}") for n in range(20)]
        await until(lambda: bot.lines("store unavailable"), "the loss to be noticed")
        for event in reversed(said):  # a client that tells everything again, and in another order
            await link.push(event)
        link = await connected(qq, bot)
        await link.push(said[0])
        proxy.up = True
        assert await shown(qq, 21) == ["before", *(f"text {n}" for n in range(20))]
        record = Record(url)
        await record.settled()
        assert len(record.inbox()) == len(qq.texts()) == 21
        record.close()
        assert bot.complaints() == []
        assert await bot.stop() == 0
