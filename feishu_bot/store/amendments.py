"""What people take back or change on the platform after they have said it, done to the record too.

As every change to a conversation, it takes the rows of the lanes concerned first, then the conversations', and
raises their version. Counters go on counting what was recalled; budgets are never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, bindparam, case, select, tuple_, update

from feishu_bot.model import End, InboundMessage
from feishu_bot.store import budgets
from feishu_bot.store.conversations import TITLE_LENGTH, lock_lanes, now_of
from feishu_bot.store.inbox import ANY_OPEN, IS_OPEN, count_ends, receive
from feishu_bot.store.quotes import find_quotes
from feishu_bot.store.schema import conversations, inbox, lanes, messages
from feishu_bot.store.threads import edit_message
from feishu_bot.store.work import Arrival, Quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Transaction

AnyRow = Row[*tuple[Any, ...]]

RECALLED = "recalled"

_c, _m = conversations.c, messages.c

_ARRIVED = select(inbox.c.id, inbox.c.account, inbox.c.lane_key, inbox.c.state, inbox.c.payload).where(
    inbox.c.account == bindparam("in_account"), inbox.c.event_key == bindparam("key")
)
_STILL_OPEN = select(
    inbox.c.id, inbox.c.account, inbox.c.lane_key, inbox.c.payload, inbox.c.begun_token
).where(inbox.c.account == bindparam("in_account"), inbox.c.event_key == bindparam("key"), IS_OPEN)
_ANSWERS = select(_m.id, _m.conversation_id, _m.content).where(
    tuple_(_m.conversation_id, _m.save_key).in_(bindparam("keys", expanding=True)), _m.recalled_at.is_(None)
)
_LANES_OF = select(_c.scope_key, _c.public_id).where(_c.id.in_(bindparam("ids", expanding=True)))
_LOCK = (
    select(_c.id, _c.title)
    .where(_c.id.in_(bindparam("ids", expanding=True)), _c.hidden_at.is_(None))
    .order_by(_c.id)
    .with_for_update()
)
_RECALL = (
    update(messages)
    .where(_m.id.in_(bindparam("ids", expanding=True)), _m.recalled_at.is_(None))
    .values(recalled_at=bindparam("now"))
)
_NEW_VERSION = (
    update(conversations)
    .where(_c.id.in_(bindparam("ids", expanding=True)))
    .values(version=_c.version + 1, summary=None, summarized_to=0)  # it may tell of what was recalled
)
_SET_TITLE = update(conversations).where(_c.id == bindparam("cid")).values(title=bindparam("new_title"))
_END = (
    update(inbox)
    .where(inbox.c.id == bindparam("inbox_id"))
    .values(
        state=End.IGNORED.value, reason=RECALLED, payload="{}", begun_token=None, ended_at=bindparam("now")
    )
)
_ANEW = (
    update(inbox)
    .where(inbox.c.id == bindparam("inbox_id"))
    .values(payload=bindparam("new_payload"), begun_token=None, attempts=0)
)
# Only a lease under which this very message is worked on: what it makes of it is no longer wanted.
_END_LEASE = (
    update(lanes)
    .where(lanes.c.key == bindparam("lane"), lanes.c.lease_token == bindparam("token"))
    .values(
        lease_owner=None,
        lease_token=None,
        lease_until=0,
        ready_at=case((ANY_OPEN, bindparam("now")), else_=None),
    )
)


@dataclass(frozen=True, slots=True)
class Amended:
    """What a change has done: stored messages changed, and lane and id of a message that was still open."""

    messages: int
    lane_key: str | None = None
    inbox_id: int | None = None


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored message: enough to change it, and its conversation's title with it."""

    id: int
    conversation_id: int
    content: str


def amend(tx: Transaction, event: InboundMessage, *, shard: int = 0) -> Amended:
    """Do to the record what an event with a ``change`` says of an earlier message. Safe to run twice.

    A message that has not ended is ended as ignored, its text erased, or asked anew with its new text; one that
    is yet to come (the platform repeats what it could not deliver) will not be answered either.
    """
    if event.change is None or event.message_id is None:
        return Amended(0)
    key = {"in_account": event.account, "key": event.target_key}
    arrived = tx.connection.execute(_ARRIVED, key).first() if event.target_key else None
    if arrived is None and event.target_key and event.change == RECALLED:
        lane = f"event:{event.account}"
        known = Arrival(event.account, event.target_key, lane, "{}", End.IGNORED.value, RECALLED)
        receive(tx, [known], shard=shard)
    stored = _stored(tx, event)
    keys = _lanes_of(tx, stored)
    if arrived is not None:
        keys.add(arrived.lane_key)
    lock_lanes(tx, *keys)
    # Behind the locks, as its answer may have been stored while we waited for them.
    still_open = tx.connection.execute(_STILL_OPEN, key).first() if event.target_key else None
    if still_open is not None:
        (_end if event.change == RECALLED else _ask_anew)(tx, still_open, event, shard)
    stored = _stored(tx, event)
    if event.change == RECALLED:
        _recall(tx, stored)
    else:
        _edit(tx, stored, event)
    if still_open is None:
        return Amended(len(stored))
    return Amended(len(stored), still_open.lane_key, still_open.id)


def _stored(tx: Transaction, event: InboundMessage) -> list[_Stored]:
    """Return where the message is stored: with its copies in forks; of the bot's own words, the whole answer."""
    assert event.message_id is not None  # noqa: S101  # the caller has looked
    found = find_quotes(tx, [Quote.of(event, event.message_id)])
    stored: dict[int, _Stored] = {}
    for quoted in found.values():
        for row in quoted.said:
            stored[row.id] = _Stored(row.id, row.conversation_id, row.content)
        if quoted.answer is not None and event.change == RECALLED:
            for row in tx.connection.execute(_ANSWERS, {"keys": [quoted.answer]}):
                stored[row.id] = _Stored(row.id, row.conversation_id, row.content)
    return [stored[message_id] for message_id in sorted(stored)]


def _lanes_of(tx: Transaction, stored: Sequence[_Stored]) -> set[str]:
    ids = sorted({s.conversation_id for s in stored})
    if not ids:
        return set()
    rows = tx.connection.execute(_LANES_OF, {"ids": ids}).all()
    return {key for r in rows for key in (r.scope_key, f"conv:{r.public_id}") if key is not None}


def _end(tx: Transaction, row: AnyRow, _event: InboundMessage, shard: int) -> None:
    tx.connection.execute(_END, {"inbox_id": row.id, "now": tx.now_ms})
    budgets.settle(tx, [row.id], {}, {})
    count_ends(tx, {(row.account, End.IGNORED.value): 1}, shard=shard)
    _end_lease(tx, row)


def _ask_anew(tx: Transaction, row: AnyRow, event: InboundMessage, _shard: int) -> None:
    message = InboundMessage.from_json(row.payload)
    if message.text == event.text:
        return
    edited = replace(message, text=event.text, tokens=event.tokens, unreadable=None)
    tx.connection.execute(_ANEW, {"inbox_id": row.id, "new_payload": edited.to_json()})
    _end_lease(tx, row)


def _end_lease(tx: Transaction, row: AnyRow) -> None:
    if row.begun_token is not None:
        values = {"lane": row.lane_key, "token": row.begun_token, "now": tx.now_ms}
        tx.connection.execute(_END_LEASE, values)


def _recall(tx: Transaction, stored: Sequence[_Stored]) -> None:
    if not stored:
        return
    ids = sorted({s.conversation_id for s in stored})
    locked = {r.id: r for r in tx.connection.execute(_LOCK, {"ids": ids})}
    tx.connection.execute(_RECALL, {"ids": [s.id for s in stored], "now": now_of(tx)})
    tx.connection.execute(_NEW_VERSION, {"ids": ids})
    for message in stored:
        _retitle(tx, locked.get(message.conversation_id), message, None)


def _edit(tx: Transaction, stored: Sequence[_Stored], event: InboundMessage) -> None:
    for message in stored:
        if message.content == event.text:
            continue
        edit_message(tx, message.id, event.text, event.tokens)
        (locked,) = tx.connection.execute(_LOCK, {"ids": [message.conversation_id]})
        _retitle(tx, locked, message, _title_of(event.text))


def _retitle(tx: Transaction, conversation: AnyRow | None, message: _Stored, title: str | None) -> None:
    """Give a conversation that is called after the message another title; None: after the next one."""
    if conversation is not None and conversation.title == _title_of(message.content):
        tx.connection.execute(_SET_TITLE, {"cid": conversation.id, "new_title": title})


def _title_of(content: str) -> str | None:
    return content.strip()[:TITLE_LENGTH] or None
