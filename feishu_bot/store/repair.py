"""Making rows right together again after some of them were lost; on SQLite, for a file that nobody else has open."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import orjson

from feishu_bot.errors import StoreUnavailable
from feishu_bot.model import End
from feishu_bot.store.cleanup import settle_orphans
from feishu_bot.store.engine import open_engine, store_errors
from feishu_bot.store.snapshot import driver_errors
from feishu_bot.store.sums import differences
from feishu_bot.store.work import Transaction

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

# A conversation for messages whose own was lost: archived, under the key of whoever spoke first in it.
_STAND_INS = """
INSERT INTO conversations (id, public_id, user_key, platform, title, created_at, last_activity)
SELECT conversation_id,
       'recovered-' || conversation_id,
       coalesce(speaker, 'recovered:private:' || conversation_id),
       coalesce(substr(speaker, 1, instr(speaker, ':') - 1), 'recovered'),
       'recovered',
       first, last
FROM (
    SELECT conversation_id, min(timestamp) AS first, max(timestamp) AS last,
           (SELECT sender_id FROM messages AS said
            WHERE said.conversation_id = lost.conversation_id AND sender_id LIKE '_%:%' ORDER BY seq LIMIT 1) AS speaker
    FROM messages AS lost
    WHERE conversation_id NOT IN (SELECT id FROM conversations)
    GROUP BY conversation_id
)
"""
_COUNTERS = """
UPDATE conversations SET
    message_count = present,
    last_seq = max(last_seq, seq),
    total_tokens = CASE WHEN message_count = present THEN max(total_tokens, tokens) ELSE tokens END
FROM (
    SELECT c.id AS cid, count(m.id) AS present, coalesce(max(m.seq), 0) AS seq, coalesce(sum(m.tokens), 0) AS tokens
    FROM conversations AS c LEFT JOIN messages AS m
        ON m.conversation_id = c.id AND m.seq > coalesce(c.cleared_seq, 0)
    GROUP BY c.id
) WHERE id = cid
"""
_LANES = (
    """
    INSERT INTO lanes (key, ready_at)
    SELECT lane_key, min(received_at) FROM inbox WHERE state = 'open' GROUP BY lane_key
    ON CONFLICT (key) DO UPDATE SET ready_at = coalesce(ready_at, excluded.ready_at)
    """,
    """
    INSERT INTO lanes (key, send_ready_at)
    SELECT lane_key, min(created_at) FROM outbox WHERE state IN ('pending', 'attempting') GROUP BY lane_key
    ON CONFLICT (key) DO UPDATE SET send_ready_at = coalesce(send_ready_at, excluded.send_ready_at)
    """,
)
# Ids that lost rows had are still named elsewhere: they are not used again.
_USED_IDS = (
    ("inbox", "SELECT max(inbox_id) FROM usage"),
    ("inbox", "SELECT max(CAST(substr(source, 4) AS INTEGER)) FROM outbox WHERE source LIKE 'in:%'"),
    ("conversations", "SELECT max(conversation_id) FROM usage"),
)
# After which the ledger's sums are made anew, of the rows there are.
_FORGET_SUMS = ("DELETE FROM usage_hours", "DELETE FROM usage_names", "UPDATE usage SET fresh = 1")
_ADD_TO_TOTAL = """
INSERT INTO totals (day, account, "end", shard, count) VALUES (?, ?, ?, 0, ?)
ON CONFLICT (day, account, "end", shard) DO UPDATE SET count = count + excluded.count
"""
_RESERVE = """
INSERT INTO budget_windows (budget, key, window_start, reserved, reserved_requests, reserved_micro_usd)
VALUES (?, ?, ?, ?, 1, ?)
ON CONFLICT (budget, key, window_start) DO UPDATE SET reserved = reserved + excluded.reserved,
reserved_requests = reserved_requests + 1, reserved_micro_usd = reserved_micro_usd + excluded.reserved_micro_usd
"""


def repair(path: Path, *, now: datetime) -> int:
    """Bring counters, lanes, totals and reservations in line with the rows there are.

    Returns how many conversations were made for messages whose own was lost. Raises StoreUnavailable.
    """
    with driver_errors(), closing(sqlite3.connect(path, isolation_level=None)) as driver:
        driver.execute("BEGIN IMMEDIATE")
        stand_ins = driver.execute(_STAND_INS).rowcount
        driver.execute(_COUNTERS)
        for statement in _LANES:
            driver.execute(statement)
        for table, statement in _USED_IDS:
            _keep_used(driver, table, driver.execute(statement).fetchone()[0])
        _balance_totals(driver, f"{now:%Y-%m-%d}")
        _hold_reserved(driver)
        driver.execute("COMMIT")
    _check_sums(path)
    try:
        _book_lost(path, now)
    except StoreUnavailable:  # the row is one of those that are not what they were
        with driver_errors(), closing(sqlite3.connect(path)) as driver:
            driver.execute(
                "DELETE FROM reservations WHERE inbox_id NOT IN (SELECT id FROM inbox WHERE state = 'open')"
            )
            _hold_reserved(driver)
            driver.commit()
    return stand_ins


def _hold_reserved(driver: sqlite3.Connection) -> None:
    """Have the budget windows reserve what the reservations say; one that cannot be read is dropped."""
    driver.execute("UPDATE budget_windows SET reserved = 0, reserved_requests = 0, reserved_micro_usd = 0")
    rows = driver.execute(
        "SELECT inbox_id, attempt, call, windows, tokens, coalesce(micro_usd, 0) FROM reservations"
    ).fetchall()
    for *key, windows, tokens, micro_usd in rows:
        try:
            held = [(str(budget), str(name), int(start)) for budget, name, start in orjson.loads(windows)]
        except (ValueError, TypeError):
            driver.execute("DELETE FROM reservations WHERE inbox_id = ? AND attempt = ? AND call = ?", key)
            continue
        driver.executemany(_RESERVE, [(*window, max(0, tokens), max(0, micro_usd)) for window in held])


def _keep_used(driver: sqlite3.Connection, table: str, highest: int | None) -> None:
    if highest is None:
        return
    changed = driver.execute(
        "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (highest, table)
    ).rowcount
    if not changed:
        driver.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, highest))


def _balance_totals(driver: sqlite3.Connection, day: str) -> None:
    """Have ends + open = rows + removed for each account: what was lost counts as removed."""
    ends = [end.value for end in End]
    totals: dict[tuple[str, str], int] = {
        (account, end): count
        for account, end, count in driver.execute(
            'SELECT account, "end", sum(count) FROM totals GROUP BY 1, 2'
        )
    }
    rows: dict[tuple[str, str], int] = {
        (account, state): count
        for account, state, count in driver.execute(
            "SELECT account, state, count(*) FROM inbox GROUP BY 1, 2"
        )
    }
    for (account, state), count in rows.items():
        missing = count - totals.get((account, state), 0)
        if state in ends and missing > 0:
            driver.execute(_ADD_TO_TOTAL, (day, account, state, missing))
            totals[account, state] = count
    for account in {account for account, _ in totals.keys() | rows.keys()}:
        ended = sum(totals.get((account, end), 0) for end in ends)
        gone = ended - sum(rows.get((account, end), 0) for end in ends)
        missing = gone - totals.get((account, "removed"), 0)
        if missing:
            driver.execute(_ADD_TO_TOTAL, (day, account, "removed", missing))


def _check_sums(path: Path) -> None:
    """Drop the ledger's sums if they are not those of its rows."""
    engine = open_engine(f"sqlite:///{path}")
    try:
        with store_errors(), engine.begin() as connection:
            if any(differences(connection, "sqlite")):
                for statement in _FORGET_SUMS:
                    connection.exec_driver_sql(statement)
    finally:
        engine.dispose()


def _book_lost(path: Path, now: datetime) -> None:
    """Settle the reservations of messages that are lost or ended."""
    engine = open_engine(f"sqlite:///{path}")
    try:
        settled = 1
        while settled:
            with store_errors(), engine.begin() as connection:
                settled = settle_orphans(Transaction(connection, "sqlite", int(now.timestamp() * 1000)))
    finally:
        engine.dispose()
