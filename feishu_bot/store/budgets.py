"""Reservations: what a model call may take is held against its budgets before it, and settled after it.

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
from sqlalchemy import Insert, Integer, bindparam, case, delete, insert, select, tuple_, update

from feishu_bot.model import BudgetRefusal, CallUsage
from feishu_bot.store.bulk import execute_many
from feishu_bot.store.engine import insert_add
from feishu_bot.store.schema import budget_windows, inbox, reservations, usage
from feishu_bot.store.work import Amounts, Balance, Charge, Standing, WindowKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from feishu_bot.store.work import PlannedCall, Transaction

log = logging.getLogger(__name__)

_w = budget_windows.c
WINDOW = (_w.budget, _w.key, _w.window_start)
BALANCE = (
    *(_w.used, _w.used_requests, _w.used_micro_usd),
    *(_w.reserved, _w.reserved_requests, _w.reserved_micro_usd),
    *(_w.granted, _w.granted_requests, _w.granted_micro_usd),
    _w.told,
)
_SELECT_WINDOWS = (
    select(*WINDOW, *BALANCE).where(tuple_(*WINDOW).in_(bindparam("keys", expanding=True))).order_by(*WINDOW)
)
_LEVEL = bindparam("t", type_=Integer)
_ADD_TO_WINDOW = (
    update(budget_windows)
    .where(_w.budget == bindparam("b"), _w.key == bindparam("k"), _w.window_start == bindparam("w"))
    .values(
        used=_w.used + bindparam("u0"),
        used_requests=_w.used_requests + bindparam("u1"),
        used_micro_usd=_w.used_micro_usd + bindparam("u2"),
        reserved=_w.reserved + bindparam("r0"),
        reserved_requests=_w.reserved_requests + bindparam("r1"),
        reserved_micro_usd=_w.reserved_micro_usd + bindparam("r2"),
        told=case((_w.told < _LEVEL, _LEVEL), else_=_w.told),
    )
)
_CHANGES = ("b", "k", "w", "t", "u0", "u1", "u2", "r0", "r1", "r2")
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
        reservations.c.micro_usd,
        reservations.c.windows,
        reservations.c.ledger,
    )
)
_TAKE_CRASHED = _TAKE_RESERVATIONS.where(
    reservations.c.attempt
    < select(inbox.c.runs).where(inbox.c.id == reservations.c.inbox_id).scalar_subquery()
)
_EXISTING = select(
    reservations.c.inbox_id, reservations.c.attempt, reservations.c.call, reservations.c.model
).where(reservations.c.inbox_id.in_(bindparam("ids", expanding=True)))
_INSERT_USAGE = insert(usage)

_NOTHING = Amounts()


class CallRequest(NamedTuple):
    """A call to reserve; ``attempt`` counts the runs of its message. ``ledger``: the columns of ``usage`` that say whose call it is."""

    inbox_id: int
    attempt: int
    call: int
    planned: PlannedCall
    ledger: dict[str, Any]


class Reserved(NamedTuple):
    """What became of a request: it is held, or ``refusal`` says which budget does not hold it.

    ``model``: an earlier run of the transaction has reserved the call for this other model.
    """

    refusal: BudgetRefusal | None = None
    standings: tuple[Standing, ...] = ()
    model: str | None = None


RESERVED = Reserved()  # and nothing to tell


def reserve(tx: Transaction, requests: Sequence[CallRequest]) -> list[Reserved]:
    """Reserve each call against all its budgets, or say which budget refuses it.

    The items are decided in order within the list. A row is updated once, with the sum: nobody else sees it, or
    gets at the row, before what was too much has been taken off again.
    """
    done = _already_reserved(tx, requests)
    wanted: dict[WindowKey, Amounts] = defaultdict(Amounts)
    for request in requests:
        if request[:3] not in done:
            for charge in request.planned.charges:
                wanted[charge.window] += request.planned.amounts
    balances = _add_all(tx, wanted)
    added: dict[WindowKey, Amounts] = defaultdict(Amounts)
    rows: list[dict[str, Any]] = []
    answers: list[Reserved] = []
    for request in requests:
        planned = request.planned
        if request[:3] in done:
            model = done[request[:3]]
            answers.append(RESERVED if model == planned.model else Reserved(model=model))
            continue
        refusal = _refusal(planned, balances, added)
        if refusal is not None:
            answers.append(Reserved(refusal))
            continue
        watched = tuple([Standing(c, balances[c.window]) for c in planned.charges if c.watched])
        answers.append(Reserved(standings=watched) if watched else RESERVED)
        for charge in planned.charges:
            added[charge.window] += planned.amounts
        rows.append(
            {
                "inbox_id": request.inbox_id,
                "attempt": request.attempt,
                "call": request.call,
                "model": planned.model,
                "input_tokens": planned.input_tokens,
                "tokens": planned.tokens,
                "micro_usd": planned.micro_usd,
                "windows": orjson.dumps([c.window for c in planned.charges]).decode(),
                "ledger": orjson.dumps(request.ledger).decode(),
                "at": tx.now_ms,
            }
        )
    _add_to_windows(tx, {k: (_NOTHING, added[k] - n) for k, n in wanted.items()})  # what was refused
    if rows:
        execute_many(tx, _INSERT_RESERVATION, rows)
    return answers


def _refusal(
    planned: PlannedCall, balances: Mapping[WindowKey, Balance], added: Mapping[WindowKey, Amounts]
) -> BudgetRefusal | None:
    """Return which budget does not hold a call; one that knows another model comes before one that does not."""
    found: BudgetRefusal | None = None
    for charge in planned.charges:
        if charge.soft or (found is not None and charge.degrade_to is None):
            continue
        refusal = _over(charge, planned, balances[charge.window], added.get(charge.window, _NOTHING))
        if refusal is not None and refusal.degrade_to is not None:
            return refusal
        found = found or refusal
    return found


def _over(charge: Charge, planned: PlannedCall, balance: Balance, added: Amounts) -> BudgetRefusal | None:
    for unit, place, limit in charge.limits(balance.granted):
        used, reserved = balance.used[place], balance.reserved[place] + added[place]
        wanted = planned.amounts[place]
        unpriced = unit == "cost" and planned.micro_usd is None
        if unpriced or used + reserved + wanted > limit:
            return BudgetRefusal(
                budget=charge.budget,
                used=used,
                reserved=reserved,
                limit=limit,
                wanted=wanted,
                ends_ms=charge.ends_ms,
                unit=unit,
                unpriced=unpriced,
                degrade_to=charge.degrade_to,
            )
    return None


def _already_reserved(tx: Transaction, requests: Sequence[CallRequest]) -> dict[tuple[int, int, int], str]:
    """Return what an earlier run of the same transaction has reserved, where there can have been one."""
    if not tx.rerun and all(r.call == 0 for r in requests):
        return {}  # the first calls belong to a run that was counted a moment ago
    rows = tx.connection.execute(_EXISTING, {"ids": [r.inbox_id for r in requests]})
    return {(r.inbox_id, r.attempt, r.call): r.model for r in rows}


def book_crashed(
    tx: Transaction, inbox_ids: Sequence[int], conversation_ids: Mapping[int, int | None]
) -> None:
    """Book what earlier attempts of these messages had reserved: they died, nobody knows if it was billed."""
    rows = tx.connection.execute(_TAKE_CRASHED, {"ids": list(inbox_ids)}).all()
    _book(tx, rows, {}, conversation_ids, {})


def settle(
    tx: Transaction,
    inbox_ids: Sequence[int],
    calls: Mapping[tuple[int, int, int], CallUsage],
    conversation_ids: Mapping[int, int | None],
    *,
    told: Mapping[WindowKey, int] | None = None,
) -> None:
    """End every reservation of these messages and write the ledger.

    ``calls`` maps (inbox id, attempt, call) to what the call cost. A reservation without such an entry is a call
    whose outcome nobody knows (its process died): it is booked whole, and marked so. ``told``: the windows whose
    speakers are told by the same transaction how they stand.
    """
    if inbox_ids:
        rows = tx.connection.execute(_TAKE_RESERVATIONS, {"ids": list(inbox_ids)}).all()
        _book(tx, rows, calls, conversation_ids, told or {})


def _book(
    tx: Transaction,
    rows: Sequence[Any],
    calls: Mapping[tuple[int, int, int], CallUsage],
    conversation_ids: Mapping[int, int | None],
    told: Mapping[WindowKey, int],
) -> None:
    changes: dict[WindowKey, tuple[Amounts, Amounts]] = defaultdict(lambda: (_NOTHING, _NOTHING))
    ledger: list[dict[str, Any]] = []
    at = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    for row in rows:
        call = _usage_of(row, calls.get((row.inbox_id, row.attempt, row.call)))
        tokens = call.input_tokens + call.output_tokens
        taken = Amounts(tokens, 1, call.cost_micro_usd or 0) if call.outcome != "failed" else _NOTHING
        if tokens > row.tokens:
            extra = {"model": call.model, "reserved": row.tokens, "used": tokens}
            log.warning("call over its reservation", extra=extra)
        held = Amounts(row.tokens, 1, row.micro_usd or 0)
        for window in orjson.loads(row.windows):
            key: WindowKey = tuple(window)
            used, reserved = changes[key]
            changes[key] = (used + taken, reserved - held)
        if call.outcome != "failed":
            ledger.append(
                {
                    **orjson.loads(row.ledger),
                    "inbox_id": row.inbox_id,
                    "attempt": row.attempt,
                    "call": row.call,
                    "conversation_id": conversation_ids.get(row.inbox_id),
                    "model": call.model,
                    "input_tokens": call.input_tokens,
                    "output_tokens": call.output_tokens,
                    "cached_tokens": call.cached_tokens,
                    "reasoning_tokens": call.reasoning_tokens,
                    "cost_micro_usd": call.cost_micro_usd,
                    "outcome": call.outcome,
                    "at": at,
                }
            )
    _add_to_windows(tx, changes, told)
    if ledger:
        execute_many(tx, _INSERT_USAGE, ledger)


def _usage_of(row: Any, call: CallUsage | None) -> CallUsage:
    """Return what a reserved call took; all that was reserved where nobody knows."""
    if call is not None and call.outcome == "ok":
        return call
    if call is not None and call.outcome == "failed":
        return CallUsage(row.call, call.model, 0, 0, "failed")
    output = row.tokens - row.input_tokens
    return CallUsage(row.call, row.model, row.input_tokens, output, "unknown", cost_micro_usd=row.micro_usd)


@cache
def _add_statement(kind: str) -> Insert:
    statement = insert_add(
        kind,
        budget_windows,
        ("budget", "key", "window_start"),
        ("reserved", "reserved_requests", "reserved_micro_usd"),
    )
    return statement.returning(*WINDOW, *BALANCE)


def _add_all(tx: Transaction, wanted: Mapping[WindowKey, Amounts]) -> dict[WindowKey, Balance]:
    """Add to what is reserved in each row, in sorted order, and return their balances as they were before.

    One statement locks the rows, makes those that are missing and tells their balance.
    """
    if not wanted:
        return {}
    rows = tx.connection.execute(
        _add_statement(tx.kind),
        [
            {
                "budget": b,
                "key": k,
                "window_start": w,
                "reserved": add.tokens,
                "reserved_requests": add.requests,
                "reserved_micro_usd": add.micro_usd,
            }
            for (b, k, w), add in sorted(wanted.items())
        ],
    )
    balances = {}
    for row in rows:
        key, balance = balance_of(row)
        balances[key] = balance._replace(reserved=balance.reserved - wanted[key])
    return balances


def balance_of(row: Any) -> tuple[WindowKey, Balance]:
    """Read a row of ``WINDOW`` and ``BALANCE``."""
    values = tuple(row)
    return values[:3], Balance(
        Amounts(*values[3:6]), Amounts(*values[6:9]), Amounts(*values[9:12]), values[12]
    )


def _add_to_windows(
    tx: Transaction,
    changes: Mapping[WindowKey, tuple[Amounts, Amounts]],
    told: Mapping[WindowKey, int] | None = None,
) -> None:
    told = told or {}
    # In sorted order, so that two nodes do not wait for each other.
    rows = [
        dict(zip(_CHANGES, (*key, told.get(key, 0), *used, *reserved), strict=True))
        for key, (used, reserved) in sorted(changes.items())
        if any(used) or any(reserved) or key in told
    ]
    if rows:
        execute_many(tx, _ADD_TO_WINDOW, rows)


def read_balances(tx: Transaction, charges: Iterable[Charge]) -> dict[WindowKey, Balance]:
    """Return the balances of those budget rows of ``charges`` that exist, without locking them."""
    keys = sorted({c.window for c in charges})
    if not keys:
        return {}
    return dict(balance_of(row) for row in tx.connection.execute(_SELECT_WINDOWS, {"keys": keys}))
