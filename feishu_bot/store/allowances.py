"""What operators change of budgets: more for this window, or a window begun anew. Each change leaves an audit row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, update

from feishu_bot.store import audit, budgets
from feishu_bot.store.engine import insert_add
from feishu_bot.store.schema import budget_windows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from feishu_bot.store.audit import Order
    from feishu_bot.store.work import Amounts, Balance, Charge, Transaction, WindowKey

MAX_GRANTED: Final = 2**53  # of one unit in one window, as a limit is at most: no column overflows

_w = budget_windows.c
_BEGIN_ANEW = (
    update(budget_windows)
    .where(_w.budget == bindparam("b"), _w.key == bindparam("k"), _w.window_start == bindparam("s"))
    .values(
        used=0, used_requests=0, used_micro_usd=0, granted=0, granted_requests=0, granted_micro_usd=0, told=0
    )
)


def grant(tx: Transaction, charges: Sequence[Charge], amounts: Amounts, order: Order) -> bool:
    """Add to the limits of these budgets, for their window now; False if this order was carried out before.

    In all at most ``MAX_GRANTED`` is granted in a window: what goes beyond is left out.
    """
    if audit.known(tx, order.source):
        return False
    before = budgets.read_balances(tx, charges)
    added = ("granted", "granted_requests", "granted_micro_usd")
    statement = insert_add(tx.kind, budget_windows, ("budget", "key", "window_start"), added)
    for window in sorted({charge.window for charge in charges}):
        granted = before[window].granted if window in before else (0, 0, 0)
        more = [max(0, min(amount, MAX_GRANTED - old)) for amount, old in zip(amounts, granted, strict=True)]
        row = dict(zip(("budget", "key", "window_start"), window, strict=True))
        tx.connection.execute(statement, row | dict(zip(added, more, strict=True)))
    after = budgets.read_balances(tx, charges)
    audit.note(tx, "budget.grant", order, before=_told(before), after=_told(after))
    return True


def reset(tx: Transaction, charges: Sequence[Charge], order: Order) -> bool:
    """Have these windows begin anew: nothing used, nothing granted; what is reserved right now stays.

    The ledger is not changed. False if this order was carried out before.
    """
    if audit.known(tx, order.source):
        return False
    before = budgets.read_balances(tx, charges)
    for budget, key, start in sorted(before):
        tx.connection.execute(_BEGIN_ANEW, {"b": budget, "k": key, "s": start})
    after = budgets.read_balances(tx, charges)
    audit.note(tx, "budget.reset", order, before=_told(before), after=_told(after))
    return True


def _told(balances: Mapping[WindowKey, Balance]) -> dict[str, Any]:
    return {
        budget: {"used": balance.used._asdict(), "granted": balance.granted._asdict()}
        for (budget, _, _), balance in sorted(balances.items())
    }
