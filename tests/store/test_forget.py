from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import func, insert, make_url, select, text, update

from feishu_bot.errors import LeaseLost
from feishu_bot.model import ChatType, End, InboundMessage
from feishu_bot.store import cleanup, conversations, erasure, search
from feishu_bot.store.conversations import append, get_or_create
from feishu_bot.store.schema import (
    SEARCH_TABLE,
    audit,
    budget_windows,
    inbox,
    lanes,
    messages,
    metadata,
    outbox,
    totals,
    usage,
)
from feishu_bot.store.schema import conversations as conversation_table
from feishu_bot.store.transactions import Transactions
from feishu_bot.store.values import new_message
from feishu_bot.store.work import Arrival, Lease, NewConversation, NewMessage, NewPart, Outcome
from tests.stores import NOON, Clock, count, opened, rows

AT = datetime.fromtimestamp(NOON / 1000, UTC)
BOB = "qq:group:bob"
SECRET = "bobs secret 秘密"


class Desk:
    """A database with one person's traces among those of others."""

    def __init__(self, url):
        self.database = Transactions(url, clock=lambda: AT)

    def say(self, user_key, *said, sender=None, **columns):
        """Store messages (role, content) in a user key's conversation; return its id."""

        def work(tx):
            row = get_or_create(tx, user_key, user_key.partition(":")[0])
            append(
                tx,
                row["id"],
                [new_message(r, c, 10, sender_id=sender if r == "user" else None) for r, c in said],
            )
            if columns:
                where = conversation_table.c.id == row["id"]
                tx.connection.execute(update(conversation_table).where(where).values(columns))
            return row["id"]

        return self.database.write(work)

    def put(self, table, *values):
        self.database.write(lambda tx: [tx.connection.execute(insert(table), row) for row in values] and None)

    def rows(self, table):
        statement = select(table).order_by(*table.primary_key)
        return self.database.read(lambda tx: [dict(r) for r in tx.connection.execute(statement).mappings()])

    def find(self, query):
        return self.database.read(
            lambda tx: [h["content"] for h in search.search_messages(tx.connection, tx.kind, query)]
        )

    def forget(self, name="qq:bob", **more):
        return erasure.forget(self.database, name, **more)


@pytest.fixture
def desk(db_url):
    desk = Desk(db_url)
    yield desk
    desk.database.close()


def ledger(n, user_key, tokens, *, chat_id=None, cost=None):
    platform, _, sender = user_key.split(":")
    return {
        "inbox_id": n,
        "attempt": 1,
        "call": 0,
        "conversation_id": 5,
        "user_key": user_key,
        "user_id": f"{platform}:{sender}",
        "chat_id": chat_id,
        "platform": platform,
        "model": "echo",
        "input_tokens": tokens,
        "output_tokens": 1,
        "cost_micro_usd": None if cost is None else round(cost * 1_000_000),
        "outcome": "ok",
        "at": AT,
    }


def event(key, sender, lane, state="open", *, said=SECRET, chat_type=ChatType.GROUP, **more):
    message = InboundMessage(
        "qq", key, text=said, sender_id=sender, sender_name=sender.title(), chat_type=chat_type, chat_id="g1"
    )
    ended = None if state == "open" else NOON
    row = {"account": "qq", "event_key": key, "lane_key": lane, "payload": message.to_json(), "state": state}
    return row | {"received_at": NOON, "ended_at": ended} | more


def part(n, sender, lane, state="sent", **more):
    payload = json.dumps(
        {"chat_type": "group", "chat_id": "g1", "sender_id": sender, "text": f"秘密 {sender}"}
    )
    row = {"source": f"in:{n}", "kind": "answer", "part": 0, "lane_key": lane, "account": "qq"}
    return row | {"payload": payload, "state": state, "created_at": NOON} | more


def leave_traces(desk):
    """Bob in private, in his group lane, in a shared conversation; and Ann beside him everywhere."""
    own = desk.say("qq:private:bob", ("user", SECRET), ("assistant", SECRET), summary=SECRET)
    desk.say(BOB, ("user", SECRET))
    shared = desk.say(
        "qq:chat:g1", ("user", SECRET), ("assistant", "to all"), sender=BOB, summary=SECRET, user_id=None
    )
    desk.say("qq:chat:g1", ("user", "ann's words"), sender="qq:group:ann")
    anns = desk.say("qq:private:ann", ("user", "hello"), summary="about Ann")
    lane, anns_lane = "in:qq:group:g1:bob", "in:qq:group:g1:ann"
    desk.put(
        lanes, {"key": lane, "ready_at": NOON}, {"key": anns_lane, "ready_at": None}, {"key": "chat:qq:g1"}
    )
    desk.put(
        inbox,
        event("e1", "bob", lane),
        event("e2", "bob", "chat:qq:g1", "answered"),
        event("request:bob:7", "bob", lane, "dead", reason="model"),
        event("e4", "ann", anns_lane, "answered", said="ann's words"),
        event("e5", "bobby", "in:qq:group:g1:bobby", said="bobby's words"),
    )
    desk.put(
        outbox,
        part(1, "bob", lane, "pending"),
        part(2, "bob", "chat:qq:g1"),
        part(4, "ann", anns_lane, payload='{"sender_id": "ann", "text": "to Ann"}'),
        part(99, "bob", lane, payload="{}"),
    )
    desk.put(
        usage,
        ledger(1, "qq:private:bob", 100, chat_id="private chat", cost=0.5),
        ledger(2, BOB, 50, chat_id="g1"),
        ledger(4, "qq:group:ann", 7, chat_id="g1", cost=0.25),
    )
    desk.put(
        budget_windows,
        {"budget": "daily", "key": "qq:bob", "window_start": 0, "used": 5},
        {"budget": "daily", "key": "qq:ann", "window_start": 0, "used": 6},
    )
    change = {"at": AT, "action": "budget.grant", "before": "{}", "after": "{}"}
    desk.put(
        audit,
        change | {"actor": "qq:ann", "target": "qq:bob"},
        change | {"actor": "qq:private:bob", "target": "qq:ann"},
    )
    return own, shared, anns


EXPECTED = {
    "person": "qq:bob",
    "at": "2025-06-18T12:00:00Z",
    "conversations": 2,
    "messages": 3,
    "messages_elsewhere": 1,
    "summaries": 1,
    "inbox": 3,
    "outbox": 3,
    "usage_rows": 2,
    "usage_tokens": 152,
    "usage_cost_usd": 0.5,
    "budget_windows": 1,
    "lanes": 1,
}


@pytest.mark.parametrize("name", ["qq:bob", BOB, "qq:private:bob"])
def test_a_person_leaves_no_trace_by_whatever_name(desk, name):
    leave_traces(desk)
    assert desk.forget(name).to_dict() == EXPECTED | {"dry_run": False}
    for table in metadata.sorted_tables:
        for row in desk.rows(table):
            assert "bob" not in str(row).lower().replace("bobby", ""), (table.name, row)
            assert "秘密" not in str(row), (table.name, row)
    assert desk.find("秘密") == []
    assert desk.find("words") == ["ann's words"]


def test_a_dry_run_counts_the_same_and_changes_nothing(desk):
    leave_traces(desk)
    before = {table.name: desk.rows(table) for table in metadata.sorted_tables}
    assert desk.forget(dry_run=True).to_dict() == EXPECTED | {"dry_run": True}
    assert {table.name: desk.rows(table) for table in metadata.sorted_tables} == before


def test_others_keep_all_that_is_theirs(desk):
    _, shared, anns = leave_traces(desk)
    before = desk.rows(conversation_table)
    desk.forget()
    left = {row["id"]: row for row in desk.rows(conversation_table)}
    assert set(left) == {shared, anns}
    assert [row for row in before if row["id"] == anns] == [left[anns]]
    assert [m["content"] for m in desk.rows(messages)] == ["to all", "ann's words", "hello"]
    assert [row["state"] for row in desk.rows(inbox)] == [
        "ignored",
        "answered",
        "ignored",
        "answered",
        "open",
    ]
    assert [row["source"] for row in desk.rows(outbox)] == ["in:4"]
    assert [row["key"] for row in desk.rows(budget_windows)] == ["qq:ann"]


def test_the_numbers_of_a_shared_conversation_stay_right(desk):
    _, shared, _ = leave_traces(desk)
    desk.say("qq:chat:g1", ("user", "more of bob"), sender=BOB)
    before = next(row for row in desk.rows(conversation_table) if row["id"] == shared)
    desk.forget()
    after = next(row for row in desk.rows(conversation_table) if row["id"] == shared)
    assert (before["message_count"], before["total_tokens"], before["title"]) == (4, 40, SECRET)
    assert (after["message_count"], after["total_tokens"], after["title"]) == (2, 20, None)
    assert after["version"] > before["version"]
    assert after["summary"] is None


def test_the_ledger_keeps_its_sums_and_no_name(desk):
    leave_traces(desk)
    desk.forget()
    found = [
        (r["user_key"], r["user_id"], r["chat_id"], r["input_tokens"], r["cost_micro_usd"])
        for r in desk.rows(usage)
    ]
    assert found == [
        (None, None, None, 100, 500_000),
        (None, None, "g1", 50, None),
        ("qq:group:ann", "qq:ann", "g1", 7, 250_000),
    ]


def test_an_events_key_that_names_nobody_still_holds_a_repeat_off(desk):
    leave_traces(desk)
    desk.forget()
    keys = [row["event_key"] for row in desk.rows(inbox)]
    assert keys[:2] == ["e1", "e2"]
    assert keys[2].startswith("erased:")
    assert keys[3:] == ["e4", "e5"]


def test_what_ends_is_counted(desk):
    leave_traces(desk)
    desk.put(totals, {"day": AT.date().isoformat(), "account": "qq", "end": "dead", "shard": 0, "count": 1})
    desk.forget()
    assert {(r["end"], r["count"]) for r in desk.rows(totals)} == {("dead", 0), ("ignored", 2)}


def test_forgetting_again_finds_nothing(desk):
    leave_traces(desk)
    desk.forget()
    again = desk.forget().to_dict()
    assert [v for v in again.values() if isinstance(v, int) and v] == []


@pytest.mark.parametrize("table", ["messages", "usage", "outbox"])
def test_an_erasure_that_died_half_way_is_finished_by_the_next(desk, table):
    leave_traces(desk)
    done = []

    def die(field, number):
        done.append((field, number))
        if field.startswith(table):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        desk.forget(progress=die)
    assert done
    desk.forget()
    assert desk.find("秘密") == []
    assert not [row for row in desk.rows(usage) if row["user_id"] == "qq:bob"]
    assert not [row for row in desk.rows(outbox) if "bob" in row["payload"]]


def test_more_than_one_piece_is_erased(desk):
    many = erasure.PIECE + 20
    desk.say("qq:chat:g1", *[("user", f"秘密 {n}") for n in range(many)], sender=BOB)
    desk.put(inbox, *[event(f"e{n}", "bob", "chat:qq:g1", "answered") for n in range(many)])
    desk.put(usage, *[ledger(n, BOB, 1) for n in range(many)])
    receipt = desk.forget()
    assert (receipt.messages_elsewhere, receipt.inbox, receipt.usage_rows) == (many, many, many)
    (row,) = desk.rows(conversation_table)
    assert (row["message_count"], row["total_tokens"]) == (0, 0)


def test_a_user_key_of_a_librarys_own_form_is_forgotten_too(desk):
    desk.say("alice", ("user", SECRET))
    desk.say("alice2", ("user", "kept"))
    desk.say("group", ("user", SECRET), sender="alice")
    receipt = desk.forget("alice")
    assert (receipt.conversations, receipt.messages, receipt.messages_elsewhere) == (1, 1, 1)
    assert [m["content"] for m in desk.rows(messages)] == ["kept"]


def test_a_name_that_nobody_has_erases_nothing(desk):
    leave_traces(desk)
    before = {table.name: desk.rows(table) for table in metadata.sorted_tables}
    for name in ("qq:nobody", "qq", "feishu:bob", "qq:group:g1:bob", "qq:chat:bob"):
        desk.forget(name)
    assert {table.name: desk.rows(table) for table in metadata.sorted_tables} == before


def test_nothing_is_left_in_the_file(sqlite_url):
    desk = Desk(sqlite_url)
    for n in range(30):
        desk.say("qq:private:bob", ("user", f"veryhidden{n} words"))
    desk.say("qq:private:ann", ("user", "hello"))
    desk.forget()
    names = desk.database.read(
        lambda tx: tx.connection.execute(text(f"SELECT count(*) FROM {SEARCH_TABLE}_data")).scalar_one()
    )
    assert names
    desk.database.close()
    path = Path(make_url(sqlite_url).database)
    for file in path.parent.iterdir():
        assert b"veryhidden" not in file.read_bytes(), file.name


async def test_an_answer_that_is_being_made_is_not_stored_or_sent(db_url):
    clock = Clock()
    async with opened(db_url, clock) as store:
        lane = "user:qq:private:bob"
        payload = InboundMessage("qq", "e1", text=SECRET, sender_id="bob").to_json()
        await store.receive([Arrival("qq", "e1", lane, payload)])
        (work,) = await store.begin([Lease(lane, str(store.owner), "token")])
        database = Transactions(db_url, clock=lambda: AT)
        assert erasure.forget(database, "qq:bob").inbox == 1
        new = NewConversation("public", lane, "qq:private:bob", "qq", None, "qq:bob", None, None)
        said = (NewMessage("user", SECRET, 1, sender_id="qq:private:bob"),)
        parts = (NewPart("answer", 0, "{}"),)
        with pytest.raises(LeaseLost):
            await store.commit(Outcome(work, End.ANSWERED, messages=said, conversation=new, parts=parts))
        assert await count(store, conversation_table) == 0
        assert await count(store, messages) == 0
        assert await count(store, outbox) == 0
        (row,) = await rows(store, inbox)
        assert (row["state"], row["reason"], row["payload"]) == ("ignored", "forgotten", "{}")
        database.close()


async def test_another_speakers_answer_in_a_shared_lane_is_not_disturbed(db_url):
    async with opened(db_url) as store:
        lane = "chat:qq:g1"
        for key, sender in (("e1", "ann"), ("e2", "bob")):
            message = InboundMessage(
                "qq", key, text="x", sender_id=sender, chat_type=ChatType.GROUP, chat_id="g1"
            )
            await store.receive([Arrival("qq", key, lane, message.to_json())])
        (work,) = await store.begin([Lease(lane, str(store.owner), "token")])
        database = Transactions(db_url, clock=lambda: AT)
        erasure.forget(database, "qq:bob")
        done = await store.commit(Outcome(work, End.ANSWERED))
        assert done.end is End.ANSWERED
        assert [row["state"] for row in await rows(store, inbox)] == ["answered", "ignored"]
        database.close()


def test_what_a_cleanup_has_hidden_is_gone_as_well(desk):
    own = desk.say("qq:private:bob", ("user", SECRET))
    desk.database.write(partial(conversations.hide, conversation_id=own))
    desk.forget()
    assert desk.rows(messages) == []
    assert desk.database.write(cleanup.remove_hidden) == 0
    left = desk.database.read(
        lambda tx: tx.connection.execute(select(func.count()).select_from(conversation_table)).scalar_one()
    )
    assert left == 0
