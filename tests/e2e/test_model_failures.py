"""The model fails in every way: one sentence to the user, the end on record, the other chats go on."""

from __future__ import annotations

import pytest

from feishu_bot.testing.model import Behaviour, FakeModelServer
from feishu_bot.texts import TEXTS
from tests.e2e.bots import configuration

SORRY = "Sorry, something went wrong with your message. Please try again later."
BUDGET = {"name": "ever", "window": "total", "limit_tokens": 1_000_000}

# What the model does -> how often it is asked, and whether its calls may have been billed.
FAILURES = {
    "refuses the key": (Behaviour("status", status=401), 1, False),
    "has no such model": (Behaviour("status", status=404), 1, False),
    "is overloaded": (Behaviour("status", status=503, retry_after="0"), 2, False),
    "limits the rate": (Behaviour("status", status=429, retry_after="0"), 2, False),
    "says nothing in time": (Behaviour("hang"), 2, True),
    "breaks off": (Behaviour("broken"), 2, True),
    "cuts the connection": (Behaviour("drop"), 2, True),
    "reports an error in the stream": (Behaviour("error_event"), 2, True),
    "answers with a page": (Behaviour("html"), 1, True),
    "answers with nonsense": (Behaviour("not_json"), 1, True),
    "answers with another shape": (Behaviour("no_choices"), 1, True),
    "answers with nothing": (Behaviour("nothing"), 1, True),
    "answers without text": (Behaviour("empty"), 1, True),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_model_that_fails_costs_the_user_one_sentence_and_others_nothing(
    bots, people, model, feishu, sqlite_url, sqlite_record, name
):
    behaviour, most_calls, billed = FAILURES[name]
    patience = {"timeout_s": 0.3 if behaviour.kind == "hang" else 30}
    config = configuration(sqlite_url, feishu=feishu, model=model, ai=patience, budgets=[BUDGET])
    bot = await bots.start(config)
    model.script(behaviour, times=most_calls)
    await people.say(bot, "trouble")
    assert await people.replies(1, "oc_ann") == [SORRY]
    await people.say(bot, "no trouble", user="bob")
    assert await people.replies(1, "oc_bob") == ["echo: no trouble"]
    await sqlite_record.settled()
    failed, good = sqlite_record.inbox()
    assert (failed.state, good.state) == ("dead", "answered")
    assert failed.reason.startswith("model openai:gpt-4o:")
    assert [m.content for m in sqlite_record.messages()] == ["trouble", "no trouble", "echo: no trouble"]
    calls = sqlite_record.ledger(inbox_id=failed.id)
    assert model.count - 1 <= most_calls
    assert bool(calls) is billed
    sqlite_record.check_accounts()
    sqlite_record.check_ends()
    assert bot.complaints() == []
    assert feishu.texts("oc_ann") == [SORRY]


async def test_a_model_that_is_away_is_one_sentence_for_each_and_answers_again_when_it_is_back(
    bots, people, feishu, sqlite_url, sqlite_record
):
    model = FakeModelServer()
    await model.start()
    config = configuration(sqlite_url, feishu=feishu, model=model, budgets=[BUDGET])
    await model.stop()
    bot = await bots.start(config)
    await people.say(bot, "anybody there?")
    await people.say(bot, "anybody?", user="bob")
    assert await people.replies(2) == [SORRY, SORRY]
    await model.start()
    await people.say(bot, "and now?")
    assert (await people.replies(3))[-1] == "echo: and now?"
    await model.stop()
    await sqlite_record.settled()
    assert [row.state for row in sqlite_record.inbox()] == ["dead", "dead", "answered"]
    sqlite_record.check_accounts()


async def test_a_slow_model_holds_up_only_the_one_who_asked(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai={"timeout_s": 1.0}))
    model.script(Behaviour("hang"))
    await people.say(bot, "slow")
    await people.say(bot, "quick", user="bob")
    await people.replies(2)
    assert feishu.texts() == ["echo: quick", "echo: slow"], "asked again after the time-out"
    await sqlite_record.settled()


async def test_a_fallback_answers_where_the_first_model_refuses(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    ai = {"fallback_models": ["openai:gpt-4o-mini"]}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai=ai, budgets=[BUDGET]))
    model.script(Behaviour("status", status=401))
    await people.say(bot, "hi")
    assert await people.replies(1) == ["echo: hi"]
    await sqlite_record.settled()
    (call,) = sqlite_record.ledger()
    assert (call.model, call.call) == ("openai:gpt-4o-mini", 1)
    sqlite_record.check_accounts()


async def test_the_operators_own_sentence_is_said_where_there_is_one(bots, people, model, feishu, sqlite_url):
    chat = {"error_message": "Back in a minute."}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, chat=chat))
    model.script(Behaviour("status", status=401))
    await people.say(bot, "hi")
    assert await people.replies(1) == ["Back in a minute."]


async def test_what_the_providers_filter_holds_back_is_told_in_words(bots, people, model, feishu, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    model.script(Behaviour("filtered"), Behaviour(text="It begins so", finish="content_filter"))
    await people.say(bot, "one")
    await people.say(bot, "two")
    assert await people.replies(2) == [
        TEXTS["en"]["filtered"],
        "It begins so\n\n(The content filter of the model's provider has held back the rest.)",
    ]


async def test_a_model_that_keeps_failing_is_left_alone_and_shown(
    bots, people, http, model, feishu, sqlite_url
):
    ai = {"fallback_models": ["openai:gpt-4o-mini"], "retries": 4}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai=ai))
    model.script(Behaviour("status", status=503), times=5)
    for n in (1, 2):
        await people.say(bot, f"q{n}")
        await people.replies(n)
    assert [r.model for r in model.requests] == ["gpt-4o"] * 5 + ["gpt-4o-mini"] * 2
    async with http.get(f"{bot.url}/readyz") as response:
        body = await response.json()
        assert (response.status, body["status"]) == (200, "degraded")
        assert "model openai:gpt-4o: 5 failures in a row" in body["degraded"][0]
    async with http.get(f"{bot.url}/metrics") as response:
        assert 'feishu_bot_model_circuit_open{model="openai:gpt-4o"} 1.0' in await response.text()
