"""Which conversation an outcome is stored in: the one its work began with, or one made for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache as once
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Insert, Row, bindparam, select

from feishu_bot.model import End
from feishu_bot.store.bulk import execute_many
from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.schema import conversations
from feishu_bot.store.work import CHOICES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from feishu_bot.store.work import Outcome, Transaction

AnyRow = Row[*tuple[Any, ...]]

COLUMNS = (
    conversations.c.id,
    conversations.c.public_id,
    conversations.c.last_seq,
    conversations.c.version,
)
_LOCK_BY_ID = (
    select(*COLUMNS)
    .where(conversations.c.id.in_(bindparam("ids", expanding=True)), conversations.c.hidden_at.is_(None))
    .order_by(conversations.c.id)
    .with_for_update()
)
_LOCK_BY_PUBLIC_ID = (
    select(*COLUMNS, conversations.c.hidden_at)
    .where(conversations.c.public_id.in_(bindparam("keys", expanding=True)))
    .order_by(conversations.c.id)
    .with_for_update()
)
_LOCK_BY_SCOPE = (
    select(*COLUMNS, conversations.c.scope_key, conversations.c.tenant_id)
    .where(conversations.c.scope_key.in_(bindparam("keys", expanding=True)))
    .order_by(conversations.c.id)
    .with_for_update()
)


class Conversation(NamedTuple):
    """A conversation as it was before this commit."""

    id: int
    public_id: str
    last_seq: int
    version: int


@dataclass(slots=True)
class Item:
    """One outcome on its way through the commit."""

    outcome: Outcome
    lane: AnyRow
    end: End
    conversation: Conversation | None = None
    made: bool = False  # the conversation, with its counters, by this commit
    new_rows: list[dict[str, Any]] | None = None
    first_part: dict[str, Any] | None = None


def find_conversations(tx: Transaction, live: list[Item], seen: Mapping[int, Conversation]) -> None:
    """Lock the conversations, make those that are needed and missing; note those that were deleted."""
    known = {i.outcome.work.conversation.id for i in live if i.outcome.work.conversation is not None}
    rows = dict(seen)
    unseen = sorted(known - seen.keys())
    if unseen:
        found = tx.connection.execute(_LOCK_BY_ID, {"ids": unseen})
        rows |= {r.id: Conversation(r.id, r.public_id, r.last_seq, r.version) for r in found}
    to_make: list[Item] = []
    for item in live:
        state = item.outcome.work.conversation
        if state is not None:
            item.conversation = rows.get(state.id)
            if item.conversation is None:
                item.end = End.IGNORED  # deleted while the answer was made: store and send nothing
        elif item.outcome.conversation is not None and (
            item.outcome.messages or item.outcome.change in CHOICES
        ):
            to_make.append(item)
    if to_make:
        _make_conversations(tx, to_make)


def _make_conversations(tx: Transaction, items: list[Item]) -> None:
    """Make what is missing. A conversation that a door named and that is hidden was deleted, not new."""
    named = {i.outcome.work.message.conversation: i for i in items if i.outcome.work.message.conversation}
    if named:
        for row in tx.connection.execute(_LOCK_BY_PUBLIC_ID, {"keys": sorted(named)}):
            item = named[row.public_id]
            if row.hidden_at is not None:
                item.end = End.IGNORED
            else:
                item.conversation = Conversation(row.id, row.public_id, row.last_seq, row.version)
        items = [i for i in items if i.conversation is None and i.end is not End.IGNORED]
    if items:
        _insert_conversations(tx, items)


@once
def _insert_statement(kind: str) -> Insert:
    return insert_ignore(kind, conversations, ("scope_key", "tenant_id"))


@once
def _insert_returning(kind: str) -> Insert:
    return _insert_statement(kind).returning(conversations.c.id, conversations.c.public_id)


def _insert_conversations(tx: Transaction, items: list[Item]) -> None:
    """Make the conversations, their counters right at once; or find those that were made in the meantime."""
    rows = sorted((_conversation_row(tx, i) for i in items), key=lambda r: (r["scope_key"], r["tenant_id"]))
    made: dict[str, int] = {}
    if tx.kind == "mariadb":
        execute_many(tx, _insert_statement(tx.kind), rows)
    else:
        made = {r.public_id: r.id for r in tx.connection.execute(_insert_returning(tx.kind), rows)}
    found: dict[tuple[str, str], AnyRow] = {}
    if len(made) < len(rows):
        # A library in another process may make the same scope's conversation at the same moment: one row wins.
        others = tx.connection.execute(_LOCK_BY_SCOPE, {"keys": sorted({r["scope_key"] for r in rows})})
        found = {(r.tenant_id, r.scope_key): r for r in others}
        own = {r["public_id"] for r in rows}
        made |= {r.public_id: r.id for r in found.values() if r.public_id in own}
    for item in items:
        new = item.outcome.conversation
        assert new is not None  # noqa: S101  # the caller chose these items by it
        if new.public_id in made:
            item.conversation, item.made = Conversation(made[new.public_id], new.public_id, 0, 0), True
        else:
            row = found[item.outcome.work.tenant_id, new.scope_key or ""]
            item.conversation = Conversation(row.id, row.public_id, row.last_seq, row.version)


def _conversation_row(tx: Transaction, item: Item) -> dict[str, Any]:
    now = datetime.fromtimestamp(tx.now_ms / 1000, UTC)
    new = item.outcome.conversation
    assert new is not None  # noqa: S101  # the caller chose these items by it
    said = item.outcome.messages
    return {
        "public_id": new.public_id,
        "scope_key": new.scope_key,
        "tenant_id": item.outcome.work.tenant_id,
        "user_key": new.user_key,
        "platform": new.platform,
        "chat_id": new.chat_id,
        "user_id": new.user_id,
        "agent": new.agent,
        "title": new.title,
        "total_tokens": sum(m.tokens for m in said),
        "message_count": len(said),
        "last_seq": len(said),
        "version": 1,
        "created_at": now,
        "last_activity": now,
    }
