"""What operators change of budgets: more for this window, or a window begun anew. Each change leaves an audit row."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import bindparam, insert, select, update

from feishu_bot.store import budgets
from feishu_bot.store.engine import insert_add
from feishu_bot.store.schema import audit, budget_windows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from feishu_bot.store.work import Amounts, Balance, Charge, Transaction, WindowKey

_w = budget_windows.c
_BEGIN_ANEW = (
    update(budget_windows)
    .where(_w.budget == bindparam("b"), _w.key == bindparam("k"), _w.window_start == bindparam("s"))
    .values(
        used=0, used_requests=0, used_micro_usd=0, granted=0, granted_requests=0, granted_micro_usd=0, told=0
    )
)


class Order(NamedTuple):
    """An operator's order. ``source`` makes it the same one when it is carried out again."""

    actor: str
    target: str
    source: str


def grant(tx: Transaction, charges: Sequence[Charge], amounts: Amounts, order: Order) -> bool:
    """Add to the limits of these budgets, for their window now; False if this order was carried out before."""
    if _known(tx, order.source):
        return False
    before = budgets.read_balances(tx, charges)
    added = ("granted", "granted_requests", "granted_micro_usd")
    statement = insert_add(tx.kind, budget_windows, ("budget", "key", "window_start"), added)
    for budget, key, start in sorted({charge.window for charge in charges}):
        row = {"budget": budget, "key": key, "window_start": start}
        tx.connection.execute(statement, row | dict(zip(added, amounts, strict=True)))
    _note(tx, "budget.grant", order, before, budgets.read_balances(tx, charges))
    return True


def reset(tx: Transaction, charges: Sequence[Charge], order: Order) -> bool:
    """Have these windows begin anew: nothing used, nothing granted; what is reserved right now stays.

    The ledger is not changed. False if this order was carried out before.
    """
    if _known(tx, order.source):
        return False
    before = budgets.read_balances(tx, charges)
    for budget, key, start in sorted(before):
        tx.connection.execute(_BEGIN_ANEW, {"b": budget, "k": key, "s": start})
    _note(tx, "budget.reset", order, before, budgets.read_balances(tx, charges))
    return True


def _known(tx: Transaction, source: str) -> bool:
    return tx.connection.execute(select(audit.c.id).where(audit.c.source == source)).first() is not None


def _note(
    tx: Transaction,
    action: str,
    order: Order,
    before: Mapping[WindowKey, Balance],
    after: Mapping[WindowKey, Balance],
) -> None:
    at = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    values = {"at": at, "action": action, "before": _json(before), "after": _json(after)}
    tx.connection.execute(insert(audit).values(values | order._asdict()))


def _json(balances: Mapping[WindowKey, Balance]) -> str:
    told: dict[str, Any] = {
        budget: {"used": balance.used._asdict(), "granted": balance.granted._asdict()}
        for (budget, _, _), balance in sorted(balances.items())
    }
    return orjson.dumps(told).decode()
