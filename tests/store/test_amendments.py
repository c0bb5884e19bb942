"""Messages recalled or edited on the platform: what that does to the record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from feishu_bot.errors import LeaseLost
from feishu_bot.model import InboundMessage
from feishu_bot.store import search, threads
from feishu_bot.store.amendments import amend
from feishu_bot.store.history import load_tails
from feishu_bot.store.inbox import receive
from feishu_bot.store.schema import (
    budget_windows,
    conversations,
    inbox,
    lanes,
    messages,
    reservations,
    totals,
    usage,
)
from feishu_bot.store.work import ConversationState, NoWork, Recorded
from tests.store.chats import ACCOUNT, arrival, converse, lane_of, message, outcome

if TYPE_CHECKING:
    from tests.transact import Database


def change(of: str, what: str, *, chat: str = "oc_team", who: str = "", text: str = "") -> InboundMessage:
    return InboundMessage(
        ACCOUNT, f"ev:{of}:{text}", kind="event", change=what, target_key=f"om:{of}", message_id=of, chat_id=chat,
        sender_id=who, text=text, tokens=len(text.split()),
    )  # fmt: skip


def recall(db: Database, of: str, **more):
    return db.run(amend, change(of, "recalled", **more))


def edit(db: Database, of: str, text: str, **more):
    return db.run(amend, change(of, "edited", text=text, **more))


def told(db: Database) -> list[str]:
    """Return what of the only conversation goes to the model."""
    conversation = db.row(conversations)
    state = state_of(conversation)
    tail = db.run(load_tails, [state], turns=5, cache=db.cache)[conversation.id]
    return [row.content for row in tail]


def state_of(row) -> ConversationState:
    return ConversationState(
        row.id, row.public_id, row.tenant_id, row.user_key, None, None, None, 0, 0, row.last_seq, row.version
    )


def found(db: Database, words: str) -> list[str]:
    with db.transaction() as tx:
        return [hit["content"] for hit in search.search_messages(tx.connection, tx.kind, words)]


def ends(db: Database) -> dict[str, int]:
    statement = select(totals.c.end, func.sum(totals.c.count)).group_by(totals.c.end)
    with db.transaction() as tx:
        return {end: int(count) for end, count in tx.connection.execute(statement)}


# ------------------------------------------------------------------------------------------------ recalled


def test_a_recalled_question_leaves_history_and_search_with_its_answer_and_is_still_counted(db):
    converse(db, message("q1", "my password is swordfish"), "never tell it")
    converse(db, message("q2", "the weather"), "is fine")
    assert len(told(db)) == 4
    before = db.row(conversations)
    assert recall(db, "q1").messages == 1
    after = db.row(conversations)
    assert told(db) == ["the weather", "is fine"]
    assert found(db, "swordfish") == []
    assert (after.message_count, after.total_tokens) == (before.message_count, before.total_tokens) == (4, 16)
    assert after.version > before.version
    marked = {m.content: m.recalled_at for m in db.rows(messages) if m.recalled_at is not None}
    assert marked == {"my password is swordfish": db.clock.utc()}
    assert after.title is None, "it was called after what was recalled"


def test_a_recall_told_twice_changes_nothing_more(db):
    converse(db, message("q1", "hello"), "hi")
    recall(db, "q1")
    before = (db.row(conversations), db.rows(messages), ends(db))
    db.clock.now_ms += 1000
    assert recall(db, "q1").messages == 0
    assert (db.row(conversations), db.rows(messages), ends(db)) == before


def test_a_recall_in_another_chat_with_the_same_id_changes_nothing(db):
    converse(db, message("q1", "hello"), "hi")
    assert recall(db, "q1", chat="oc_other").messages == 0
    assert told(db) == ["hello", "hi"]


def test_copies_in_forked_conversations_are_recalled_too(db):
    converse(db, message("q1", "hello"), "hi")
    last = db.rows(messages)[-1]
    db.run(threads.fork, last.conversation_id, last.id)
    assert recall(db, "q1").messages == 2
    assert sum(m.recalled_at is not None for m in db.rows(messages)) == 2


def test_the_bots_own_answer_is_recalled_whole_by_any_of_its_parts(db):
    sent = converse(db, message("q1", "hello"), "hi", parts=2)
    assert recall(db, sent[1]).messages == 1
    assert told(db) == ["hello"]


def test_a_message_that_waits_ends_recalled_and_its_text_is_erased(db):
    said = message("q1", "do not answer this")
    db.run(receive, [arrival(said)])
    assert recall(db, "q1").lane_key == lane_of(said)
    row = db.row(inbox)
    assert (row.state, row.reason, row.payload) == ("ignored", "recalled", "{}")
    assert ends(db) == {"ignored": 1}
    assert db.begin_one(lane_of(said)) is NoWork.IDLE
    assert db.row(lanes).ready_at is None


def test_an_answer_in_the_making_is_dropped_and_its_call_is_booked(db):
    said = message("q1", "do not answer this")
    db.plans.reserve(100)
    db.run(receive, [arrival(said), arrival(message("q2", "but this"), lane=lane_of(said))])
    work = db.begin_one(lane_of(said), token="t1")
    recall(db, "q1")
    assert isinstance(db.commit_one(outcome(work, said, "too late")), LeaseLost)
    assert db.rows(messages) == []
    assert db.rows(reservations) == []
    assert (db.row(budget_windows).used, db.row(budget_windows).reserved) == (100, 0)
    assert [u.outcome for u in db.rows(usage)] == ["unknown"]
    assert db.begin_one(lane_of(said), token="t2").message.text == "but this"


def test_a_recall_does_not_disturb_the_message_before_it_in_the_lane(db):
    first, second = message("q1", "one"), message("q2", "two")
    db.run(receive, [arrival(first), arrival(second)])
    work = db.begin_one(lane_of(first), token="t1")
    recall(db, "q2")
    assert db.commit_one(outcome(work, first, "yes")).end == "answered"
    assert told(db) == ["one", "yes"]
    assert db.begin_one(lane_of(first), token="t2") is NoWork.IDLE


def test_a_message_that_comes_after_its_recall_is_not_answered(db):
    recall(db, "q1")
    recall(db, "q1")
    assert db.run(receive, [arrival(message("q1", "too late"))]) == [Recorded.REPEAT]
    assert (db.row(inbox).state, db.row(inbox).reason) == ("ignored", "recalled")
    assert ends(db) == {"ignored": 1}


# -------------------------------------------------------------------------------------------------- edited


def test_an_edited_message_has_its_new_text_everywhere_and_the_counters_by_the_difference(db):
    converse(db, message("q1", "the old words"), "yes")
    before = db.row(conversations)
    assert edit(db, "q1", "five new words are here").messages == 1
    after, (asked, _) = db.row(conversations), db.rows(messages)
    assert (asked.content, asked.tokens, asked.edited_at) == ("five new words are here", 5, db.clock.utc())
    assert after.total_tokens == before.total_tokens + 2
    assert after.message_count == before.message_count
    assert told(db) == ["five new words are here", "yes"]
    assert (found(db, "old"), found(db, "new")) == ([], ["five new words are here"])
    assert after.title == "five new words are here"
    assert edit(db, "q1", "five new words are here").messages == 1
    assert db.row(conversations) == after, "told twice, it changes nothing more"


def test_a_conversation_that_was_renamed_keeps_its_name_when_its_first_message_is_edited_or_recalled(db):
    converse(db, message("q1", "hello"), "hi")
    db.run(threads.rename, db.row(conversations).id, "mine")
    edit(db, "q1", "good morning")
    recall(db, "q1")
    assert db.row(conversations).title == "mine"


@pytest.mark.parametrize("begun", [False, True])
def test_a_message_that_has_not_ended_is_answered_with_its_new_text(db, begun):
    said = message("q1", "the old words")
    db.plans.reserve(100)
    db.run(receive, [arrival(said)])
    work = db.begin_one(lane_of(said), token="t1") if begun else None
    edit(db, "q1", "the new ones")
    if work is not None:
        assert isinstance(db.commit_one(outcome(work, said, "to the old")), LeaseLost)
    anew = db.begin_one(lane_of(said), token="t2")
    assert (anew.message.text, anew.message.tokens, anew.attempt) == ("the new ones", 3, 1)
    assert db.commit_one(outcome(anew, said, "to the new")).end == "answered"
    assert told(db) == ["the new ones", "to the new"]
    assert db.rows(reservations) == []
    assert db.row(budget_windows).reserved == 0


def test_an_event_without_a_change_or_for_nobody_does_nothing(db):
    assert db.run(amend, InboundMessage(ACCOUNT, "ev", kind="event")).messages == 0
    assert edit(db, "unknown", "x").messages == 0
    assert db.rows(inbox) == []
