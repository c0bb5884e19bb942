"""What the console reads: the same on each database."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from feishu_bot.store import audit, console, schema
from feishu_bot.store.audit import Order
from feishu_bot.store.console import Page
from feishu_bot.store.transactions import Transactions

NOW = datetime(2025, 6, 18, 12, tzinfo=UTC)
STAMP = int(NOW.timestamp() * 1000)


@pytest.fixture
def base(db_url):
    database = Transactions(db_url)
    database.prepare()
    yield database
    database.close()


def put(base, table, *rows):
    base.write(lambda tx: [tx.connection.execute(table.insert(), row) for row in rows])


def letters(base):
    ins = [
        {"account": "web", "event_key": f"k{n}", "lane_key": "web:private:ann", "payload": f'{{"text":"100% of {n}"}}',
         "state": state, "reason": "too late" if n % 2 else "the model failed", "received_at": STAMP,
         "ended_at": STAMP + n}
        for n, state in enumerate(("dead", "expired", "answered", "dead"))
    ]  # fmt: skip
    outs = [
        {"source": f"s{n}", "kind": "answer", "part": 0, "lane_key": "l", "account": "qq", "payload": "{}",
         "state": state, "last_error": "403", "created_at": STAMP, "ended_at": STAMP + 10 + n}
        for n, state in enumerate(("refused", "sent", "dead"))
    ]  # fmt: skip
    put(base, schema.inbox, *ins)
    put(base, schema.outbox, *outs)


def test_letters_of_both_sides_come_newest_first_in_pages_and_by_any_of_their_words(base):
    letters(base)

    def ids(**page):
        return [letter.id for letter in base.read(lambda tx: console.dead_letters(tx, Page(**page)))]

    assert ids() == ["out-3", "out-1", "in-4", "in-2", "in-1"]
    assert ids(offset=1, limit=2) == ["out-1", "in-4"]
    assert ids(text="too late") == ["in-4", "in-2"]
    assert ids(text="403") == ["out-3", "out-1"]
    assert ids(text="100% of 0") == ["in-1"]
    assert ids(text="100_ of") == [], "what is looked for is no pattern"
    assert base.read(lambda tx: console.dead_letter(tx, "in-2")).state == "expired"
    assert base.read(lambda tx: console.dead_letter(tx, "in-3")) is None
    failed = base.read(lambda tx: console.failed_since(tx, STAMP))
    assert failed == {"web": (3, "too late", STAMP + 3), "qq": (2, "403", STAMP + 12)}


def test_conversations_that_are_hidden_are_not_there(base):
    for n, hidden in enumerate((None, NOW, None)):
        row = {"public_id": f"p{n}", "user_key": f"web:private:u{n}", "platform": "web", "title": f"Title {n}",
               "created_at": NOW, "last_activity": NOW.replace(minute=n), "hidden_at": hidden}  # fmt: skip
        put(base, schema.conversations, row)
    found = base.read(lambda tx: console.list_conversations(tx, Page()))
    assert [row["title"] for row in found] == ["Title 2", "Title 0"]
    assert len(base.read(lambda tx: console.list_conversations(tx, Page(text="u0")))) == 1


def test_accounts_are_counted_with_what_stands_for_them(base):
    account = {"password": "x", "role": "viewer", "created_at": STAMP}
    put(base, schema.accounts, {"name": "ann", **account}, {"name": "bob", **account})
    token = {"label": "l", "created_at": STAMP, "used_at": STAMP}
    put(
        base,
        schema.tokens,
        {"account": "ann", "kind": "session", "hash": "1", "expires_at": 2**50, **token},
        {"account": "ann", "kind": "session", "hash": "2", "expires_at": 1, **token},
        {"account": "ann", "kind": "api", "hash": "3", "expires_at": None, **token},
    )
    ann, bob = base.read(lambda tx: console.list_people(tx, Page()))
    assert (ann.sessions, ann.tokens, bob.sessions, bob.tokens) == (1, 1, 0, 0)
    assert len(base.read(lambda tx: console.list_tokens(tx, Page(text="ann")))) == 2


def test_traffic_counts_ends_and_no_removals_over_all_shards(base):
    ends = [("2025-06-17", "answered", 0, 5), ("2025-06-17", "dead", 1, 2), ("2025-06-17", "removed", 0, 4)]
    ends += [("2025-06-16", "answered", 0, 9)]
    for day, end, shard, count in ends:
        put(
            base,
            schema.totals,
            {"day": day, "account": "web", "end": end, "shard": shard, "count": count},
        )
    assert base.read(lambda tx: console.ended_by_day(tx, "2025-06-17")) == {("2025-06-17", "web"): 7}


def test_an_order_on_record_is_known_and_found_by_its_words(base):
    order = Order("web:ada", "in-7", "console:1")
    base.write(lambda tx: audit.note(tx, "dead.retry", order, after=["in-7"]))
    assert base.read(lambda tx: audit.known(tx, "console:1"))
    assert not base.read(lambda tx: audit.known(tx, "console:2"))
    (row,) = base.read(lambda tx: audit.entries(tx, text="retry", offset=0, limit=5))
    assert (row["actor"], row["target"], row["before"], row["after"]) == ("web:ada", "in-7", None, '["in-7"]')
    assert base.read(lambda tx: audit.entries(tx, text="bob", offset=0, limit=5)) == []
