"""Step 8: parts on their way out. A lane's parts are sent in order, by one process at a time.

A part goes pending → attempting → sent, refused, dead or expired; the record says "attempting" before the
platform is called, so that an unknown outcome is never taken for "not sent".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Integer, bindparam, case, func, literal_column, or_, select, tuple_, update

from feishu_bot.store.bulk import execute_many
from feishu_bot.store.engine import insert_fill, insert_ignore
from feishu_bot.store.schema import ATTEMPTING, PENDING, UNSENT, lanes, outbox
from feishu_bot.store.work import Lease, NoWork, PartToSend, SendStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Transaction

# Written out, not bound: a plan made once for all values could not use an index on unsent rows.
IS_UNSENT = outbox.c.state.in_([literal_column(f"'{state}'") for state in UNSENT])
_unsent = (outbox.c.lane_key == lanes.c.key) & IS_UNSENT
_FIRST = select(func.min(outbox.c.id)).where(_unsent).correlate(lanes).scalar_subquery()
_ANY_UNSENT = select(outbox.c.id).where(_unsent).correlate(lanes).exists()

_LOCK = (
    select(lanes.c.key, lanes.c.send_token, lanes.c.send_owner)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .order_by(lanes.c.key)
    .with_for_update()
)
_FREE_LANES = select(lanes.c.key, _FIRST.label("first")).where(
    lanes.c.key.in_(bindparam("keys", expanding=True)),
    or_(
        lanes.c.send_token.is_(None),
        lanes.c.send_until < bindparam("now"),
        tuple_(lanes.c.key, lanes.c.send_token).in_(bindparam("leases", expanding=True)),  # a second run
    ),
)
# Under a lock (or alone on the database), so what is seen here cannot be added to before the lane is let go.
_GO_ON = (
    update(lanes)
    .where(
        lanes.c.key.in_(bindparam("keys", expanding=True)),
        tuple_(lanes.c.key, lanes.c.send_token).in_(bindparam("leases", expanding=True)),
    )
    .values(
        send_ready_at=case((_ANY_UNSENT, bindparam("now")), else_=None),
        send_owner=case((_ANY_UNSENT, lanes.c.send_owner), else_=None),
        send_until=case((_ANY_UNSENT, bindparam("until")), else_=0),
        send_token=case((_ANY_UNSENT, lanes.c.send_token), else_=None),
    )
)
_GO_ON_RETURNING = _GO_ON.returning(lanes.c.key, _FIRST.label("first"))
_FIRSTS = select(lanes.c.key, _FIRST.label("first")).where(lanes.c.key.in_(bindparam("keys", expanding=True)))
_ROWS = select(outbox).where(outbox.c.id.in_(bindparam("ids", expanding=True)))
# The attempt is fenced by its own token: once another process has taken the part, no result of ours counts.
_FINISH = (
    update(outbox)
    .where(
        outbox.c.id == bindparam("part_id"),
        outbox.c.state == ATTEMPTING,
        outbox.c.attempt_token == bindparam("token"),
    )
    .values(
        state=bindparam("new_state"),
        sent_id=bindparam("new_sent_id"),
        last_error=bindparam("new_error"),
        not_before=bindparam("new_not_before"),
        attempts=func.coalesce(bindparam("new_attempts", type_=Integer), outbox.c.attempts),
        first_attempt_at=case((bindparam("never_tried") == 1, None), else_=outbox.c.first_attempt_at),
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
        attempt_token=bindparam("token"),
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
_SET_ASIDE = (
    update(outbox)
    .where(
        outbox.c.id == bindparam("part_id"),
        outbox.c.state == PENDING,
        outbox.c.attempt_token == bindparam("token"),
    )
    .values(lane_key=bindparam("new_lane"))
)


def send_step(tx: Transaction, steps: Sequence[SendStep]) -> list[PartToSend | NoWork]:
    """Record results, then hand out each lane's next part, marked as attempting.

    A lane whose lease another process holds by now is BUSY: its result is dropped (that process sends the part
    again with the same key). A lane whose next part may not go yet is WAIT; one without parts is IDLE.
    """
    firsts = _first_parts(tx, steps)
    ids = sorted({first for first in firsts.values() if first is not None})
    rows = {r.id: r for r in tx.connection.execute(_ROWS, {"ids": ids})} if ids else {}
    results: list[PartToSend | NoWork] = []
    attempts: list[dict[str, Any]] = []
    holds: dict[str, dict[str, Any]] = {}
    for step in steps:
        lane, lease = step.lease.lane_key, step.lease
        if (lane, lease.token) not in firsts:
            results.append(NoWork.BUSY)
            continue
        row = rows.get(firsts[lane, lease.token] or 0)
        free = {"lane": lane, "new_owner": None, "new_until": 0, "new_token": None}
        if row is None:
            if step.result is None:
                holds[lane] = {**free, "new_ready": None}
            results.append(NoWork.IDLE)
        elif row.state == PENDING and row.not_before > tx.now_ms:
            holds[lane] = {**free, "new_ready": row.not_before}
            results.append(NoWork.WAIT)
        else:
            results.append(_take(tx, lease, row, attempts))
            if step.result is None:
                taken = {
                    "new_owner": lease.owner,
                    "new_until": tx.now_ms + tx.lease_ms,
                    "new_token": lease.token,
                }
                holds[lane] = {"lane": lane, "new_ready": tx.now_ms, **taken}
    if attempts:
        execute_many(tx, _ATTEMPT, attempts)
    if holds:
        execute_many(tx, _HOLD, [holds[lane] for lane in sorted(holds)])
    return results


def _first_parts(tx: Transaction, steps: Sequence[SendStep]) -> dict[tuple[str, str], int | None]:
    """Record the results; return the oldest unsent part of each (lane, token) that holds its lane."""
    reporting = [s for s in steps if s.result is not None]
    asking = [s for s in steps if s.result is None]
    held: Sequence[Any] = ()
    if tx.kind != "sqlite":
        held = tx.connection.execute(_LOCK, {"keys": sorted({s.lease.lane_key for s in steps})}).all()
    _record(tx, reporting)
    firsts = _go_on(tx, reporting, {(r.key, r.send_token) for r in held}) if reporting else {}
    if asking:
        leases = sorted({s.lease.lane_key: s.lease.token for s in reversed(asking)}.items())
        keys = [lane for lane, _ in leases]
        found = tx.connection.execute(_FREE_LANES, {"keys": keys, "leases": leases, "now": tx.now_ms})
        free = {r.key: r.first for r in found}
        firsts |= {(lane, token): free[lane] for lane, token in leases if lane in free}
    return firsts


def _go_on(
    tx: Transaction, reporting: Sequence[SendStep], held_before: set[tuple[str, str]]
) -> dict[tuple[str, str], int | None]:
    """Keep the lanes that have more to send and are still held, let go of the others."""
    leases = sorted({(s.lease.lane_key, s.lease.token) for s in reporting})
    keys = sorted({lane for lane, _ in leases})
    parameters = {"keys": keys, "leases": leases, "now": tx.now_ms, "until": tx.now_ms + tx.lease_ms}
    tokens: dict[str, str] = dict(leases)
    if tx.kind != "mariadb":
        held = {r.key: r.first for r in tx.connection.execute(_GO_ON_RETURNING, parameters)}
    else:
        tx.connection.execute(_GO_ON, parameters)
        held = {
            r.key: r.first
            for r in tx.connection.execute(_FIRSTS, {"keys": keys})
            if (r.key, tokens[r.key]) in held_before
        }
    return {(lane, tokens[lane]): first for lane, first in held.items()}


def _record(tx: Transaction, steps: Sequence[SendStep]) -> None:
    finished: list[dict[str, Any]] = []
    aside: list[dict[str, Any]] = []
    for step in steps:
        result = step.result
        if result is None:
            continue
        if result.aside:
            lane = f"aside:out-{result.id}"
            aside.append({"part_id": result.id, "token": step.lease.token, "new_lane": lane})
        finished.append(
            {
                "part_id": result.id,
                "token": step.lease.token,
                "new_state": result.state,
                "new_sent_id": result.sent_id,
                "new_error": result.error[:500] if result.error else None,
                "new_not_before": result.not_before,
                "new_ended_at": None if result.state == PENDING else tx.now_ms,
                "unknown": int(result.outcome_unknown),
                "new_attempts": result.attempts,
                "never_tried": int(result.attempts == 0),
                "erase": int(result.erase),
            }
        )
    if finished:
        execute_many(tx, _FINISH, finished)
    if aside:
        tx.connection.execute(
            insert_ignore(tx.kind, lanes, ("key",)),
            [{"key": row["new_lane"], "send_ready_at": tx.now_ms} for row in aside],
        )
        tx.connection.execute(_SET_ASIDE, aside)


def _take(tx: Transaction, lease: Lease, row: Any, attempts: list[dict[str, Any]]) -> PartToSend:
    # Found attempting: whoever attempted it died or was cut off, and nobody knows what the platform did. Under
    # this very lease it is an attempt that was handed out a moment ago but not heard of, so not made.
    ours = row.state == ATTEMPTING and row.attempt_token == lease.token
    unknown = row.state == ATTEMPTING and not ours
    first = row.first_attempt_at or tx.now_ms
    # A person who retries a dead part (first_attempt_at is None again) has decided about its past.
    unknown_at = row.first_attempt_at and (row.unknown_at or (first if unknown else None))
    count = 0 if ours else 1
    attempts.append(
        {
            "part_id": row.id,
            "count": count,
            "token": lease.token,
            "now": tx.now_ms,
            "new_unknown_at": unknown_at,
        }
    )
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


def push(tx: Transaction, rows: Sequence[dict[str, Any]]) -> None:
    """Put parts that answer no message (notes, an operator's words) into the outbox; known ones are left alone."""
    keys = sorted({r["lane_key"] for r in rows})
    if not keys:
        return
    tx.connection.execute(
        insert_fill(tx.kind, lanes, ("key",), ("send_ready_at",)),
        [{"key": key, "send_ready_at": tx.now_ms} for key in keys],
    )
    tx.connection.execute(
        insert_ignore(tx.kind, outbox, ("source", "kind", "part")),
        [{"state": PENDING, "attempts": 0, "not_before": 0, "created_at": tx.now_ms, **r} for r in rows],
    )
