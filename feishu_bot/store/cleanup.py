"""What ends or removes rows beside the way of a message; always in pieces of bounded size."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import bindparam, case, delete, func, select, update

from feishu_bot.model import End, InboundMessage, make_key
from feishu_bot.store import budgets, search
from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.inbox import RETRIED, count_ends
from feishu_bot.store.outbox import push
from feishu_bot.store.schema import (
    OPEN,
    PENDING,
    SENT,
    conversations,
    inbox,
    lanes,
    messages,
    outbox,
    reservations,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import ColumnElement

    from feishu_bot.retention import Retention
    from feishu_bot.store.work import Transaction

ERASED = "{}"  # the payload of what ended and whose text is not kept
PIECE = 500  # rows changed by one transaction, so that no writer waits noticeably
BITE = 50  # rows of a piece between two looks at the clock
MOMENT_S = 0.01  # how long a piece of a cleanup takes; the bite that is under way is finished
KEEP_ENDED_MS = 48 * 3600 * 1000  # as long as a platform may repeat an event

# ------------------------------------------------------------------------------------------------- expiring

_OLD_ROWS = (
    select(inbox.c.id, inbox.c.account, inbox.c.lane_key, inbox.c.payload)
    .where(inbox.c.state == OPEN, inbox.c.received_at < bindparam("cutoff"))
    .order_by(inbox.c.id)
    .limit(bindparam("most"))
)
_LOCK_FREE_LANES = (
    select(lanes.c.key)
    .where(
        lanes.c.key.in_(bindparam("keys", expanding=True)),
        (lanes.c.lease_token.is_(None)) | (lanes.c.lease_until < bindparam("now")),
    )
    .order_by(lanes.c.key)
    .with_for_update(skip_locked=True)
)
_EXPIRE = (
    update(inbox)
    .where(inbox.c.id.in_(bindparam("ids", expanding=True)), inbox.c.state == OPEN)
    .values(
        state=End.EXPIRED.value,
        reason="too old to answer",
        ended_at=bindparam("now"),
        begun_token=None,
        payload=case((bindparam("erase") == 1, ERASED), else_=inbox.c.payload),
    )
)
# Whoever ends a message ends the lease it was worked on under: a worker that wakes up late stores nothing.
_END_LEASES = (
    update(lanes)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .values(lease_owner=None, lease_token=None, lease_until=0)
)


def expire(
    tx: Transaction,
    *,
    older_than_ms: int,
    note: Callable[[InboundMessage, int], dict[str, Any] | None],
    shard: int = 0,
    erase: bool = False,
    most: int = 5000,
) -> Counter[str]:
    """End messages that were received longer ago than ``older_than_ms``; one note per chat says how many.

    ``note`` makes the outbox row of a note from one of the chat's messages and their number, or None. ``erase``
    keeps no text of them. Returns how many ended, by account.
    """
    cutoff = tx.now_ms - older_than_ms
    rows = tx.connection.execute(_OLD_ROWS, {"cutoff": cutoff, "most": most}).all()
    if not rows:
        return Counter()
    keys = sorted({r.lane_key for r in rows})
    free = set(tx.connection.execute(_LOCK_FREE_LANES, {"keys": keys, "now": tx.now_ms}).scalars())
    rows = [r for r in rows if r.lane_key in free]
    if not rows:
        return Counter()
    ids = [r.id for r in rows]
    still = set(
        tx.connection.execute(select(inbox.c.id).where(inbox.c.id.in_(ids), inbox.c.state == OPEN)).scalars()
    )
    rows = [r for r in rows if r.id in still]
    tx.connection.execute(_EXPIRE, {"ids": ids, "now": tx.now_ms, "erase": int(erase)})
    tx.connection.execute(_END_LEASES, {"keys": sorted({r.lane_key for r in rows})})
    budgets.settle(tx, ids, {}, {})
    ended: Counter[str] = Counter()
    chats: dict[tuple[str, str, str], list[InboundMessage]] = {}
    for row in rows:
        ended[row.account] += 1
        message = _message_of(row.payload)
        # Nobody waits for an answer to the others.
        if message is not None and message.kind == "message" and message.addressed:
            chat = (row.account, message.chat_id, "" if message.chat_id else message.person)
            chats.setdefault(chat, []).append(message)
    count_ends(tx, {(account, End.EXPIRED.value): n for account, n in ended.items()}, shard=shard)
    notes = [note(found[-1], len(found)) for found in chats.values()]
    push(tx, [n for n in notes if n is not None])
    return ended


def _message_of(payload: str) -> InboundMessage | None:
    """Return a recorded message; None for one that cannot be read, which ends all the same."""
    try:
        return InboundMessage.from_json(payload)
    except (ValueError, TypeError, AttributeError):
        return None


def stumble(tx: Transaction, lane_key: str, *, pause_ms: int, most: int, reason: str, shard: int = 0) -> None:
    """Count an attempt of a lane's oldest message, which could not even be begun; after ``most`` it ends dead."""
    tx.connection.execute(select(lanes.c.key).where(lanes.c.key == lane_key).with_for_update()).all()
    head = tx.connection.execute(
        select(inbox.c.id, inbox.c.account, inbox.c.attempts)
        .where(inbox.c.lane_key == lane_key, inbox.c.state == OPEN)
        .order_by(inbox.c.id)
        .limit(1)
    ).one_or_none()
    if head is None:
        return
    values: dict[str, Any] = {"attempts": head.attempts + 1}
    if head.attempts + 1 >= most:
        values |= {"state": End.DEAD.value, "reason": reason[:255], "ended_at": tx.now_ms}
        budgets.settle(tx, [head.id], {}, {})
        count_ends(tx, {(head.account, End.DEAD.value): 1}, shard=shard)
        pause_ms = 0
    tx.connection.execute(update(inbox).where(inbox.c.id == head.id).values(values))
    tx.connection.execute(update(lanes).where(lanes.c.key == lane_key).values(ready_at=tx.now_ms + pause_ms))


def erase_sent(tx: Transaction, *, since: int, until: int) -> None:
    """Erase the texts of answers that were ready for their askers between two instants (ms)."""
    tx.connection.execute(
        update(outbox)
        .where(
            outbox.c.ended_at >= since,
            outbox.c.ended_at < until,
            outbox.c.state == SENT,
            outbox.c.payload != ERASED,
        )
        .values(payload=ERASED)
    )


# ------------------------------------------------------------------------------------------------- pruning


def prune(tx: Transaction, *, shard: int = 0) -> int:
    """Remove one piece of ended inbox and outbox rows that no platform repeats any more; return how many."""
    cutoff = tx.now_ms - KEEP_ENDED_MS
    old = tx.connection.execute(
        select(inbox.c.id, inbox.c.account)
        .where(inbox.c.ended_at < cutoff, inbox.c.state.not_in((End.DEAD.value, End.EXPIRED.value)))
        .order_by(inbox.c.ended_at)
        .limit(PIECE)
    ).all()
    removed: dict[tuple[str, str], int] = {}
    for row in old:
        key = (row.account, "removed")
        removed[key] = removed.get(key, 0) + 1
    if old:
        tx.connection.execute(delete(inbox).where(inbox.c.id.in_([r.id for r in old])))
        count_ends(tx, removed, shard=shard)
    sent = tx.connection.execute(
        select(outbox.c.id, outbox.c.source, outbox.c.kind, outbox.c.part, outbox.c.sent_id)
        .add_columns(outbox.c.conversation_id)
        .where(outbox.c.ended_at < cutoff, outbox.c.state == "sent")
        .order_by(outbox.c.ended_at)
        .limit(PIECE)
    ).all()
    if sent:
        _keep_sent_ids(tx, sent)
        tx.connection.execute(delete(outbox).where(outbox.c.id.in_([r.id for r in sent])))
    return len(old) + len(sent)


_NAME_SOURCE = (
    update(messages)
    .where(
        messages.c.conversation_id == bindparam("cid"),
        messages.c.save_key == bindparam("key"),
        messages.c.source_id.is_(None),
    )
    .values(source_id=bindparam("sent_id"))
)


def _keep_sent_ids(tx: Transaction, sent: Sequence[Any]) -> None:
    """Give stored answers the platform's id of their first part: from now on nothing else tells replies to them."""
    rows = [
        {"cid": r.conversation_id, "key": f"{r.source}:assistant", "sent_id": r.sent_id}
        for r in sent
        if r.sent_id and r.conversation_id is not None and r.kind == "answer" and r.part == 0
    ]
    if rows:
        tx.connection.execute(_NAME_SOURCE, rows)


def prune_lanes(tx: Transaction) -> int:
    """Remove one piece of lanes with nothing to do; a message that comes makes its lane anew."""
    keys = list(
        tx.connection.execute(
            select(lanes.c.key)
            .where(
                lanes.c.ready_at.is_(None),
                lanes.c.send_ready_at.is_(None),
                lanes.c.lease_token.is_(None),
                lanes.c.send_token.is_(None),
            )
            .order_by(lanes.c.key)
            .limit(PIECE)
            .with_for_update(skip_locked=True)
        ).scalars()
    )
    if keys:
        tx.connection.execute(delete(lanes).where(lanes.c.key.in_(keys)))
    return len(keys)


def settle_orphans(tx: Transaction) -> int:
    """Book reservations whose message has ended; there are none unless something went wrong."""
    ids = list(
        tx.connection.execute(
            select(reservations.c.inbox_id)
            .select_from(reservations.outerjoin(inbox, inbox.c.id == reservations.c.inbox_id))
            .where((inbox.c.id.is_(None)) | (inbox.c.state != OPEN))
            .limit(PIECE)
        ).scalars()
    )
    budgets.settle(tx, ids, {}, {})
    return len(ids)


# -------------------------------------------------------------------------------------------- conversations


_LOCK_QUIET_LANES = (
    select(lanes.c.key)
    .where(
        lanes.c.key.in_(bindparam("keys", expanding=True)),
        lanes.c.ready_at.is_(None),
        lanes.c.lease_token.is_(None),
    )
    .order_by(lanes.c.key)
    .with_for_update(skip_locked=True)
)


def _idle_for(tx: Transaction, days: int) -> ColumnElement[bool]:
    cutoff = datetime.fromtimestamp(tx.now_ms / 1000, UTC) - timedelta(days=days)
    return (conversations.c.last_activity < cutoff) & conversations.c.hidden_at.is_(None)


def count_idle(tx: Transaction, retention: Retention) -> int:
    """Count the conversations without activity for longer than they are kept."""
    if retention.shortest is None:
        return 0
    if not retention.rules:
        statement = select(func.count()).where(_idle_for(tx, retention.shortest))
        return int(tx.connection.execute(statement).scalar_one())
    found = find_idle(tx, retention)
    count = len(found.ids)
    while found.after is not None:
        found = find_idle(tx, retention, found.after)
        count += len(found.ids)
    return count


class Place(NamedTuple):
    """Where a search for idle conversations goes on: behind this one."""

    last_activity: datetime
    id: int


_START = Place(datetime(1000, 1, 1, tzinfo=UTC), 0)  # nothing imported is older


class Idle(NamedTuple):
    """Conversations to remove, and where to look for more; None: there are no more."""

    ids: list[int]
    after: Place | None

    def bites(self) -> Iterator[list[int]]:
        """Yield the ids in the few that one transaction hides: each locks its lanes and changes several pages."""
        for start in range(0, len(self.ids), BITE):
            yield self.ids[start : start + BITE]


def find_idle(tx: Transaction, retention: Retention, after: Place = _START) -> Idle:
    """Return one piece of the conversations without activity for longer than they are kept; only reads."""
    c, shortest = conversations.c, retention.shortest
    if shortest is None:
        return Idle([], None)
    same = (c.last_activity == after.last_activity) & (c.id > after.id)
    rows = tx.connection.execute(
        select(c.last_activity, c.id, c.platform, c.chat_id, c.user_key)
        .where(_idle_for(tx, shortest))
        .where(c.last_activity >= after.last_activity, (c.last_activity > after.last_activity) | same)
        .order_by(c.last_activity, c.id)
        .limit(PIECE)
    ).all()
    now = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    ids = []
    for row in rows:
        days = retention.days_of(row.platform, row.chat_id, row.user_key) if retention.rules else shortest
        if days is not None and row.last_activity < now - timedelta(days=days):
            ids.append(row.id)
    return Idle(ids, Place(*rows[-1][:2]) if len(rows) == PIECE else None)


def hide(tx: Transaction, ids: Sequence[int], retention: Retention) -> int:
    """Hide those of a piece that are still idle, and return how many; ``remove_hidden`` takes their rows.

    The lanes are locked first. One with a message at work is passed by: its answer, made for a conversation that
    is gone by then, would be dropped.
    """
    c = conversations.c
    if retention.shortest is None or not ids:
        return 0
    # Whatever has happened to one since it was found has made it younger than the shortest time.
    still_idle = c.id.in_(ids) & _idle_for(tx, retention.shortest)
    rows = tx.connection.execute(select(c.id, c.scope_key, c.public_id).where(still_idle)).all()
    if not rows:
        return 0
    keys = {r.id: {"conv:" + make_key(r.public_id), r.scope_key} - {None} for r in rows}
    all_keys = sorted(set().union(*keys.values()))
    tx.connection.execute(insert_ignore(tx.kind, lanes, ("key",)), [{"key": key} for key in all_keys])
    quiet = set(tx.connection.execute(_LOCK_QUIET_LANES, {"keys": all_keys}).scalars())
    result = tx.connection.execute(
        update(conversations)
        .where(still_idle, c.id.in_([i for i, lane_keys in keys.items() if lane_keys <= quiet]))
        .values(
            hidden_at=datetime.fromtimestamp(tx.now_ms / 1000, UTC), scope_key=None, version=c.version + 1
        )
    )
    return int(result.rowcount)


def remove_hidden(tx: Transaction) -> int:
    """Remove one piece of what is hidden: messages first, then the conversations that have none left.

    At most PIECE rows, and no more than a moment allows: in a large database each row costs several pages of the disk,
    and where there is one writer, everybody waits for this transaction.
    """
    removed, end = 0, time.monotonic() + MOMENT_S
    while removed < PIECE:
        some = _remove_some_hidden(tx)
        removed += some
        if not some or time.monotonic() >= end:
            break
    return removed


def _remove_some_hidden(tx: Transaction) -> int:
    hidden = list(
        tx.connection.execute(
            select(conversations.c.id)
            # An import that is not ready stays hidden until an instant to come.
            .where(conversations.c.hidden_at <= datetime.fromtimestamp(tx.now_ms / 1000, UTC))
            .order_by(conversations.c.id)
            .limit(BITE)
        ).scalars()
    )
    if not hidden:
        return 0
    doomed = list(
        tx.connection.execute(
            select(messages.c.id, messages.c.content)
            .where(messages.c.conversation_id.in_(hidden))
            .limit(BITE)
        ).mappings()
    )
    if doomed:
        search.remove_messages(tx.connection, tx.kind, doomed)
        tx.connection.execute(delete(messages).where(messages.c.id.in_([row["id"] for row in doomed])))
        return len(doomed)
    tx.connection.execute(delete(conversations).where(conversations.c.id.in_(hidden)))
    return len(hidden)


# -------------------------------------------------------------------------------------------- dead letters


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Something given up: a message (``in-7``) or a part of a reply (``out-9``)."""

    id: str
    account: str
    state: str
    reason: str
    attempts: int
    ended_at: int
    text: str


_LETTER_ID = re.compile(r"(in|out)-(\d{1,18})", re.ASCII)
GIVEN_UP_IN = (End.DEAD.value, End.EXPIRED.value)
GIVEN_UP_OUT = ("dead", "refused", "expired")


def dead_letters(tx: Transaction, *, limit: int = 200) -> list[DeadLetter]:
    """Return what was given up or expired, newest first."""
    ins = tx.connection.execute(
        select(inbox).where(inbox.c.state.in_(GIVEN_UP_IN)).order_by(inbox.c.ended_at.desc()).limit(limit)
    ).all()
    outs = tx.connection.execute(
        select(outbox).where(outbox.c.state.in_(GIVEN_UP_OUT)).order_by(outbox.c.ended_at.desc()).limit(limit)
    ).all()
    letters = [
        DeadLetter(f"in-{r.id}", r.account, r.state, r.reason or "", r.attempts, r.ended_at, r.payload)
        for r in ins
    ]
    letters += [
        DeadLetter(f"out-{r.id}", r.account, r.state, r.last_error or "", r.attempts, r.ended_at, r.payload)
        for r in outs
    ]
    return sorted(letters, key=lambda letter: letter.ended_at, reverse=True)[:limit]


def _touch(tx: Transaction, key: str, column: str) -> None:
    tx.connection.execute(select(lanes.c.key).where(lanes.c.key == key).with_for_update()).all()
    tx.connection.execute(
        update(lanes)
        .where(lanes.c.key == key)
        .values({column: func.coalesce(lanes.c[column], bindparam("now"))}),
        {"now": tx.now_ms},
    )


def retry_dead(tx: Transaction, ids: Sequence[str], *, shard: int = 0) -> list[str]:
    """Open these letters again: a message is answered anew, a part is sent again. Returns those that were dead."""
    done: list[str] = []
    for letter in ids:
        match = _LETTER_ID.fullmatch(letter)
        if match is None:
            continue
        side, number = match.groups()
        table, states = (inbox, GIVEN_UP_IN) if side == "in" else (outbox, GIVEN_UP_OUT)
        row = tx.connection.execute(
            select(table).where(
                table.c.id == int(number),
                table.c.state.in_(states),
                table.c.payload != ERASED,  # without its text there is nothing to answer or to send
            )
        ).one_or_none()
        if row is None:
            continue
        tx.connection.execute(insert_ignore(tx.kind, lanes, ("key",)), {"key": row.lane_key})
        _touch(tx, row.lane_key, "ready_at" if side == "in" else "send_ready_at")
        if side == "in":
            values: dict[str, Any] = {
                "state": OPEN,
                "reason": RETRIED,
                "attempts": 0,
                "begun_token": None,
                "received_at": tx.now_ms,
                "ended_at": None,
            }
            count_ends(tx, {(row.account, row.state): -1}, shard=shard)
        else:
            values = {"state": PENDING, "not_before": 0, "ended_at": None, "first_attempt_at": None}
        tx.connection.execute(update(table).where(table.c.id == row.id).values(values))
        done.append(letter)
    return done


def drop_dead(tx: Transaction, ids: Sequence[str], *, shard: int = 0) -> list[str]:
    """Remove these letters for good. Returns those that were there."""
    done: list[str] = []
    for letter in ids:
        match = _LETTER_ID.fullmatch(letter)
        if match is None:
            continue
        side, number = match.groups()
        table, states = (inbox, GIVEN_UP_IN) if side == "in" else (outbox, GIVEN_UP_OUT)
        row = tx.connection.execute(
            select(table.c.id, table.c.account).where(table.c.id == int(number), table.c.state.in_(states))
        ).one_or_none()
        if row is None:
            continue
        tx.connection.execute(delete(table).where(table.c.id == row.id))
        if side == "in":
            count_ends(tx, {(row.account, "removed"): 1}, shard=shard)
        done.append(letter)
    return done
