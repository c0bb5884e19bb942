"""QQ's official platform before servers as processes, killed and started again."""

from __future__ import annotations

import aiohttp
import pytest

from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.qq import FakeQQ, group_event, private_event, signed_event
from tests.e2e.bots import SECRET, configuration, until

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
