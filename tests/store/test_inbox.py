"""Recording events, claiming lanes and beginning messages (steps 2, 4 and 5)."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select, text, update

from feishu_bot.model import End
from feishu_bot.store import leases
from feishu_bot.store.inbox import begin, receive
from feishu_bot.store.schema import budget_windows, inbox, lanes, reservations, totals, usage
from feishu_bot.store.work import LEASE_MS, Lease, NoWork, Outcome, Recorded, Work
from tests.stores import HOUR
from tests.transact import LANE, OWNER, Database, answered, arrival, row_locks

NEW, REPEAT = Recorded.NEW, Recorded.REPEAT
BOB = "user:web:private:bob"


def states(db):
    return [(r.event_key, r.state) for r in db.rows(inbox)]


# ------------------------------------------------------------------------------------------------- receive


def test_a_repeat_within_a_batch_is_no_second_row(db):
    assert db.receive("a", "b", "a") == [NEW, NEW, REPEAT]
    assert states(db) == [("a", "open"), ("b", "open")]


def test_a_repeat_in_a_later_batch_is_no_second_row(db):
    db.receive("a")
    assert db.receive("b", "a", "c") == [NEW, REPEAT, NEW]
    assert states(db) == [("a", "open"), ("b", "open"), ("c", "open")]


def test_a_repeat_of_a_message_that_has_ended_is_a_repeat(db):
    db.answer("a")
    assert db.receive("a") == [REPEAT]
    assert states(db) == [("a", "answered")]


def test_the_same_event_key_of_two_accounts_is_two_events(db):
    assert db.run(receive, [arrival("a"), arrival("a", account="other")]) == [NEW, NEW]


def test_the_addressed_copy_of_an_event_that_was_only_seen_is_taken(db):
    seen = arrival("a#seen", state=End.IGNORED.value)
    assert db.run(receive, [seen, arrival("a"), seen]) == [NEW, NEW, REPEAT]
    assert states(db) == [("a#seen", "ignored"), ("a", "open")]


def test_an_event_that_needs_no_answer_ends_when_it_comes_and_wakes_no_lane(db):
    ignored = arrival("a", state=End.IGNORED.value)
    db.run(receive, [ignored])
    db.run(receive, [ignored])
    row = db.row(inbox)
    assert (row.state, row.reason, row.ended_at) == ("ignored", "not for us", db.clock())
    assert db.rows(lanes) == []
    assert [(t.account, t.end, t.count) for t in db.rows(totals)] == [("web", "ignored", 1)]


def test_an_event_recorded_twice_by_a_lost_commit_is_one_row(db):
    db.receive("a", "b")
    assert db.run(receive, [arrival("a"), arrival("b")], rerun=True) == [REPEAT, REPEAT]
    assert len(db.rows(inbox)) == 2


def test_ids_follow_the_order_of_arrival(db):
    db.receive(*"dacb")
    assert [key for key, _ in states(db)] == ["d", "a", "c", "b"]


def test_a_message_in_a_lane_that_waits_does_not_make_it_wait_longer(db):
    db.receive("a")
    recorded_at = db.clock()
    db.clock.now_ms += 500
    db.receive("b")
    assert db.row(lanes).ready_at == recorded_at


@pytest.mark.parametrize("state", ["open", "ignored"])
def test_two_nodes_that_get_one_event_at_once_record_it_once(db, db_url, state):
    """The second waits for the first, whatever they wait at, and then knows it or is told to look again."""
    other = Database(db_url)
    found = []

    def record_elsewhere():
        try:
            found.extend(other.run(receive, [arrival("a", state=state)]))
        except Exception as error:  # noqa: BLE001  # looked at below
            found.append(error)

    thread = threading.Thread(target=record_elsewhere)
    with db.transaction() as tx:
        receive(tx, [arrival("a", state=state)])
        thread.start()
        thread.join(0.2)
    thread.join()
    if not isinstance(found[0], Recorded):
        found = other.run(receive, [arrival("a", state=state)])
    assert found == [REPEAT]
    assert len(db.rows(inbox)) == 1
    assert [t.count for t in db.rows(totals)] == ([] if state == "open" else [1])
    other.close()


# ------------------------------------------------------------------------------------------ claim and begin


def test_the_oldest_open_message_of_a_lane_is_begun(db):
    db.receive("a", "b")
    work = db.begin_one()
    assert isinstance(work, Work)
    assert (work.message.event_key, work.attempt, work.run, work.more) == ("a", 1, 1, True)
    db.commit_one(answered(work))
    work = db.begin_one(token="t2")
    assert (work.message.event_key, work.more) == ("b", False)


def test_lanes_are_begun_beside_each_other(db):
    db.receive("a", "b")
    db.receive("c", lane=BOB)
    first, second = db.begin(LANE, BOB)
    assert (first.message.event_key, second.message.event_key) == ("a", "c")


def test_a_lane_that_somebody_works_on_is_busy(db):
    db.receive("a", "b")
    db.begin_one()
    assert db.begin_one(token="t2") is NoWork.BUSY
    assert [r.attempts for r in db.rows(inbox)] == [1, 0]


def test_a_lane_nobody_has_heard_of_is_busy_and_not_made(db):
    assert db.begin_one("user:nobody") is NoWork.BUSY
    assert db.rows(lanes) == []


def test_a_lane_without_open_messages_is_idle_and_let_go(db):
    db.answer("a")
    with db.transaction() as tx:
        tx.connection.execute(update(lanes).values(ready_at=1))
    assert db.begin_one(token="t2") is NoWork.IDLE
    lane = db.row(lanes)
    assert (lane.ready_at, lane.lease_token, lane.lease_owner, lane.lease_until) == (None, None, None, 0)


def test_one_of_many_lanes_being_busy_or_idle_does_not_touch_the_others(db):
    db.receive("a")
    db.receive("b", lane=BOB)
    db.answer("c", lane="user:cyd")
    db.begin_one(token="other")
    results = db.begin(LANE, BOB, "user:cyd", token="t2")
    assert results[0] is NoWork.BUSY
    assert results[1].message.event_key == "b"
    assert results[2] is NoWork.IDLE


def test_a_lease_holds_until_its_end_and_no_longer(db):
    db.receive("a")
    db.begin_one()
    db.clock.now_ms += LEASE_MS
    assert db.begin_one(token="t2") is NoWork.BUSY
    db.clock.now_ms += 1
    work = db.begin_one(token="t2", owner="other/boot/1|2|2")
    assert (work.attempt, work.run) == (2, 2)
    assert (db.row(lanes).lease_owner, db.row(lanes).lease_token) == ("other/boot/1|2|2", "t2")


def test_a_renewed_lease_holds_longer(db):
    db.receive("a")
    db.begin_one()
    db.clock.now_ms += 10_000
    db.run(leases.renew, OWNER, [LANE], [])
    db.clock.now_ms += 10_000
    assert db.begin_one(token="t2") is NoWork.BUSY


@row_locks
def test_a_lane_held_by_another_transaction_is_passed_over_without_waiting(db, db_url):
    db.receive("a")
    db.receive("b", lane=BOB)
    other = Database(db_url)
    with other.transaction() as tx:
        tx.connection.execute(select(lanes.c.key).where(lanes.c.key == LANE).with_for_update()).all()
        found = db.begin(LANE, BOB)
    assert found[0] is NoWork.BUSY
    assert isinstance(found[1], Work)
    other.close()


def test_an_attempt_is_counted_once_for_one_lease(db):
    db.receive("a")
    first = db.begin_one()
    again = db.begin_one(rerun=True)
    assert (again.inbox_id, again.attempt, again.run) == (first.inbox_id, 1, 1)
    assert db.row(inbox).attempts == 1


def test_a_first_call_is_reserved_once_for_one_lease(db):
    db.plans.reserve(300)
    db.receive("a")
    db.begin_one()
    work = db.begin_one(rerun=True)
    assert work.refusal is None
    assert len(db.rows(reservations)) == 1
    assert db.row(budget_windows).reserved == 300


def test_a_second_run_reserves_what_the_first_could_not_finish(db):
    """The commit was lost before it was done: the same call with the re-run mark does all of it."""
    db.plans.reserve(300)
    db.receive("a")
    db.begin_one(rerun=True)
    assert db.row(budget_windows).reserved == 300
    assert db.row(inbox).attempts == 1


def test_waiting_is_no_attempt(db):
    db.plans.wait_ms = db.clock() + HOUR
    db.receive("a")
    assert db.begin_one() is NoWork.WAIT
    assert db.begin_one(rerun=True) is NoWork.WAIT
    assert (db.row(inbox).attempts, db.row(inbox).runs) == (0, 0)
    lane = db.row(lanes)
    assert (lane.ready_at, lane.lease_token) == (db.clock() + HOUR, None)
    db.plans.wait_ms = None
    assert db.begin_one(token="t2").attempt == 1


def test_lanes_wait_each_for_their_own_instant_and_let_others_work(db):
    db.plans.wait_ms = db.clock() + 1
    db.receive("a")
    db.begin_one()
    db.clock.now_ms += 2
    assert db.run(leases.ready_lanes, 10) == ([LANE], [])


@row_locks
def test_a_message_recorded_while_a_lane_is_found_idle_is_not_forgotten(db, db_url):
    """The lane is let go by a statement that sees what was committed after the lane was read."""
    db.answer("a")
    db.run(receive, [arrival("b")])
    with db.transaction() as tx:
        tx.connection.execute(update(inbox).where(inbox.c.event_key == "b").values(state="ignored"))
    other = Database(db_url)
    with db.transaction() as tx:
        assert begin(tx, [Lease(LANE, OWNER, "t2")], planner=db.plans, cache=db.cache) == [NoWork.IDLE]
        thread = threading.Thread(target=other.receive, args=("c",))
        thread.start()
        thread.join(0.2)
    thread.join()
    lane = db.row(lanes)
    assert (lane.lease_token, lane.ready_at) == (None, db.clock())
    other.close()


@pytest.mark.parametrize("turn", range(3))
def test_lanes_taken_by_many_at_once_are_each_worked_on_by_one(db_url, turn):
    databases = [Database(db_url) for _ in range(4)]
    names = [f"user:{n}" for n in range(12)]
    for name in names:
        databases[0].receive(name, lane=name)
    begun = []

    def work(n):
        for start in range(3):
            own = sorted(names, key=lambda name: hash((name, n, start, turn)))
            begun.extend(
                (r.inbox_id, r.attempt)
                for r in databases[n].begin(*own, token=f"t{n}")
                if isinstance(r, Work)
            )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {inbox_id for inbox_id, _ in begun} == {r.id for r in databases[0].rows(inbox)}
    assert {r.attempts for r in databases[0].rows(inbox)} == {1}
    for database in databases:
        database.close()


# ---------------------------------------------------------------------------------------------- after a crash


def test_the_call_of_an_attempt_that_died_is_booked_whole_exactly_once(db):
    db.plans.reserve(300)
    db.receive("a")
    db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    db.begin_one(token="t2")
    db.begin_one(token="t2", rerun=True)
    booked = db.row(usage)
    assert (booked.attempt, booked.outcome, booked.input_tokens + booked.output_tokens) == (1, "unknown", 300)
    assert (booked.user_id, booked.model, booked.cost_micro_usd) == ("web:ann", "echo", None)
    window = db.row(budget_windows)
    assert (window.used, window.reserved) == (300, 300)
    assert [(r.attempt, r.tokens) for r in db.rows(reservations)] == [(2, 300)]


def test_an_attempt_that_died_is_booked_even_if_the_next_one_must_wait(db):
    db.plans.reserve(300)
    db.receive("a")
    db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    db.plans.wait_ms = db.clock() + 5
    assert db.begin_one(token="t2") is NoWork.WAIT
    window = db.row(budget_windows)
    assert (window.used, window.reserved) == (300, 0)
    assert db.rows(reservations) == []
    db.clock.now_ms += 5
    db.plans.wait_ms = None
    work = db.begin_one(token="t3")
    assert (work.attempt, db.row(budget_windows).reserved) == (2, 300)


def test_what_cannot_be_reserved_is_refused_with_the_numbers_and_begun_all_the_same(db):
    db.plans.reserve(600)
    db.receive("a")
    db.receive("b", lane=BOB)
    first, second = db.begin(LANE, BOB)
    assert first.refusal is None
    assert (second.refusal.budget, second.refusal.reserved, second.refusal.wanted) == ("daily-user", 600, 600)
    assert db.row(budget_windows).reserved == 600


def test_a_stored_event_that_nobody_can_read_ends_dead_and_stops_nobody(db):
    db.receive("a")
    db.receive("b", lane=BOB)
    for payload in ("{}", "[1]", "no json"):
        with db.transaction() as tx:
            tx.connection.execute(text("UPDATE inbox SET payload = :p WHERE id = 1"), {"p": payload})
            tx.connection.execute(update(inbox).values(state="open"))
            tx.connection.execute(update(lanes).values(ready_at=1, lease_token=None))
        first, second = db.begin(LANE, BOB, token=f"t-{payload}")
        assert first is NoWork.AGAIN
        assert second.message.event_key == "b"
        assert db.rows(inbox)[0].state == "dead"
    assert db.rows(lanes)[0].ready_at is None or db.rows(lanes)[1].ready_at is None


def test_the_history_and_the_conversation_come_with_the_message(db):
    db.answer("a")
    db.receive("b")
    work = db.begin_one(token="t2")
    assert [(r.role, r.content, r.tokens) for r in work.history] == [
        ("user", "say a", 3),
        ("assistant", "hello", 5),
    ]
    state = work.conversation
    assert (state.public_id, state.title, state.message_count, state.total_tokens) == (
        "public-1",
        "say a",
        2,
        8,
    )
    assert (state.last_seq, state.version, state.user_key) == (2, 1, "web:private:ann")


def test_a_conversation_of_another_tenant_is_not_this_ones(db):
    db.answer("a")
    with db.transaction() as tx:
        tx.connection.execute(text("UPDATE conversations SET tenant_id = 'other'"))
    db.receive("b")
    work = db.begin_one(token="t2")
    assert work.conversation is None
    db.commit_one(answered(work))
    with db.transaction() as tx:
        assert sorted(tx.connection.execute(text("SELECT tenant_id FROM conversations")).scalars()) == [
            "default",
            "other",
        ]


def test_a_conversation_that_the_message_names_is_found_by_its_name(db):
    db.receive("a", lane="conv:mine", conversation="mine")
    db.commit_one(answered(db.begin_one("conv:mine")))
    db.receive("b", lane="conv:mine", conversation="mine")
    work = db.begin_one("conv:mine", token="t2")
    assert (work.conversation.public_id, work.conversation.message_count) == ("mine", 2)


def test_nothing_begins_for_an_empty_list(db):
    assert db.run(begin, [], planner=db.plans, cache=db.cache) == []
    assert db.run(receive, []) == []


def test_the_ends_of_a_day_are_counted_by_account(db):
    db.answer("a")
    db.receive("b")
    db.commit_one(Outcome(db.begin_one(token="t2"), End.REFUSED, "too long"))
    db.run(receive, [arrival("c", account="other", state="ignored")])
    counted = {(t.account, t.end): t.count for t in db.rows(totals)}
    assert counted == {("web", "answered"): 1, ("web", "refused"): 1, ("other", "ignored"): 1}
    assert {t.day for t in db.rows(totals)} == {db.clock.utc().date().isoformat()}
