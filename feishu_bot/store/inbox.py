"""The first half of a message's way: recorded (step 2), claimed and begun (steps 4 and 5).

Lists in, lists out: a fixed number of statements whatever the length. Every function can be run twice.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache as once
from typing import TYPE_CHECKING, Any

from sqlalchemy import Insert, Row, bindparam, case, func, insert, literal_column, or_, select, tuple_, update

from feishu_bot.model import End, InboundMessage
from feishu_bot.store import budgets
from feishu_bot.store.bulk import execute_many
from feishu_bot.store.engine import insert_add, insert_fill, insert_ignore
from feishu_bot.store.history import HistoryCache, load_tails
from feishu_bot.store.quotes import find_quotes
from feishu_bot.store.schema import OPEN, conversations, inbox, lanes, totals
from feishu_bot.store.work import Arrival, ConversationState, Lease, NoWork, Quote, Recorded, Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from feishu_bot.store.work import HistoryRow, Planner, Transaction

log = logging.getLogger(__name__)

AnyRow = Row[*tuple[Any, ...]]

MAX_QUOTE = 2000  # characters of a message that is replied to, as the model gets to see it
RETRIED = "retried"  # reason of a row that a person asked to have answered anew

_KNOWN = select(inbox.c.account, inbox.c.event_key).where(
    tuple_(inbox.c.account, inbox.c.event_key).in_(bindparam("keys", expanding=True))
)
_INSERT_INBOX = insert(inbox)


def receive(tx: Transaction, arrivals: Sequence[Arrival], *, shard: int = 0) -> list[Recorded]:
    """Record events; one that is known already is a repeat and changes nothing.

    The lanes are touched first, in sorted order: whoever releases a lane holds its row, so an event can not slip
    in unseen between "nothing left" and "released", and two copies of one event wait for each other here.
    """
    given, arrivals = arrivals, _with_replies(tx, arrivals)
    waiting = sorted({a.lane_key for a in arrivals if a.state == OPEN})
    if waiting:
        execute_many(
            tx,
            insert_fill(tx.kind, lanes, ("key",), ("ready_at",)),
            [{"key": key, "ready_at": tx.now_ms} for key in waiting],
        )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for arrival in arrivals:
        rows.setdefault((arrival.account, arrival.event_key), _row_of(tx, arrival))
    new = _insert_new(tx, rows)
    ended: dict[tuple[str, str], int] = {}
    results: list[Recorded] = []
    for arrival, as_given in zip(arrivals, given, strict=True):
        key = (arrival.account, arrival.event_key)
        if key not in new:
            results.append(Recorded.REPEAT)
            continue
        new.discard(key)
        results.append(Recorded.NEW if arrival is as_given else Recorded.TO_BOT)
        if arrival.state != OPEN:
            end = (arrival.account, arrival.state)
            ended[end] = ended.get(end, 0) + 1
    count_ends(tx, ended, shard=shard)
    return results


def _with_replies(tx: Transaction, arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
    """Return the arrivals, those that reply to the bot as what they are then."""
    replies = [arrival.reply.to for arrival in arrivals if arrival.reply is not None]
    if not replies:
        return arrivals
    found = find_quotes(tx, replies)
    return [
        a.reply.to_bot if a.reply is not None and a.reply.to in found and found[a.reply.to].by_bot else a
        for a in arrivals
    ]


def _row_of(tx: Transaction, arrival: Arrival) -> dict[str, Any]:
    return {
        "account": arrival.account,
        "event_key": arrival.event_key,
        "lane_key": arrival.lane_key,
        "payload": arrival.payload,
        "state": arrival.state,
        "reason": arrival.reason,
        "attempts": 0,
        "runs": 0,
        "reply_before": arrival.reply_before,
        "received_at": tx.now_ms,
        "ended_at": None if arrival.state == OPEN else tx.now_ms,
    }


@once
def _insert_statement(kind: str) -> Insert:
    return insert_ignore(kind, inbox, ("account", "event_key")).returning(inbox.c.account, inbox.c.event_key)


def _insert_new(tx: Transaction, rows: dict[tuple[str, str], dict[str, Any]]) -> set[tuple[str, str]]:
    """Insert the events that are not known, and return their keys."""
    if not rows:
        return set()
    if tx.kind != "mariadb":
        inserted = tx.connection.execute(_insert_statement(tx.kind), list(rows.values()))
        return {(r.account, r.event_key) for r in inserted}
    # MariaDB does not tell an inserted row from one that was there. The lanes' locks keep another copy away; where
    # there is none (two copies of an ignored event), the unique key does, and this is run again.
    known = {(r.account, r.event_key) for r in tx.connection.execute(_KNOWN, {"keys": list(rows)})}
    new = {key: row for key, row in rows.items() if key not in known}
    if new:
        tx.connection.execute(_INSERT_INBOX, list(new.values()))
    return set(new)


def count_ends(tx: Transaction, ended: Mapping[tuple[str, str], int], *, shard: int) -> None:
    """Add to the day's totals, in the transaction that ends (or removes) the rows."""
    if ended:
        day = datetime.fromtimestamp(tx.now_ms / 1000, UTC).date().isoformat()
        execute_many(
            tx,
            insert_add(tx.kind, totals, ("day", "account", "end", "shard"), ("count",)),
            [
                {"day": day, "account": account, "end": end, "shard": shard, "count": count}
                for (account, end), count in sorted(ended.items())
            ],
        )


# ---------------------------------------------------------------------------------------------------- begin

# Written out, not bound: a plan made once for all values could not use an index on open rows.
IS_OPEN = inbox.c.state == literal_column(f"'{OPEN}'")
_open_rows = (inbox.c.lane_key == lanes.c.key) & IS_OPEN
HEAD_OF_LANE = select(func.min(inbox.c.id)).where(_open_rows).correlate(lanes).scalar_subquery()
_TAIL_OF_LANE = select(func.max(inbox.c.id)).where(_open_rows).correlate(lanes).scalar_subquery()

ANY_OPEN = select(inbox.c.id).where(_open_rows).correlate(lanes).exists()

# A lane may be taken when nobody holds it, its lease has ended, or the taker holds it already (a re-run).
_FREE = or_(
    lanes.c.lease_token.is_(None),
    lanes.c.lease_until < bindparam("now"),
    (lanes.c.lease_token == bindparam("token")) & (lanes.c.lease_owner == bindparam("owner")),
)
_FREE_KEYS = (
    select(lanes.c.key)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)), _FREE)
    .order_by(lanes.c.key)
    .with_for_update(skip_locked=True)
)
_TAKE_VALUES: dict[str, Any] = {
    "lease_owner": bindparam("owner"),
    "lease_token": bindparam("token"),
    "lease_until": bindparam("until"),
}
_TAKE_RETURNING = (
    update(lanes)
    .where(lanes.c.key.in_(_FREE_KEYS.scalar_subquery()))
    .values(_TAKE_VALUES)
    .returning(lanes.c.key, HEAD_OF_LANE.label("head"), _TAIL_OF_LANE.label("tail"))
)
_TAKE = update(lanes).where(lanes.c.key.in_(bindparam("taken", expanding=True))).values(_TAKE_VALUES)
_HEADS = select(lanes.c.key, HEAD_OF_LANE.label("head"), _TAIL_OF_LANE.label("tail")).where(
    lanes.c.key.in_(bindparam("taken", expanding=True))
)

_ROW = (
    inbox.c.id,
    inbox.c.account,
    inbox.c.lane_key,
    inbox.c.payload,
    inbox.c.reason,
    inbox.c.attempts,
    inbox.c.runs,
    inbox.c.received_at,
)
_STILL_OPEN = inbox.c.id.in_(bindparam("ids", expanding=True)) & IS_OPEN
# Run a second time under the same lease, it counts nothing.
_COUNT_ATTEMPT = (
    update(inbox)
    .where(_STILL_OPEN)
    .values(
        attempts=inbox.c.attempts + case((inbox.c.begun_token == bindparam("token"), 0), else_=1),
        runs=inbox.c.runs + case((inbox.c.begun_token == bindparam("token"), 0), else_=1),
        begun_token=bindparam("token"),
    )
)
_COUNT_ATTEMPT_RETURNING = _COUNT_ATTEMPT.returning(*_ROW)
_SELECT_ROWS = select(*_ROW).where(_STILL_OPEN)
# The token goes too: a second run counts the attempt again before it takes it back again.
_UNCOUNT_ATTEMPT = (
    update(inbox)
    .where(inbox.c.id.in_(bindparam("ids", expanding=True)), inbox.c.begun_token == bindparam("token"))
    .values(attempts=inbox.c.attempts - 1, runs=inbox.c.runs - 1, begun_token=None)
)
_BURY = (
    update(inbox)
    .where(inbox.c.id.in_(bindparam("ids", expanding=True)))
    .values(state=End.DEAD.value, reason="the stored event cannot be read", ended_at=bindparam("now"))
)
_CONVERSATION = (
    conversations.c.id,
    conversations.c.public_id,
    conversations.c.tenant_id,
    conversations.c.user_key,
    conversations.c.agent,
    conversations.c.title,
    conversations.c.summary,
    conversations.c.message_count,
    conversations.c.total_tokens,
    conversations.c.last_seq,
    conversations.c.version,
    conversations.c.active_persona_id,
    conversations.c.model,
    conversations.c.summarized_to,
)
_BY_SCOPE = select(conversations.c.scope_key, *_CONVERSATION).where(
    conversations.c.scope_key.in_(bindparam("keys", expanding=True)), conversations.c.hidden_at.is_(None)
)
_BY_PUBLIC_ID = select(conversations.c.public_id, *_CONVERSATION).where(
    conversations.c.public_id.in_(bindparam("keys", expanding=True)), conversations.c.hidden_at.is_(None)
)
_RELEASE = (
    update(lanes)
    .where(
        lanes.c.key.in_(bindparam("keys", expanding=True)),
        lanes.c.lease_token == bindparam("token"),
        lanes.c.lease_owner == bindparam("owner"),
    )
    .values(
        lease_owner=None,
        lease_token=None,
        lease_until=0,
        ready_at=case((ANY_OPEN, bindparam("ready")), else_=None),
    )
)


def begin(
    tx: Transaction,
    leases: Sequence[Lease],
    *,
    planner: Planner,
    cache: HistoryCache,
    shard: int = 0,
    again: bool = False,
) -> list[Work | NoWork]:
    """Take each lane if it is free, count an attempt of its oldest open message and reserve its first call.

    All leases of one list have the same owner and token. A message that cannot be read ends dead. ``again``: these
    leases were asked for before, and nobody heard what became of that.
    """
    if not leases:
        return []
    if again and not tx.rerun:
        tx = replace(tx, rerun=True)  # for this function alone; what is to be done after the commit is shared
    heads = _take_lanes(tx, leases)
    rows = _count_attempts(tx, [head for head, _ in heads.values() if head is not None], leases[0].token)
    messages = _with_quotes(tx, _read_messages(tx, rows, shard))
    states = _conversations(tx, rows, messages, planner)
    tails = load_tails(tx, states.values(), turns=planner.history_turns, cache=cache)
    crashed = [row.id for row in rows.values() if row.runs > 1]
    if crashed:  # the calls of an attempt that died: nobody knows if they were billed
        budgets.book_crashed(tx, crashed, {rows[k].id: s.id for k, s in states.items()})

    results: list[Work | NoWork] = []
    requests: list[tuple[int, budgets.CallRequest]] = []
    idle: list[str] = []
    waiting: dict[str, tuple[int, int]] = {}
    for lease in leases:
        lane = lease.lane_key
        row = rows.get(lane)
        if row is None:
            found = heads.get(lane)
            results.append(
                NoWork.BUSY if found is None else NoWork.IDLE if found[0] is None else NoWork.AGAIN
            )
            if found is not None:
                idle.append(lane)
            continue
        state = states.get(lane)
        tail: Sequence[HistoryRow] = tails[state.id] if state is not None else ()
        planned = planner.plan(
            messages[lane],
            state,
            tail,
            attempt=row.attempts,
            received_at=row.received_at,
            now_ms=tx.now_ms,
        )
        if planned.wait_ms is not None:
            waiting[lane] = (row.id, planned.wait_ms)
            results.append(NoWork.WAIT)
            continue
        tail_id = heads[lane][1]
        work = Work(
            lease=lease,
            inbox_id=row.id,
            attempt=row.attempts,
            run=row.runs,
            retried=row.reason == RETRIED,
            received_at=row.received_at,
            message=messages[lane],
            tenant_id=planner.tenant(messages[lane].account),
            conversation=state,
            history=tail,
            planned=planned,
            refusal=None,
            more=tail_id is not None and tail_id > row.id,
        )
        if planned.call is not None:
            ledger = ledger_of(work)
            requests.append((len(results), budgets.CallRequest(row.id, row.runs, 0, planned.call, ledger)))
        results.append(work)
    _reserve_first_calls(tx, requests, results, planner)
    _let_go(tx, leases[0], idle, waiting)
    return results


def ledger_of(work: Work) -> dict[str, Any]:
    """Return the columns of the ledger that say whose call it is."""
    message = work.message
    return {
        "user_key": message.user_key,
        "user_id": message.person,
        "chat_id": message.chat_id or None,
        "platform": message.account,
        "tenant_id": work.tenant_id,
    }


def _reserve_first_calls(
    tx: Transaction,
    requests: list[tuple[int, budgets.CallRequest]],
    results: list[Work | NoWork],
    planner: Planner,
) -> None:
    """Reserve the calls; where a budget wants another model then, that one's call instead."""
    while requests:
        again: list[tuple[int, budgets.CallRequest]] = []
        reserved = budgets.reserve(tx, [request for _, request in requests])
        for (index, request), answer in zip(requests, reserved, strict=True):
            work = results[index]
            if not isinstance(work, Work) or answer is budgets.RESERVED:
                continue
            model, budget = answer.model, ""
            if answer.refusal is not None:
                model, budget = answer.refusal.degrade_to, answer.refusal.budget
            if model is None:
                results[index] = replace(work, refusal=answer.refusal, standings=answer.standings)
                continue
            planned = planner.degrade(
                work.planned, work.history, model=model, budget=budget, now_ms=tx.now_ms
            )
            results[index] = replace(work, planned=planned, standings=answer.standings)
            if answer.refusal is not None and planned.call is not None:
                again.append((index, request._replace(planned=planned.call)))
        requests = again


def _take_lanes(tx: Transaction, leases: Sequence[Lease]) -> dict[str, tuple[int | None, int | None]]:
    """Take what is free and return, by lane, its oldest and newest open message."""
    first = leases[0]
    parameters: dict[str, Any] = {
        "keys": sorted({lease.lane_key for lease in leases}),
        "owner": first.owner,
        "token": first.token,
        "now": tx.now_ms,
        "until": tx.now_ms + tx.lease_ms,
    }
    if tx.kind != "mariadb":
        return {r.key: (r.head, r.tail) for r in tx.connection.execute(_TAKE_RETURNING, parameters)}
    free = list(tx.connection.execute(_FREE_KEYS, parameters).scalars())
    if not free:
        return {}
    tx.connection.execute(_TAKE, {**parameters, "taken": free})
    return {r.key: (r.head, r.tail) for r in tx.connection.execute(_HEADS, {"taken": free})}


def _count_attempts(tx: Transaction, heads: list[int], token: str) -> dict[str, AnyRow]:
    """Count an attempt of each message that is still open; return the rows by lane."""
    if not heads:
        return {}
    if tx.kind != "mariadb":
        rows = tx.connection.execute(_COUNT_ATTEMPT_RETURNING, {"ids": heads, "token": token})
    else:
        tx.connection.execute(_COUNT_ATTEMPT, {"ids": heads, "token": token})
        rows = tx.connection.execute(_SELECT_ROWS, {"ids": heads})
    return {row.lane_key: row for row in rows}


def _read_messages(tx: Transaction, rows: dict[str, AnyRow], shard: int) -> dict[str, InboundMessage]:
    """Return the message of each row; those that nobody can read are ended, and taken out of ``rows``."""
    messages: dict[str, InboundMessage] = {}
    for lane, row in rows.items():
        try:
            messages[lane] = InboundMessage.from_json(row.payload)
        except (ValueError, TypeError, AttributeError):
            log.exception("stored event cannot be read", extra={"inbox": row.id, "account": row.account})
    lost = [rows.pop(lane) for lane in list(rows) if lane not in messages]
    if lost:
        ids = [row.id for row in lost]
        tx.connection.execute(_BURY, {"ids": ids, "now": tx.now_ms})
        budgets.settle(tx, ids, {}, {})
        ended: dict[tuple[str, str], int] = {}
        for row in lost:
            key = (row.account, End.DEAD.value)
            ended[key] = ended.get(key, 0) + 1
        count_ends(tx, ended, shard=shard)
    return messages


def _with_quotes(tx: Transaction, messages: dict[str, InboundMessage]) -> dict[str, InboundMessage]:
    """Return the messages, those that reply to another with its words if they are known in the same chat."""
    asked = {
        lane: Quote.of(m, m.reply_to) for lane, m in messages.items() if m.reply_to and m.kind == "message"
    }
    if not asked:
        return messages
    found = find_quotes(tx, asked.values())
    for lane, quote in asked.items():
        quoted = found.get(quote)
        if quoted is not None:
            by_bot = messages[lane].quotes_bot or quoted.by_bot
            messages[lane] = replace(messages[lane], quoted=quoted.text[:MAX_QUOTE], quotes_bot=by_bot)
    return messages


def _conversations(
    tx: Transaction, rows: Mapping[str, AnyRow], messages: Mapping[str, InboundMessage], planner: Planner
) -> dict[str, ConversationState]:
    """Return the conversation of each lane that has one: the current one of its scope, or the one it names."""
    named = {m.conversation: lane for lane, m in messages.items() if m.conversation is not None}
    scoped = [lane for lane, m in messages.items() if m.conversation is None]
    states: dict[str, ConversationState] = {}
    if scoped:
        for row in tx.connection.execute(_BY_SCOPE, {"keys": scoped}):
            if row.tenant_id == planner.tenant(messages[row.scope_key].account):
                states[row.scope_key] = ConversationState(*tuple(row)[1:])
    if named:
        for row in tx.connection.execute(_BY_PUBLIC_ID, {"keys": list(named)}):
            states[named[row.public_id]] = ConversationState(*tuple(row)[1:])
    return {lane: states[lane] for lane in rows if lane in states}


def _let_go(tx: Transaction, lease: Lease, idle: list[str], waiting: dict[str, tuple[int, int]]) -> None:
    """Release lanes without work; those that wait become ready again at their instant."""
    holder = {"owner": lease.owner, "token": lease.token}
    if idle:
        # A statement of its own: it sees what was committed after the lanes were read.
        tx.connection.execute(_RELEASE, {"keys": idle, "ready": tx.now_ms, **holder})
    for instant in {at for _, at in waiting.values()}:
        keys = [lane for lane, (_, at) in waiting.items() if at == instant]
        tx.connection.execute(_RELEASE, {"keys": keys, "ready": instant, **holder})
    if waiting:
        ids = [i for i, _ in waiting.values()]
        tx.connection.execute(_UNCOUNT_ATTEMPT, {"ids": ids, "token": lease.token})
