"""Step 7: all that the end of a message means, in one transaction guarded by the lane's lease."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache as once
from typing import TYPE_CHECKING, Any

from sqlalchemy import Insert, Row, bindparam, case, func, insert, select, update

from feishu_bot.errors import LeaseLost
from feishu_bot.model import CallUsage, End
from feishu_bot.store import budgets, search
from feishu_bot.store.bulk import execute_many
from feishu_bot.store.changes import change_conversations
from feishu_bot.store.conversations import without_cleared
from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.history import history_row
from feishu_bot.store.inbox import ANY_OPEN, IS_OPEN, count_ends, ledger_of
from feishu_bot.store.placing import COLUMNS, Conversation, Item, find_conversations
from feishu_bot.store.repeats import committed_before
from feishu_bot.store.schema import (
    ATTEMPTING,
    NOT_CLEARED,
    PENDING,
    SENT,
    conversations,
    inbox,
    lanes,
    messages,
    outbox,
)
from feishu_bot.store.work import Committed, Lease, PartToSend

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from feishu_bot.model import BudgetRefusal
    from feishu_bot.store.history import HistoryCache
    from feishu_bot.store.work import (
        HistoryRow,
        NewPart,
        Outcome,
        PlannedCall,
        Transaction,
        WindowKey,
        Work,
    )

AnyRow = Row[*tuple[Any, ...]]

_LANE = (
    lanes.c.key,
    lanes.c.lease_owner,
    lanes.c.lease_token,
    lanes.c.send_ready_at,
    lanes.c.send_owner,
    lanes.c.send_until,
    lanes.c.send_token,
)
_THESE_LANES = lanes.c.key.in_(bindparam("keys", expanding=True))
LOCK_LANES = select(*_LANE).where(_THESE_LANES).order_by(lanes.c.key).with_for_update()
# Where one transaction writes at a time there is nothing to lock: lanes and their conversations in one look.
_SEE_LANES = (
    select(*_LANE, *COLUMNS)
    .select_from(
        lanes.outerjoin(
            conversations,
            (conversations.c.scope_key == lanes.c.key) & conversations.c.hidden_at.is_(None),
        )
    )
    .where(_THESE_LANES)
)
_APPEND = (
    update(conversations)
    .where(conversations.c.id == bindparam("cid"))
    .values(
        last_seq=conversations.c.last_seq + bindparam("added"),
        message_count=conversations.c.message_count + bindparam("added"),
        total_tokens=conversations.c.total_tokens + bindparam("tokens"),
        version=conversations.c.version + 1,
        last_activity=bindparam("now"),
        title=func.coalesce(conversations.c.title, bindparam("new_title")),
    )
)
_SAVED = (
    select(messages.c.id, messages.c.conversation_id, messages.c.save_key, messages.c.content)
    .add_columns(NOT_CLEARED.label("present"))
    .join_from(messages, conversations, conversations.c.id == messages.c.conversation_id)
    .where(
        messages.c.conversation_id.in_(bindparam("ids", expanding=True)),
        messages.c.save_key.in_(bindparam("keys", expanding=True)),
    )
)
_INSERT_MESSAGES = insert(messages)
_MESSAGE_IDS = select(messages.c.id, messages.c.conversation_id, messages.c.seq).where(
    messages.c.conversation_id.in_(bindparam("ids", expanding=True)), messages.c.seq > bindparam("after")
)
_END = (
    update(inbox)
    .where(inbox.c.id == bindparam("inbox_id"), IS_OPEN)
    .values(
        state=bindparam("new_state"),
        reason=bindparam("new_reason"),
        ended_at=bindparam("now"),
        payload=case((bindparam("erase") == 1, "{}"), else_=inbox.c.payload),
    )
)
_FREE_LANE = (
    update(lanes)
    .where(lanes.c.key == bindparam("lane"))
    .values(
        lease_owner=None,
        lease_token=None,
        lease_until=0,
        ready_at=case((ANY_OPEN, bindparam("now")), else_=None),
        send_ready_at=bindparam("new_ready"),
        send_owner=bindparam("new_owner"),
        send_until=bindparam("new_until"),
        send_token=bindparam("new_token"),
    )
)
_PART = (outbox.c.id, outbox.c.source, outbox.c.kind, outbox.c.part)
_PARTS = select(*_PART).where(
    outbox.c.source.in_(bindparam("sources", expanding=True)), outbox.c.state == ATTEMPTING
)


@once
def _insert_parts(kind: str) -> Insert:
    return insert_ignore(kind, outbox, ("source", "kind", "part"))


@once
def _insert_parts_returning(kind: str) -> Insert:
    return _insert_parts(kind).returning(*_PART)


def commit(
    tx: Transaction, outcomes: Sequence[Outcome], *, cache: HistoryCache, shard: int = 0, keep_turns: int = 20
) -> list[Committed | LeaseLost]:
    """End messages: conversation, ledger, inbox and outbox together, or not at all.

    An outcome whose lane has another owner by now is dropped with LeaseLost; the others are not touched by that.
    One that was committed before, unheard, is answered as it was then.
    """
    items, seen = _fence(tx, outcomes)
    live = [item for item in items if isinstance(item, Item)]
    if live:
        find_conversations(tx, live, seen)
        _end(tx, live, shard)
        change_conversations(tx, live, cache)
        ids = _store_messages(tx, live, cache, keep_turns)
        sending = _hand_out(tx, live)
        _settle(tx, live)  # last: rows of shared budgets are locked for as short as can be
    else:
        ids, sending = {}, {}
    results: list[Committed | LeaseLost] = []
    for item in items:
        if not isinstance(item, Item):
            results.append(item)
            continue
        inbox_id = item.outcome.work.inbox_id
        conversation = item.conversation
        results.append(
            Committed(
                end=item.end,
                conversation_id=conversation.id if conversation is not None else None,
                conversation_public_id=conversation.public_id if conversation is not None else None,
                message_ids=tuple(ids.get(inbox_id, ())),
                sending=sending.get(inbox_id),
            )
        )
    return results


def holds(row: AnyRow | None, lease: Lease) -> bool:
    """Say whether the lane's row still names this lease."""
    return row is not None and row.lease_token == lease.token and row.lease_owner == lease.owner


def _fence(
    tx: Transaction, outcomes: Sequence[Outcome]
) -> tuple[list[Item | Committed | LeaseLost], dict[int, Conversation]]:
    """Lock the lanes and say which outcomes still may be stored: whoever ends a message ends its lease with it.

    Returns also the conversations that were seen with them.
    """
    keys = sorted({o.work.lease.lane_key for o in outcomes})
    statement = _SEE_LANES if tx.kind == "sqlite" else LOCK_LANES
    rows = tx.connection.execute(statement, {"keys": keys}).all()
    locked = {r.key: r for r in rows}
    seen = {}
    if tx.kind == "sqlite":
        seen = {
            r.id: Conversation(r.id, r.public_id, r.last_seq, r.version) for r in rows if r.id is not None
        }
    held = [holds(locked.get(o.work.lease.lane_key), o.work.lease) for o in outcomes]
    done: Mapping[int, Committed] = {}
    if not all(held):
        done = committed_before(tx, [o for o, is_held in zip(outcomes, held, strict=True) if not is_held])
    items: list[Item | Committed | LeaseLost] = []
    for outcome, is_held in zip(outcomes, held, strict=True):
        if is_held:
            items.append(Item(outcome, locked[outcome.work.lease.lane_key], outcome.end))
        else:
            items.append(done.get(outcome.work.inbox_id) or LeaseLost("the lane has another owner"))
    return items, seen


def _store_messages(
    tx: Transaction, live: list[Item], cache: HistoryCache, keep_turns: int
) -> dict[int, list[int]]:
    """Insert the messages with their numbers, and carry the counters; return the new ids by inbox id."""
    now = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    saved = _already_saved(tx, live)
    rows: list[dict[str, Any]] = []
    updates: list[dict[str, Any]] = []
    for item in live:
        conversation = item.conversation
        if conversation is None or not item.outcome.messages or item.end is End.IGNORED:
            continue
        new = [m for m in item.outcome.messages if (conversation.id, m.save_key) not in saved]
        if not new:
            continue
        item.new_rows = [
            {
                "conversation_id": conversation.id,
                "seq": conversation.last_seq + n,
                "role": m.role,
                "content": m.content,
                "sender_id": m.sender_id,
                "source_id": m.source_id,
                "tokens": m.tokens,
                "metadata_json": m.metadata_json,
                "save_key": m.save_key,
                "timestamp": now,
                "search_terms": search.column_value(tx.kind, m.content),
            }
            for n, m in enumerate(new, start=1)
        ]
        rows += item.new_rows
        if not item.made:
            updates.append(
                {
                    "cid": conversation.id,
                    "added": len(new),
                    "tokens": sum(m.tokens for m in new),
                    "now": now,
                    "new_title": item.outcome.conversation.title if item.outcome.conversation else None,
                }
            )
        tail = [
            history_row(r["role"], r["content"], r["tokens"], r["seq"], r["metadata_json"])
            for r in item.new_rows
        ]
        tx.after_commit.append(
            lambda c=conversation, t=tail: _carry(cache, c, t, turns=keep_turns)  # type: ignore[misc]
        )
    if not rows:
        return {}
    execute_many(tx, _INSERT_MESSAGES, rows)
    search.index_inserted(tx.connection, tx.kind, [row["content"] for row in rows])
    execute_many(tx, _APPEND, sorted(updates, key=lambda u: u["cid"]))
    return _message_ids(tx, live)


def _carry(cache: HistoryCache, conversation: Conversation, tail: list[HistoryRow], *, turns: int) -> None:
    if conversation.last_seq == 0:
        cache.put(conversation.id, conversation.version + 1, tail)
    else:
        cache.append(conversation.id, conversation.version, conversation.version + 1, tail, turns=turns)


def _already_saved(tx: Transaction, live: list[Item]) -> set[tuple[int, str | None]]:
    """Return what an earlier end of a retried message has stored; asked only where that can be."""
    retried = [i for i in live if i.outcome.work.retried and i.conversation is not None]
    keys = [m.save_key for i in retried for m in i.outcome.messages if m.save_key]
    if not keys:
        return set()
    ids = [i.conversation.id for i in retried if i.conversation is not None]
    found = tx.connection.execute(_SAVED, {"ids": ids, "keys": keys}).mappings()
    return {(row["conversation_id"], row["save_key"]) for row in without_cleared(tx, found)}


def _message_ids(tx: Transaction, live: list[Item]) -> dict[int, list[int]]:
    """Return the ids of the messages just stored, for those who asked through a page (they show them)."""
    asked = [
        i for i in live if i.new_rows and i.conversation is not None and i.outcome.work.message.conversation
    ]
    if not asked:
        return {}
    conversation_ids = {i.conversation.id: i for i in asked if i.conversation is not None}
    after = min(i.conversation.last_seq for i in asked if i.conversation is not None)
    found: dict[int, list[int]] = {}
    for row in tx.connection.execute(_MESSAGE_IDS, {"ids": sorted(conversation_ids), "after": after}):
        item = conversation_ids[row.conversation_id]
        if item.conversation is not None and row.seq > item.conversation.last_seq:
            found.setdefault(item.outcome.work.inbox_id, []).append(row.id)
    return {inbox_id: sorted(ids) for inbox_id, ids in found.items()}


def _settle(tx: Transaction, live: list[Item]) -> None:
    calls: dict[tuple[int, int, int], CallUsage] = {}
    for item in live:
        work = item.outcome.work
        for call in item.outcome.calls:
            calls[work.inbox_id, work.run, call.call] = call
    conversation_ids = {
        i.outcome.work.inbox_id: i.conversation.id if i.conversation is not None else None for i in live
    }
    told: dict[WindowKey, int] = {}
    for item in live:
        for window, level in item.outcome.told.items():
            told[window] = max(level, told.get(window, 0))
    # All of them, also those without a planned call: no reservation outlives its message.
    budgets.settle(tx, [i.outcome.work.inbox_id for i in live], calls, conversation_ids, told=told)


def _end(tx: Transaction, live: list[Item], shard: int) -> None:
    ended: dict[tuple[str, str], int] = {}
    rows = []
    for item in live:
        work = item.outcome.work
        reason = item.outcome.reason
        if item.end is not item.outcome.end:
            reason = "the conversation was deleted"
        rows.append(
            {
                "inbox_id": work.inbox_id,
                "new_state": item.end.value,
                "new_reason": reason[:255] if reason else None,
                "now": tx.now_ms,
                "erase": int(item.outcome.erase or item.end is End.IGNORED),
            }
        )
        key = (work.message.account, item.end.value)
        ended[key] = ended.get(key, 0) + 1
    if execute_many(tx, _END, rows) != len(rows):
        # Somebody ended one without ending its lease. Nothing of this list is stored; halving finds it.
        raise LeaseLost("the message has ended")
    count_ends(tx, ended, shard=shard)


def _hand_out(tx: Transaction, live: list[Item]) -> dict[int, PartToSend]:
    """Write the parts, free the lanes, and take the sending of a lane that nobody sends for."""
    rows: list[dict[str, Any]] = []
    frees: list[dict[str, Any]] = []
    for item in live:
        lane, lease = item.lane, item.outcome.work.lease
        parts: tuple[NewPart, ...] = item.outcome.parts if item.end is not End.IGNORED else ()
        new = [_part_row(tx, item, part) for part in parts]
        unsent = [r for r in new if r["state"] == PENDING]
        ready, owner, until, token = lane.send_ready_at, lane.send_owner, lane.send_until, lane.send_token
        if unsent:
            first = unsent[0]
            # A row with a source of its own, or of a message that was answered anew, may exist already.
            own = first["source"] == f"in:{item.outcome.work.inbox_id}"
            certain = own and not item.outcome.work.retried
            if ready is None and token is None and certain:
                first["state"], first["attempts"], first["first_attempt_at"] = ATTEMPTING, 1, tx.now_ms
                first["attempt_token"] = lease.token
                item.first_part = first
                owner, until, token = lease.owner, tx.now_ms + tx.lease_ms, lease.token
            ready = tx.now_ms if ready is None else ready
        rows += new
        frees.append(
            {
                "lane": lane.key,
                "now": tx.now_ms,
                "new_ready": ready,
                "new_owner": owner,
                "new_until": until,
                "new_token": token,
            }
        )
    stored = _store_parts(tx, live, rows)
    execute_many(tx, _FREE_LANE, frees)
    return _parts_to_send(tx, live, stored)


def _store_parts(tx: Transaction, live: list[Item], rows: list[dict[str, Any]]) -> Sequence[AnyRow]:
    """Insert the parts; return those that are handed out, and perhaps others."""
    if not any(item.first_part for item in live):
        execute_many(tx, _insert_parts(tx.kind), rows)
        return ()
    if tx.kind != "mariadb":
        return tx.connection.execute(_insert_parts_returning(tx.kind), rows).all()
    execute_many(tx, _insert_parts(tx.kind), rows)
    return tx.connection.execute(_PARTS, {"sources": sorted({row["source"] for row in rows})}).all()


def _part_row(tx: Transaction, item: Item, part: NewPart) -> dict[str, Any]:
    work = item.outcome.work
    return {
        "source": part.source or f"in:{work.inbox_id}",
        "kind": part.kind,
        "part": part.part,
        "lane_key": work.lease.lane_key,
        "account": work.message.account,
        "conversation_id": item.conversation.id if item.conversation is not None else None,
        "payload": "{}" if part.erase else part.payload,
        "state": SENT if part.sent else PENDING,
        "attempts": 0,
        "attempt_token": None,
        "not_before": 0,
        "reply_before": part.reply_before,
        "first_attempt_at": None,
        "created_at": tx.now_ms,
        "ended_at": tx.now_ms if part.sent else None,
    }


def _parts_to_send(tx: Transaction, live: list[Item], stored: Sequence[AnyRow]) -> dict[int, PartToSend]:
    firsts = {
        (i.first_part["source"], i.first_part["kind"], i.first_part["part"]): i for i in live if i.first_part
    }
    sending: dict[int, PartToSend] = {}
    for row in stored:
        item = firsts.get((row.source, row.kind, row.part))
        if item is None or item.first_part is None:
            continue
        sending[item.outcome.work.inbox_id] = PartToSend(
            lease=item.outcome.work.lease,
            id=row.id,
            source=row.source,
            kind=row.kind,
            part=row.part,
            account=item.first_part["account"],
            payload=item.first_part["payload"],
            attempts=1,
            reply_before=item.first_part["reply_before"],
            first_attempt_at=tx.now_ms,
            unknown_at=None,
        )
    return sending


# --------------------------------------------------------------------------------------- further reservations


def reserve_calls(
    tx: Transaction, requests: Sequence[tuple[Work, int, PlannedCall]]
) -> list[BudgetRefusal | LeaseLost | None]:
    """Reserve further calls (retries, fallbacks, tools) of messages being worked on; fenced like the commit."""
    keys = sorted({work.lease.lane_key for work, _, _ in requests})
    locked: Mapping[str, AnyRow] = {r.key: r for r in tx.connection.execute(LOCK_LANES, {"keys": keys})}
    answers: list[BudgetRefusal | LeaseLost | None] = [
        None
        if holds(locked.get(work.lease.lane_key), work.lease)
        else LeaseLost("the lane has another owner")
        for work, _, _ in requests
    ]
    held = [i for i, answer in enumerate(answers) if answer is None]
    calls = [
        budgets.CallRequest(work.inbox_id, work.run, call, planned, ledger_of(work))
        for work, call, planned in (requests[i] for i in held)
    ]
    for index, reserved in zip(held, budgets.reserve(tx, calls), strict=True):
        answers[index] = reserved.refusal
    return answers
