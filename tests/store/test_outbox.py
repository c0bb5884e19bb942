"""Parts on their way out: order, leases, outcomes nobody knows (steps 8 and 9)."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import update

from feishu_bot.model import End
from feishu_bot.store import cleanup, leases, outbox
from feishu_bot.store.schema import lanes
from feishu_bot.store.schema import outbox as parts
from feishu_bot.store.work import LEASE_MS, Lease, NoWork, PartToSend, SendResult, SendStep
from tests.transact import LANE, OWNER, Database, answered, row_locks

MINE = Lease(LANE, OWNER, "mine")
THEIRS = Lease(LANE, "other/boot/1|2|2", "theirs")


def pushed(db, *sources, lane=LANE, **more):
    """Put one note for each source into the outbox."""
    rows = [
        {
            "source": s,
            "kind": "note",
            "part": 0,
            "lane_key": lane,
            "account": "web",
            "payload": f'"{s}"',
            **more,
        }
        for s in sources
    ]
    db.run(outbox.push, rows)


def states(db):
    return [(p.source, p.state) for p in db.rows(parts)]


def sent(part):
    return SendResult(part.id, "sent", sent_id=f"id-{part.source}")


# ---------------------------------------------------------------------------------------------------- order


def test_the_parts_of_a_lane_are_sent_in_order_one_at_a_time(db):
    pushed(db, "a", "b", "c")
    part, order = db.step(MINE), []
    while isinstance(part, PartToSend):
        order.append(part.source)
        assert [s for _, s in states(db)].count("attempting") == 1
        part = db.step(MINE, sent(part))
    assert (order, part) == (["a", "b", "c"], NoWork.IDLE)
    assert states(db) == [("a", "sent"), ("b", "sent"), ("c", "sent")]
    assert [p.sent_id for p in db.rows(parts)] == ["id-a", "id-b", "id-c"]
    lane = db.row(lanes)
    assert (lane.send_ready_at, lane.send_token, lane.send_owner, lane.send_until) == (None, None, None, 0)


def test_many_lanes_are_sent_for_in_one_list(db):
    names = [f"user:{n}" for n in range(5)]
    for name in names:
        pushed(db, f"a-{name}", f"b-{name}", lane=name)
    own = [Lease(name, OWNER, f"t-{name}") for name in names]
    first = db.run(outbox.send_step, [SendStep(lease) for lease in own])
    assert [p.source for p in first] == [f"a-{name}" for name in names]
    second = db.run(outbox.send_step, [SendStep(le, sent(p)) for le, p in zip(own, first, strict=True)])
    assert [p.source for p in second] == [f"b-{name}" for name in names]
    last = db.run(outbox.send_step, [SendStep(le, sent(p)) for le, p in zip(own, second, strict=True)])
    assert last == [NoWork.IDLE] * 5


def test_a_refused_part_does_not_hold_up_the_next(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    second = db.step(MINE, SendResult(first.id, "refused", error="no such chat"))
    assert second.source == "b"
    row = db.rows(parts)[0]
    assert (row.state, row.last_error, row.ended_at) == ("refused", "no such chat", db.clock())


def test_a_part_that_is_to_be_tried_later_holds_its_lane_until_then(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    later = db.clock() + 2000
    assert db.step(MINE, SendResult(first.id, "pending", error="busy", not_before=later)) is NoWork.WAIT
    lane = db.row(lanes)
    assert (lane.send_ready_at, lane.send_token) == (later, None)
    assert db.step(THEIRS) is NoWork.WAIT
    db.clock.now_ms = later
    again = db.step(THEIRS)
    assert (again.source, again.attempts, again.first_attempt_at) == ("a", 2, first.first_attempt_at)
    assert again.unknown_at is None


def test_the_state_of_a_part_says_that_it_is_being_sent_before_it_is(db):
    pushed(db, "a")
    db.step(MINE)
    row = db.row(parts)
    assert (row.state, row.attempts, row.first_attempt_at, row.attempt_token) == (
        "attempting",
        1,
        db.clock(),
        "mine",
    )


# ---------------------------------------------------------------------------------------------------- lease


def test_a_lane_that_another_sends_for_is_busy(db):
    pushed(db, "a", "b")
    db.step(MINE)
    assert db.step(THEIRS) is NoWork.BUSY
    db.clock.now_ms += LEASE_MS
    assert db.step(THEIRS) is NoWork.BUSY


def test_of_two_that_ask_for_a_lane_in_one_list_one_gets_it(db):
    pushed(db, "a")
    found = db.run(outbox.send_step, [SendStep(MINE), SendStep(THEIRS)])
    assert sorted(isinstance(f, PartToSend) for f in found) == [False, True]
    assert NoWork.BUSY in found
    assert db.row(parts).attempts == 1


def test_a_result_and_a_question_of_another_for_the_same_lane_do_not_disturb_each_other(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    busy, second = db.run(outbox.send_step, [SendStep(THEIRS), SendStep(MINE, sent(first))])
    assert busy is NoWork.BUSY
    assert second.source == "b"
    assert states(db) == [("a", "sent"), ("b", "attempting")]


def test_a_result_under_a_lost_lease_is_dropped(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    db.clock.now_ms += LEASE_MS + 1
    theirs = db.step(THEIRS)
    assert theirs.id == first.id
    assert db.step(MINE, sent(first)) is NoWork.BUSY
    assert states(db)[0] == ("a", "attempting")
    assert db.step(MINE, SendResult(first.id, "pending", error="x", aside=True)) is NoWork.BUSY
    assert {p.lane_key for p in db.rows(parts)} == {LANE}
    assert db.step(THEIRS, sent(theirs)).source == "b"


def test_a_result_that_comes_late_counts_if_nobody_took_the_lane(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    db.clock.now_ms += LEASE_MS + 1
    assert db.step(MINE, sent(first)).source == "b"
    assert states(db)[0] == ("a", "sent")


def test_sending_keeps_its_lease_while_it_is_renewed(db):
    pushed(db, "a")
    db.step(MINE)
    db.clock.now_ms += 10_000
    db.run(leases.renew, OWNER, [], [LANE])
    db.clock.now_ms += 10_000
    assert db.step(THEIRS) is NoWork.BUSY


def test_going_on_renews_the_lease(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    db.clock.now_ms += 10_000
    db.step(MINE, sent(first))
    assert db.row(lanes).send_until == db.clock() + LEASE_MS


def test_working_on_a_lane_does_not_keep_others_from_sending_for_it(db):
    pushed(db, "a")
    db.receive("m")
    db.begin_one()
    assert db.step(THEIRS).source == "a"


# ------------------------------------------------------------------------------------------ unknown outcomes


def test_a_part_that_its_process_died_over_has_an_unknown_outcome(db):
    pushed(db, "a")
    first = db.step(MINE)
    db.clock.now_ms += LEASE_MS + 1
    again = db.step(THEIRS)
    assert (again.id, again.attempts, again.unknown_at) == (first.id, 2, first.first_attempt_at)
    assert db.row(parts).unknown_at == first.first_attempt_at


def test_an_attempt_that_may_have_arrived_is_remembered_by_its_first_instant(db):
    pushed(db, "a")
    first = db.step(MINE)
    result = SendResult(first.id, "pending", outcome_unknown=True, not_before=db.clock())
    db.clock.now_ms += 10
    again = db.step(MINE, result)
    assert (again.attempts, again.unknown_at) == (2, first.first_attempt_at)
    db.clock.now_ms += 10
    third = db.step(MINE, SendResult(again.id, "pending", not_before=0))
    assert third.unknown_at == first.first_attempt_at


def test_a_step_whose_commit_was_not_heard_of_is_no_second_attempt(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    again = db.step(MINE, rerun=True)
    assert (again.id, again.attempts, again.unknown_at) == (first.id, 1, None)
    result = sent(first)
    second = db.step(MINE, result)
    again = db.step(MINE, result, rerun=True)
    assert (again.id, again.attempts, again.unknown_at) == (second.id, 1, None)
    assert states(db) == [("a", "sent"), ("b", "attempting")]


def test_a_step_run_again_for_a_part_of_somebody_who_died_still_calls_its_outcome_unknown(db):
    """The first run was undone with its connection; that it is a second one says nothing about the part."""
    pushed(db, "a")
    db.step(THEIRS)
    db.clock.now_ms += LEASE_MS + 1
    assert db.step(MINE, rerun=True).unknown_at is not None


def test_a_last_part_reported_twice_stays_sent(db):
    pushed(db, "a")
    first = db.step(MINE)
    assert db.step(MINE, sent(first)) is NoWork.IDLE
    db.step(MINE, SendResult(first.id, "refused", error="x"), rerun=True)
    assert states(db) == [("a", "sent")]


# ---------------------------------------------------------------------------------------------- other ends


@pytest.mark.parametrize("end", ["dead", "expired"])
def test_a_part_that_is_given_up_lets_the_next_go(db, end):
    pushed(db, "a", "b")
    assert db.step(MINE, SendResult(db.step(MINE).id, end, error="too long")).source == "b"
    assert states(db)[0] == ("a", end)


def test_a_part_set_aside_is_sent_in_a_lane_of_its_own(db):
    pushed(db, "a", "b")
    first = db.step(MINE)
    later = db.clock() + 1000
    following = db.step(MINE, SendResult(first.id, "pending", error="x", not_before=later, aside=True))
    assert following.source == "b"
    aside = f"aside:out-{first.id}"
    assert db.rows(parts)[0].lane_key == aside
    db.step(MINE, sent(following))
    assert db.run(leases.ready_lanes, 9)[1] == [aside]
    assert db.step(Lease(aside, OWNER, "aside")) is NoWork.WAIT
    db.clock.now_ms = later
    assert db.step(Lease(aside, OWNER, "aside")).source == "a"


def test_an_erased_part_keeps_its_keys_and_no_text(db):
    pushed(db, "a")
    part = db.step(MINE)
    db.step(MINE, SendResult(part.id, "sent", erase=True))
    assert (db.row(parts).payload, db.row(parts).source) == ("{}", "a")


def test_a_long_error_is_cut(db):
    pushed(db, "a")
    db.step(MINE, SendResult(db.step(MINE).id, "refused", error="é" * 900))
    assert db.row(parts).last_error == "é" * 500


def test_a_dead_part_is_sent_again_when_a_person_asks_for_it(db):
    pushed(db, "a")
    part = db.step(MINE)
    db.step(MINE, SendResult(part.id, "dead", error="x"))
    assert db.run(cleanup.retry_dead, [f"out-{part.id}"]) == [f"out-{part.id}"]
    assert db.run(leases.ready_lanes, 9)[1] == [LANE]
    assert db.step(THEIRS).id == part.id


# ----------------------------------------------------------------------------------------------------- push


def test_a_part_is_pushed_once(db):
    pushed(db, "a", "b", "a")
    pushed(db, "a")
    pushed(db)
    assert states(db) == [("a", "pending"), ("b", "pending")]
    assert db.run(leases.ready_lanes, 9) == ([], [LANE])


def test_pushing_again_what_was_sent_sends_nothing(db):
    pushed(db, "a")
    db.step(MINE, sent(db.step(MINE)))
    pushed(db, "a")
    assert db.step(MINE) is NoWork.IDLE
    assert states(db) == [("a", "sent")]


def test_a_note_goes_out_beside_the_work_on_its_lane(db):
    db.receive("m")
    work = db.begin_one()
    pushed(db, "note")
    first = db.step(MINE)
    assert first.source == "note"
    assert db.commit_one(answered(work, End.ANSWERED)).sending is None
    assert db.step(MINE, sent(first)).source == "in:1"


def test_nothing_to_send_in_a_lane_nobody_knows(db):
    assert db.step(MINE) is NoWork.BUSY
    assert db.rows(lanes) == []


def test_a_lane_that_looks_ready_and_has_no_parts_is_put_to_rest(db):
    db.receive("m")
    with db.transaction() as tx:
        tx.connection.execute(update(lanes).values(send_ready_at=1))
    assert db.step(MINE) is NoWork.IDLE
    assert db.row(lanes).send_ready_at is None


@row_locks
def test_a_part_pushed_while_the_last_one_is_reported_keeps_the_lane_ready(db, db_url):
    other = Database(db_url)
    pushed(db, "a")
    first = db.step(MINE)
    pushing = threading.Thread(target=pushed, args=(other, "b"))
    with db.transaction() as tx:
        assert outbox.send_step(tx, [SendStep(MINE, sent(first))]) == [NoWork.IDLE]
        pushing.start()
        pushing.join(0.2)
        assert pushing.is_alive()
    pushing.join()
    second = db.step(MINE)
    assert second.source == "b"

    found = []
    reporting = threading.Thread(target=lambda: found.append(db.step(MINE, sent(second))))
    with other.transaction() as tx:
        outbox.push(
            tx, [{"source": "c", "kind": "note", "part": 0, "lane_key": LANE, "account": "w", "payload": "1"}]
        )
        reporting.start()
        reporting.join(0.2)
        assert reporting.is_alive()
    reporting.join()
    assert found[0].source == "c"
    other.close()


def test_many_that_ask_for_one_lane_send_each_part_once(db_url):
    databases = [Database(db_url) for _ in range(4)]
    pushed(databases[0], *[f"p{n}" for n in range(8)])
    taken = []

    def send(n):
        for turn in range(40):
            lease = Lease(LANE, OWNER, f"t{n}-{turn}")
            part = databases[n].step(lease)
            while isinstance(part, PartToSend):
                taken.append(part.source)
                part = databases[n].step(lease, sent(part))

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [f"p{n}" for n in range(8)]
    for database in databases:
        database.close()
