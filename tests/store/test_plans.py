"""With many rows in the tables, indexes serve every statement on a message's way."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    MetaData,
    String,
    Table,
    cast,
    event,
    insert,
    literal,
    select,
    text,
)

from feishu_bot.model import CallUsage
from feishu_bot.store import leases, outbox
from feishu_bot.store.history import HistoryCache
from feishu_bot.store.inbox import receive
from feishu_bot.store.schema import (
    budget_windows,
    conversations,
    inbox,
    lanes,
    messages,
    metadata,
    reservations,
    usage,
)
from feishu_bot.store.schema import outbox as parts
from feishu_bot.store.work import Lease, SendResult, SendStep
from tests.transact import DAILY, OWNER, answered, arrival

ROWS = 20_000
WAITING = 300  # of which there is something to do
LARGE = ["lanes", "conversations", "messages", "inbox", "outbox", "usage", "budget_windows", "reservations"]

_numbers = Table("numbers", MetaData(), Column("i", BigInteger, primary_key=True, autoincrement=False))


def fill(db):
    """Put in rows that are idle or have ended, and some that wait."""
    i, t = _numbers.c.i, cast(_numbers.c.i, String(10))
    now, at = db.clock.utc(), literal(db.clock())
    said = {
        "role": literal("user"),
        "content": literal("x"),
        "timestamp": literal(now, messages.c.timestamp.type),
    }
    lived = {name: literal(now, conversations.c.created_at.type) for name in ("created_at", "last_activity")}
    event_of = {"account": literal("web"), "payload": literal("{}"), "received_at": at}
    part = {
        "kind": literal("answer"),
        "part": literal(0),
        "account": literal("web"),
        "payload": literal("{}"),
    }
    call = {"platform": literal("web"), "model": literal("m"), "input_tokens": i, "output_tokens": i}
    idle = {
        lanes: {"key": "idle:" + t},
        conversations: {
            "id": i + 10**6,
            "public_id": t,
            "scope_key": "idle:" + t,
            "user_key": t,
            "platform": t,
            **lived,
        },
        messages: {"conversation_id": i + 10**6, "seq": literal(1), "save_key": t, **said},
        inbox: {
            "event_key": t,
            "lane_key": "idle:" + t,
            "state": literal("answered"),
            "ended_at": at,
            **event_of,
        },
        parts: {
            "source": t,
            "lane_key": "idle:" + t,
            "state": literal("sent"),
            "created_at": at,
            "ended_at": at,
            **part,
        },
        usage: {
            "inbox_id": i,
            "attempt": literal(1),
            "call": literal(0),
            "outcome": literal("ok"),
            "at": literal(now, usage.c.at.type),
            **call,
        },
        budget_windows: {"budget": literal("b"), "key": t, "window_start": i},
        reservations: {
            "inbox_id": i + 10**6,
            "attempt": literal(1),
            "call": literal(0),
            "model": literal("m"),
            "input_tokens": i,
            "tokens": i,
            "windows": literal("[]"),
            "ledger": literal("{}"),
            "at": at,
        },
    }
    waiting = {
        lanes: {
            "key": "busy:" + t,
            "ready_at": at,
            "send_ready_at": at,
            "lease_owner": literal(OWNER),
            "lease_token": t,
            "lease_until": at,
        },
        inbox: {"event_key": "b" + t, "lane_key": "busy:" + t, "state": literal("open"), **event_of},
        parts: {
            "source": "b" + t,
            "lane_key": "busy:" + t,
            "state": literal("pending"),
            "created_at": at,
            **part,
        },
    }
    with db.transaction() as tx:
        _numbers.create(tx.connection)
        tx.connection.execute(insert(_numbers), [{"i": n} for n in range(ROWS)])
        for rows, count in ((idle, ROWS), (waiting, WAITING)):
            for table, columns in rows.items():
                named = [column.label(name) for name, column in columns.items()]
                source = select(*named).where(_numbers.c.i < count)
                tx.connection.execute(insert(table).from_select(list(columns), source))


def analyze(db):
    level = {} if db.kind == "sqlite" else {"isolation_level": "AUTOCOMMIT"}
    with db.engine.connect().execution_options(**level) as connection:
        for table in metadata.sorted_tables:
            quoted = db.engine.dialect.identifier_preparer.format_table(table)
            connection.execute(text(f"ANALYZE {'TABLE ' if db.kind == 'mariadb' else ''}{quoted}"))
        connection.commit()


class Plans:
    """Asks for the plan of each statement before it runs, and notes those that read a large table whole."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.explained = 0
        self.bad: list[str] = []

    def __call__(
        self, connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool
    ) -> None:
        if statement.startswith(("BEGIN", "INSERT", "PRAGMA")):
            return
        with connection.connection.cursor() if self.kind != "sqlite" else _closing(connection) as cursor:
            asked = "EXPLAIN QUERY PLAN " if self.kind == "sqlite" else "EXPLAIN "
            cursor.execute(asked + statement, values[0] if many else values)
            plan = cursor.fetchall()
        self.explained += 1
        if any(self.reads_all(row) for row in plan):
            self.bad.append(f"{statement}\n{plan}")

    def reads_all(self, row: Any) -> bool:
        if self.kind == "sqlite":
            read_whole = any(row[3].startswith(f"SCAN {table}") for table in LARGE)
            return read_whole and "ix_outbox_unsent_lane" not in row[3]  # which holds what waits alone
        if self.kind == "postgresql":
            return any(f"Seq Scan on {table}" in row[0] for table in LARGE)
        return row[2] in LARGE and row[3] in {"ALL", "index"}


class _closing:  # noqa: N801  # as contextlib.closing, of a cursor of SQLite
    def __init__(self, connection: Any) -> None:
        self._cursor = connection.connection.cursor()

    def __enter__(self) -> Any:
        return self._cursor

    def __exit__(self, *_error: object) -> None:
        self._cursor.close()


def go_all_the_way(db, turn):
    db.cache = HistoryCache()
    lanes_of = [f"user:{n}" for n in range(3)]
    db.run(receive, [arrival(f"{turn}-{lane}", lane=lane) for lane in lanes_of])
    works = db.begin(*lanes_of, token=f"t{turn}")
    done = db.commit(*(answered(work, calls=(CallUsage(0, "echo", 1, 1),)) for work in works))
    db.run(outbox.send_step, [SendStep(d.sending.lease, SendResult(d.sending.id, "sent")) for d in done])


# PostgreSQL analyzes by itself, and without any statistics every plan of its is a guess.
@pytest.mark.parametrize(
    ("db_url", "analyzed"),
    [("sqlite", True), ("sqlite", False), ("postgresql", True), ("mariadb", True), ("mariadb", False)],
    indirect=["db_url"],
)
def test_no_statement_on_the_way_reads_a_large_table_whole(db, analyzed):
    fill(db)
    db.plans.reserve(10, DAILY)
    go_all_the_way(db, 1)
    if analyzed:
        analyze(db)
    plans = Plans(db.kind)
    event.listen(db.engine, "before_cursor_execute", plans)
    go_all_the_way(db, 2)
    works, sends = db.run(leases.ready_lanes, 100)
    assert (works, len(sends)) == ([], 100)
    waiting = db.run(leases.depth)
    assert (waiting.waiting, waiting.unsent) == (WAITING, WAITING)
    db.run(leases.waiting_lanes)
    db.run(leases.take_over, "another-host")
    db.run(leases.renew, OWNER, ["busy:1"], ["busy:2"])
    db.run(leases.release_owner, OWNER)
    db.step(Lease("busy:3", OWNER, "s"))
    event.remove(db.engine, "before_cursor_execute", plans)
    assert plans.explained > 20
    assert not plans.bad, "\n\n".join(plans.bad)
    assert len(db.run(leases.ready_lanes, 10**6)[0]) == WAITING
