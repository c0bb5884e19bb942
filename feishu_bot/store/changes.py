"""What a chat command does to its conversation, inside the transaction that ends the command."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, func, select, update

from feishu_bot.store import search, threads
from feishu_bot.store.conversations import clear_locked, recount
from feishu_bot.store.schema import NOT_CLEARED, conversations, messages
from feishu_bot.store.work import Change

if TYPE_CHECKING:
    from feishu_bot.store.history import HistoryCache
    from feishu_bot.store.placing import Item
    from feishu_bot.store.work import Transaction

_c = conversations.c
_m = messages.c

_ARCHIVE = (
    update(conversations).where(_c.id == bindparam("cid")).values(scope_key=None, version=_c.version + 1)
)
_RENAME = update(conversations).where(_c.id == bindparam("cid")).values(title=bindparam("new_title"))
_SUMMARIZE = (
    update(conversations)
    .where(_c.id == bindparam("cid"))
    .values(summary=bindparam("new_summary"), summarized_to=bindparam("upto"))
)
_CHOSEN = update(conversations).where(_c.id == bindparam("cid"))
_CHOOSE_AGENT = _CHOSEN.values(agent=bindparam("chosen"), active_persona_id=None, model=None)
_CHOOSE_PERSONA = _CHOSEN.values(active_persona_id=bindparam("chosen"))
_CHOOSE_MODEL = _CHOSEN.values(model=bindparam("chosen"))
_FREE = (
    select(_c.id)
    .where(_c.id == bindparam("cid"), _c.scope_key.is_(None), _c.hidden_at.is_(None))
    .with_for_update()
)
_MAKE_CURRENT = (
    update(conversations)
    .where(_c.id == bindparam("cid"))
    .values(scope_key=bindparam("lane"), version=_c.version + 1, last_activity=bindparam("now"))
)
_TAIL = (
    select(_m.id, _m.content, _m.tokens)
    .join_from(messages, conversations, _c.id == _m.conversation_id)
    .where(_c.id == bindparam("cid"), _m.seq > bindparam("after"), NOT_CLEARED)
)
_LAST_OF = (
    select(func.max(_m.id))
    .join_from(messages, conversations, _c.id == _m.conversation_id)
    .where(_c.id == bindparam("cid"), _m.seq <= bindparam("upto"), _m.recalled_at.is_(None), NOT_CLEARED)
)


def change_conversations(tx: Transaction, live: list[Item], cache: HistoryCache) -> None:
    """Do what commands ask: few, so one by one. What ``detail`` names is looked at again here."""
    for item in live:
        _summarize(tx, item)
        change, detail = item.outcome.change, item.outcome.detail
        if change is None or (item.conversation is None and change is not Change.SWITCH):
            continue
        known = item.conversation.id if item.conversation is not None else None
        if change is Change.SWITCH:
            _switch(tx, item, known, int(detail or 0))
        elif known is not None:
            _change(tx, item, known)
        if known is not None:
            tx.after_commit.append(lambda cid=known: cache.drop(cid))  # type: ignore[misc]


def _summarize(tx: Transaction, item: Item) -> None:
    """Keep a new summary beside the messages, unless these have changed since they were read."""
    summary, read = item.outcome.summary, item.outcome.work.conversation
    if summary is None or read is None or item.conversation is None:
        return
    if item.conversation.version == read.version:
        values = {"cid": item.conversation.id, "new_summary": summary[0], "upto": summary[1]}
        tx.connection.execute(_SUMMARIZE, values)


def _change(tx: Transaction, item: Item, cid: int) -> None:
    change, detail = item.outcome.change, item.outcome.detail
    match change:
        case Change.ARCHIVE:
            tx.connection.execute(_ARCHIVE, {"cid": cid})
        case Change.CLEAR:
            clear_locked(tx, cid)
        case Change.RENAME:
            tx.connection.execute(_RENAME, {"cid": cid, "new_title": str(detail)})
        case Change.AGENT:  # with all that it is
            tx.connection.execute(_CHOOSE_AGENT, {"cid": cid, "chosen": detail})
        case Change.PERSONA:
            tx.connection.execute(_CHOOSE_PERSONA, {"cid": cid, "chosen": detail})
        case Change.MODEL:
            tx.connection.execute(_CHOOSE_MODEL, {"cid": cid, "chosen": detail})
        case Change.CUT:
            _cut(tx, cid, int(detail or 0))
        case Change.FORK:
            _fork(tx, item, cid, int(detail or 0))


def _now(tx: Transaction) -> datetime:
    return datetime.fromtimestamp(tx.now_ms / 1000, UTC)


def _switch(tx: Transaction, item: Item, current: int | None, target: int) -> None:
    """Make an archived conversation the lane's current one, unless it is gone or current elsewhere by now."""
    if tx.connection.execute(_FREE, {"cid": target}).first() is None:
        return
    if current is not None:
        tx.connection.execute(_ARCHIVE, {"cid": current})
    lane = item.outcome.work.lease.lane_key
    tx.connection.execute(_MAKE_CURRENT, {"cid": target, "lane": lane, "now": _now(tx)})


def _cut(tx: Transaction, cid: int, after: int) -> None:
    """Remove what stands behind ``seq`` ``after``."""
    rows = tx.connection.execute(_TAIL, {"cid": cid, "after": after}).mappings().all()
    if not rows:
        return
    search.remove_messages(tx.connection, tx.kind, rows)
    tx.connection.execute(delete(messages).where(_m.id.in_([row["id"] for row in rows])))
    recount(tx, cid, since=after + 1, messages_by=-len(rows), tokens_by=-sum(row["tokens"] for row in rows))


def last_message(tx: Transaction, conversation_id: int, *, upto: int) -> int | None:
    """Return the id of the last message up to a ``seq``, None where a copy that ends there would be empty."""
    found = tx.connection.execute(_LAST_OF, {"cid": conversation_id, "upto": upto}).scalar()
    return None if found is None else int(found)


def _fork(tx: Transaction, item: Item, cid: int, upto: int) -> None:
    """Go on in a copy that ends at ``seq`` ``upto``; the original is archived as it is."""
    last = last_message(tx, cid, upto=upto)
    if last is None:
        return
    copy = threads.fork(tx, cid, last)
    tx.connection.execute(_ARCHIVE, {"cid": cid})
    lane = item.outcome.work.lease.lane_key
    tx.connection.execute(_MAKE_CURRENT, {"cid": copy["id"], "lane": lane, "now": _now(tx)})
