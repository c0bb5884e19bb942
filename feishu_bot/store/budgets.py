"""Reservations: a model call's tokens are held against its budgets before it, and settled after it.

A reservation is a row. It is settled, booked or released exactly once, by the transaction that deletes it, in
the windows it was reserved in. The rows of ``budget_windows`` that transactions share are locked in sorted order.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import Insert, bindparam, delete, insert, select, tuple_, update

from feishu_bot.model import BudgetRefusal, CallUsage
from feishu_bot.store.bulk import execute_many
from feishu_bot.store.engine import insert_add
from feishu_bot.store.schema import budget_windows, inbox, reservations, usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from feishu_bot.store.work import Charge, PlannedCall, Transaction

log = logging.getLogger(__name__)

WindowKey = tuple[str, str, int]  # budget, key, window_start

_WINDOW_COLUMNS = (budget_windows.c.budget, budget_windows.c.key, budget_windows.c.window_start)
_SELECT_WINDOWS = (
    select(*_WINDOW_COLUMNS, budget_windows.c.used, budget_windows.c.reserved)
    .where(tuple_(*_WINDOW_COLUMNS).in_(bindparam("keys", expanding=True)))
    .order_by(*_WINDOW_COLUMNS)
)
_ADD_TO_WINDOW = (
    update(budget_windows)
    .where(
        budget_windows.c.budget == bindparam("b"),
        budget_windows.c.key == bindparam("k"),
        budget_windows.c.window_start == bindparam("w"),
    )
    .values(
        used=budget_windows.c.used + bindparam("add_used"),
        reserved=budget_windows.c.reserved + bindparam("add_reserved"),
    )
)
_INSERT_RESERVATION = insert(reservations)
_TAKE_RESERVATIONS = (
    delete(reservations)
    .where(reservations.c.inbox_id.in_(bindparam("ids", expanding=True)))
    .returning(
        reservations.c.inbox_id,
        reservations.c.attempt,
        reservations.c.call,
        reservations.c.model,
        reservations.c.input_tokens,
        reservations.c.tokens,
        reservations.c.windows,
        reservations.c.ledger,
    )
)
_TAKE_CRASHED = _TAKE_RESERVATIONS.where(
    reservations.c.attempt
    < select(inbox.c.runs).where(inbox.c.id == reservations.c.inbox_id).scalar_subquery()
)
_EXISTING = select(reservations.c.inbox_id, reservations.c.attempt, reservations.c.call).where(
    reservations.c.inbox_id.in_(bindparam("ids", expanding=True))
)
_INSERT_USAGE = insert(usage)


class CallRequest(NamedTuple):
    """A call to reserve; ``attempt`` counts the runs of its message. ``ledger``: the columns of ``usage`` that say whose call it is."""

    inbox_id: int
    attempt: int
    call: int
    planned: PlannedCall
    ledger: dict[str, Any]


def reserve(tx: Transaction, requests: Sequence[CallRequest]) -> list[BudgetRefusal | None]:
    """Reserve each call against all its budgets, or say which budget refuses it.

    The items are decided in order within the list. A row is updated once, with the sum: nobody else sees it, or
    gets at the row, before what was too much has been taken off again.
    """
    done = _already_reserved(tx, requests)
    wanted: dict[WindowKey, int] = defaultdict(int)
    for request in requests:
        if request[:3] not in done:
            for charge in request.planned.charges:
                wanted[_key(charge)] += request.planned.tokens
    balances = _add_all(tx, wanted)
    added: dict[WindowKey, int] = defaultdict(int)
    rows: list[dict[str, Any]] = []
    answers: list[BudgetRefusal | None] = []
    for request in requests:
        planned = request.planned
        if request[:3] in done:
            answers.append(None)
            continue
        refusal = _refusal(planned, balances, added)
        answers.append(refusal)
        if refusal is not None:
            continue
        for charge in planned.charges:
            added[_key(charge)] += planned.tokens
        rows.append(
            {
                "inbox_id": request.inbox_id,
                "attempt": request.attempt,
                "call": request.call,
                "model": planned.model,
                "input_tokens": planned.input_tokens,
                "tokens": planned.tokens,
                "windows": orjson.dumps([_key(c) for c in planned.charges]).decode(),
                "ledger": orjson.dumps(request.ledger).decode(),
                "at": tx.now_ms,
            }
        )
    _add_to_windows(tx, {k: (0, added[k] - n) for k, n in wanted.items()})  # what was refused
    if rows:
        execute_many(tx, _INSERT_RESERVATION, rows)
    return answers


def _refusal(
    planned: PlannedCall, balances: Mapping[WindowKey, tuple[int, int]], added: Mapping[WindowKey, int]
) -> BudgetRefusal | None:
    for charge in planned.charges:
        used, reserved = balances[_key(charge)]
        reserved += added.get(_key(charge), 0)
        if used + reserved + planned.tokens > charge.limit:
            return BudgetRefusal(
                budget=charge.budget,
                used=used,
                reserved=reserved,
                limit=charge.limit,
                wanted=planned.tokens,
                ends_ms=charge.ends_ms,
            )
    return None


def _already_reserved(tx: Transaction, requests: Sequence[CallRequest]) -> set[tuple[int, int, int]]:
    """Return what an earlier run of the same transaction has reserved, where there can have been one."""
    if not tx.rerun and all(r.call == 0 for r in requests):
        return set()  # the first calls belong to a run that was counted a moment ago
    rows = tx.connection.execute(_EXISTING, {"ids": [r.inbox_id for r in requests]})
    return {(r.inbox_id, r.attempt, r.call) for r in rows}


def book_crashed(
    tx: Transaction, inbox_ids: Sequence[int], conversation_ids: Mapping[int, int | None]
) -> None:
    """Book what earlier attempts of these messages had reserved: they died, nobody knows if it was billed."""
    rows = tx.connection.execute(_TAKE_CRASHED, {"ids": list(inbox_ids)}).all()
    _book(tx, rows, {}, conversation_ids)


def settle(
    tx: Transaction,
    inbox_ids: Sequence[int],
    calls: Mapping[tuple[int, int, int], CallUsage],
    conversation_ids: Mapping[int, int | None],
) -> None:
    """End every reservation of these messages and write the ledger.

    ``calls`` maps (inbox id, attempt, call) to what the call cost. A reservation without such an entry is a call
    whose outcome nobody knows (its process died): it is booked whole, and marked so.
    """
    if inbox_ids:
        rows = tx.connection.execute(_TAKE_RESERVATIONS, {"ids": list(inbox_ids)}).all()
        _book(tx, rows, calls, conversation_ids)


def _book(
    tx: Transaction,
    rows: Sequence[Any],
    calls: Mapping[tuple[int, int, int], CallUsage],
    conversation_ids: Mapping[int, int | None],
) -> None:
    changes: dict[WindowKey, tuple[int, int]] = defaultdict(lambda: (0, 0))
    ledger: list[dict[str, Any]] = []
    at = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    for row in rows:
        call = calls.get((row.inbox_id, row.attempt, row.call))
        if call is None or call.outcome == "unknown":
            model, outcome, cost = row.model, "unknown", None
            tokens_in, tokens_out = row.input_tokens, row.tokens - row.input_tokens
        elif call.outcome == "failed":
            model, outcome, cost, tokens_in, tokens_out = call.model, "failed", None, 0, 0
        else:
            model, outcome, cost = call.model, "ok", call.cost_usd
            tokens_in, tokens_out = call.input_tokens, call.output_tokens
            if tokens_in + tokens_out > row.tokens:
                extra = {"model": model, "reserved": row.tokens, "used": tokens_in + tokens_out}
                log.warning("call over its reservation", extra=extra)
        for window in orjson.loads(row.windows):
            key: WindowKey = tuple(window)
            used, reserved = changes[key]
            changes[key] = (used + tokens_in + tokens_out, reserved - row.tokens)
        if outcome != "failed":
            ledger.append(
                {
                    **orjson.loads(row.ledger),
                    "inbox_id": row.inbox_id,
                    "attempt": row.attempt,
                    "call": row.call,
                    "conversation_id": conversation_ids.get(row.inbox_id),
                    "model": model,
                    "input_tokens": tokens_in,
                    "output_tokens": tokens_out,
                    "cost_usd": cost,
                    "outcome": outcome,
                    "at": at,
                }
            )
    _add_to_windows(tx, changes)
    if ledger:
        execute_many(tx, _INSERT_USAGE, ledger)


def _key(charge: Charge) -> WindowKey:
    return (charge.budget, charge.key, charge.window_start)


@cache
def _add_statement(kind: str) -> Insert:
    statement = insert_add(kind, budget_windows, ("budget", "key", "window_start"), ("reserved",))
    return statement.returning(*_WINDOW_COLUMNS, budget_windows.c.used, budget_windows.c.reserved)


def _add_all(tx: Transaction, wanted: Mapping[WindowKey, int]) -> dict[WindowKey, tuple[int, int]]:
    """Add to ``reserved`` of each row, in sorted order, and return (used, reserved) as they were before.

    One statement locks the rows, makes those that are missing and tells their balance.
    """
    if not wanted:
        return {}
    rows = tx.connection.execute(
        _add_statement(tx.kind),
        [
            {"budget": b, "key": k, "window_start": w, "used": 0, "reserved": tokens}
            for (b, k, w), tokens in sorted(wanted.items())
        ],
    )
    balances = {}
    for row in rows:
        key = (row.budget, row.key, row.window_start)
        balances[key] = (row.used, row.reserved - wanted[key])
    return balances


def _add_to_windows(tx: Transaction, changes: Mapping[WindowKey, tuple[int, int]]) -> None:
    # In sorted order, so that two nodes do not wait for each other.
    rows = [
        {"b": b, "k": k, "w": w, "add_used": used, "add_reserved": reserved}
        for (b, k, w), (used, reserved) in sorted(changes.items())
        if used or reserved
    ]
    if rows:
        execute_many(tx, _ADD_TO_WINDOW, rows)


def read_balances(tx: Transaction, charges: Iterable[Charge]) -> dict[WindowKey, tuple[int, int]]:
    """Return (used, reserved) of the budget rows of ``charges`` that exist, without locking them."""
    keys = sorted({_key(c) for c in charges})
    if not keys:
        return {}
    rows = tx.connection.execute(_SELECT_WINDOWS, {"keys": keys})
    return {(r.budget, r.key, r.window_start): (r.used, r.reserved) for r in rows}
