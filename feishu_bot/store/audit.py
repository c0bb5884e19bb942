"""Who has changed what, for good: a row in the transaction that makes the change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import insert, or_, select

from feishu_bot.store.schema import audit

if TYPE_CHECKING:
    from feishu_bot.store.work import StoredRow, Transaction

_a = audit.c


class Order(NamedTuple):
    """An operator's order. ``source`` makes it the same one when it is carried out again."""

    actor: str
    target: str
    source: str


def known(tx: Transaction, source: str) -> bool:
    """Say whether this order was carried out before."""
    return tx.connection.execute(select(_a.id).where(_a.source == source)).first() is not None


def note(tx: Transaction, action: str, order: Order, *, before: Any = None, after: Any = None) -> None:
    """Put down that the order was carried out, and what it has changed (as JSON can hold it)."""
    at = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    values = {"at": at, "action": action, "before": _json(before), "after": _json(after)}
    tx.connection.execute(insert(audit).values(values | order._asdict()))


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def entries(tx: Transaction, *, text: str, offset: int, limit: int) -> list[StoredRow]:
    """Return the rows, newest first; with ``text`` in who, what or whom."""
    statement = select(audit).order_by(_a.id.desc()).offset(offset).limit(limit)
    if text:
        places = (_a.actor, _a.action, _a.target)
        statement = statement.where(or_(*(place.contains(text, autoescape=True) for place in places)))
    return list(tx.connection.execute(statement).mappings())
