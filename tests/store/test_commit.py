"""Ending a message: conversation, ledger, inbox, outbox and lane in one transaction (step 7)."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlalchemy import delete, text, update

from feishu_bot.errors import LeaseLost
from feishu_bot.model import CallUsage, End
from feishu_bot.store import cleanup, leases
from feishu_bot.store.commit import commit, reserve_calls
from feishu_bot.store.schema import (
    budget_windows,
    conversations,
    inbox,
    lanes,
    messages,
    outbox,
    reservations,
    totals,
    usage,
)
from feishu_bot.store.work import (
    LEASE_MS,
    Change,
    Committed,
    HistoryRow,
    Lease,
    NewPart,
    NoWork,
    Outcome,
    PlannedCall,
    SendResult,
    Work,
)
from tests.transact import DAILY, LANE, Database, answered, row_locks

BOB = "user:web:private:bob"
OK = CallUsage(0, "echo", 40, 10, cost_micro_usd=500_000)


def nothing_was_stored(db):
    return not db.rows(messages) and not db.rows(outbox) and not db.rows(usage)


def hide(db, scope=None):
    with db.transaction() as tx:
        tx.connection.execute(update(conversations).values(hidden_at=db.clock.utc(), scope_key=scope))


# --------------------------------------------------------------------------------------------- what is stored


def test_an_answer_is_stored_with_all_that_it_means(db):
    db.plans.reserve(100)
    db.receive("a")
    work = db.begin_one()
    done = db.commit_one(answered(work, calls=(OK,), parts=2, reason="asked"))
    assert (done.end, done.conversation_public_id) == (End.ANSWERED, "public-1")

    user, assistant = db.rows(messages)
    assert (user.seq, user.role, user.content, user.tokens) == (1, "user", "say a", 3)
    assert (user.sender_id, user.save_key) == ("web:private:ann", "in:1:user")
    assert (assistant.seq, assistant.role, assistant.content) == (2, "assistant", "hello")
    conversation = db.row(conversations)
    assert (conversation.message_count, conversation.total_tokens, conversation.last_seq) == (2, 8, 2)
    assert (conversation.title, conversation.version, conversation.scope_key) == ("say a", 1, LANE)
    assert conversation.created_at == conversation.last_activity == db.clock.utc()

    row = db.row(inbox)
    assert (row.state, row.reason, row.ended_at) == ("answered", "asked", db.clock())
    assert [(p.source, p.kind, p.part, p.lane_key) for p in db.rows(outbox)] == [
        ("in:1", "answer", 0, LANE),
        ("in:1", "answer", 1, LANE),
    ]
    booked = db.row(usage)
    assert (booked.input_tokens, booked.output_tokens, booked.cost_micro_usd, booked.outcome) == (
        40,
        10,
        500_000,
        "ok",
    )
    assert booked.conversation_id == conversation.id
    assert (db.row(budget_windows).used, db.row(budget_windows).reserved) == (50, 0)
    assert db.rows(reservations) == []
    assert [(t.end, t.count) for t in db.rows(totals)] == [("answered", 1)]
    assert db.row(lanes).ready_at is None


def test_counters_go_on_from_message_to_message(db):
    db.answer("a")
    db.clock.now_ms += 1000
    db.answer("b")
    conversation = db.row(conversations)
    assert (conversation.message_count, conversation.total_tokens, conversation.last_seq) == (4, 16, 4)
    assert conversation.version == 2
    assert conversation.last_activity == db.clock.utc() > conversation.created_at
    assert conversation.title == "say a"
    assert [m.seq for m in db.rows(messages)] == [1, 2, 3, 4]


def test_a_conversation_without_a_title_gets_that_of_the_first_words_stored(db):
    db.answer("a")
    with db.transaction() as tx:
        tx.connection.execute(update(conversations).values(title=None))
    db.receive("b")
    work = db.begin_one(token="t2")
    named = replace(answered(work).work, conversation=work.conversation)
    outcome = answered(named)
    new = replace(_new(db, work), title="say b")
    db.commit_one(replace(outcome, conversation=new))
    assert db.row(conversations).title == "say b"


def _new(db, work):
    return answered(replace(work, conversation=None)).conversation


def test_many_outcomes_in_one_list_are_each_stored_once(db):
    db.plans.reserve(10, replace(DAILY, limit=10_000))
    names = [f"user:{n}" for n in range(20)]
    for name in names:
        db.receive(f"m-{name}", lane=name)
    works = db.begin(*names)
    results = db.commit(
        *(answered(work, calls=(replace(OK, input_tokens=1, output_tokens=2),)) for work in works)
    )
    assert len({r.conversation_id for r in results}) == 20
    assert len(db.rows(messages)) == 40
    assert db.row(budget_windows).used == 60
    assert {c.message_count for c in db.rows(conversations)} == {2}
    assert all(r.sending.payload == '{"text": "hello 0"}' for r in results)
    assert [t.count for t in db.rows(totals)] == [20]


def test_a_message_that_ends_without_words_makes_no_conversation(db):
    db.receive("a")
    done = db.commit_one(Outcome(db.begin_one(), End.REFUSED, "too long", parts=(NewPart("note", 0, "{}"),)))
    assert (done.conversation_id, db.rows(conversations)) == (None, [])
    assert [p.kind for p in db.rows(outbox)] == ["note"]


def test_an_erased_message_keeps_its_key_and_no_text(db):
    db.receive("a")
    db.commit_one(Outcome(db.begin_one(), End.ANSWERED, erase=True))
    assert (db.row(inbox).payload, db.row(inbox).event_key) == ("{}", "a")


def test_the_ids_of_stored_messages_are_told_to_who_named_the_conversation(db):
    db.receive("a", lane="conv:mine", conversation="mine")
    done = db.commit_one(answered(db.begin_one("conv:mine")))
    assert done.conversation_public_id == "mine"
    assert done.message_ids == tuple(m.id for m in db.rows(messages))
    assert db.answer("b").message_ids == ()


def test_the_new_rows_are_carried_to_the_cache(db):
    db.answer("a")
    with db.statements() as seen:
        db.receive("b")
        work = db.begin_one(token="t2")
    assert [r.content for r in work.history] == ["say a", "hello"]
    assert isinstance(work.history[0], HistoryRow)
    assert not [s for s in seen if "FROM messages" in s or "JOIN messages" in s]


def test_a_library_that_makes_the_scopes_conversation_first_is_joined(db):
    db.receive("a")
    work = db.begin_one()
    now = db.clock.utc()
    same = {"public_id": "first", "scope_key": LANE, "user_key": "u", "platform": "web"}
    db.put(
        conversations, {**same, "created_at": now, "last_activity": now, "last_seq": 7, "message_count": 1}
    )
    done = db.commit_one(answered(work))
    assert done.conversation_public_id == "first"
    assert (db.row(conversations).last_seq, [m.seq for m in db.rows(messages)]) == (9, [8, 9])


# -------------------------------------------------------------------------------------------------- commands


def test_archiving_leaves_the_messages_and_frees_the_scope(db):
    db.answer("a")
    db.receive("b")
    work = db.begin_one(token="t2")
    db.commit_one(Outcome(work, End.ANSWERED, "command", change=Change.ARCHIVE))
    assert (db.row(conversations).scope_key, db.row(conversations).version) == (None, 2)
    db.answer("c")
    old, new = db.rows(conversations)
    assert (old.message_count, new.message_count, new.scope_key) == (2, 2, LANE)


def test_clearing_keeps_the_conversation_and_nothing_in_it(db):
    db.answer("a")
    with db.transaction() as tx:
        tx.connection.execute(update(conversations).values(summary="old words"))
    db.receive("b")
    work = db.begin_one(token="t2")
    db.commit_one(Outcome(work, End.ANSWERED, "command", change=Change.CLEAR))
    conversation = db.row(conversations)
    assert (conversation.message_count, conversation.total_tokens, conversation.summary) == (0, 0, None)
    assert (conversation.last_seq, conversation.version, db.rows(messages)) == (2, 2, [])
    db.receive("c")
    assert db.begin_one(token="t3").history == ()


def test_a_message_answered_anew_is_stored_though_its_first_words_were_cleared_and_not_removed_yet(db):
    db.answer("a")
    with db.transaction() as tx:
        tx.connection.execute(update(conversations).values(cleared_seq=2, message_count=0, total_tokens=0))
        tx.connection.execute(update(inbox).values(state="dead"))
    assert db.run(cleanup.retry_dead, ["in-1"]) == ["in-1"]
    db.commit_one(answered(db.begin_one(token="t2")))
    assert [m.seq for m in db.rows(messages)] == [3, 4]
    assert db.row(conversations).message_count == 2


# ---------------------------------------------------------------------------------------------------- fence


def test_an_outcome_is_dropped_when_another_has_taken_the_lane(db):
    db.plans.reserve(100)
    db.receive("a")
    work = db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    theirs = db.begin_one(token="t2")
    assert isinstance(db.commit_one(answered(work, calls=(OK,))), LeaseLost)
    assert not db.rows(messages)
    assert not db.rows(outbox)
    assert (db.row(inbox).state, db.row(lanes).lease_token) == ("open", "t2")
    assert isinstance(db.commit_one(answered(theirs, calls=(OK,))), Committed)
    assert len(db.rows(messages)) == 2


def test_the_same_token_of_another_owner_is_no_fence_passed(db):
    db.receive("a")
    work = db.begin_one()
    work = replace(work, lease=replace(work.lease, owner="other/boot/1|2|2"))
    assert isinstance(db.commit_one(answered(work)), LeaseLost)
    assert nothing_was_stored(db)


def test_an_outcome_whose_lease_has_ended_but_was_not_taken_is_stored(db):
    db.receive("a")
    work = db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    assert isinstance(db.commit_one(answered(work)), Committed)


def test_one_lost_lease_does_not_touch_the_others_of_a_list(db):
    db.receive("a")
    db.receive("b", lane=BOB)
    works = db.begin(LANE, BOB)
    db.clock.now_ms += LEASE_MS + 1
    db.begin_one(LANE, token="t2")
    lost, done = db.commit(*map(answered, works))
    assert isinstance(lost, LeaseLost)
    assert isinstance(done, Committed)
    assert {m.content for m in db.rows(messages)} == {"say b", "hello"}


def test_an_outcome_is_dropped_when_the_message_expired_in_the_meantime(db):
    db.receive("a")
    work = db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    assert db.run(cleanup.expire, older_than_ms=LEASE_MS, note=lambda message, count: None).total() == 1
    for end in (End.ANSWERED, End.EXPIRED):
        assert isinstance(db.commit_one(answered(work, end)), LeaseLost)
    assert nothing_was_stored(db)
    assert [(t.end, t.count) for t in db.rows(totals)] == [("expired", 1)]


def test_a_message_somebody_ended_without_the_lease_is_not_ended_twice(db):
    """Nobody does; if somebody did, nothing of the list is stored and halving it finds the message."""
    db.receive("a")
    work = db.begin_one()
    with db.transaction() as tx:
        tx.connection.execute(update(inbox).values(state="dead", begun_token=None))
    with pytest.raises(LeaseLost):
        db.commit_one(answered(work))
    assert nothing_was_stored(db)
    assert (db.row(inbox).state, db.rows(totals)) == ("dead", [])


# ------------------------------------------------------------------------------------------- committed unheard


@pytest.mark.parametrize("rerun", [True, False])
@pytest.mark.parametrize("scope", ["scope", "named", "known"])
def test_a_commit_that_nobody_heard_of_is_answered_again_as_it_was(db, rerun, scope):
    db.plans.reserve(100)
    named = {"conversation": "mine"} if scope == "named" else {}
    if scope == "known":
        db.answer("before")
        db.step(Lease(LANE, "o", "send"), None)
    with db.transaction() as tx:
        tx.connection.execute(delete(outbox))
        tx.connection.execute(update(lanes).values(send_ready_at=None, send_token=None))
    db.receive("a", **named)
    work = db.begin_one()
    outcome = answered(work, calls=(OK,), parts=2)
    first = db.commit_one(outcome)
    again = db.commit_one(outcome, rerun=rerun)
    assert again == first
    assert again.sending is not None
    assert len(db.rows(outbox)) == 2
    assert sum(t.count for t in db.rows(totals)) == len(db.rows(inbox))
    assert db.rows(conversations)[-1].message_count == len(db.rows(messages))
    assert len(db.rows(usage)) == len(db.rows(inbox)) or scope == "known"


def test_a_commit_lost_before_it_was_done_is_done_by_the_second_run(db):
    db.receive("a")
    assert isinstance(db.commit_one(answered(db.begin_one()), rerun=True), Committed)
    assert len(db.rows(messages)) == 2


# -------------------------------------------------------------------------------------- deleted conversations


@pytest.mark.parametrize("scope", [None, LANE])
def test_an_answer_to_a_deleted_conversation_is_paid_for_and_neither_stored_nor_sent(db, scope):
    db.answer("a")
    db.plans.reserve(100)
    db.receive("b")
    work = db.begin_one(token="t2")
    hide(db, scope)
    done = db.commit_one(answered(work, calls=(OK,)))
    assert (done.end, done.sending) == (End.IGNORED, None)
    row = db.rows(inbox)[1]
    assert (row.state, row.reason, row.payload) == ("ignored", "the conversation was deleted", "{}")
    assert len(db.rows(messages)) == 2
    assert [p.source for p in db.rows(outbox)] == ["in:1"]
    assert (db.row(usage).inbox_id, db.row(budget_windows).used) == (2, 50)
    assert sorted((t.end, t.count) for t in db.rows(totals)) == [("answered", 1), ("ignored", 1)]


def test_an_answer_to_a_conversation_whose_rows_are_gone_is_not_stored_either(db):
    db.answer("a")
    db.receive("b")
    work = db.begin_one(token="t2")
    with db.transaction() as tx:
        tx.connection.execute(delete(conversations))
    assert db.commit_one(answered(work)).end is End.IGNORED
    assert db.rows(messages) == []


def test_a_named_conversation_that_was_deleted_before_the_work_began_is_not_made_anew(db):
    db.receive("a", lane="conv:mine", conversation="mine")
    db.commit_one(answered(db.begin_one("conv:mine")))
    db.receive("b", lane="conv:mine", conversation="mine")
    hide(db)
    work = db.begin_one("conv:mine", token="t2")
    assert work.conversation is None
    assert db.commit_one(answered(work)).end is End.IGNORED
    assert len(db.rows(conversations)) == 1
    assert len(db.rows(messages)) == 2


# ------------------------------------------------------------------------------------------- answered anew


def test_a_message_that_is_answered_anew_is_stored_once_and_its_calls_are_all_in_the_ledger(db):
    db.plans.reserve(100)
    db.receive("a")
    work = db.begin_one()
    user, _ = answered(work).messages
    unknown = CallUsage(0, "echo", 0, 0, "unknown")
    db.commit_one(answered(work, End.DEAD, messages=(user,), calls=(unknown,), parts=0))
    assert db.run(cleanup.retry_dead, ["in-1"]) == ["in-1"]

    again = db.begin_one(token="t2")
    assert (again.attempt, again.run, again.retried) == (1, 2, True)
    assert db.rows(reservations)[0].attempt == 2
    done = db.commit_one(answered(again, calls=(OK,)))
    assert done.end is End.ANSWERED
    assert [m.role for m in db.rows(messages)] == ["user", "assistant"]
    assert db.row(conversations).message_count == 2
    assert [(u.attempt, u.outcome) for u in db.rows(usage)] == [(1, "unknown"), (2, "ok")]
    assert db.row(budget_windows).used == 150
    assert {(t.end): t.count for t in db.rows(totals)} == {"dead": 0, "answered": 1}


def test_the_answer_of_a_message_answered_anew_is_left_to_who_looks_for_it(db):
    """Its rows may be there already, so nothing is handed out that was not read."""
    db.receive("a")
    db.commit_one(answered(db.begin_one(), End.DEAD, parts=0))
    db.run(cleanup.retry_dead, ["in-1"])
    done = db.commit_one(answered(db.begin_one(token="t2")))
    assert done.sending is None
    assert db.row(outbox).state == "pending"
    assert db.run(leases.ready_lanes, 9)[1] == [LANE]


# ---------------------------------------------------------------------------------------------------- parts


def test_the_first_part_is_handed_out_under_the_works_lease(db):
    db.receive("a")
    work = db.begin_one()
    sending = db.commit_one(answered(work, parts=2)).sending
    first, second = db.rows(outbox)
    assert (sending.id, sending.part, sending.attempts, sending.payload) == (first.id, 0, 1, first.payload)
    assert (sending.lease, sending.first_attempt_at) == (work.lease, db.clock())
    assert (first.state, first.attempts, first.first_attempt_at) == ("attempting", 1, db.clock())
    assert first.attempt_token == work.lease.token
    assert (second.state, second.attempts) == ("pending", 0)
    lane = db.row(lanes)
    assert (lane.send_token, lane.send_owner) == (work.lease.token, work.lease.owner)
    assert lane.send_until == db.clock() + LEASE_MS
    following = db.step(work.lease, SendResult(sending.id, "sent"))
    assert following.id == second.id


def test_a_lane_that_somebody_sends_for_gets_its_parts_behind_the_others(db):
    first = db.answer("a").sending
    done = db.answer("b")
    assert done.sending is None
    following = db.step(first.lease, SendResult(first.id, "sent"))
    assert (following.source, following.lease) == ("in:2", first.lease)


def test_a_lane_whose_parts_wait_gets_its_parts_behind_them(db):
    first = db.answer("a").sending
    later = db.clock() + 5000
    assert db.step(first.lease, SendResult(first.id, "pending", not_before=later)) is NoWork.WAIT
    assert db.answer("b").sending is None
    assert db.row(lanes).send_ready_at == later


def test_a_part_with_a_source_of_its_own_is_said_once(db):
    db.receive("a", "b")
    note = (NewPart("note", 0, "{}", source="access:ann"),)
    assert db.commit_one(Outcome(db.begin_one(), End.REFUSED, parts=note)).sending is None
    assert db.commit_one(Outcome(db.begin_one(token="t2"), End.REFUSED, parts=note)).sending is None
    assert db.row(outbox).source == "access:ann"


def test_a_part_that_the_asker_fetches_is_recorded_as_sent(db):
    db.receive("a")
    done = db.commit_one(answered(db.begin_one(), parts=0))
    assert done.sending is None
    db.receive("b")
    work = db.begin_one(token="t2")
    done = db.commit_one(replace(answered(work), parts=(NewPart("answer", 0, "{}", sent=True),)))
    assert done.sending is None
    assert (db.row(outbox).state, db.row(outbox).ended_at) == ("sent", db.clock())
    assert db.row(lanes).send_ready_at is None


# --------------------------------------------------------------------------------------- the lane is let go


def test_a_lane_with_more_messages_stays_ready(db):
    db.receive("a", "b")
    db.clock.now_ms += 50
    db.commit_one(answered(db.begin_one()))
    lane = db.row(lanes)
    assert (lane.ready_at, lane.lease_token, lane.lease_owner) == (db.clock(), None, None)


@row_locks
def test_a_message_recorded_while_the_last_one_ends_keeps_the_lane_ready(db, db_url):
    """It waits for the lane's row, or is seen by the statement that lets the lane go: there is no third way."""
    other = Database(db_url)
    db.receive("a")
    work = db.begin_one()
    recording = threading.Thread(target=other.receive, args=("b",))
    with db.transaction() as tx:
        commit(tx, [answered(work)], cache=db.cache)
        recording.start()
        recording.join(0.2)
        assert recording.is_alive()  # the lane's row is held
    recording.join()
    assert db.row(lanes).ready_at is not None

    work = db.begin_one(token="t2")
    ending = threading.Thread(target=db.commit_one, args=(answered(work),))
    with other.transaction() as tx:
        tx.connection.execute(text("UPDATE lanes SET ready_at = ready_at"))
        ending.start()
        ending.join(0.2)
        assert ending.is_alive()
        tx.connection.execute(
            text(
                "INSERT INTO inbox (account, event_key, lane_key, payload, state, received_at)"
                " VALUES ('web', 'c', :lane, :payload, 'open', 1)"
            ),
            {"lane": LANE, "payload": db.rows(inbox)[0].payload},
        )
    ending.join()
    assert db.row(lanes).ready_at is not None
    assert db.begin_one(token="t3").message.event_key == "a"  # the payload was copied
    other.close()


# -------------------------------------------------------------------------------------------- further calls


def test_further_calls_are_reserved_and_settled_each_by_itself(db):
    db.plans.reserve(100)
    db.receive("a")
    work = db.begin_one()
    more = PlannedCall("other", 20, 50, (DAILY,))
    assert db.run(reserve_calls, [(work, 1, more), (work, 2, more)]) == [None, None]
    assert db.row(budget_windows).reserved == 200
    calls = (OK, CallUsage(1, "other", 0, 0, "failed"), CallUsage(2, "other", 7, 3))
    db.commit_one(answered(work, calls=calls))
    assert [(u.call, u.model, u.input_tokens + u.output_tokens) for u in db.rows(usage)] == [
        (0, "echo", 50),
        (2, "other", 10),
    ]
    assert (db.row(budget_windows).used, db.row(budget_windows).reserved) == (60, 0)


def test_a_further_call_is_fenced(db):
    db.receive("a")
    work = db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    db.begin_one(token="t2")
    (lost,) = db.run(reserve_calls, [(work, 1, PlannedCall("echo", 1, 2, (DAILY,)))])
    assert isinstance(lost, LeaseLost)
    assert db.rows(reservations) == db.rows(budget_windows) == []


@pytest.mark.parametrize("rerun", [True, False])
def test_a_further_call_asked_for_twice_is_reserved_once(db, rerun):
    db.receive("a")
    work = db.begin_one()
    for run in (False, rerun):
        assert db.run(reserve_calls, [(work, 1, PlannedCall("echo", 1, 20, (DAILY,)))], rerun=run) == [None]
    assert db.row(budget_windows).reserved == 20


def test_a_call_reserved_for_a_message_that_planned_none_ends_with_it(db):
    db.receive("a")
    work = db.begin_one()
    db.run(reserve_calls, [(work, 0, PlannedCall("echo", 5, 20, (DAILY,)))])
    db.commit_one(answered(work))
    assert db.rows(reservations) == []
    assert (db.row(usage).outcome, db.row(budget_windows).used, db.row(budget_windows).reserved) == (
        "unknown",
        20,
        0,
    )


def test_nothing_is_left_of_a_message_of_a_lane(db):
    """The end of a message leaves a lane that another may take, and no reservation."""
    db.plans.reserve(100)
    for end in End:
        db.receive(end.value)
        work = db.begin_one(token=f"t-{end}")
        assert isinstance(work, Work)
        assert db.commit_one(answered(work, end, calls=(OK,), parts=0)).end is end
    assert db.rows(reservations) == []
    assert db.run(cleanup.settle_orphans) == 0
    assert {m.state for m in db.rows(inbox)} == {end.value for end in End}
