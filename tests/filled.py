"""A database with a row of every sort, and all that a database holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, insert, select

from feishu_bot.store.engine import open_engine
from feishu_bot.store.schema import (
    accounts,
    audit,
    budget_windows,
    conversations,
    inbox,
    job_runs,
    lanes,
    login_attempts,
    messages,
    metadata,
    outbox,
    processes,
    refusals,
    reservations,
    tokens,
    totals,
    usage,
    usage_hours,
    usage_names,
)
from feishu_bot.store.snapshot import kept_tables

if TYPE_CHECKING:
    from sqlalchemy import Table

SAID = datetime(2025, 6, 18, 12, 0, 0, 123456, tzinfo=UTC)
SAID_MS = int(SAID.timestamp() * 1000)
TEXTS = (
    "hello",
    "",
    "你好，世界 \N{GRINNING FACE}",
    "quotes \" and ' and \\ and \\N",
    "tab\t newline\n return\r end\x7f \u2028 \ufeff",
    "100% %s :name ? {}",
    "\u202eright to left\u202c",
    "x" * 700_000,
)
_LEASES = {"lease_owner", "lease_until", "lease_token", "send_owner", "send_until", "send_token"}


def rows_of_every_sort() -> list[tuple[Table, list[dict[str, Any]]]]:
    """Return rows that are right together: counters, totals and reservations are those of the rows."""
    people = [
        {
            "id": n,
            "public_id": f"00000000-0000-0000-0000-00000000000{n}",
            "scope_key": None if n == 2 else f"user:web:private:u{n}",
            "user_key": f"web:private:{'Ou_A' if n == 1 else 'ou_a '}",
            "platform": "web",
            "title": "标题" if n == 1 else None,
            "total_tokens": 7 + 3 * len(TEXTS) if n == 1 else 0,
            "message_count": len(TEXTS) if n == 1 else 0,
            "last_seq": len(TEXTS) if n == 1 else 4,
            "created_at": SAID,
            "last_activity": SAID + timedelta(days=n),
        }
        for n in (1, 2, 5)
    ]
    said = [
        {
            "conversation_id": 1,
            "seq": seq,
            "role": "user" if seq % 2 else "assistant",
            "content": content,
            "tokens": 3,
            "metadata_json": '{"a": null}' if seq == 1 else None,
            "save_key": f"k{seq}" if seq < 3 else None,
            "source_id": "s%:1" if seq == 1 else None,
            "timestamp": SAID + timedelta(seconds=seq),
            "edited_at": SAID if seq == 2 else None,
        }
        for seq, content in enumerate(TEXTS, 1)
    ]
    came = [
        {
            "id": n,
            "account": "web",
            "event_key": f"e{n}",
            "lane_key": "lane",
            "payload": '{"text":"hi"}',
            "state": state,
            "attempts": 1,
            "received_at": SAID_MS,
            "ended_at": None if state == "open" else SAID_MS + 5,
        }
        for n, state in ((3, "answered"), (4, "open"), (9, "dead"))
    ]
    sent = [
        {
            "source": "in:3",
            "kind": "answer",
            "part": part,
            "lane_key": "lane",
            "account": "web",
            "payload": "{}",
            "state": state,
            "attempts": 0,
            "created_at": SAID_MS,
            "ended_at": SAID_MS if state == "sent" else None,
        }
        for part, state in ((0, "sent"), (1, "pending"))
    ]
    call = {"inbox_id": 3, "attempt": 1, "call": 0, "platform": "web", "model": "m", "outcome": "ok"}
    call |= {"input_tokens": 2**40, "output_tokens": 1, "cost_micro_usd": 100_000, "at": SAID}
    added = {"tenant_id": "default", "calls": 1, "input_tokens": 2**40, "output_tokens": 1, "priced": 0}
    added |= {"cached_tokens": 0, "reasoning_tokens": 0, "cost_micro_usd": 0}
    window = {"budget": "daily", "key": "web:u1", "window_start": SAID_MS, "used": 10}
    held_in = {"reserved": 50, "reserved_requests": 1, "reserved_micro_usd": 70}
    held = {
        "inbox_id": 4,
        "attempt": 1,
        "call": 0,
        "model": "m",
        "input_tokens": 20,
        "tokens": 50,
        "micro_usd": 70,
        "at": SAID_MS,
    }
    held |= {"windows": f'[["daily","web:u1",{SAID_MS}]]', "ledger": '{"platform":"web","user_id":"web:u1"}'}
    change = {"at": SAID, "actor": "web:boss", "action": "budget.grant", "target": "web:u1", "after": "{}"}
    lane = {"key": "lane", "ready_at": SAID_MS, "send_ready_at": SAID_MS}
    lane |= {"lease_owner": "host|1|1", "lease_until": SAID_MS, "lease_token": "t"}
    ended = {"day": "2025-06-18", "account": "web", "shard": 0}
    account = {"name": "ann", "password": "$argon2id$…", "role": "admin", "created_at": SAID_MS}
    token = {"account": "ann", "kind": "api", "hash": "ab" * 32, "label": "a script", "created_at": SAID_MS}
    token |= {"used_at": SAID_MS, "expires_at": None}
    attempt = {"kind": "address", "name": "192.0.2.1", "count": 3, "until": SAID_MS}
    return [
        (conversations, people),
        (messages, said),
        (lanes, [lane]),
        (inbox, came),
        (outbox, sent),
        (usage, [{**call, "fresh": 1}, {**call, "call": 1, "cost_micro_usd": None, "fresh": None}]),
        (usage_hours, [{**added, "hour": SAID_MS // 3_600_000, "platform": "web", "model": "m"}]),
        (usage_names, [{**added, "kind": kind, "name": ""} for kind in ("user", "chat")]),
        (budget_windows, [window | held_in, {**window, "key": "web:U1", "told": 1, "reserved": 0}]),
        (reservations, [held]),
        (accounts, [account, {**account, "name": "Ann", "role": "user"}]),
        (tokens, [token, {**token, "kind": "session", "hash": "cd" * 32, "expires_at": SAID_MS + 1}]),
        (login_attempts, [attempt]),
        (refusals, [{"account": "qq", "chat": "U", "refused": 1, "at": SAID_MS}]),
        (audit, [{**change, "source": "in:1"}, {**change, "before": "{}"}]),
        (job_runs, [{"job": "cleanup", "fire_time": SAID_MS, "node": "n", "started_at": SAID_MS}]),
        (
            totals,
            [{**ended, "end": end, "count": n} for end, n in (("answered", 3), ("dead", 1), ("removed", 2))],
        ),
    ]


def fill(url: str) -> None:
    """Put a row of every sort into an empty database; the highest message of all was removed again."""
    engine = open_engine(url)
    with engine.begin() as connection:
        for table, rows in rows_of_every_sort():
            for row in rows:  # one by one, so that each may leave out what it likes
                connection.execute(insert(table), row)
        last = {"conversation_id": 1, "seq": 99, "role": "user", "content": "gone", "timestamp": SAID}
        connection.execute(insert(messages), last)
        connection.execute(delete(messages).where(messages.c.seq == 99))
    engine.dispose()


def say(url: str) -> int:
    """Store one more message and return its id."""
    engine = open_engine(url)
    with engine.begin() as connection:
        row = {"conversation_id": 1, "seq": 100, "role": "user", "content": "", "timestamp": SAID}
        (said,) = connection.execute(insert(messages), row).inserted_primary_key
    engine.dispose()
    return said


def contents(url: str) -> dict[str, list[dict[str, Any]]]:
    """Return all rows that a backup is of, by table."""
    engine = open_engine(url)
    with engine.connect() as connection:
        found: dict[str, Any] = {}
        for table in kept_tables():
            columns = [c for c in table.c if c.name not in _LEASES and c.name != "search_terms"]
            found[table.name] = [
                dict(row)
                for row in connection.execute(select(*columns).order_by(*table.primary_key)).mappings()
            ]
            found[table.name].sort(key=repr)
    engine.dispose()
    return found


def leases(url: str) -> list[Any]:
    engine = open_engine(url)
    with engine.connect() as connection:
        held = select(lanes.c.key).where(lanes.c.lease_token.is_not(None) | (lanes.c.lease_until > 0))
        found = [
            *connection.execute(held).scalars(),
            *connection.execute(select(processes.c.owner)).scalars(),
        ]
    engine.dispose()
    return found


def is_empty(url: str) -> bool:
    engine = open_engine(url)
    with engine.connect() as connection:
        found = [table.name for table in metadata.sorted_tables if connection.execute(select(table)).first()]
    engine.dispose()
    return not found
