"""The newest messages of a conversation, from the database and from the cache: the same."""

from __future__ import annotations

from contextlib import suppress

import pytest
from sqlalchemy import update

from feishu_bot.store.commit import commit
from feishu_bot.store.history import HistoryCache, load_tails
from feishu_bot.store.inbox import begin
from feishu_bot.store.schema import conversations, messages
from feishu_bot.store.work import ConversationState, HistoryRow, Lease, NewMessage
from tests.transact import OWNER, answered


def put(db, *roles, n=1, version=1):
    """Store a conversation of messages with these roles."""
    now = db.clock.utc()
    tokens = len(roles)
    key = {"id": n, "public_id": f"p{n}", "scope_key": f"user:{n}", "user_key": "u", "platform": "web"}
    counters = {"last_seq": tokens, "message_count": tokens, "version": version}
    db.put(conversations, {**key, **counters, "created_at": now, "last_activity": now})
    rows = [
        {
            "conversation_id": n,
            "seq": seq,
            "role": role,
            "content": f"{role} {seq}",
            "timestamp": now,
            "tokens": 1,
        }
        for seq, role in enumerate(roles, start=1)
    ]
    if rows:
        db.put(messages, *rows)


def state(n=1, *, last_seq=99, version=1):
    return ConversationState(n, f"p{n}", "default", "u", None, None, None, 0, 0, last_seq, version)


def load(db, *states, turns=2, cache=None):
    return db.run(load_tails, states, turns=turns, cache=cache or HistoryCache())


def seqs(tail):
    return [row.seq for row in tail]


def newest_turns(tail, turns):
    starts = [i for i, row in enumerate(tail) if row.role == "user"]
    return tail[starts[-turns] :] if len(starts) >= turns else tail


# ------------------------------------------------------------------------------------------- from the database


def test_the_newest_turns_come_oldest_first(db):
    put(db, *["user", "assistant"] * 10)
    tail = load(db, state(last_seq=20))[1]
    assert seqs(tail) == sorted(seqs(tail))
    assert seqs(newest_turns(tail, 2)) == [17, 18, 19, 20]
    assert (tail[-1].role, tail[-1].content, tail[-1].tokens) == ("assistant", "assistant 20", 1)


def test_a_conversation_full_of_tool_calls_is_read_back_far_enough(db):
    put(db, "user", "assistant", "user", *["assistant", "tool"] * 40, "user", *["assistant", "tool"] * 30)
    tail = load(db, state(last_seq=144))[1]
    assert sum(row.role == "user" for row in tail) >= 2
    assert newest_turns(tail, 2)[0].seq == 3
    assert len(newest_turns(tail, 2)) == 142


def test_a_conversation_without_enough_turns_is_read_whole(db):
    put(db, *["assistant", "tool"] * 50)
    assert len(load(db, state(last_seq=100))[1]) == 100


def test_many_conversations_are_read_by_one_statement(db):
    for n in range(1, 8):
        put(db, "user", "assistant", n=n)
    states = [state(n, last_seq=2) for n in range(1, 8)]
    with db.statements() as seen:
        found = load(db, *states)
    assert len(seen) == 1
    assert {n: len(tail) for n, tail in found.items()} == dict.fromkeys(range(1, 8), 2)


@pytest.mark.parametrize(
    ("recalled", "left"),
    [([3], [1, 2, 5, 6]), ([4], [1, 2, 3, 5, 6]), ([1, 5], [3, 4]), ([6], [1, 2, 3, 4, 5])],
)
def test_recalled_messages_are_left_out_a_question_with_its_answer(db, recalled, left):
    put(db, *["user", "assistant"] * 3)
    with db.transaction() as tx:
        tx.connection.execute(
            update(messages).where(messages.c.seq.in_(recalled)).values(recalled_at=db.clock.utc())
        )
    assert seqs(load(db, state(last_seq=6), turns=3)[1]) == left


@pytest.mark.parametrize(("turns", "last_seq"), [(0, 4), (2, 0)])
def test_nothing_is_read_where_nothing_is_wanted_or_there(db, turns, last_seq):
    put(db, "user", "assistant", "user", "assistant")
    with db.statements() as seen:
        assert load(db, state(last_seq=last_seq), turns=turns) == {1: ()}
    assert seen == []


# --------------------------------------------------------------------------------------------- from the cache


def test_a_tail_of_the_same_version_is_not_read_again(db):
    put(db, "user", "assistant")
    cache = HistoryCache()
    first = load(db, state(last_seq=2), cache=cache)
    with db.statements() as seen:
        assert load(db, state(last_seq=2), cache=cache) == first
    assert seen == []


def test_a_tail_of_another_version_is_read_again(db):
    put(db, "user", "assistant")
    cache = HistoryCache()
    load(db, state(last_seq=2), cache=cache)
    with db.transaction() as tx:
        tx.connection.execute(update(messages).where(messages.c.seq == 2).values(content="edited"))
    assert load(db, state(last_seq=2, version=2), cache=cache)[1][1].content == "edited"


def test_what_an_undone_transaction_read_is_not_kept(db):
    """It may have read its own words, under a version that another's words will have."""
    db.answer("a")
    db.receive("b")
    work = db.begin_one(token="t2")
    db.receive("c", lane="user:other")
    with suppress(RuntimeError), db.transaction() as tx:
        commit(tx, [answered(work, says="undone")], cache=db.cache)
        tx.connection.execute(update(conversations).values(scope_key="user:other"))
        (other,) = begin(tx, [Lease("user:other", OWNER, "t3")], planner=db.plans, cache=db.cache)
        assert other.history[-1].content == "undone"
        raise RuntimeError
    db.commit_one(answered(work, says="said"))
    db.receive("d")
    assert [r.content for r in db.begin_one(token="t4").history] == ["say a", "hello", "say b", "said"]


@pytest.mark.parametrize("tools", [0, 1, 6])
def test_a_carried_tail_shows_the_turns_that_the_database_shows(db, tools):
    """Twelve messages, each with this many tool calls, and a cache that is never read from the database."""
    for n in range(12):
        db.receive(f"m{n}")
        work = db.begin_one(token=f"t{n}")
        shown = newest_turns(work.history, 2)
        if work.conversation is not None:
            (fresh,) = load(db, work.conversation).values()
            assert newest_turns(fresh, 2) == shown
            assert seqs(shown)[-1] == work.conversation.last_seq
        key = f"in:{work.inbox_id}"
        steps = [NewMessage("tool", f"{n}.{i}", 1, save_key=f"{key}:{i}") for i in range(tools)]
        said = (NewMessage("user", f"u{n}", 1, save_key=key), *steps, NewMessage("assistant", f"a{n}", 1))
        db.commit_one(answered(work, messages=said, parts=0))


def test_the_library_writing_beside_the_server_is_seen(db):
    db.answer("a")
    with db.transaction() as tx:
        row = {
            "conversation_id": 1,
            "seq": 3,
            "role": "user",
            "content": "by the library",
            "timestamp": db.clock.utc(),
        }
        tx.connection.execute(messages.insert(), row)
        tx.connection.execute(update(conversations).values(last_seq=3, version=2))
    db.receive("b")
    work = db.begin_one(token="t2")
    assert work.history[-1].content == "by the library"
    db.commit_one(answered(work))
    db.receive("c")
    assert [r.seq for r in db.begin_one(token="t3").history] == [1, 2, 3, 4, 5]


# -------------------------------------------------------------------------------------------------- the cache


def row(seq, role="user"):
    return HistoryRow(role=role, content="x", tokens=1, seq=seq)


def test_the_least_used_tail_makes_room():
    cache = HistoryCache(conversations=2)
    for n in (1, 2):
        cache.put(n, 1, [row(n)])
    cache.get(1, 1)
    cache.put(3, 1, [row(3)])
    assert [cache.get(n, 1) is None for n in (1, 2, 3)] == [False, True, False]


def test_a_tail_that_is_too_long_is_not_kept_in_part():
    cache = HistoryCache(rows=3)
    cache.put(1, 1, [row(1)])
    cache.put(1, 2, [row(n) for n in range(4)])
    assert cache.get(1, 1) is cache.get(1, 2) is None


def test_only_the_version_before_is_carried_on():
    cache = HistoryCache()
    cache.put(1, 5, [row(1)])
    cache.append(1, 6, 7, [row(2)], turns=9)
    assert cache.get(1, 7) is None
    cache.append(1, 5, 6, [row(2)], turns=9)
    assert seqs(cache.get(1, 6)) == [1, 2]
    cache.drop(1)
    assert cache.get(1, 6) is None
