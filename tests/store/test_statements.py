"""How many statements the way of a message takes: a fixed number, whatever the length of the lists."""

from __future__ import annotations

import pytest

from feishu_bot.model import CallUsage
from feishu_bot.store import leases, outbox
from feishu_bot.store.commit import reserve_calls
from feishu_bot.store.history import HistoryCache
from feishu_bot.store.inbox import receive
from feishu_bot.store.work import Charge, Lease, PlannedCall, SendResult, SendStep
from tests.transact import OWNER, answered, arrival

# Of one message in a batch of one: echo with a budget, in a conversation that is known, its answer in one part.
MOST = {"sqlite": 20, "postgresql": 21, "mariadb": 27}
TRANSACTIONS = 4
LIMITED = Charge("daily", "ann", 0, 10**9, None), Charge("global", "all", 0, 10**9, None)


def names(n):
    return [f"user:web:private:u{i:03}" for i in range(n)]


def counted(db, function):
    with db.statements() as seen:
        result = function()
    return result, list(seen)


def way(db, n, turn):
    """Take n messages in n lanes all the way, as lists; return the statements of each step."""
    lanes, token = names(n), f"t{turn}"
    arrivals = [arrival(f"{turn}-{lane}", lane=lane) for lane in lanes]
    _, received = counted(db, lambda: db.run(receive, arrivals))
    works, begun = counted(db, lambda: db.begin(*lanes, token=token))
    outcomes = [answered(work, calls=(CallUsage(0, "echo", 5, 5),)) for work in works]
    done, committed = counted(db, lambda: db.commit(*outcomes))
    steps = [SendStep(d.sending.lease, SendResult(d.sending.id, "sent")) for d in done]
    _, delivered = counted(db, lambda: db.run(outbox.send_step, steps))
    return {"receive": received, "begin": begun, "commit": committed, "delivered": delivered}


@pytest.mark.parametrize("cached", [True, False])
def test_no_step_takes_more_statements_for_many_messages_than_for_one(db, cached):
    db.plans.reserve(100, *LIMITED)
    way(db, 40, "first")  # makes the conversations
    found = []
    for n in (1, 40):
        if not cached:
            db.cache = HistoryCache()
        found.append({step: len(statements) for step, statements in way(db, n, f"then-{n}").items()})
    assert found[0] == found[1]


def test_the_first_message_of_many_conversations_takes_no_more_than_that_of_one(db):
    one, many = way(db, 1, "one"), None
    db.run(leases.release_owner, OWNER)
    lanes = [f"other:{i}" for i in range(30)]
    db.run(receive, [arrival(lane, lane=lane) for lane in lanes])
    works, begun = counted(db, lambda: db.begin(*lanes, token="t2"))
    many, committed = counted(db, lambda: db.commit(*map(answered, works)))
    assert len(begun) == len(one["begin"])
    assert len(committed) == len(one["commit"])
    assert len({c.conversation_id for c in many}) == 30


def test_further_calls_and_looks_take_no_more_for_many(db):
    def reserve(n):
        works = db.begin(*names(n), token=f"t{n}")
        call = PlannedCall("echo", 1, 2, LIMITED)
        return counted(db, lambda: db.run(reserve_calls, [(work, 1, call) for work in works]))[1]

    db.run(receive, [arrival(lane, lane=lane) for lane in names(1)])
    one = reserve(1)
    db.run(leases.release_owner, OWNER)
    db.clock.now_ms += 1
    db.run(receive, [arrival(lane + "-2", lane=lane) for lane in names(30)])
    assert len(reserve(30)) == len(one)
    assert len(counted(db, lambda: db.run(leases.ready_lanes, 100))[1]) == 2
    assert len(counted(db, lambda: db.run(leases.depth))[1]) == 2
    renewed = counted(db, lambda: db.run(leases.renew, OWNER, names(30), names(30)))[1]
    assert len(renewed) == 3


def test_asking_for_many_lanes_to_send_takes_no_more_than_for_one(db):
    def ask(n, prefix):
        lanes = [f"{prefix}{i}" for i in range(n)]
        rows = [
            {"source": lane, "kind": "note", "part": 0, "lane_key": lane, "account": "web", "payload": "1"}
            for lane in lanes
        ]
        pushed = counted(db, lambda: db.run(outbox.push, rows))[1]
        steps = [SendStep(Lease(lane, OWNER, "s")) for lane in lanes]
        asked = counted(db, lambda: db.run(outbox.send_step, steps))[1]
        return len(pushed), len(asked)

    assert ask(1, "a") == ask(30, "b")


def test_one_message_takes_few_statements(db, record_property):
    db.plans.reserve(100, LIMITED[0])
    way(db, 1, "first")
    steps = way(db, 1, "second")
    for step, statements in steps.items():
        record_property(step, len(statements))
    total = sum(map(len, steps.values()))
    assert len(steps) == TRANSACTIONS
    assert total <= MOST[db.kind], "\n".join(f"{k}: {s}" for k, found in steps.items() for s in found)
