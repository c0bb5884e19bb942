"""Budgets: reserved before a call, settled after it, never passed by a token."""

from __future__ import annotations

import asyncio

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration


def budget(limit, **more):
    return {"name": "mine", "window": "total", "limit_tokens": limit, **more}


async def test_what_no_longer_fits_is_refused_with_the_numbers_and_commands_keep_working(
    bots, people, model, feishu, db_url, record
):
    config = configuration(
        db_url, feishu=feishu, model=model, budgets=[budget(180)], ai={"max_output_tokens": 100}
    )
    bot = await bots.start(config)
    await people.say(bot, "hello")
    await people.replies(1)
    await people.say(bot, "hello")
    assert (await people.replies(2))[-1] == "echo: hello"
    await people.say(bot, "hello")
    used = sum(c.input_tokens + c.output_tokens for c in record.ledger())
    sentence = (
        f"Not enough of your budget is left: “mine” has used {used} of 180 tokens. Commands keep working."
    )
    assert (await people.replies(3))[-1] == sentence
    await people.say(bot, "/usage")
    expected = f"Budget “mine” (in total): {used} used of 180, {180 - used} left."
    assert expected in (await people.replies(4))[-1]
    await people.say(bot, "hello", user="bob")
    assert await people.replies(1, "oc_bob") == ["echo: hello"], "each person has his own"
    await record.settled()
    assert [r.reason for r in record.inbox(state="refused")] == ["budget mine"]
    assert len(record.messages()) == 6, "a refused question is no part of the conversation"
    assert model.count == 3
    record.check_accounts()


@pytest.mark.parametrize("window", ["minute", "hour", "day", "week", "month"])
async def test_the_sentence_says_when_the_window_ends(bots, people, model, feishu, sqlite_url, window):
    config = configuration(sqlite_url, feishu=feishu, model=model, budgets=[budget(5, window=window)])
    bot = await bots.start(config)
    await people.say(bot, "hello")
    (sentence,) = await people.replies(1)
    assert "“mine” has used 0 of 5 tokens. It is renewed at 20" in sentence
    assert model.count == 0


async def test_many_at_once_of_one_person_never_pass_the_limit_by_the_providers_own_sum(
    bots, people, model, feishu, db_url, record
):
    limit = 1000
    model.default = Behaviour(delay_s=0.05, text="word " * 150)  # more than it may say: cut off at its bound
    config = configuration(
        db_url, feishu=feishu, model=model, budgets=[budget(limit)], ai={"max_output_tokens": 60}
    )
    bot = await bots.start(config)
    # Each chat is a lane of its own, so these run beside each other.
    await asyncio.gather(*(people.say(bot, f"question {n}", chat=f"oc_{n}") for n in range(40)))
    await people.replies(40)
    await record.settled()
    used = sum(c.input_tokens + c.output_tokens for c in record.ledger())
    assert model.tokens == used <= limit
    refused = [r for r in record.inbox() if r.state == "refused"]
    assert 0 < len(refused) < 40
    assert {r.reason for r in refused} == {"budget mine"}
    record.check_accounts()


async def test_each_of_several_budgets_holds_and_one_for_others_does_not(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    budgets = [
        {"name": "wide", "window": "total", "limit_tokens": 1_000_000},
        {"name": "groups", "window": "total", "limit_tokens": 5, "match": {"chat": "oc_team*"}},
        {"name": "bob", "window": "day", "limit_tokens": 5, "match": {"user": "feishu:ou_bob"}},
    ]
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, budgets=budgets))
    await people.say(bot, "hi")
    assert await people.replies(1, "oc_ann") == ["echo: hi"]
    await people.say(bot, "hi", user="bob")
    assert "“bob”" in (await people.replies(1, "oc_bob"))[0]
    await people.say(bot, "hi", chat="oc_team_1")
    assert "“groups”" in (await people.replies(1, "oc_team_1"))[0]
    await sqlite_record.settled()
    assert [w.budget for w in sqlite_record.rows(schema.budget_windows) if w.used] == ["wide"]


async def test_a_broken_stream_is_booked_whole_and_its_retry_reserves_anew(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    config = configuration(
        sqlite_url, feishu=feishu, model=model, budgets=[budget(100_000)], ai={"max_output_tokens": 1000}
    )
    bot = await bots.start(config)
    model.script(Behaviour("broken"))
    await people.say(bot, "hello")
    assert await people.replies(1) == ["echo: hello"]
    await sqlite_record.settled()
    broken, good = sqlite_record.ledger()
    assert (broken.outcome, broken.output_tokens) == ("unknown", 1000)
    assert good.outcome == "ok"
    assert (broken.call, good.call) == (0, 1)
    sqlite_record.check_accounts()


async def test_a_retry_that_no_longer_fits_is_not_made(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    config = configuration(
        sqlite_url, feishu=feishu, model=model, budgets=[budget(1500)], ai={"max_output_tokens": 1000}
    )
    bot = await bots.start(config)
    model.script(Behaviour("broken"))
    await people.say(bot, "hello")
    assert "something went wrong" in (await people.replies(1))[0]
    await sqlite_record.settled()
    (row,) = sqlite_record.inbox()
    assert row.state == "dead"
    assert row.reason.endswith("no budget for another call")
    assert model.count == 1
    sqlite_record.check_accounts()
