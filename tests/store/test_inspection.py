"""Sizes, vacuum, and the check that finds what is not right."""

from __future__ import annotations

import pytest
from sqlalchemy import delete, text, update

from feishu_bot.errors import SchemaMismatch, StoreUnavailable
from feishu_bot.store.engine import open_engine
from feishu_bot.store.inspection import check, sizes, vacuum
from feishu_bot.store.schema import (
    budget_windows,
    conversations,
    inbox,
    lanes,
    messages,
    metadata,
    totals,
)
from tests.filled import TEXTS, fill


def run(url, *statements):
    engine = open_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(statement)
    engine.dispose()


def wrong(url):
    return {finding.name: finding.wrong for finding in check(url) if finding.wrong}


def test_rows_that_are_right_together_are_found_right(db_url):
    told = []
    fill(db_url)
    assert check(db_url, told.append) == told
    assert [(finding.name, finding.wrong) for finding in told] == [
        (name, "")
        for name in (
            "storage",
            "references",
            "counters",
            "ends",
            "reservations",
            "budgets",
            "sums",
            "lanes",
            "leases",
        )
    ]


def test_an_empty_database_is_right(db_url):
    assert wrong(db_url) == {}


@pytest.mark.parametrize(
    ("statement", "name", "words"),
    [
        (update(conversations).where(conversations.c.id == 1).values(message_count=7), "counters", ": 1"),
        (update(conversations).where(conversations.c.id == 1).values(last_seq=7), "counters", ": 1"),
        (update(conversations).where(conversations.c.id == 1).values(total_tokens=23), "counters", ": 1"),
        (delete(messages).where(messages.c.seq == 1), "counters", ": 1"),
        (
            delete(inbox).where(inbox.c.id == 3),
            "ends",
            "web: 2 messages and 2 removed, but 4 ended and 1 open",
        ),
        (delete(totals), "ends", "web: 3 messages and 0 removed, but 0 ended and 1 open"),
        (update(inbox).where(inbox.c.id == 4).values(state="dead"), "reservations", "not open: 4"),
        (
            update(budget_windows).where(budget_windows.c.reserved > 0).values(reserved=49),
            "budgets",
            "daily of web:u1: 49 instead of 50",
        ),
        (
            update(budget_windows).where(budget_windows.c.reserved == 0).values(reserved=1),
            "budgets",
            "daily of web:U1: 1 instead of 0",
        ),
        (update(lanes).values(ready_at=None), "lanes", "open messages that are not ready: lane"),
        (update(lanes).values(send_ready_at=None), "lanes", "unsent replies that are not ready: lane"),
        (update(inbox).where(inbox.c.id == 4).values(lane_key="other"), "lanes", "not ready: other"),
        (update(lanes).values(lease_until=2**50), "leases", ": lane"),
    ],
)
def test_what_is_not_right_is_found(db_url, statement, name, words):
    fill(db_url)
    run(db_url, statement)
    found = wrong(db_url)
    assert words in found[name]


def test_a_conversation_that_is_being_removed_counts_as_it_likes(db_url):
    fill(db_url)
    change = update(conversations).where(conversations.c.id == 1)
    run(
        db_url,
        change.values(hidden_at=conversations.c.created_at),
        delete(messages).where(messages.c.seq == 1),
    )
    assert wrong(db_url) == {}


def test_a_message_without_its_conversation_is_found(sqlite_url):
    fill(sqlite_url)
    engine = open_engine(sqlite_url)
    driver = engine.raw_connection()
    driver.execute("PRAGMA foreign_keys=OFF")
    driver.execute("DELETE FROM conversations WHERE id = 1")
    driver.close()
    engine.dispose()
    assert "8 messages without a conversation: 1, 2, 3, 4, 5, …" in wrong(sqlite_url)["references"]


def test_a_database_at_another_version_is_not_judged(db_url):
    run(db_url, text("UPDATE alembic_version SET version_num = 'other'"))
    with pytest.raises(SchemaMismatch):
        check(db_url)


def test_sizes_name_rows_and_bytes_of_every_table(db_url):
    fill(db_url)
    found = sizes(db_url)
    by_name = {table.name: table for table in found.tables}
    assert by_name.keys() == {table.name for table in metadata.sorted_tables}
    assert (by_name["messages"].rows, by_name["conversations"].rows) == (len(TEXTS), 3)
    assert all(table.size is None or table.size > 0 for table in found.tables)
    if not db_url.startswith("mariadb"):  # whose sizes are estimates that lag behind
        assert by_name["messages"].size > 700_000 or db_url.startswith(
            "postgresql"
        )  # it compresses long texts
        assert found.size >= by_name["messages"].size
    assert (found.log is not None) == db_url.startswith("sqlite")


def test_a_vacuum_gives_the_space_of_removed_rows_back(sqlite_url):
    fill(sqlite_url)
    run(sqlite_url, delete(messages))
    assert sizes(sqlite_url).free > 500_000
    before, after = vacuum(sqlite_url)
    assert before - after > 500_000
    assert sizes(sqlite_url).free == 0


def test_a_vacuum_changes_no_row(db_url):
    fill(db_url)
    told = []
    vacuum(db_url, told.append)
    assert told
    assert wrong(db_url) == {}


def test_what_does_not_exist_is_neither_judged_nor_made(tmp_path):
    for act in (check, sizes, vacuum):
        with pytest.raises(StoreUnavailable, match="there is no database"):
            act(f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_tables_is_named_so(blank_db_url):
    if blank_db_url.startswith("sqlite"):
        open_engine(blank_db_url).connect().close()
    with pytest.raises(StoreUnavailable, match="no tables"):
        sizes(blank_db_url)
    with pytest.raises(SchemaMismatch, match="no tables"):
        check(blank_db_url)
