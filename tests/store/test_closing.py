"""The note to those whose platform will soon take no reply."""

from __future__ import annotations

import pytest

from feishu_bot.store.closing import KIND, LEAD_MS, PATIENCE_MS, warn
from feishu_bot.store.inbox import receive
from feishu_bot.store.schema import lanes
from feishu_bot.store.schema import outbox as parts
from tests.store.chats import arrival, lane_of, message, outcome

WINDOW = 300_000


def asked(db, *keys: str):
    ends = db.clock() + WINDOW
    said = [message(key, "slow", who=key, reply_before_ms=ends) for key in keys]
    db.run(receive, [arrival(m, reply_before=ends) for m in said])
    return said


def say(_message) -> str | None:
    return '{"text": "wait"}'


def test_a_note_goes_out_shortly_before_the_window_closes_once_and_also_beside_an_answer_in_the_making(db):
    waiting, working = asked(db, "a", "b")
    db.begin_one(lane_of(working))
    db.clock.now_ms += WINDOW - LEAD_MS - 1
    assert db.run(warn, say) == []
    db.clock.now_ms += 1
    assert db.run(warn, say) == sorted([lane_of(waiting), lane_of(working)])
    assert db.run(warn, say) == []
    rows = db.rows(parts)
    assert {(r.kind, r.part, r.state, r.reply_before) for r in rows} == {
        (KIND, 0, "pending", db.clock() + LEAD_MS)
    }
    assert all(r.send_ready_at is not None for r in db.rows(lanes))


def test_a_message_that_was_answered_or_whose_window_has_closed_gets_no_note(db):
    answered, _ = asked(db, "a", "b")
    db.commit_one(outcome(db.begin_one(lane_of(answered)), answered, "done"))
    db.clock.now_ms += WINDOW + 1
    assert db.run(warn, say) == []
    assert {r.kind for r in db.rows(parts)} == {"answer"}


def test_what_came_late_has_a_moment_to_be_answered_first(db):
    ends = db.clock() + LEAD_MS - 5000
    db.run(receive, [arrival(message("a", "late", reply_before_ms=ends), reply_before=ends)])
    assert db.run(warn, say) == []
    db.clock.now_ms += PATIENCE_MS
    assert db.run(warn, say) == [lane_of(message("a"))]


@pytest.mark.parametrize("keys", [("a",), ("a", "b", "c")])
def test_a_message_about_which_nothing_is_to_be_said_gets_no_note(db, keys):
    asked(db, *keys)
    db.clock.now_ms += WINDOW - 10_000
    assert db.run(warn, lambda _message: None) == []
    assert db.rows(parts) == []
