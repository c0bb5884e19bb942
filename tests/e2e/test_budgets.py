"""Budgets: reserved before a call, settled after it, never passed by a token."""

from __future__ import annotations

import asyncio

import orjson
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


# ---------------------------------------------------------------------------- scopes, and what happens beyond


def calls(name, limit, scope, **more):
    return {"name": name, "window": "total", "limit_requests": limit, "scope": scope, **more}


async def test_each_scope_counts_together_what_it_says(bots, people, model, feishu, db_url, record):
    """Two calls for a chat, three for an account, a tenant or everybody: each refuses when its own are used."""
    scopes = [calls("chat", 2, "chat"), calls("account", 4, "platform"), calls("all", 5, "global")]
    config = configuration(db_url, feishu=feishu, model=model, budgets=[*scopes, calls("own", 3, "tenant")])
    bot = await bots.start(config)
    for n, user in enumerate(("ann", "bob", "cid"), start=1):
        await people.say(bot, "hi", user=user, chat="oc_team")
        await people.replies(n, "oc_team")
    *answers, refused = await people.replies(3, "oc_team")
    assert answers == ["echo: hi"] * 2
    assert "“chat” has used 2 of 2 calls" in refused
    await people.say(bot, "hi", user="ann")
    assert await people.replies(1, "oc_ann") == ["echo: hi"], "another chat, and the third call of the tenant"
    await people.say(bot, "hi", user="bob")
    assert "“own” has used 3 of 3 calls" in (await people.replies(1, "oc_bob"))[0]
    await record.settled()
    windows = {(w.budget, w.key): w.used_requests for w in record.rows(schema.budget_windows)}
    assert windows == {
        ("chat", "feishu:oc_team"): 2,
        ("chat", "feishu:private:ou_ann"): 1,
        ("chat", "feishu:private:ou_bob"): 0,
        ("account", "feishu"): 3,
        ("own", "default"): 3,
        ("all", "*"): 3,
    }


async def test_a_budget_that_degrades_has_the_other_model_answer_and_says_so(
    bots, people, model, feishu, db_url, record
):
    dear = {**calls("dear", 1, "user"), "on_exceeded": "degrade", "degrade_to": "any:small"}
    hard = calls("hard", 3, "user")
    config = configuration(db_url, feishu=feishu, model=model, budgets=[dear, hard])
    bot = await bots.start(config)
    for n in range(1, 5):
        await people.say(bot, "hi")
        await people.replies(n)
    first, second, third, fourth = await people.replies(4)
    assert first == "echo: hi"
    assert second == third == "echo: hi\n\n(The budget “dear” is used up; any:small has answered.)"
    assert "“hard” has used 3 of 3 calls" in fourth
    await record.settled()
    assert [r.model for r in model.requests][1:] == ["small", "small"]
    assert [m.content for m in record.messages(role="assistant")] == ["echo: hi"] * 3
    windows = {w.budget: (w.used_requests, w.reserved_requests) for w in record.rows(schema.budget_windows)}
    assert windows == {"dear": (1, 0), "hard": (3, 0)}


async def test_a_budget_that_warns_goes_on_and_tells_it_once(bots, people, model, feishu, db_url, record):
    soft = {**calls("soft", 2, "user"), "on_exceeded": "warn", "warn_at": 0.5}
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, budgets=[soft]))
    expected = []
    for note in ("nearly used up: 1 of 2 calls.", None, "used up: 3 of 2 calls. Answers go on.", None):
        await people.say(bot, "hi")
        expected += ["echo: hi"] if note is None else ["echo: hi", f"Note: your budget “soft” is {note}"]
        assert await people.replies(len(expected)) == expected
    await record.settled()
    (window,) = record.rows(schema.budget_windows)
    assert (window.used_requests, window.told) == (4, 2)


async def test_of_answers_made_at_once_one_tells_that_a_budget_is_nearly_used_up(
    bots, people, model, feishu, db_url, record
):
    model.default = Behaviour(delay_s=0.3)
    near = {**calls("near", 100, "user"), "warn_at": 0.01}
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, budgets=[near]))
    await asyncio.gather(*(people.say(bot, "hi", chat=f"oc_{n}") for n in range(8)))
    texts = await people.replies(9)
    await record.settled()
    assert sorted(texts)[-8:] == ["echo: hi"] * 8
    assert sum("nearly used up" in text for text in people.feishu.texts()) == 1


async def test_a_cost_budget_holds_by_the_prices_of_the_configuration(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    prices = {"openai:*": {"input": 1000, "cached_input": 100, "output": 2000}}
    cost = {"name": "money", "window": "day", "limit_cost_usd": 0.4, "scope": "global"}
    bot = await bots.start(
        configuration(
            sqlite_url,
            feishu=feishu,
            model=model,
            budgets=[cost],
            ai={"max_output_tokens": 100, "prices": prices},
        )
    )
    for n in range(1, 20):
        await people.say(bot, "hi")
        if "“money”" in (await people.replies(n))[-1]:
            break
    assert "of $0.40. It is renewed" in people.feishu.texts()[-1]
    await people.say(bot, "/usage")
    shown = (await people.replies(n + 1))[-1]
    await sqlite_record.settled()
    booked = sqlite_record.ledger()
    assert booked
    for call in booked:
        assert call.cost_micro_usd == 1000 * call.input_tokens + 2000 * call.output_tokens
    (window,) = sqlite_record.rows(schema.budget_windows)
    assert window.used_micro_usd == sum(call.cost_micro_usd for call in booked) <= 400_000
    assert (window.reserved_micro_usd, window.key) == (0, "*")
    assert "“money” (per day, shared by everybody): $0." in shown
    assert "used of $0.40, $0." in shown


# ------------------------------------------------------------------------------------------------ /budget


async def test_an_operator_sees_grants_and_resets_and_each_change_is_on_record(
    bots, people, model, feishu, db_url, record
):
    budgets = [
        {"name": "day", "scope": "user", "window": "day", "limit_tokens": 20},
        calls("team", 5, "chat"),
        {"name": "money", "scope": "user", "window": "total", "limit_cost_usd": 2},
    ]
    config = configuration(
        db_url,
        feishu=feishu,
        model=model,
        budgets=budgets,
        ai={"max_output_tokens": 10, "prices": {"openai:*": {"input": 1, "output": 1}}},
        chat={"admins": ["feishu:ou_boss"]},
    )
    bot = await bots.start(config)
    said = 0

    async def boss(words: str) -> str:
        nonlocal said
        said += 1
        await people.say(bot, words, user="boss")
        return (await people.replies(said, "oc_boss"))[-1]

    await people.say(bot, "hello")
    assert "“day” has used 0 of 20 tokens" in (await people.replies(1, "oc_ann"))[0]
    assert "Budget “day” (per day): 0 used of 20, 20 left." in await boss("/budget show ou_ann")
    granted = await boss("/budget grant feishu:private:ou_ann 1000 day")
    assert "0 used of 1020, 1020 left." in granted
    assert "Granted to “day” in this window: 1000." in granted
    await people.say(bot, "hello")
    assert (await people.replies(2, "oc_ann"))[-1] == "echo: hello"
    assert "$0 used of $3.50" in await boss("/budget grant feishu:ou_bob $1.5 money")
    assert "7 call(s) left" in await boss("/budget grant here 2calls team")
    await record.settled()
    assert "0 used of 20, 20 left." in await boss("/budget reset ou_ann")
    assert [(c.outcome, c.user_id) for c in record.ledger()] == [("ok", "feishu:ou_ann")], "the ledger stays"
    trail = record.rows(schema.audit)
    assert [(a.action, a.actor, a.target) for a in trail] == [
        ("budget.grant", "feishu:ou_boss", "feishu:ou_ann"),
        ("budget.grant", "feishu:ou_boss", "feishu:ou_bob"),
        ("budget.grant", "feishu:ou_boss", "here"),
        ("budget.reset", "feishu:ou_boss", "feishu:ou_ann"),
    ]
    before, after = (orjson.loads(text)["day"] for text in (trail[-1].before, trail[-1].after))
    assert before["granted"]["tokens"] == 1000
    assert before["used"]["requests"] == 1
    assert after == {key: {"tokens": 0, "requests": 0, "micro_usd": 0} for key in ("used", "granted")}


async def test_what_an_operator_cannot_mean_is_answered_with_the_usage(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    two = [budget(20), {**budget(30), "name": "other", "match": {"user": "feishu:*"}}]
    two.append({"name": "money", "scope": "user", "window": "total", "limit_cost_usd": 2})
    config = configuration(
        sqlite_url, feishu=feishu, model=model, budgets=two, chat={"admins": ["feishu:ou_boss"]}
    )
    bot = await bots.start(config)
    answers = {
        "/budget": "Usage: /budget show USER",
        "/budget show": "Usage:",
        "/budget give ou_ann 5": "Usage:",
        "/budget grant ou_ann": "Usage:",
        "/budget grant ou_ann 5": "Please name one budget: mine, other, money.",
        "/budget grant ou_ann 5 none": "Please name one budget: mine, other, money.",
        "/budget grant ou_ann -5 mine": "Usage:",
        "/budget grant ou_ann 1e9 mine": "Usage:",
        "/budget grant ou_ann 9999999999999999999999 mine": "Usage:",
        "/budget grant ou_ann $5 mine": "Usage:",
        "/budget grant ou_ann $999999999999999 money": "Usage:",
        "/budget grant ou_ann 5 mine more": "Usage:",
        "/budget reset ou_ann none": "Please name one budget",
        "/budget show a:b:c:d": "No budget counts a:b:c:d.",
        "/budget show here": "No budget counts here.",
    }
    for n, (words, expected) in enumerate(answers.items(), start=1):
        await people.say(bot, words, user="boss")
        assert expected in (await people.replies(n, "oc_boss"))[-1], words
    await people.say(bot, "/budget show ou_boss")
    assert await people.replies(1, "oc_ann") == ["Only administrators may use this command."]
    assert sqlite_record.rows(schema.audit) == []
    assert sqlite_record.rows(schema.budget_windows) == []
