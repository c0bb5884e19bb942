"""Step 8: parts on their way out. A lane's parts are sent in order, by one process at a time.

A part goes pending → attempting → sent, refused, dead or expired; the record says "attempting" before the
platform is called, so that an unknown outcome is never taken for "not sent".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, case, func, insert, or_, select, update

from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.inbox import LEASE_MS
from feishu_bot.store.schema import ATTEMPTING, PENDING, UNSENT, lanes, outbox
from feishu_bot.store.work import Lease, NoWork, PartToSend, SendStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Transaction

_unsent = (outbox.c.lane_key == lanes.c.key) & outbox.c.state.in_(UNSENT)
_FIRST = (
    select(func.min(outbox.c.id))
    .where(_unsent, outbox.c.id.not_in(bindparam("done", expanding=True)))
    .correlate(lanes)
    .scalar_subquery()
)
_FREE = or_(
    lanes.c.send_token.is_(None),
    lanes.c.send_until < bindparam("now"),
    (lanes.c.send_token == bindparam("token")) & (lanes.c.send_owner == bindparam("owner")),
)
_LOCK = (
    select(lanes.c.key, lanes.c.send_token, lanes.c.send_owner, lanes.c.send_until)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .order_by(lanes.c.key)
    .with_for_update()
)
_NEXT = select(lanes.c.key, _FIRST.label("first")).where(lanes.c.key.in_(bindparam("keys", expanding=True)))
_ROWS = select(outbox).where(outbox.c.id.in_(bindparam("ids", expanding=True)))
_FINISH = (
    update(outbox)
    .where(outbox.c.id == bindparam("part_id"), outbox.c.state == ATTEMPTING)
    .values(
        state=bindparam("new_state"),
        sent_id=bindparam("new_sent_id"),
        last_error=bindparam("new_error"),
        not_before=bindparam("new_not_before"),
        ended_at=bindparam("new_ended_at"),
        unknown_at=case(
            (bindparam("unknown") == 1, func.coalesce(outbox.c.unknown_at, outbox.c.first_attempt_at)),
            else_=outbox.c.unknown_at,
        ),
        payload=case((bindparam("erase") == 1, "{}"), else_=outbox.c.payload),
    )
)
_ATTEMPT = (
    update(outbox)
    .where(outbox.c.id == bindparam("part_id"))
    .values(
        state=ATTEMPTING,
        attempts=outbox.c.attempts + bindparam("count"),
        first_attempt_at=func.coalesce(outbox.c.first_attempt_at, bindparam("now")),
        unknown_at=bindparam("new_unknown_at"),
    )
)
_HOLD = (
    update(lanes)
    .where(lanes.c.key == bindparam("lane"))
    .values(
        send_ready_at=bindparam("new_ready"),
        send_owner=bindparam("new_owner"),
        send_until=bindparam("new_until"),
        send_token=bindparam("new_token"),
    )
)
_SET_ASIDE = update(outbox).where(outbox.c.id == bindparam("part_id")).values(lane_key=bindparam("new_lane"))


def send_step(tx: Transaction, steps: Sequence[SendStep]) -> list[PartToSend | NoWork]:
    """Record results, then hand out each lane's next part, marked as attempting.

    A lane whose lease another process holds by now is BUSY: its result is dropped (that process sends the part
    again with the same key). A lane whose next part may not go yet is WAIT; one without parts is IDLE.
    """
    held = _hold_lanes(tx, steps)
    _record(tx, [s for s in steps if s.result is not None and s.lease.lane_key in held])
    firsts = _firsts(tx, held, steps)
    rows: dict[int, Any] = {}
    if firsts:
        rows = {r.id: r for r in tx.connection.execute(_ROWS, {"ids": sorted(firsts.values())})}
    results: list[PartToSend | NoWork] = []
    attempts: list[dict[str, Any]] = []
    holds: list[dict[str, Any]] = []
    for step in steps:
        lane = step.lease.lane_key
        if lane not in held:
            results.append(NoWork.BUSY)
            continue
        row = rows.get(firsts.get(lane, -1))
        free = {"lane": lane, "new_owner": None, "new_until": 0, "new_token": None}
        if row is None:
            holds.append({**free, "new_ready": None})
            results.append(NoWork.IDLE)
        elif row.state == PENDING and row.not_before > tx.now_ms:
            holds.append({**free, "new_ready": row.not_before})
            results.append(NoWork.WAIT)
        else:
            part = _take(tx, step.lease, row, attempts)
            holds.append(
                {
                    "lane": lane,
                    "new_ready": tx.now_ms,
                    "new_owner": step.lease.owner,
                    "new_until": tx.now_ms + LEASE_MS,
                    "new_token": step.lease.token,
                }
            )
            results.append(part)
    if attempts:
        tx.connection.execute(_ATTEMPT, attempts)
    if holds:
        tx.connection.execute(_HOLD, holds)
    return results


def _hold_lanes(tx: Transaction, steps: Sequence[SendStep]) -> set[str]:
    """Lock the lanes and return those that are free or ours."""
    leases = {s.lease.lane_key: s.lease for s in steps}
    reporting = {s.lease.lane_key for s in steps if s.result is not None}
    held = set()
    for row in tx.connection.execute(_LOCK, {"keys": sorted(leases)}):
        lease = leases[row.key]
        ours = row.send_token == lease.token and row.send_owner == lease.owner
        free = row.send_token is None or row.send_until < tx.now_ms
        # A result counts only under the lease it was sent under: afterwards another may have sent the part.
        if ours or (free and row.key not in reporting):
            held.add(row.key)
    return held


def _record(tx: Transaction, steps: Sequence[SendStep]) -> None:
    finished: list[dict[str, Any]] = []
    aside: list[int] = []
    for step in steps:
        result = step.result
        if result is None:
            continue
        if result.aside:
            aside.append(result.id)
        finished.append(
            {
                "part_id": result.id,
                "new_state": result.state,
                "new_sent_id": result.sent_id,
                "new_error": result.error[:500] if result.error else None,
                "new_not_before": result.not_before,
                "new_ended_at": None if result.state == PENDING else tx.now_ms,
                "unknown": int(result.outcome_unknown),
                "erase": int(result.erase),
            }
        )
    if finished:
        tx.connection.execute(_FINISH, finished)
    if aside:
        tx.connection.execute(
            insert_ignore(tx.kind, lanes, ("key",)),
            [{"key": f"aside:out-{i}", "send_ready_at": tx.now_ms} for i in aside],
        )
        tx.connection.execute(_SET_ASIDE, [{"part_id": i, "new_lane": f"aside:out-{i}"} for i in aside])


def _firsts(tx: Transaction, held: set[str], steps: Sequence[SendStep]) -> dict[str, int]:
    """Return each held lane's oldest unsent part."""
    if not held:
        return {}
    done = [s.result.id for s in steps if s.result is not None and s.result.state != PENDING]
    rows = tx.connection.execute(_NEXT, {"keys": sorted(held), "done": done or [0]})
    return {r.key: r.first for r in rows if r.first is not None}


def _take(tx: Transaction, lease: Lease, row: Any, attempts: list[dict[str, Any]]) -> PartToSend:
    # Found attempting: whoever attempted it died or was cut off, and nobody knows what the platform did.
    # Under a re-run it is our own attempt of a moment ago, not made yet.
    unknown = row.state == ATTEMPTING and not tx.rerun
    first = row.first_attempt_at or tx.now_ms
    # A person who retries a dead part (first_attempt_at is None again) has decided about its past.
    unknown_at = row.first_attempt_at and (row.unknown_at or (first if unknown else None))
    count = 0 if tx.rerun and row.state == ATTEMPTING else 1
    attempts.append({"part_id": row.id, "count": count, "now": tx.now_ms, "new_unknown_at": unknown_at})
    return PartToSend(
        lease=lease,
        id=row.id,
        source=row.source,
        kind=row.kind,
        part=row.part,
        account=row.account,
        payload=row.payload,
        attempts=row.attempts + count,
        reply_before=row.reply_before,
        first_attempt_at=first,
        unknown_at=unknown_at,
    )


_INSERT = insert(outbox)


def push(tx: Transaction, rows: Sequence[dict[str, Any]]) -> None:
    """Put parts that answer no message (notes, an operator's words) into the outbox; known ones are left alone."""
    keys = sorted({r["lane_key"] for r in rows})
    if not keys:
        return
    tx.connection.execute(insert_ignore(tx.kind, lanes, ("key",)), [{"key": k} for k in keys])
    tx.connection.execute(_LOCK, {"keys": keys}).all()
    tx.connection.execute(
        insert_ignore(tx.kind, outbox, ("source", "kind", "part")),
        [{"state": PENDING, "attempts": 0, "not_before": 0, "created_at": tx.now_ms, **r} for r in rows],
    )
    tx.connection.execute(
        update(lanes)
        .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
        .values(send_ready_at=func.coalesce(lanes.c.send_ready_at, bindparam("now"))),
        {"keys": keys, "now": tx.now_ms},
    )
