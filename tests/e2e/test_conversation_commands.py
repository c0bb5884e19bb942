"""The commands that show and change conversations, on each database."""

from __future__ import annotations

import re

import pytest

from feishu_bot.store import schema
from tests.e2e.bots import configuration


@pytest.fixture
async def bot(bots, feishu, model, db_url):
    return await bots.start(configuration(db_url, feishu=feishu, model=model))


async def talk(bot, people, words, *, chat=None):
    """Say each and wait for its answer; return the answers."""
    where = {"chat": chat} if chat else {}
    before = len(await people.replies(0, chat))
    for n, text in enumerate(words, start=before + 1):
        await people.say(bot, text, **where)
        await people.replies(n, chat)
    return (await people.replies(0, chat))[before:]


def prompts(model):
    return [[m["content"] for m in r.body["messages"]][1:] for r in model.requests]


async def test_conversations_are_listed_and_gone_on_with(bot, people, model, record):
    await talk(bot, people, ["one", "/new", "two", "/rename   a new\nname"])
    (listed,) = await talk(bot, people, ["/threads"])
    first, second = (int(n) for n in re.findall(r"^(\d+)\.", listed, re.MULTILINE))
    assert "a new name (2 message(s)" in listed.splitlines()[1]
    assert listed.splitlines()[1].endswith("← current")
    switched, _ = await talk(bot, people, [f"/switch {second}", "three"])
    assert switched == "Going on with “one”."
    assert prompts(model)[-1] == ["one", "echo: one", "three"]
    await record.settled()
    rows = {row.id: row for row in record.rows(schema.conversations)}
    assert rows[first].scope_key is None
    assert (rows[second].scope_key, rows[second].message_count) == ("user:feishu:private:ou_ann", 4)


async def test_nobody_goes_on_with_what_belongs_to_another_chat(bot, people, record):
    await talk(bot, people, ["a secret", "/new"])
    await talk(bot, people, ["in the group", "/new"], chat="oc_team")
    await record.settled()
    secret, group = record.rows(schema.conversations)
    listed, refused, found = await talk(
        bot, people, ["/threads", f"/switch {secret.id}", "/search secret"], chat="oc_team"
    )
    assert "in the group" in listed
    assert "secret" not in listed
    assert refused.startswith(f"There is no conversation {secret.id} here")
    assert found == "“secret” was not found in the conversations of this chat."
    assert (await talk(bot, people, [f"/switch {group.id}"]))[0].startswith("There is no conversation")
    other = await talk(bot, people, ["/switch 999999999", "/switch x", "/switch"])
    assert [text.split(" ")[0] for text in other] == ["There", "Usage:", "Usage:"]


async def test_a_fork_goes_on_in_a_copy_and_leaves_the_original(bot, people, model, record):
    await talk(bot, people, ["one", "two", "/fork 1", "three"])
    assert prompts(model)[-1] == ["one", "echo: one", "three"]
    await record.settled()
    original, copy = record.rows(schema.conversations)
    assert (original.scope_key, original.message_count) == (None, 4)
    assert (copy.parent_id, copy.message_count) == (original.id, 4)
    assert copy.scope_key == "user:feishu:private:ou_ann"
    fewer, usage = await talk(bot, people, ["/fork 9", "/fork x"])
    assert fewer == "The recent history has 2 turn(s) only; no more can be left off."
    assert usage.startswith("Usage")
    assert (await talk(bot, people, ["/fork 2"]))[0].startswith("The copy would be empty")


async def test_undo_removes_the_last_turn_from_counters_search_and_what_the_model_sees(
    bot, people, model, record
):
    _, _, undone, _, found = await talk(bot, people, ["one", "two", "/undo", "three", "/search two"])
    assert undone == "The last turn was removed: two"
    assert prompts(model)[-1] == ["one", "echo: one", "three"]
    assert found.startswith("“two” was not found")
    await record.settled()
    (conversation,) = record.rows(schema.conversations)
    stored = record.messages()
    assert [m.content for m in stored] == ["one", "echo: one", "three", "echo: three"]
    assert conversation.message_count == 4
    assert conversation.total_tokens == sum(m.tokens for m in stored)


async def test_retry_answers_the_last_question_anew_and_keeps_one_answer(bot, people, model, record):
    *_, nothing = await talk(bot, people, ["/retry"])
    assert nothing == "This conversation has no messages yet."
    await talk(bot, people, ["one", "two", "/retry"])
    assert prompts(model)[-1] == ["one", "echo: one", "two"]
    await record.settled()
    (conversation,) = record.rows(schema.conversations)
    stored = record.messages()
    assert [m.content for m in stored] == ["one", "echo: one", "two", "echo: two"]
    assert conversation.message_count == 4
    assert conversation.total_tokens == sum(m.tokens for m in stored)
    assert len(record.ledger()) == 3
    record.check_accounts()


async def test_what_is_found_exported_and_counted_is_this_chats(bot, people, record):
    await talk(bot, people, ["天气怎么样", "/rename weather"])
    found, exported, stats, who = await talk(bot, people, ["/搜索 天气", "/export", "/stats", "/whoami"])
    assert "User: «天气»怎么样" in found
    assert exported.startswith("# weather\n\n**User** ")
    assert exported.endswith("\n\necho: 天气怎么样")
    assert "“weather”: 2 message(s)" in stats
    assert "Person: feishu:ou_ann" in who
    assert "Role: user" in who
    await record.settled()


async def test_where_one_conversation_spans_all_groups_none_is_shown_in_a_group(
    bots, people, feishu, model, sqlite_url
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, chat={"scope": "user"}))
    await talk(bot, people, ["secret"], chat="oc_team")
    words = ["/threads", "/search secret", "/export", "/stats", "/undo", "/fork", "/switch 1"]
    answers = await talk(bot, people, words, chat="oc_other")
    assert all(answer.startswith("This conversation spans several groups") for answer in answers)
