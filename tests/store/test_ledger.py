"""What model calls have used: the same, whatever part of the ledger has been added up, while it is, and after."""

from __future__ import annotations

import random
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select, text, update

from feishu_bot.store import inspection, ledger, sums
from feishu_bot.store.erasure import forget
from feishu_bot.store.schema import usage, usage_hours, usage_names
from feishu_bot.store.transactions import Transactions
from tests.processes import all_at_once, started, wait_for_all

NOON = datetime(2025, 6, 18, 12, tzinfo=UTC)
SHANGHAI, KATHMANDU, ZERO = ZoneInfo("Asia/Shanghai"), ZoneInfo("Asia/Kathmandu"), ZoneInfo("UTC")


def calls(count, *, start=0):
    """Return rows of the ledger over ten days, the same each time."""
    choose = random.Random(count + start).choice
    rows = []
    for n in range(start, start + count):
        user = choose(["ann", "bob", "Bob", None])
        kind = choose(["private", "group"])
        rows.append(
            {
                "inbox_id": n + 1,
                "attempt": 1,
                "call": 0,
                "user_key": f"web:{kind}:{user}" if user else None,
                "user_id": f"web:{user}" if user else None,
                "chat_id": choose(["g1", "G1", "g2"]) if kind == "group" else choose([None, f"p-{user}"]),
                "platform": choose(["web", "feishu"]),
                "tenant_id": choose(["default", "acme"]),
                "model": choose(["gpt-4o", "GPT-4o", "qwen"]),
                "input_tokens": choose([0, 7, 2**33]),
                "output_tokens": n,
                "cached_tokens": choose([0, 3]),
                "reasoning_tokens": choose([0, 5]),
                "cost_micro_usd": choose([None, 0, 1, 2_500_000]),
                "outcome": "ok",
                "at": NOON + timedelta(minutes=7 * n, microseconds=n),
            }
        )
    return rows


@pytest.fixture
def book(db_url):
    database = Transactions(db_url)
    database.url = db_url
    yield database
    database.close()


def put(book, rows):
    book.write(lambda tx: tx.connection.execute(usage.insert(), rows))


def add_all(book):
    pieces = 0
    while book.write(sums.add_fresh):
        pieces += 1
    return pieces


def look(book, by, zone=ZERO, **chosen):
    return book.read(lambda tx: ledger.usage_by(tx, by, zone, **chosen))


def expected(rows, by, zone=ZERO, *, since=None, until=None, tenant_id=None):
    """Return the same by looking at each row."""
    column = {"user": "user_id", "chat": "chat_id", "tenant": "tenant_id"}.get(by, by)
    found = defaultdict(list)
    for row in rows:
        if (since and row["at"] < since) or (until and row["at"] >= until):
            continue
        if tenant_id not in {None, row["tenant_id"]}:
            continue
        found[row["at"].astimezone(zone).date().isoformat() if by == "day" else row[column]].append(row)
    return {key: total(some) for key, some in found.items()}


def total(rows):
    prices = [row["cost_micro_usd"] for row in rows if row["cost_micro_usd"] is not None]
    names = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")
    tokens = {name: sum(row[name] for row in rows) for name in names}
    return {
        "calls": len(rows),
        **tokens,
        "total_tokens": tokens["input_tokens"] + tokens["output_tokens"],
        "cost_usd": sum(prices) / 1_000_000 if prices else None,
    }


def keyed(found, by):
    return {row[by]: {name: n for name, n in row.items() if name != by} for row in found}


RANGES = [
    {},
    {"tenant_id": "acme"},
    {"since": NOON + timedelta(days=2, minutes=17)},
    {"until": NOON + timedelta(days=3, hours=5)},
    {"since": NOON + timedelta(hours=30, seconds=1), "until": NOON + timedelta(days=4, microseconds=5)},
    {"since": NOON + timedelta(minutes=61), "until": NOON + timedelta(minutes=100)},  # within an hour
    {"since": NOON + timedelta(minutes=50), "until": NOON + timedelta(minutes=70)},  # over its end
    {"since": NOON + timedelta(days=90)},
    {"since": NOON + timedelta(days=3), "until": NOON + timedelta(days=2)},
]


def test_sums_are_those_of_the_rows_whatever_part_of_them_was_added_up(book):
    rows = calls(900)
    put(book, rows[:600])
    add_all(book)
    put(book, rows[600:])
    book.write(sums.add_fresh)
    put(book, calls(100, start=900))
    rows += calls(100, start=900)
    for chosen in RANGES:
        assert book.read(lambda tx, c=chosen: ledger.usage_total(tx, **c)) == next(
            iter(expected([row | {"all": 1} for row in rows], "all", **chosen).values()), total([])
        )
        for by in ledger.USAGE_BY:
            assert keyed(look(book, by, **chosen), by) == expected(rows, by, **chosen), (by, chosen)
        for zone in (SHANGHAI, KATHMANDU):  # of Kathmandu, days begin at a quarter past an hour of UTC
            assert keyed(look(book, "day", zone, **chosen), "day") == expected(rows, "day", zone, **chosen)
    assert not list(book.read(lambda tx: list(sums.differences(tx.connection, tx.kind))))


def test_the_most_tokens_come_first_and_the_newest_days(book):
    put(book, calls(300))
    for _ in range(2):
        tokens = [row["total_tokens"] for row in look(book, "user")]
        assert tokens == sorted(tokens, reverse=True)
        days = [row["day"] for row in look(book, "day")]
        assert days == sorted(days, reverse=True)
        assert look(book, "day", limit=1) == look(book, "day")[:1]
        assert look(book, "chat", limit=2) == look(book, "chat")[:2]
        add_all(book)


def test_rows_are_added_once_in_pieces_and_a_piece_that_fails_is_not_added(book):
    put(book, calls(sums.PIECE + 10))

    def fails(tx):
        sums.add_fresh(tx)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        book.write(fails)
    before = look(book, "user")
    assert add_all(book) == 2
    assert add_all(book) == 0
    assert look(book, "user") == before


def write_and_add_up(connection, url, number):
    """Write, add up and read: one sees at least what one has written, and never more than all wrote."""
    book = Transactions(url)
    assert look(book, "user") == []
    wait_for_all(connection)
    before = 0
    for n in range(15):
        put(book, calls(20, start=1000 * number + 20 * n))
        if n % 3 == number % 3:
            book.write(sums.add_fresh)
        for by in ("user", "model"):
            seen = sum(row["calls"] for row in look(book, by))
            assert max(before, 20 * (n + 1)) <= seen <= 4 * 300, (before, seen)
            before = seen
    book.close()


def test_while_four_processes_write_and_add_up_no_row_is_missed_or_seen_twice(book):
    with started(write_and_add_up, *((book.url, number) for number in range(4))) as running:
        all_at_once(running)
        assert [child.ended() for child in running] == [0] * 4
    rows = [row for number in range(4) for n in range(15) for row in calls(20, start=1000 * number + 20 * n)]
    for _ in range(2):
        for by in ledger.USAGE_BY:
            assert keyed(look(book, by), by) == expected(rows, by)
        add_all(book)


def test_who_is_forgotten_leaves_the_sums_too_and_their_numbers_stay(book):
    rows = calls(700)
    put(book, rows[:500])
    add_all(book)
    put(book, rows[500:])
    forget(book, "web:bob")
    for row in rows:
        if row["user_id"] == "web:bob":
            private = ":private:" in row["user_key"]
            row.update({"user_id": None} | ({"chat_id": None} if private else {}))
    for _ in range(2):
        for by in ledger.USAGE_BY:
            assert keyed(look(book, by), by) == expected(rows, by)
        names = book.read(lambda tx: set(tx.connection.execute(select(usage_names.c.name)).scalars()))
        assert not names & {"web:bob", "p-bob"}
        assert "web:Bob" in names
        assert [finding for finding in inspection.check(book.url) if finding.wrong] == []
        add_all(book)


@pytest.mark.parametrize("table", [usage_hours, usage_names])
def test_sums_that_are_not_the_ledgers_are_found(book, table):
    put(book, calls(50))
    add_all(book)
    book.write(lambda tx: tx.connection.execute(update(table).values(calls=table.c.calls + 1)))
    (wrong,) = [finding for finding in inspection.check(book.url) if finding.wrong]
    assert wrong.name == "sums"
    book.write(lambda tx: tx.connection.execute(text(f"DELETE FROM {table.name}")))
    assert [finding.name for finding in inspection.check(book.url) if finding.wrong] == ["sums"]


@pytest.mark.parametrize("by", ["user", "platform", "model"])
def test_the_days_of_each_are_the_same_whatever_part_has_been_added_up(book, by):
    rows, since = calls(300), NOON + timedelta(hours=5, minutes=30)
    put(book, rows[:200])
    for added in (False, True):
        if added:
            add_all(book)
            put(book, rows[200:])
        known = rows if added else rows[:200]
        days = defaultdict(list)
        for row in known:
            if row["at"] >= since:
                name = row["user_id" if by == "user" else by] or ""
                days[row["at"].astimezone(SHANGHAI).date().isoformat(), name].append(row)
        found = book.read(lambda tx: ledger.usage_days_by(tx, by, SHANGHAI, since=since))
        assert found == {key: total(some) for key, some in days.items()}
    few = book.read(lambda tx: ledger.usage_days_by(tx, by, SHANGHAI, since=since, most=1))
    assert len({name for _, name in few}) == 1
