"""The platform fails in every way; whatever was answered is delivered afterwards, in order, once."""

from __future__ import annotations

import pytest

from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import SECRET, configuration, until

SAID = ["one", "two", "three"]

FAILURES = {
    "500": Failure(status=500, code=2200),
    "500 of a gateway": Failure(status=500, raw=b"<html>oops</html>"),
    "502": Failure(status=502, raw=b""),
    "503": Failure(status=503, raw=b"down"),
    "429": Failure(status=429, raw=b"", headers={"Retry-After": "0"}),
    "429 with a code": Failure(status=429, code=99991400, headers={"x-ogw-ratelimit-reset": "0"}),
    "400 frequency of calls": Failure(status=400, code=99991400),
    "200 frequency in the chat": Failure(code=230020),
    "no JSON": Failure(raw=b"<html>200 and yet no answer</html>"),
    "no object": Failure(raw=b"[]"),
    "cut off before it was taken": Failure(drop="before"),
    "cut off after it was taken": Failure(drop="after"),
    "token refused": Failure(status=400, code=99991663),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_what_a_platform_that_fails_for_a_while_missed_comes_afterwards_in_order_and_once(
    bots, people, feishu, sqlite_url, sqlite_record, name
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    feishu.fail(FAILURES[name])
    for text in SAID:
        await people.say(bot, text)
    assert await people.replies(len(SAID)) == SAID
    await sqlite_record.settled()
    assert feishu.texts() == SAID
    assert [row.state for row in sqlite_record.outbox()] == ["sent"] * len(SAID)
    assert bot.complaints() == []
    if name == "cut off after it was taken":
        assert feishu.folded == 1, "the second attempt had the same key"


async def test_a_platform_that_is_down_and_refuses_connections_gets_everything_when_it_is_back(
    bots, people, http, sqlite_url, sqlite_record
):
    fake = FakeFeishu(app_secret=SECRET)
    await fake.start()
    port = int(fake.url.rsplit(":", 1)[1])
    people.feishu = fake
    bot = await bots.start(configuration(sqlite_url, feishu=fake))
    await people.say(bot, "before")
    await people.replies(1)
    await fake.stop()
    for text in SAID:
        await people.say(bot, text)
        await people.say(bot, f"bob {text}", user="bob")
    await until(lambda: bot.lines("reply postponed"), "a failed attempt")
    await fake.start(port=port)
    fake.down = True
    await until(lambda: any("503" in line["reason"] for line in bot.lines("reply postponed")), "an attempt")
    fake.down = False
    await people.replies(1 + 2 * len(SAID))
    assert fake.texts("oc_ann") == ["before", *SAID]
    assert fake.texts("oc_bob") == [f"bob {text}" for text in SAID]
    await sqlite_record.settled()
    await fake.stop()


async def test_what_the_platform_will_never_take_is_a_dead_letter_and_holds_up_nothing(
    bots, people, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    feishu.fail(Failure(status=400, code=230027))
    await people.say(bot, "refused")
    await people.say(bot, "taken")
    assert await people.replies(1) == ["taken"]
    await sqlite_record.settled()
    refused, sent = sqlite_record.outbox()
    assert (refused.state, sent.state) == ("refused", "sent")
    assert "230027" in refused.last_error
    assert [row.state for row in sqlite_record.inbox()] == ["answered", "answered"]


async def test_a_reply_whose_question_was_recalled_goes_to_the_chat_as_a_plain_message(
    bots, people, feishu, sqlite_url
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    feishu.fail(Failure(status=400, code=230011))
    await people.say(bot, "gone by now")
    await people.replies(1)
    (message,) = feishu.visible
    assert (message.reply_to, message.chat, message.text) == (None, "oc_ann", "gone by now")


async def test_an_answer_waiting_for_a_platform_that_is_down_survives_a_kill(
    bots, people, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu)
    bot = await bots.start(config)
    feishu.down = True
    for text in SAID:
        await people.say(bot, text)
    await record.ended(len(SAID))
    await bot.kill()
    feishu.down = False
    await bots.start(config)
    assert await people.replies(len(SAID)) == SAID
    await record.settled()
    assert feishu.texts() == SAID


async def test_a_mention_that_comes_before_the_bot_knows_its_own_id_waits_and_is_answered_then(
    bots, people, feishu, db_url, record
):
    feishu.fail(Failure(status=503, raw=b""), times=1, on="info")
    budget = {"name": "ever", "window": "total", "limit_tokens": 10_000}
    bot = await bots.start(
        configuration(db_url, feishu=feishu, budgets=[budget], chat={"max_input_tokens": 50})
    )
    await people.say(bot, "hello you", chat="oc_team")
    await people.say(bot, "word " * 60, chat="oc_team", user="cyd")
    stranger = {"key": "@_user_1", "id": {"open_id": "ou_other"}, "name": "other"}
    await people.say(bot, "@_user_1 secret", chat="oc_team", user="bob", at_bot=False, mentions=[stranger])
    assert {row.state for row in record.inbox()} == {"open"}
    assert (await (await people.http.get(f"{bot.url}/readyz")).json())["status"] == "degraded"
    assert set(await people.replies(2)) == {
        "hello you",
        "Your message has 60 tokens; the limit is 50. Please send a shorter one.",
    }
    await record.settled()
    states = {row.lane_key.rsplit(":", 1)[1]: (row.state, row.reason, row.payload) for row in record.inbox()}
    assert states["ou_ann"][0] == "answered"
    assert states["ou_cyd"][:2] == ("refused", "too long")
    assert states["ou_bob"] == ("ignored", "not addressed", "{}")
    asked, _ = record.messages()
    assert asked.tokens == 2, "counted although it could be read only when the id was known"
    record.check_accounts()
