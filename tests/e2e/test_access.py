"""Who is answered, and what is not: access, mentions, outsiders, pictures, lengths, ages and numbers."""

from __future__ import annotations

import asyncio

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.feishu import make_event, message_event
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until

NO = "Sorry, you may not use this bot. Please ask its administrator."


@pytest.mark.parametrize(
    "access",
    [
        {"deny": ["feishu:ou_ann"]},
        {"deny": ["feishu:private:ou_ann", "feishu:oc_team"]},
        {"deny": ["feishu:ou_a*"], "allow": ["feishu:ou_ann"]},
        {"default": "deny", "allow": ["feishu:ou_bob"]},
    ],
    ids=str,
)
async def test_whoever_is_denied_is_told_once_a_day_in_each_chat_and_others_are_answered(
    bots, people, feishu, sqlite_url, sqlite_record, access
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, access=access))
    for text in ("hi", "/help", "really?"):
        await people.say(bot, text)
    await people.say(bot, "hi", chat="oc_team")
    await people.say(bot, "hi", user="bob")
    await sqlite_record.settled()
    assert feishu.texts("oc_ann") == [NO]
    assert feishu.texts("oc_team") == [NO]
    assert feishu.texts("oc_bob") == ["hi"]
    assert [(r.state, r.reason) for r in sqlite_record.inbox()] == [("refused", "access")] * 4 + [
        ("answered", None)
    ]
    assert [m.content for m in sqlite_record.messages()] == ["hi", "hi"]


async def test_people_of_another_company_are_ignored_unless_they_are_let_in(
    bots, people, feishu, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu)
    bot = await bots.start(config)
    await people.say(bot, "from outside", sender_tenant_key="another")
    await people.say(bot, "from inside", user="bob")
    assert await people.replies(1) == ["from inside"]
    await sqlite_record.settled()
    row = sqlite_record.inbox()[0]
    assert (row.state, row.reason) == ("ignored", "from outside the company")
    assert "from outside" not in row.payload
    await bot.stop()
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, access={"outsiders": "allow"}))
    await people.say(bot, "and now", sender_tenant_key="another")
    assert (await people.replies(2))[1] == "and now"


async def test_what_is_not_said_to_the_bot_is_seen_and_its_text_not_stored(
    bots, people, feishu, model, db_url, record
):
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model))
    await people.say(bot, "first", chat="oc_team")  # the bot knows its own id by now
    await people.replies(1)
    message_id = await people.say(bot, "among ourselves", chat="oc_team", at_bot=False)
    (row,) = record.inbox(event_key=f"om:{message_id}#seen")
    assert (row.state, row.reason) == ("ignored", "not addressed")
    assert not any("among ourselves" in text for text in record.texts())
    await people.say(bot, "now you", chat="oc_team", message_id=message_id)
    assert (await people.replies(2))[1] == "echo: now you", "an addressed copy of it is taken"
    assert [m["content"] for m in model.requests[-1].body["messages"]][-1] == "now you"
    record.check_ends()


async def test_a_bots_own_words_and_what_nobody_said_are_ignored(
    bots, people, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    await people.say(bot, "I am a bot", sender_type="app")
    event = make_event({"chat_id": "oc_x", "operator_id": {}}, event_type="im.chat.member.bot.added_v1")
    assert await people.post(bot, event) == 200
    assert await people.post(bot, event) == 200
    await people.say(bot, "hi")
    assert await people.replies(1) == ["hi"]
    await sqlite_record.settled()
    assert [(r.state, r.reason) for r in sqlite_record.inbox()] == [
        ("ignored", "from a bot"),
        ("ignored", "event"),
        ("answered", None),
    ]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ({"enable_private": False}, "private chats are off"),
        ({"enable_in_groups": False}, "groups are off"),
    ],
    ids=str,
)
async def test_chats_that_are_switched_off_are_ignored(
    bots, people, feishu, sqlite_url, sqlite_record, chat, reason
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, chat=chat))
    await people.say(bot, "private")
    await people.say(bot, "group", chat="oc_team")
    await people.replies(1)
    await sqlite_record.settled()
    assert sorted((r.state, r.reason or "") for r in sqlite_record.inbox()) == [
        ("answered", ""),
        ("ignored", reason),
    ]


async def test_without_the_need_of_a_mention_groups_are_answered_too(bots, people, feishu, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, chat={"require_at_in_groups": False}))
    await people.say(bot, "hi all", chat="oc_team", at_bot=False)
    assert await people.replies(1) == ["hi all"]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("image", {"image_key": "img_1"}),
        ("file", {"file_key": "f", "file_name": "secret-plan.pdf"}),
        ("audio", {"file_key": "f"}),
        ("sticker", {"file_key": "f"}),
        ("location", {"name": "here"}),
        ("something_new", {"text": "what is this"}),
        ("text", {"text": "   "}),
        ("text", "no JSON at all"),
    ],
    ids=str,
)
async def test_what_cannot_be_read_is_refused_with_a_sentence(
    bots, people, feishu, model, sqlite_url, sqlite_record, kind, content
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai={"images": False}))
    event = message_event(content, message_type=kind, chat_id="oc_ann", message_id="om_1")
    assert await people.post(bot, event) == 200
    (text,) = await people.replies(1)
    assert text.startswith("Sorry, I can only read text.")
    await sqlite_record.settled()
    (row,) = sqlite_record.inbox()
    assert row.state == "refused"
    assert row.reason.startswith("cannot read: ")
    assert model.count == 0


async def test_a_bare_mention_is_asked_for_its_question(bots, people, feishu, sqlite_url, sqlite_record):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    await people.say(bot, "", chat="oc_team")
    (text,) = await people.replies(1)
    assert text.startswith("I am here.")
    await sqlite_record.settled()
    assert sqlite_record.inbox()[0].reason == "cannot read: mention"


async def test_a_question_that_is_too_long_is_refused_with_both_numbers(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu, model=model, chat={"max_input_tokens": 20})
    bot = await bots.start(config)
    await people.say(bot, "word " * 30)
    expected = "Your message has 31 tokens; the limit is 20. Please send a shorter one."
    assert await people.replies(1) == [expected]
    await sqlite_record.settled()
    assert sqlite_record.messages() == []
    assert model.count == 0


async def test_what_is_too_old_after_an_outage_is_not_answered_and_one_note_per_chat_says_how_many(
    bots, people, feishu, model, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model, chat={"answer_within": "2s"})
    model.default = Behaviour("hang")
    bot = await bots.start(config)
    for n in range(3):
        await people.say(bot, f"old {n}")
    for name in ("bob", "cyd"):
        await people.say(bot, "old too", user=name, chat="oc_team")
    await until(lambda: model.count == 3, "the questions")
    await bot.kill()
    newest = max(r.received_at for r in record.inbox())
    await until(lambda: record.now_ms() > newest + 2100, "time to pass")
    model.default = Behaviour()
    bot = await bots.start(config)
    await people.say(bot, "fresh", user="dan")
    await people.replies(3)
    await record.settled()
    note = "The service was interrupted; {} older message(s) were not answered. "
    assert [text.split("Please")[0] for text in feishu.texts("oc_ann")] == [note.format(3)]
    assert [text.split("Please")[0] for text in feishu.texts("oc_team")] == [note.format(2)]
    assert feishu.texts("oc_dan") == ["echo: fresh"]
    assert [r.state for r in record.inbox()] == ["expired"] * 5 + ["answered"]
    assert {m.content for m in record.messages()} == {"fresh", "echo: fresh"}
    metrics = await (await people.http.get(f"{bot.url}/metrics")).text()
    assert 'feishu_bot_ended_total{account="feishu",end="expired"} 5.0' in metrics
    assert record.rows(schema.reservations) == []
    record.check_ends()


async def test_more_waiting_messages_than_allowed_are_put_off_before_the_acknowledgement(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    model.default = Behaviour("hang")
    config = configuration(
        sqlite_url, feishu=feishu, model=model, server={"max_waiting": 3, "max_waiting_age_s": 1}
    )
    bot = await bots.start(config)
    for n in range(4):
        await people.say(bot, f"waiting {n}", user=f"u{n}")

    async def probe():
        return await people.post(bot, people.event("one more", user="late", message_id="om_late"))

    for _ in range(200):  # the depth is counted once a second
        if await probe() == 503:
            break
        await asyncio.sleep(0.05)
    assert await probe() == 503
    (line, *_) = bot.lines("request put off")
    assert "server.max_waiting is 3" in line["reason"]
    ready = await people.http.get(f"{bot.url}/readyz")
    assert ready.status == 200
    assert any("max_waiting" in reason for reason in (await ready.json())["degraded"])
    model.default = Behaviour()
    assert len(sqlite_record.inbox()) <= 5


async def test_a_message_that_cannot_even_be_begun_holds_up_nobody_and_ends_dead(
    bots, people, feishu, db_url, record
):
    feishu.down = True
    config = configuration(db_url, feishu=feishu)
    bot = await bots.start(config)
    await people.say(bot, "will be damaged")
    await people.say(bot, "behind it")
    await record.ended(2)
    await bot.stop()
    record.execute(
        schema.inbox.update()
        .where(schema.inbox.c.id == 1)
        .values(state="open", payload="{damaged", ended_at=None)
    )
    record.execute(schema.lanes.update().values(ready_at=0))
    feishu.down = False
    bot = await bots.start(config)
    await people.say(bot, "hello", user="bob")
    await people.say(bot, "next")
    await until(lambda: "hello" in feishu.texts(), "the others")
    await until(lambda: record.inbox()[0].state == "dead", "the end of the damaged message")
    assert record.inbox()[0].reason == "the stored event cannot be read"
    await until(lambda: "next" in feishu.texts(), "what came behind it")
    assert (await (await people.http.get(f"{bot.url}/readyz")).json())["status"] != "unavailable"
