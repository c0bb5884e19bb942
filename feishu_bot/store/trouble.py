"""Figures that tell an operator whether something goes wrong; by indexes, so that they cost what is wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, or_, select, tuple_

from feishu_bot.model import End
from feishu_bot.store.schema import budget_windows, conversations, inbox, outbox, usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Transaction

_SHOWN = 20  # budget windows told of at once


def given_up_since(tx: Transaction, since_ms: int) -> tuple[int, int]:
    """Return how many messages ended dead and how many parts of replies were given up since an instant."""
    dead = select(func.count()).where(inbox.c.ended_at >= since_ms, inbox.c.state == End.DEAD.value)
    parts = select(func.count()).where(
        outbox.c.ended_at >= since_ms, outbox.c.state.in_(["dead", "refused", "expired"])
    )
    return (
        int(tx.connection.execute(dead).scalar_one()),
        int(tx.connection.execute(parts).scalar_one()),
    )


class Window(NamedTuple):
    """A budget window in which more than a share is used. ``name`` tells it from all others."""

    budget: str
    key: str
    window_start: int
    used: int

    @property
    def name(self) -> str:
        return f"{self.window_start}:{self.budget}:{self.key}"[:255]


def full_windows(tx: Transaction, limits: Sequence[tuple[str, int, int]]) -> list[Window]:
    """Return the windows with at least so much used; ``limits``: budget, start of its window, tokens."""
    w = budget_windows.c
    if not limits:
        return []
    which = tuple_(w.budget, w.window_start).in_([(budget, start) for budget, start, _ in limits])
    enough = or_(*((w.budget == budget) & (w.used >= tokens) for budget, _, tokens in limits))
    statement = select(w.budget, w.key, w.window_start, w.used).where(which, enough)
    rows = tx.connection.execute(statement.order_by(w.used.desc()).limit(_SHOWN))
    return [Window(*row) for row in rows]


def tokens_since(tx: Transaction, since_ms: int) -> int:
    """Return the tokens booked since an instant."""
    total = func.coalesce(func.sum(usage.c.input_tokens + usage.c.output_tokens), 0)
    since = datetime.fromtimestamp(since_ms / 1000, UTC)
    return int(tx.connection.execute(select(total).where(usage.c.at >= since)).scalar_one())


def count_conversations(tx: Transaction) -> int:
    """Return how many conversations there are."""
    statement = select(func.count()).select_from(conversations).where(conversations.c.hidden_at.is_(None))
    return int(tx.connection.execute(statement).scalar_one())


def count_events(tx: Transaction, account: str, event_key: str) -> int:
    """Return how often an event was recorded: once, or not at all."""
    statement = select(func.count()).where(inbox.c.account == account, inbox.c.event_key == event_key)
    return int(tx.connection.execute(statement).scalar_one())
