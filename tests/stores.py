"""An open store with a clock of the test's own, and rows put straight into it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, insert, select

from feishu_bot.store.schema import conversations, messages
from feishu_bot.store.store import Store
from feishu_bot.store.work import Planned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import Table

NOON = int(datetime(2025, 6, 18, 12, tzinfo=UTC).timestamp() * 1000)  # a Wednesday
HOUR = 3_600_000
DAY = 24 * HOUR


class Clock:
    """Milliseconds since 1970, as the test sets them."""

    def __init__(self, now_ms: int = NOON) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self.now_ms / 1000, UTC)


class AnswersLater:
    """Plans nothing: messages are begun, and the test ends them."""

    history_turns = 20

    def tenant(self, account: str) -> str:
        return "default"

    def plan(self, message, conversation, history, *, attempt, received_at, now_ms) -> Planned:
        return Planned()


@asynccontextmanager
async def opened(url: str, clock: Clock | None = None) -> AsyncIterator[Store]:
    store = Store(url, clock=clock or Clock())
    store.open(AnswersLater(), version="test")
    try:
        yield store
    finally:
        await store.close()


async def rows(store: Store, table: Table) -> list[dict[str, Any]]:
    """Return the rows of a table in the order of their primary key."""
    statement = select(table).order_by(*table.primary_key)
    return await store.read(lambda tx: [dict(r) for r in tx.connection.execute(statement).mappings()])


async def count(store: Store, table: Table) -> int:
    return await store.read(
        lambda tx: tx.connection.execute(select(func.count()).select_from(table)).scalar_one()
    )


async def put(store: Store, table: Table, *values: dict[str, Any]) -> None:
    await store.run(lambda tx: tx.connection.execute(insert(table), list(values)) and None)


async def put_conversations(store: Store, idle_days: list[float], *, said: int = 2, **columns: Any) -> None:
    """Store a conversation of ``said`` messages for each number of days that it has been idle."""
    now = datetime.fromtimestamp(store.now_ms() / 1000, UTC)
    await put(
        store,
        conversations,
        *(
            {
                "id": n,
                "public_id": f"public-{n}",
                "scope_key": f"user:web:private:u{n}",
                "user_key": f"web:private:u{n}",
                "platform": "web",
                "message_count": said,
                "last_seq": said,
                "created_at": now - timedelta(days=days),
                "last_activity": now - timedelta(days=days),
                **columns,
            }
            for n, days in enumerate(idle_days, start=1)
        ),
    )
    spoken = [
        {"conversation_id": n, "seq": seq, "role": "user", "content": "x", "timestamp": now}
        for n in range(1, len(idle_days) + 1)
        for seq in range(1, said + 1)
    ]
    if spoken:
        await put(store, messages, *spoken)
