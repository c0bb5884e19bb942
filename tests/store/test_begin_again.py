"""A begin whose outcome nobody heard: asked for again with the same token, it is the same begin."""

from __future__ import annotations

import pytest

from feishu_bot.model import InboundMessage
from feishu_bot.store.schema import budget_windows, inbox, reservations
from feishu_bot.store.store import Store
from feishu_bot.store.work import Arrival, Charge, Lease, Planned, PlannedCall, Work
from tests.stores import AnswersLater, Clock, rows

LANES = [f"user:web:private:{name}" for name in ("ann", "bob", "cyd")]


class Asks(AnswersLater):
    """Plans a call of 100 tokens for each message."""

    def plan(self, message, conversation, history, **_more) -> Planned:
        return Planned(call=PlannedCall("echo", 50, 100, (Charge("daily", message.person, 0, 1000, None),)))


@pytest.fixture
async def store(db_url):
    made = Store(db_url, clock=Clock())
    made.open(Asks(), version="test")
    for lane in LANES:
        name = lane.rpartition(":")[2]
        payload = InboundMessage("web", name, text="hello", sender_id=name).to_json()
        await made.receive([Arrival("web", name, lane, payload)])
    yield made
    await made.close()


async def test_what_was_begun_unheard_is_begun_once_and_reserved_once(store):
    leases = [Lease(lane, str(store.owner), "token") for lane in LANES]
    first = await store.begin(leases)
    again = await store.begin(leases, again=True)
    assert all(isinstance(work, Work) for work in first)
    assert [(w.inbox_id, w.attempt, w.refusal) for w in again] == [
        (w.inbox_id, w.attempt, w.refusal) for w in first
    ]
    assert [row["attempts"] for row in await rows(store, inbox)] == [1, 1, 1]
    assert len(await rows(store, reservations)) == 3
    assert [row["reserved"] for row in await rows(store, budget_windows)] == [100, 100, 100]


async def test_of_lanes_that_were_begun_in_part_the_rest_is_begun_now(store):
    leases = [Lease(lane, str(store.owner), "token") for lane in LANES]
    await store.begin(leases[:1])
    works = await store.begin(leases, again=True)
    assert [work.attempt for work in works] == [1, 1, 1]
    assert len(await rows(store, reservations)) == 3
