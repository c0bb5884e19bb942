"""What dies where: the process is killed after each step of a message's way and started again."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from feishu_bot.store import schema
from tests.e2e.bots import configuration
from tests.e2e.crashing_server import STEPS

BUDGETS = [
    {"name": "ever", "window": "total", "limit_tokens": 10_000_000},
    {"name": "month", "window": "month", "limit_tokens": 1_000_000},
]
USERS = ("ann", "bob", "cyd")
EACH = 3  # messages of each user
CRASH_AT = 4  # the time a step is reached at which the process dies


class Talk:
    """Messages of several people at once; each sends the next when the last is acknowledged."""

    def __init__(self, people):
        self.people = people
        self.events = {user: [people.event(f"{user} {n}", user=user) for n in range(EACH)] for user in USERS}
        self.waiting = {user: list(events) for user, events in self.events.items()}

    async def go_on(self, bot):
        """Post what is not acknowledged yet, as the platform does, until the server goes away."""
        await asyncio.gather(*(self._post(bot, events) for events in self.waiting.values()))

    async def _post(self, bot, events):
        while events:
            if await self.people.post(bot, events[0]) != 200:
                return
            del events[0]

    def texts(self, user):
        return [f"{user} {n}" for n in range(EACH)]


@pytest.mark.parametrize("step", STEPS)
async def test_after_a_kill_at_any_step_each_message_has_one_answer_and_one_reply_in_order(
    bots, people, model, feishu, db_url, record, step
):
    config = configuration(db_url, feishu=feishu, model=model, budgets=BUDGETS)
    talk = Talk(people)
    dying = await bots.start(config, crash=(step, CRASH_AT))
    await talk.go_on(dying)
    assert await dying.ended() == -9
    assert dying.complaints() == []
    dead = {row.owner for row in record.rows(schema.processes)}
    assert len(dead) == 1

    bot = await bots.start(config)
    # It is on the same machine, so it does not wait for the leases of the dead to end.
    held = [r for r in record.rows(schema.lanes) if {r.lease_owner, r.send_owner} & dead]
    assert all(r.lease_until == 0 or r.lease_owner not in dead for r in held)
    assert all(r.send_until == 0 or r.send_owner not in dead for r in held)
    await talk.go_on(bot)
    assert not any(talk.waiting.values())
    await record.settled()
    await bot.stop()

    assert bot.complaints() == []
    rows = record.inbox()
    assert Counter(r.state for r in rows) == {"answered": len(USERS) * EACH}
    for user in USERS:
        assert feishu.texts(f"oc_{user}") == [f"echo: {text}" for text in talk.texts(user)]
        (conversation,) = record.rows(schema.conversations, user_key=f"feishu:private:ou_{user}")
        stored = sorted(record.messages(conversation_id=conversation.id), key=lambda m: m.seq)
        expected = [
            (role, text)
            for t in talk.texts(user)
            for role, text in (("user", t), ("assistant", f"echo: {t}"))
        ]
        assert [(m.role, m.content) for m in stored] == expected
        assert all(m.tokens > 0 for m in stored)
        assert conversation.message_count == 2 * EACH
        assert conversation.total_tokens == sum(m.tokens for m in stored)
    uuids = [m.uuid for m in feishu.visible]
    assert len(set(uuids)) == len(uuids) == len(USERS) * EACH
    if step == "sent":
        assert feishu.folded >= 1, "the same key came twice, and was shown once"
    record.check_accounts()
    record.check_ends()


@pytest.mark.parametrize("step", ["begun", "answered"])
async def test_a_call_whose_process_died_is_booked_at_all_it_had_reserved(
    bots, people, model, feishu, sqlite_url, sqlite_record, step
):
    config = configuration(sqlite_url, feishu=feishu, model=model, budgets=BUDGETS)
    dying = await bots.start(config, crash=(step, 1))
    await people.say(dying, "hello")
    await dying.ended()
    (reserved,) = sqlite_record.rows(schema.reservations)
    await bots.start(config)
    await people.replies(1)
    await sqlite_record.settled()
    first, second = sqlite_record.ledger()
    assert (first.attempt, first.outcome) == (1, "unknown")
    assert first.input_tokens + first.output_tokens == reserved.tokens
    assert (second.attempt, second.outcome) == (2, "ok")
    assert second.input_tokens + second.output_tokens < reserved.tokens
    sqlite_record.check_accounts()


async def test_a_message_whose_process_dies_each_time_ends_dead_after_five_attempts_and_says_so(
    bots, people, feishu, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu)
    for attempt in range(5):
        dying = bots.launch(config, crash=("begun", 1))
        if attempt == 0:
            await people.say(await dying.listening(), "poison")
        assert await dying.ended() == -9
    bot = await bots.start(config)
    assert await people.replies(1) == [
        "Sorry, something went wrong with your message. Please try again later."
    ]
    await sqlite_record.settled()
    poison, *_ = sqlite_record.inbox()
    assert (poison.state, poison.reason) == ("dead", "gave up after 5 attempts")
    await people.say(bot, "and now?")
    assert (await people.replies(2))[-1] == "and now?"
    sqlite_record.check_accounts()
