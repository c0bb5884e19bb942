"""The main job: a signed event in, a durable answer out."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import MODEL, configuration, until


async def test_an_encrypted_signed_event_becomes_one_reply_in_its_thread_and_a_full_record(
    bots, people, model, feishu, db_url, record
):
    budget = {"name": "day", "window": "day", "limit_tokens": 100_000}
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, budgets=[budget]))
    message_id = await people.say(bot, "how are you?", chat="oc_team", thread_id="omt_7")
    assert await people.replies(1) == ["echo: how are you?"]
    await record.settled()

    (reply,) = feishu.visible
    (message,) = record.inbox()
    assert (reply.reply_to, reply.thread, reply.chat) == (message_id, True, "oc_team")
    source = f"feishu\nin:{message.id}\nanswer\n0"
    assert reply.uuid == hashlib.sha256(source.encode()).hexdigest()[:40]
    assert (message.event_key, message.state, message.attempts) == (f"om:{message_id}", "answered", 1)

    (conversation,) = record.rows(schema.conversations)
    assert conversation.scope_key == message.lane_key == "in:feishu:group:oc_team:ou_ann"
    assert (conversation.user_key, conversation.user_id) == ("feishu:group:ou_ann", "feishu:ou_ann")
    assert (conversation.title, conversation.chat_id) == ("how are you?", "oc_team")
    asked, said = record.messages()
    assert (asked.role, asked.content, asked.sender_id) == ("user", "how are you?", "feishu:group:ou_ann")
    assert asked.source_id == message_id
    assert (said.role, said.content) == ("assistant", "echo: how are you?")
    (call,) = record.ledger()
    (request,) = model.requests
    assert (call.model, call.outcome, call.attempt, call.call) == (MODEL, "ok", 1, 0)
    assert (call.user_id, call.chat_id, call.platform) == ("feishu:ou_ann", "oc_team", "feishu")
    assert (call.input_tokens, call.output_tokens) == (request.prompt_tokens, request.output_tokens)
    assert (asked.tokens, said.tokens) == (4, request.output_tokens)
    assert conversation.total_tokens == asked.tokens + said.tokens
    (part,) = record.outbox()
    assert (part.state, part.sent_id, part.attempts) == ("sent", reply.message_id, 1)
    record.check_accounts()
    record.check_ends()
    assert bot.complaints() == []
    (line,) = bot.lines("message ended")
    assert (line["end"], line["account"], line["inbox"]) == ("answered", "feishu", message.id)
    assert "how are you" not in bot.log.read_text(), "no message text in a log"


async def test_the_history_goes_with_the_next_question_and_stays_in_its_chat(
    bots, people, model, feishu, sqlite_url
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    await people.say(bot, "I am Ann")
    await people.replies(1)
    await people.say(bot, "who am I?")
    await people.replies(2)
    await people.say(bot, "and here?", chat="oc_team")
    await people.replies(3)
    first, second, elsewhere = ([m["content"] for m in r.body["messages"]] for r in model.requests)
    assert second[1:] == ["I am Ann", "echo: I am Ann", "who am I?"]
    assert first[1:] == ["I am Ann"]
    assert elsewhere[1:] == ["and here?"], "a private word never reaches a group"


async def test_the_same_message_five_times_at_once_and_after_a_restart_is_answered_once(
    bots, people, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu)
    bot = await bots.start(config)
    event = people.event("only once")
    message_id = event["event"]["message"]["message_id"]
    other_id = people.event("only once", message_id=message_id)
    assert other_id["header"]["event_id"] != event["header"]["event_id"]
    at_once = [event, event, event, other_id, other_id]
    assert await asyncio.gather(*(people.post(bot, e) for e in at_once)) == [200] * 5
    await people.replies(1)
    assert [await people.post(bot, e) for e in (event, other_id)] == [200, 200]
    assert await bot.stop() == 0
    bot = await bots.start(config)
    assert [await people.post(bot, e) for e in at_once] == [200] * 5
    await people.say(bot, "something else")
    assert await people.replies(2) == ["only once", "something else"]
    await record.settled()
    assert record.count(schema.inbox) == 2
    assert [m.content for m in record.messages(role="user")] == ["only once", "something else"]


async def test_messages_of_one_person_are_answered_in_order_while_others_are_not_held_up(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    model.script(Behaviour(delay_s=0.5))
    for n in range(5):
        await people.say(bot, f"slow {n}")
    await people.say(bot, "quick", user="bob")
    await people.replies(6)
    assert feishu.visible[0].text == "echo: quick"
    assert feishu.texts("oc_ann") == [f"echo: slow {n}" for n in range(5)]
    await sqlite_record.settled()


async def test_three_hundred_people_at_once_are_all_answered_by_a_model_that_takes_a_second(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    model.default = Behaviour(delay_s=1.0)
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    await asyncio.gather(*(people.say(bot, f"I am {n}", user=f"u{n}") for n in range(300)))
    replies = await people.replies(300)
    assert sorted(replies) == sorted(f"echo: I am {n}" for n in range(300))
    await sqlite_record.settled()
    assert Counter(r.state for r in sqlite_record.inbox()) == {"answered": 300}
    assert bot.complaints() == []


async def test_a_long_answer_comes_in_parts_in_order_and_no_code_block_is_cut(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu, model=model, chat={"max_message_length": 200})
    bot = await bots.start(config)
    code = "```python\n" + "".join(f"print({n})\n" for n in range(12)) + "```"
    words = " ".join(f"word{n}" for n in range(25))
    answer = f"{words}\n\n{code}\n\n{words}"
    model.script(Behaviour(text=answer))
    await people.say(bot, "tell me")
    await until(lambda: feishu.visible and not sqlite_record.inbox(state="open"), "the answer")
    await sqlite_record.settled()
    parts = feishu.texts()
    assert all(len(part) <= 200 for part in parts)
    assert code in parts, "the block is whole, in one part"
    assert "".join("".join(parts).split()) == "".join(answer.split())
    assert [r.part for r in sqlite_record.outbox()] == list(range(len(parts)))
    (_, said) = sqlite_record.messages()
    assert said.content == answer


async def test_whatever_characters_a_text_holds_come_back(bots, people, feishu, db_url, record):
    bot = await bots.start(configuration(db_url, feishu=feishu))
    texts = ["nul \0 in it", "👩\u200d👧 family", "e\u0301\u202e reversed", "𠮷" * 50]
    for text in texts:
        await people.say(bot, text)
    seen = [text.replace("\0", "") for text in texts]
    assert await people.replies(len(texts)) == seen
    await record.settled()
    assert [m.content for m in record.messages()] == [text for text in seen for _ in range(2)]


async def test_a_nul_from_a_model_reaches_store_and_platform_as_the_replacement_character(
    bots, people, model, feishu, db_url, record
):
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model))
    model.script(Behaviour(text="a\0b"))
    await people.say(bot, "hi")
    assert await people.replies(1) == ["a\ufffdb"]
    await record.settled()
    assert record.messages()[-1].content == "a\ufffdb"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [('plain <at user_id="all">all</at>', "text"), ("**bold** and `code`", "post")],
)
async def test_an_answer_is_a_post_where_it_holds_markdown_and_never_pings_anybody(
    bots, people, model, feishu, sqlite_url, answer, kind
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    model.script(Behaviour(text=answer))
    await people.say(bot, "hi")
    await people.replies(1)
    assert feishu.visible[0].msg_type == kind
    assert "<at" not in feishu.visible[0].content
