"""Budgets over several processes: no limit is passed by the provider's own count, whatever dies in between."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import pytest

from feishu_bot.store import inspection, schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until
from tests.operation.operator import pids
from tests.operation.test_workers import UNLIMITED

USERS, EACH = 20, 10
OF_ONE, OF_ALL, CALLS = 500, 7000, 120
PRICES = {"openai:*": {"input": 3, "output": 15}}  # an output token is dearer, as everywhere
MICRO_USD = 90_000
BUDGETS = [
    {"name": "one", "scope": "user", "window": "total", "limit_tokens": OF_ONE},
    {"name": "all", "scope": "global", "window": "total", "limit_tokens": OF_ALL},
    {"name": "money", "scope": "tenant", "window": "month", "limit_cost_usd": MICRO_USD / 1e6},
    {"name": "calls", "scope": "platform", "window": "day", "limit_requests": CALLS},
]


def speaker_of(request):
    return request.body["messages"][-1]["content"].split()[0]


async def insist(people, bot, event):
    """Post an event until it is acknowledged, as a platform does."""
    for _ in range(200):
        if await people.post(bot, event) == 200:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("never acknowledged")


@pytest.mark.parametrize("killed", [False, True], ids=["", "and a worker killed"])
async def test_200_messages_at_once_of_20_people_on_4_workers_pass_no_budget(
    operator, people, model, feishu, db_url, record, killed
):
    config = configuration(
        db_url,
        feishu=feishu,
        model=model,
        budgets=BUDGETS,
        ai={"max_output_tokens": 60, "prices": PRICES, "timeout_s": 20},
        **UNLIMITED,
    )
    bot = await operator.workers(config, 4)
    model.default = Behaviour(delay_s=0.1, text="word " * 40)
    # Some calls break off with a bill, some are refused without one, some say more than they may.
    model.script(
        Behaviour("broken", text="word " * 40),
        Behaviour("status", status=503),
        Behaviour(text="long " * 500),
        times=8,
    )
    # Each chat is a lane of its own, so all of a person's questions run beside each other.
    events = [
        people.event(f"user{user} asks {n}", user=f"user{user}", chat=f"oc_{user}_{n}")
        for n in range(EACH)
        for user in range(USERS)
    ]
    asking = asyncio.gather(*(insist(people, bot, event) for event in events))
    if killed:
        await until(lambda: model.count >= 30, "calls to be under way")
        os.kill(next(iter(pids(bot).values())), signal.SIGKILL)
    await asking
    await until(lambda: record.count(schema.inbox) == USERS * EACH, "all messages")
    await record.settled()

    ends = Counter(row.state for row in record.inbox())
    assert ends.total() == USERS * EACH
    assert ends["answered"] > 0
    assert ends["refused"] > 0
    by_person: Counter[str] = Counter()
    for request in model.requests:
        by_person[speaker_of(request)] += request.prompt_tokens + request.output_tokens
    assert max(by_person.values()) <= OF_ONE
    assert model.tokens == by_person.total() <= OF_ALL
    assert model.prompt_tokens * 3 + model.output_tokens * 15 <= MICRO_USD
    billed = [r for r in model.requests if r.behaviour != "status"]
    assert len(billed) <= CALLS

    assert record.rows(schema.reservations) == []
    booked = record.ledger()
    tokens = sum(call.input_tokens + call.output_tokens for call in booked)
    windows = {(w.budget, w.key): w for w in record.rows(schema.budget_windows)}
    assert all((w.reserved, w.reserved_requests, w.reserved_micro_usd) == (0, 0, 0) for w in windows.values())
    shared = [windows["all", "*"], windows["money", "default"], windows["calls", "feishu"]]
    assert {(w.used, w.used_requests, w.used_micro_usd) for w in shared} == {
        (tokens, len(booked), sum(call.cost_micro_usd for call in booked))
    }
    assert model.tokens <= tokens <= OF_ALL
    assert shared[1].used_micro_usd <= MICRO_USD
    assert len(billed) <= len(booked) <= CALLS
    assert all(w.used <= OF_ONE for (budget, _), w in windows.items() if budget == "one")
    assert [f for f in inspection.check(db_url) if f.wrong] == []
