"""Figures that tell an operator whether something goes wrong; by indexes, so that they cost what is wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, or_, select, tuple_

from feishu_bot.model import End
from feishu_bot.store import budgets
from feishu_bot.store.schema import budget_windows, conversations, inbox, outbox, usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Amounts, Charge, Transaction

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
    used: Amounts
    granted: Amounts

    @property
    def name(self) -> str:
        return f"{self.window_start}:{self.budget}:{self.key}"[:255]


def full_windows(tx: Transaction, limits: Sequence[tuple[Charge, float]]) -> list[Window]:
    """Return the windows of which at least a share is used; ``limits``: a budget's window for anybody, the share."""
    if not limits:
        return []
    w = budget_windows.c
    places = (
        (w.used, w.granted),
        (w.used_requests, w.granted_requests),
        (w.used_micro_usd, w.granted_micro_usd),
    )
    which = tuple_(w.budget, w.window_start).in_([(c.budget, c.window_start) for c, _ in limits])
    enough = or_(
        *(
            (w.budget == charge.budget) & (places[n][0] >= int(limit * share) + places[n][1] * share)
            for charge, share in limits
            for _, n, limit in charge.limits()
        )
    )
    statement = select(*budgets.WINDOW, *budgets.BALANCE).where(which, enough)
    rows = tx.connection.execute(statement.order_by(w.used.desc(), w.budget, w.key).limit(_SHOWN))
    return [Window(*key, balance.used, balance.granted) for key, balance in map(budgets.balance_of, rows)]


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
