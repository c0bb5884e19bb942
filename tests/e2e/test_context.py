"""What of a conversation is sent: its newest turns, a summary of the others, and what ``/why`` tells of it."""

from __future__ import annotations

import orjson
import pytest
from sqlalchemy import insert, update

from feishu_bot.ai.prompt import SUMMARY_INTRODUCTION
from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration
from tests.sizes import FULL_SIZE

SHORT = {
    "summarize": True,
    "conversation_persistence": {"max_history_turns": 4},
    "system_prompt": "Be kind.",
}
TURNS = 10_000 if FULL_SIZE else 2_000
BUDGET = {"name": "ever", "window": "total", "limit_tokens": 1_000_000}


def is_summary(request):
    return request.body["messages"][0]["content"].startswith("Summarise the conversation")


async def talk(bot, people, first, last):
    for n in range(first, last + 1):
        await people.say(bot, f"question {n}")
        await people.replies(n)


async def test_what_no_longer_fits_goes_along_as_a_summary_that_is_made_now_and_then(
    bots, people, feishu, model, db_url, record
):
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, ai=SHORT, budgets=[BUDGET]))
    await talk(bot, people, 1, 10)
    await record.settled()
    (conversation,) = record.rows(schema.conversations)
    summaries = [r for r in model.requests if is_summary(r)]
    assert len(summaries) == 2
    assert "[user] question 1" in summaries[0].body["messages"][1]["content"]
    assert summaries[1].body["messages"][1]["content"].startswith("[summary so far]\necho: ")
    assert conversation.summarized_to == 12
    assert conversation.summary.startswith("echo: [summary so far]")
    assert conversation.message_count == 20
    system = model.requests[-1].body["messages"][0]["content"]
    assert system.startswith(f"Be kind.\n\n{SUMMARY_INTRODUCTION}\n")
    (window,) = record.rows(schema.budget_windows)
    assert (window.reserved, window.used) == (0, model.tokens)
    assert record.count(schema.usage) == 12
    await people.say(bot, "/clear")
    await people.replies(11)
    (conversation,) = record.rows(schema.conversations)
    assert (conversation.summary, conversation.summarized_to) == (None, 0)


@pytest.mark.parametrize("budgeted", [False, True])
async def test_a_summary_that_fails_loses_nothing_and_is_made_with_the_next_question(
    bots, people, feishu, model, sqlite_url, sqlite_record, budgeted
):
    limit = {**BUDGET, "limit_requests": 6} if budgeted else BUDGET
    bot = await bots.start(
        configuration(sqlite_url, feishu=feishu, model=model, ai={**SHORT, "retries": 0}, budgets=[limit])
    )
    await talk(bot, people, 1, 5)
    answer = model.answer
    model.answer = lambda text: "" if text.startswith("[user]") else answer(text)
    await talk(bot, people, 6, 6)
    assert people.feishu.texts()[-1] == "echo: question 6"
    await sqlite_record.settled()
    (conversation,) = sqlite_record.rows(schema.conversations)
    assert (conversation.summary, conversation.message_count) == (None, 12)
    assert any(map(is_summary, model.requests)) is not budgeted
    if not budgeted:
        model.answer = answer
        await talk(bot, people, 7, 7)
        await sqlite_record.settled()
        assert "[user] question 1" in sqlite_record.rows(schema.conversations)[0].summary
    sqlite_record.check_accounts()


async def test_undoing_what_a_summary_tells_of_takes_it_back(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai=SHORT))
    await talk(bot, people, 1, 6)
    await sqlite_record.settled()
    known = []
    for n in range(7, 11):
        known.append(sqlite_record.rows(schema.conversations)[0].summarized_to)
        await people.say(bot, "/undo")
        await people.replies(n)
        await sqlite_record.settled()
    assert known == [6, 6, 6, 6]
    (conversation,) = sqlite_record.rows(schema.conversations)
    assert (conversation.summary, conversation.summarized_to, conversation.message_count) == (None, 0, 4)


async def test_why_tells_what_went_into_the_last_answer(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai=SHORT))
    await people.say(bot, "/why")
    await people.replies(1)
    await people.say(bot, "question 1")
    await people.replies(2)
    await people.say(bot, "/why")
    await people.replies(3)
    texts = people.feishu.texts()
    assert texts[0] == "No model has answered in this conversation yet."
    assert texts[2].splitlines() == [
        f"The last answer is openai:gpt-4o's: {model.requests[0].prompt_tokens} tokens were sent at last, in 1 call(s).",
        "No earlier message went along.",
    ]
    await talk(bot, people, 4, 10)
    await people.say(bot, "/why")
    why = (await people.replies(11))[-1].splitlines()
    assert why[1:] == [
        "8 message(s) of this conversation went along, from number 7 on.",
        "What was said before them went along as a summary.",
    ]
    (*_, last) = sqlite_record.messages()
    assert orjson.loads(last.metadata_json)["context"]["messages"] == 8


async def test_a_conversation_of_thousands_of_turns_is_answered_with_a_bounded_request(
    bots, people, feishu, model, db_url, record
):
    ai = {
        "conversation_persistence": {"max_history_turns": 50, "max_history_tokens": 2000},
        "summarize": True,
    }
    config = configuration(db_url, feishu=feishu, model=model, ai=ai)
    bot = await bots.start(config)
    await people.say(bot, "hello")
    await people.replies(1)
    await bot.stop()
    (conversation,) = record.rows(schema.conversations)
    (first, _) = record.messages()
    turns = [
        {"conversation_id": conversation.id, "seq": 2 * n + k, "role": role, "content": f"{role} {n} " + "word " * 20,
         "tokens": 23, "timestamp": first.timestamp}
        for n in range(1, TURNS)
        for k, role in ((1, "user"), (2, "assistant"))
    ]  # fmt: skip
    for at in range(0, len(turns), 2000):
        record.execute(insert(schema.messages).values(turns[at : at + 2000]))
    record.execute(
        update(schema.conversations).values(
            last_seq=2 * TURNS, message_count=2 * TURNS, version=conversation.version + 1
        )
    )
    await bots.start(config)
    bot = bots.started[-1]
    model.script(Behaviour())
    await people.say(bot, "and now?")
    await people.replies(2)
    requests = [r for r in model.requests if not is_summary(r)]
    messages = requests[-1].body["messages"]
    assert messages[-1]["content"] == "and now?"
    assert messages[-2]["content"].startswith(f"assistant {TURNS - 1} ")
    assert 40 < len(messages) < 102
    assert requests[-1].prompt_tokens < 3000
    assert all(len(orjson.dumps(r.body)) < 40_000 for r in model.requests)
