"""Replies: which are to the bot, and which words they bring along."""

from __future__ import annotations

import pytest

from feishu_bot.store import cleanup
from feishu_bot.store.inbox import MAX_QUOTE, receive
from feishu_bot.store.quotes import find_quotes
from feishu_bot.store.schema import inbox, messages
from feishu_bot.store.schema import outbox as parts
from feishu_bot.store.work import Quote, Recorded
from tests.store.chats import arrival, converse, lane_of, message, unaddressed_reply

NEW, TO_BOT, REPEAT = Recorded.NEW, Recorded.TO_BOT, Recorded.REPEAT


def begun(db, said, **more):
    db.run(receive, [arrival(said)])
    return db.begin_one(lane_of(said), token=f"t-{said.message_id}").message


def test_a_reply_to_any_part_of_the_bots_answer_is_recorded_as_meant_for_it(db):
    sent = converse(db, message("q1", "hello"), "hi", parts=2)
    assert len(sent) == 2
    replies = [message(f"r{n}", f"and {n}?", who="bob", reply_to=part) for n, part in enumerate(sent)]
    assert db.run(receive, [unaddressed_reply(r) for r in replies]) == [TO_BOT, TO_BOT]
    rows = {r.event_key: r for r in db.rows(inbox)}
    assert [rows[f"om:r{n}"].state for n in (0, 1)] == ["open", "open"]
    assert "om:r0#seen" not in rows


def test_a_reply_to_somebody_else_is_ignored_without_its_words(db):
    converse(db, message("q1", "hello"), "hi")
    replies = [message("r1", "secret", reply_to="q1"), message("r2", "secret", reply_to="om_unknown")]
    assert db.run(receive, [unaddressed_reply(r) for r in replies]) == [NEW, NEW]
    rows = {r.event_key: r for r in db.rows(inbox)}
    assert [rows[f"om:r{n}#seen"].state for n in (1, 2)] == ["ignored", "ignored"]
    assert not any("secret" in r.payload for r in rows.values())


def test_an_addressed_copy_is_taken_beside_a_reply_to_somebody_and_once_beside_one_to_the_bot(db):
    (answer,) = converse(db, message("q1", "hello"), "hi")
    to_somebody, to_bot = message("r1", "x", reply_to="q1"), message("r2", "y", reply_to=answer)
    assert db.run(receive, [unaddressed_reply(to_somebody), unaddressed_reply(to_bot)]) == [NEW, TO_BOT]
    assert db.run(receive, [arrival(to_somebody), arrival(to_bot)]) == [NEW, REPEAT]
    assert db.run(receive, [unaddressed_reply(to_bot)]) == [REPEAT]


def test_the_same_id_in_another_chat_is_not_the_bots(db):
    (answer,) = converse(db, message("q1", "hello"), "hi")
    elsewhere = message("r1", "x", chat="oc_other", reply_to=answer)
    assert db.run(receive, [unaddressed_reply(elsewhere)]) == [NEW]
    assert begun(db, message("r2", "y", chat="oc_other", reply_to=answer)).quoted == ""


def test_the_words_replied_to_come_along_in_the_same_chat_and_never_in_another(db):
    (answer,) = converse(db, message("q1", "a question of Ann's"), "an answer")
    assert begun(db, message("r1", "x", who="bob", reply_to="q1")).quoted == "a question of Ann's"
    own = begun(db, message("r2", "x", who="carl", reply_to=answer))
    assert (own.quoted, own.quotes_bot) == ("an answer", True)
    for chat in ("oc_other", ""):
        assert begun(db, message(f"r3{chat}", "x", chat=chat, reply_to="q1")).quoted == ""


def test_in_a_conversation_that_spans_groups_each_message_knows_its_own(db):
    lane = "user:feishu:group:ann"
    converse(db, message("q1", "in the team"), "yes", lane=lane, chat="oc_team")
    converse(db, message("q2", "elsewhere", chat="oc_other"), "no", lane=lane, chat="oc_other")
    assert begun(db, message("r1", "x", who="bob", reply_to="q2")).quoted == ""
    assert begun(db, message("r2", "x", chat="oc_other", who="bob", reply_to="q2")).quoted == "elsewhere"


def test_private_chats_without_an_id_are_told_apart_by_who_is_in_them(db):
    (answer,) = converse(db, message("7", "mine alone", chat=""), "yes")
    assert begun(db, message("8", "x", chat="", reply_to="7")).quoted == "mine alone"
    other = begun(db, message("9", "x", chat="", who="bob", reply_to="7"))
    assert (other.quoted, other.quotes_bot) == ("", False)
    assert not begun(db, message("10", "x", chat="", who="carl", reply_to=answer)).quotes_bot


def test_long_words_are_cut_and_those_of_another_account_are_unknown(db):
    converse(db, message("q1", "long " * 1000), "yes")
    assert len(begun(db, message("r1", "x", who="bob", reply_to="q1")).quoted) == MAX_QUOTE
    quote = Quote("lark", "q1", "oc_team", "lark:group:bob")
    assert db.run(find_quotes, [quote]) == {}


def test_an_answer_is_known_by_its_id_after_its_outbox_row_is_gone(db):
    (answer,) = converse(db, message("q1", "hello"), "hi")
    db.clock.now_ms += cleanup.KEEP_ENDED_MS + 1
    assert db.run(cleanup.prune) == 2
    assert db.rows(parts) == []
    assert [m.source_id for m in db.rows(messages)] == ["q1", answer]
    assert db.run(receive, [unaddressed_reply(message("r1", "more", reply_to=answer))]) == [TO_BOT]
    work = db.begin_one(lane_of(message("r1")), token="t9")
    assert (work.message.quoted, work.message.quotes_bot) == ("hi", True)


@pytest.mark.parametrize("most", [1, 5])
def test_replies_cost_two_statements_whatever_their_number_and_others_none(db, most):
    (answer,) = converse(db, message("q1", "hello"), "hi")
    with db.statements() as before:
        db.run(receive, [arrival(message(f"m{n}", "x", who=f"w{n}")) for n in range(most)])
    with db.statements() as after:
        db.run(
            receive,
            [unaddressed_reply(message(f"r{n}", "x", who=f"w{n}", reply_to=answer)) for n in range(most)],
        )
    assert len(after) == len(before) + 2
