"""What a run has left in the database, read by SQL of its own: nothing here asks the program that is on trial."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from feishu_bot.chaos.people import number_of
from feishu_bot.store.engine import open_engine, store_errors
from feishu_bot.store.inspection import check

if TYPE_CHECKING:
    from sqlalchemy import Connection


class Entry(NamedTuple):
    """A row of the inbox."""

    state: str
    reason: str
    attempts: int


class Window(NamedTuple):
    """A budget window, and what the ledger says was used."""

    budget: str
    key: str
    used: int
    reserved: int
    ledger: int


@dataclass(slots=True)
class Record:
    """The database's contents as far as they matter, by (chat, number) of the messages."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)  # by the platform's message id
    asked: Counter[tuple[int, int]] = field(default_factory=Counter)
    answered: Counter[tuple[int, int]] = field(default_factory=Counter)
    order: dict[int, list[int]] = field(
        default_factory=dict
    )  # of each chat: the numbers of its stored answers
    windows: list[Window] = field(default_factory=list)
    ledger_tokens: int = 0
    left: dict[str, int] = field(default_factory=dict)  # what should not be there any more
    wrong: list[str] = field(default_factory=list)  # what ``db check`` finds


def read_record(url: str) -> Record:
    """Read all of it. Raises StoreUnavailable."""
    record = Record()
    engine = open_engine(url, patient=True)
    try:
        with store_errors(), engine.execution_options(reader=True).connect() as connection:
            _read_inbox(connection, record)
            _read_messages(connection, record)
            _read_budgets(connection, record)
            record.left = _left(connection)
    finally:
        engine.dispose()
    record.wrong = [f"{found.name}: {found.wrong}" for found in check(url) if found.wrong]
    return record


def read_waiting(url: str) -> tuple[int, int]:
    """Return the open messages and the unsent parts. Raises StoreUnavailable."""
    engine = open_engine(url)
    try:
        with store_errors(), engine.execution_options(reader=True).connect() as connection:
            left = _left(connection)
            return left["open messages"], left["unsent parts"]
    finally:
        engine.dispose()


def _rows(connection: Connection, statement: str) -> list[Any]:
    return list(connection.exec_driver_sql(statement))


def _read_inbox(connection: Connection, record: Record) -> None:
    for row in _rows(connection, "SELECT event_key, state, reason, attempts FROM inbox ORDER BY id"):
        message_id = row.event_key.partition(":")[2]
        record.entries.setdefault(message_id, []).append(Entry(row.state, row.reason or "", row.attempts))


def _read_messages(connection: Connection, record: Record) -> None:
    statement = "SELECT role, content FROM messages ORDER BY conversation_id, seq"
    for row in _rows(connection, statement):
        found = number_of(row.content)
        if found is None:
            continue
        if row.role == "user":
            record.asked[found] += 1
        elif row.role == "assistant":
            record.answered[found] += 1
            record.order.setdefault(found[0], []).append(found[1])


def _read_budgets(connection: Connection, record: Record) -> None:
    ledger = connection.dialect.identifier_preparer.quote_identifier("usage")
    statement = f"SELECT user_id, SUM(input_tokens + output_tokens) AS tokens FROM {ledger} GROUP BY user_id"
    used = {row.user_id: int(row.tokens) for row in _rows(connection, statement)}
    record.ledger_tokens = sum(used.values())
    for row in _rows(connection, "SELECT * FROM budget_windows"):
        named = row._mapping  # noqa: SLF001  # SQLAlchemy's public name for it
        record.windows.append(
            Window(
                named["budget"],
                named["key"],
                int(named["used"]),
                int(named["reserved"]),
                used.get(named["key"], 0),
            )
        )


def _left(connection: Connection) -> dict[str, int]:
    conditions = {
        "open messages": "inbox WHERE state = 'open'",
        "unsent parts": "outbox WHERE state IN ('pending', 'attempting')",
        "reservations": "reservations",
        "leases": "lanes WHERE lease_token IS NOT NULL OR send_token IS NOT NULL",
    }
    return {
        what: int(_rows(connection, f"SELECT COUNT(*) FROM {condition}")[0][0])
        for what, condition in conditions.items()
    }
