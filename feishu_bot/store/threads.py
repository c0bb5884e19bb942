"""Several conversations of one user key, of which one is current; and changes inside one: fork, edit, delete.

"Thread" means such a conversation; a platform's own thread is something else.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, insert, literal, or_, select, update

from feishu_bot.errors import ConversationNotFound, MessageNotFound
from feishu_bot.store import search
from feishu_bot.store.conversations import (
    MESSAGE_COLUMNS,
    get,
    in_tenant,
    lock,
    lock_lanes,
    new_conversation,
    now_of,
    page,
    recount,
    user_scope,
)
from feishu_bot.store.schema import conversations, messages

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from feishu_bot.store.work import StoredRow, Transaction

_c = conversations.c
_m = messages.c

_ARCHIVE = (
    update(conversations).where(_c.id == bindparam("cid")).values(scope_key=None, version=_c.version + 1)
)
_CURRENT = select(_c.id, _c.platform, _c.chat_id, _c.user_id, _c.traits).where(
    _c.tenant_id == bindparam("in_tenant"), _c.scope_key == bindparam("in_scope")
)
_LOCK_IDS = (
    select(conversations)
    .where(_c.id.in_(bindparam("ids", expanding=True)), _c.hidden_at.is_(None))
    .order_by(_c.id)
    .with_for_update()
)


def _own(user_key: str) -> ColumnElement[bool]:
    """Select a user key's threads: its current one, archived ones, and those of the browser chat.

    Not those that are current in a group or shared by one: they belong there.
    """
    return (_c.user_key == user_key) & or_(
        _c.scope_key.is_(None), _c.scope_key == user_scope(user_key), _c.scope_key.startswith("conv:")
    )


def _insert(tx: Transaction, row: dict[str, Any]) -> int:
    key = tx.connection.execute(insert(conversations), row).inserted_primary_key
    if key is None:
        raise LookupError("a conversation that was made has no id")
    return int(key[0])


def create(
    tx: Transaction,
    user_key: str,
    title: str | None,
    *,
    platform: str | None = None,
    chat_id: str | None = None,
    tenant_id: str = "default",
    user_id: str | None = None,
    traits: str | None = None,
) -> StoredRow:
    """Make a new current conversation of the user key and return it; the one before is archived.

    ``platform`` and ``chat_id`` None are taken from that one, else from the key's first part.
    """
    scope = user_scope(user_key)
    lock_lanes(tx, scope, make=True)
    before = tx.connection.execute(
        _CURRENT.with_for_update(), {"in_tenant": tenant_id, "in_scope": scope}
    ).one_or_none()
    if before is not None:
        tx.connection.execute(_ARCHIVE, {"cid": before.id})
        platform = platform or before.platform
        chat_id = before.chat_id if chat_id is None else chat_id
        user_id = user_id or before.user_id
        traits = traits or before.traits
    new = new_conversation(
        tx,
        user_key,
        platform or user_key.partition(":")[0][:50],
        chat_id,
        tenant_id=tenant_id,
        user_id=user_id,
        traits=traits,
        title=title,
    )
    return get(tx, _insert(tx, new))


def list_threads(
    tx: Transaction, user_key: str | None, *, limit: int, offset: int = 0, tenant_id: str | None = None
) -> list[StoredRow]:
    """Return the user key's conversations (None: everybody's), the one used last first."""
    statement = in_tenant(select(conversations).where(_c.hidden_at.is_(None)), tenant_id)
    if user_key is not None:
        statement = statement.where(_own(user_key))
    ordered = statement.order_by(_c.last_activity.desc(), _c.id.desc()).limit(limit).offset(offset)
    return list(tx.connection.execute(ordered).mappings())


def of_chat(
    tx: Transaction,
    lane: str,
    owner: tuple[str, str | None],
    *,
    tenant_id: str,
    limit: int,
    only: int | None = None,
) -> list[StoredRow]:
    """Return a lane's current conversation and the archived ones of its ``owner``, the one used last first.

    ``owner`` is a user key and, unless None, a chat: what is archived elsewhere is not among them. ``only``: this
    one, if it is.
    """
    user_key, chat_id = owner
    statement = select(conversations).where(
        _c.hidden_at.is_(None),
        _c.tenant_id == tenant_id,
        _c.user_key == user_key,
        or_(_c.scope_key.is_(None), _c.scope_key == lane),
    )
    if chat_id is not None:
        statement = statement.where(_c.chat_id == chat_id)
    if only is not None:
        statement = statement.where(_c.id == only)
    ordered = statement.order_by(_c.last_activity.desc(), _c.id.desc()).limit(limit)
    return list(tx.connection.execute(ordered).mappings())


def switch(
    tx: Transaction, user_key: str, conversation_id: int, *, tenant_id: str | None = None
) -> StoredRow:
    """Make one of the user key's conversations its current one and return it.

    Raises ConversationNotFound, also for somebody else's and for one that belongs to a group.
    """
    target = get(tx, conversation_id, tenant_id=tenant_id)
    scope = user_scope(user_key)
    lock_lanes(tx, scope, f"conv:{target['public_id']}", make=True)
    current = tx.connection.execute(
        _CURRENT, {"in_tenant": target["tenant_id"], "in_scope": scope}
    ).one_or_none()
    ids = {conversation_id} | ({current.id} if current is not None else set())
    locked = {row["id"]: row for row in tx.connection.execute(_LOCK_IDS, {"ids": sorted(ids)}).mappings()}
    row = locked.get(conversation_id)
    if row is None or row["user_key"] != user_key:
        raise ConversationNotFound(conversation_id)
    if row["scope_key"] not in {None, scope} and not row["scope_key"].startswith("conv:"):
        raise ConversationNotFound(conversation_id)
    if current is not None and current.id != conversation_id:
        tx.connection.execute(_ARCHIVE, {"cid": current.id})
    tx.connection.execute(
        update(conversations)
        .where(_c.id == conversation_id)
        .values(scope_key=scope, version=_c.version + 1, last_activity=now_of(tx))
    )
    return get(tx, conversation_id)


def rename(tx: Transaction, conversation_id: int, title: str | None) -> StoredRow:
    """Give the conversation another title and return it. Raises ConversationNotFound."""
    tx.connection.execute(
        update(conversations).where(_c.id == conversation_id, _c.hidden_at.is_(None)).values(title=title)
    )
    return get(tx, conversation_id)


# -------------------------------------------------------------------------------------- inside a conversation


def fork(tx: Transaction, conversation_id: int, message_id: int) -> StoredRow:
    """Copy a conversation up to and with this message, and return the copy, which is current nowhere.

    Nothing that happens to the original changes it: the messages are copied, with their times and speakers.
    Raises ConversationNotFound or MessageNotFound.
    """
    parent = lock(tx, conversation_id)
    last = tx.connection.execute(
        select(_m.seq).where(
            _m.id == message_id, _m.conversation_id == conversation_id, _m.seq > (parent["cleared_seq"] or 0)
        )
    ).scalar_one_or_none()
    if last is None:
        raise MessageNotFound(message_id)
    now = now_of(tx)
    kept = ("tenant_id", "user_key", "platform", "chat_id", "user_id", "agent", "title", "traits")
    fork_id = _insert(
        tx,
        {name: parent[name] for name in (*kept, "active_persona_id", "model")}
        | {
            "public_id": str(uuid.uuid4()),
            "parent_id": conversation_id,
            "forked_at": message_id,
            "created_at": now,
            "last_activity": now,
        },
    )
    copied = [_m.seq, _m.role, _m.content, _m.sender_id, _m.source_id, _m.tokens, _m.metadata_json,
              _m.timestamp, _m.edited_at]  # fmt: skip
    if tx.kind != "sqlite":
        copied.append(_m.search_terms)  # the index itself
    tx.connection.execute(
        insert(messages).from_select(
            ["conversation_id", *[column.name for column in copied]],
            select(literal(fork_id), *copied)
            .where(_m.conversation_id == conversation_id, _m.seq <= last, _m.recalled_at.is_(None))
            .where(_m.seq > (parent["cleared_seq"] or 0))
            .order_by(_m.seq),
        )
    )
    _index_fork(tx, fork_id)
    count, tokens, top = tx.connection.execute(
        select(func.count(), func.sum(_m.tokens), func.max(_m.seq)).where(_m.conversation_id == fork_id)
    ).one()
    tx.connection.execute(
        update(conversations)
        .where(_c.id == fork_id)
        .values(message_count=count, total_tokens=int(tokens or 0), last_seq=top or 0, version=1)
    )
    return get(tx, fork_id)


def _index_fork(tx: Transaction, conversation_id: int) -> None:
    """Put the copies into SQLite's search index, which is a table of its own; a page at a time."""
    after = 0
    while tx.kind == "sqlite" and (rows := page(tx, conversation_id, after=after)):
        search.index_messages(tx.connection, tx.kind, rows)
        after = rows[-1]["seq"]


def _find_message(tx: Transaction, message_id: int) -> StoredRow:
    """Lock the message's conversation, its lane first, and return the message. Raises MessageNotFound."""
    home = tx.connection.execute(select(_m.conversation_id).where(_m.id == message_id)).scalar_one_or_none()
    if home is None:
        raise MessageNotFound(message_id)
    try:
        cleared = lock(tx, home)["cleared_seq"] or 0
    except ConversationNotFound:
        raise MessageNotFound(message_id) from None
    found = select(*MESSAGE_COLUMNS).where(_m.id == message_id, _m.seq > cleared)
    row = tx.connection.execute(found).mappings().one_or_none()
    if row is None:
        raise MessageNotFound(message_id)
    return row


def last_answer(tx: Transaction, conversation_id: int) -> str | None:
    """Return the metadata of the newest answer in a conversation."""
    return tx.connection.execute(
        select(_m.metadata_json)
        .where(_m.conversation_id == conversation_id, _m.role == "assistant", _m.recalled_at.is_(None))
        .order_by(_m.seq.desc())
        .limit(1)
    ).scalar_one_or_none()


def edit_message(tx: Transaction, message_id: int, content: str, tokens: int | None = None) -> StoredRow:
    """Replace a message's text and return it; ``tokens`` None keeps its count. Raises MessageNotFound."""
    before = _find_message(tx, message_id)
    count = before["tokens"] if tokens is None else tokens
    search.remove_messages(tx.connection, tx.kind, [before])
    tx.connection.execute(
        update(messages)
        .where(_m.id == message_id)
        .values(content=content, tokens=count, edited_at=now_of(tx))
    )
    search.index_messages(tx.connection, tx.kind, [{"id": message_id, "content": content}])
    recount(
        tx, before["conversation_id"], since=before["seq"], messages_by=0, tokens_by=count - before["tokens"]
    )
    return tx.connection.execute(select(*MESSAGE_COLUMNS).where(_m.id == message_id)).mappings().one()


def delete_message(tx: Transaction, message_id: int) -> None:
    """Remove one message. Raises MessageNotFound."""
    before = _find_message(tx, message_id)
    search.remove_messages(tx.connection, tx.kind, [before])
    tx.connection.execute(delete(messages).where(_m.id == message_id))
    recount(tx, before["conversation_id"], since=before["seq"], messages_by=-1, tokens_by=-before["tokens"])
