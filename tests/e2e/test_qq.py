"""QQ's official platform before servers as processes, killed and started again."""

from __future__ import annotations

import asyncio
import gzip
from io import BytesIO

import aiohttp
import orjson
import pytest

from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.qq import (
    FakeQQ,
    channel_event,
    group_event,
    make_event,
    private_event,
    sign,
    signed_event,
    validation_event,
)
from tests.e2e.bots import SECRET, configuration, until
from tests.e2e.proxy import Proxy

WORDS = " ".join(f"word{n}" for n in range(200))


@pytest.fixture
async def qq():
    async with FakeQQ(app_secret=SECRET, streaming=True) as fake:
        yield fake


def account(qq):
    return {
        "qq": {
            "enabled": True,
            "app_id": "102000001",
            "app_secret": SECRET,
            "base_url": qq.url,
            "token_url": qq.token_url,
        }
    }


async def post(http, bot, event):
    headers, body = signed_event(event, secret=SECRET)
    try:
        async with http.post(f"{bot.url}/webhook/qq", data=body, headers=headers) as answer:
            return answer.status
    except aiohttp.ClientError:
        return 0


async def test_after_a_kill_in_the_middle_of_a_streamed_answer_one_complete_message_comes(
    bots, http, model, qq, db_url, record
):
    config = configuration(db_url, model=model, platforms=account(qq))
    model.script(Behaviour(text=WORDS, chunk_delay_s=0.1))
    bot = await bots.start(config)
    assert await post(http, bot, private_event("tell me", message_id="m1")) == 200
    await until(lambda: qq.frames, "the first frame")
    await bot.kill()
    (shown,) = qq.texts()
    assert WORDS.startswith(shown)
    assert shown != WORDS

    bot = await bots.start(config)
    await record.settled()
    assert qq.texts() == [shown, "echo: tell me"]
    assert [row.content for row in record.messages()] == ["tell me", "echo: tell me"]
    assert [state for state, _ in qq.frames].count(10) <= 1
    await bot.stop()
    assert bot.complaints() == []


async def test_conversations_in_a_group_and_in_private_go_on_after_a_kill_each_with_its_own_history(
    bots, http, model, qq, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, model=model, platforms=account(qq))
    for round_ in range(2):
        bot = await bots.start(config)
        assert await post(http, bot, group_event(f"group {round_}", message_id=f"g{round_}")) == 200
        assert await post(http, bot, private_event(f"alone {round_}", message_id=f"p{round_}")) == 200
        await sqlite_record.settled()
        await bot.kill()
    asked = sorted([m["content"] for m in r.body["messages"]][1:] for r in list(model.requests)[-2:])
    assert asked == [
        ["alone 0", "echo: alone 0", "alone 1"],
        ["group 0", "echo: group 0", "group 1"],
    ]
    assert sorted(qq.texts()) == sorted(
        f"echo: {where} {n}" for where in ("group", "alone") for n in range(2)
    )


def hostile():
    """Yield requests that are no message, whoever signed them: a name, headers, body and the right answers."""
    good = private_event("words", message_id="good")
    headers, body = signed_event(good, secret=SECRET)

    def signed(content, **more):
        return {**sign(content, secret=SECRET), **more}, content

    yield "2 MiB", *signed(b"x" * 2 * 1024 * 1024), {413}
    yield "too deep", *signed(b"[" * 200_000), {400}
    yield "too deep, unsigned", {}, b"[" * 200_000, {401}
    yield "a bomb", {"Content-Encoding": "gzip"}, gzip.compress(b"0" * 50_000_000), {413}
    yield "UTF-16", *signed(b'{"op": 0}'.decode().encode("utf-16")), {400}
    yield "half a pair", *signed(b'{"op": 0, "d": {"content": "\\ud800"}}'), {400}
    yield "NaN", *signed(b'{"op": NaN}'), {400}
    yield "an endless op", *signed(b'{"op": ' + b"9" * 5000 + b"}"), {400}
    yield "no op", *signed(b'{"t": "C2C_MESSAGE_CREATE", "d": {}}'), {400}
    yield "another's signature", *signed_event(good, secret="another"), {401}
    yield "its own words changed", headers, body.replace(b"words", b"sword"), {401}
    yield "a later stamp", {**headers, "X-Signature-Timestamp": "1"}, body, {401}
    yield "a stamp in other digits", {**headers, "X-Signature-Timestamp": "\u0661"}, body, {401}
    yield (
        "two signatures",
        {**headers, "X-Signature-Ed25519": headers["X-Signature-Ed25519"] * 2},
        body,
        {401},
    )
    yield "no address to check", *signed(b'{"op": 13, "d": {"plain_token": {}, "event_ts": []}}'), {400}
    yield "a text as a message", *signed(b'{"op": 0, "t": "C2C_MESSAGE_CREATE", "d": "x"}'), {400}
    wide = {**good["d"], "id": "wide", "attachments": [{"url": "x" * 50} for _ in range(10_000)]}
    yield "many attachments", *signed_event({**good, "d": wide}, secret=SECRET), {200}
    long = {**good["d"], "id": "m" * 100_000, "author": {"user_openid": "u" * 100_000}}
    yield "endless ids", *signed_event({**good, "d": long}, secret=SECRET), {200}
    numbers = {**good["d"], "id": "numbers", "mentions": 5, "attachments": {"a": 1}, "message_scene": [[]]}
    yield "numbers for lists", *signed_event({**good, "d": numbers}, secret=SECRET), {200}
    nothing = make_event({"id": "i" * 5000, "data": {"resolved": []}}, event_type="INTERACTION_CREATE")
    yield "a button of nobody", *signed_event(nothing, secret=SECRET), {200}
    gone = orjson.dumps(make_event({"openid": "u" * 5000, "timestamp": 777}, event_type="FRIEND_DEL"))
    yield (
        "a friend with an endless name",
        *signed_event(gone.replace(b"777", b"9" * 30), secret=SECRET),
        {200},
    )


async def test_hostile_requests_on_every_database_are_refused_or_recorded_and_hurt_nobody(
    bots, http, model, qq, db_url, record
):
    bot = await bots.start(configuration(db_url, model=model, platforms=account(qq)))
    address = f"{bot.url}/webhook/qq"
    for name, headers, body, statuses in hostile():
        async with http.post(address, data=BytesIO(body), headers=headers) as answer:
            assert answer.status in statuses, name
            told = await answer.text()
            assert "Traceback" not in told
            assert "words" not in told
    await record.settled()
    assert {row.state for row in record.inbox()} <= {"answered", "refused", "ignored"}
    again = private_event("once", message_id="once")
    assert set(await asyncio.gather(*(post(http, bot, again) for _ in range(30)))) == {200}
    await record.settled()
    assert qq.texts()[-1] == "echo: once"
    assert qq.texts().count("echo: once") == 1
    await bot.stop()
    assert bot.complaints() == []


async def test_a_recall_that_comes_before_its_message_is_minded_when_that_comes(
    bots, http, model, qq, db_url, record
):
    bot = await bots.start(configuration(db_url, model=model, platforms=account(qq)))
    gone = {"message": {"id": "c1", "channel_id": "100010", "guild_id": "g", "author": {"id": "1234"}}}
    assert await post(http, bot, make_event(gone, event_type="PUBLIC_MESSAGE_DELETE")) == 200
    await record.ended(1)
    assert await post(http, bot, channel_event("not any more", message_id="c1")) == 200
    assert await post(http, bot, channel_event("but this", message_id="c2")) == 200
    await record.settled()
    assert qq.texts() == ["echo: but this"]
    assert not any("not any more" in text for text in record.texts())


async def test_while_the_database_is_away_qq_is_asked_to_repeat_and_the_address_still_proves_itself(
    bots, http, model, qq, postgresql_url
):
    async with Proxy(postgresql_url) as proxy:
        bot = await bots.start(configuration(proxy.url, model=model, platforms=account(qq)))
        assert await post(http, bot, private_event("before", message_id="m1")) == 200
        await until(lambda: qq.texts() == ["echo: before"], "the first answer")
        proxy.up = False
        proxy.cut()
        during = private_event("during", message_id="m2")
        assert [await post(http, bot, during) for _ in range(2)] == [503, 503]
        assert await post(http, bot, validation_event()) == 200
        proxy.up = True
        for _ in range(300):
            if await post(http, bot, during) == 200:
                break
            await asyncio.sleep(0.1)
        assert await post(http, bot, during) == 200
        await until(lambda: len(qq.texts()) > 1, "the second answer")
        assert await post(http, bot, private_event("after", message_id="m3")) == 200
        await until(lambda: "echo: after" in qq.texts(), "the third answer")
        assert qq.texts() == ["echo: before", "echo: during", "echo: after"]
        await bot.stop()
        assert bot.complaints() == []
