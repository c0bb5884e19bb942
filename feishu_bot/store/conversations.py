"""Conversations: made, found, written to, read, cleared and removed. For the library and for pages.

A change takes the lane's row first and the conversation's next, as the way of a message does, and raises the
conversation's version: a cached history of another version is not used.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Integer, bindparam, case, delete, func, insert, select, update

from feishu_bot.errors import ConversationNotFound
from feishu_bot.store import search
from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.prepared import Prepared
from feishu_bot.store.schema import NOT_CLEARED, conversations, lanes, messages
from feishu_bot.store.terms import terms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy import Select

    from feishu_bot.store.work import NewMessage, StoredRow, Transaction

PIECE = 500  # rows removed by one transaction, so that no writer waits noticeably
TITLE_LENGTH = 50  # of a title that nobody chose
PAGE = 500  # messages read at once by ``page``

_c = conversations.c
_COLUMNS = tuple(conversations.c)
_SEEN = _c.hidden_at.is_(None)

# Of a message, what is said and known about it; not what the search index reads.
MESSAGE_COLUMNS = tuple([column for column in messages.c if column.name != "search_terms"])
_NEW = (
    "conversation_id", "seq", "role", "content", "sender_id", "source_id", "tokens", "metadata_json", "save_key",
    "timestamp", "search_terms",
)  # fmt: skip


def now_of(tx: Transaction) -> datetime:
    """Return the transaction's instant."""
    return datetime.fromtimestamp(tx.now_ms / 1000, UTC)


def user_scope(user_key: str) -> str:
    """Return the scope key of a user key's own conversation, the seed's literal rule."""
    return "user:" + user_key


# ---------------------------------------------------------------------------------------------- made and found

_TOUCH = (
    update(conversations)
    .where(_c.tenant_id == bindparam("in_tenant"), _c.scope_key == bindparam("in_scope"))
    .values(
        platform=bindparam("new_platform"),
        chat_id=func.coalesce(bindparam("new_chat"), _c.chat_id),
        user_id=func.coalesce(bindparam("new_user"), _c.user_id),
        traits=func.coalesce(bindparam("new_traits"), _c.traits),
        last_activity=bindparam("now"),
    )
)
_TOUCH_RETURNING = _TOUCH.returning(*_COLUMNS)
_BY_SCOPE = select(*_COLUMNS).where(
    _c.tenant_id == bindparam("in_tenant"), _c.scope_key == bindparam("in_scope")
)
_BY_ID = select(*_COLUMNS).where(_c.id == bindparam("cid"), _SEEN)
_BY_USER = (
    select(*_COLUMNS)
    .where(_c.user_key == bindparam("key"), _SEEN)
    .order_by(_c.last_activity.desc(), _c.id.desc())
    .limit(1)
)


def get_or_create(
    tx: Transaction,
    user_key: str,
    platform: str,
    chat_id: str | None = None,
    *,
    tenant_id: str = "default",
    user_id: str | None = None,
    traits: str | None = None,
) -> StoredRow:
    """Return the current conversation of a user key, touched; it is made where there is none.

    What is None leaves what is stored. Racing calls return the same row.
    """
    values = {
        "in_tenant": tenant_id,
        "in_scope": user_scope(user_key),
        "new_platform": platform,
        "new_chat": chat_id,
        "new_user": user_id,
        "new_traits": traits,
        "now": now_of(tx),
    }
    row = _touch(tx, values)
    if row is None:
        new = new_conversation(
            tx, user_key, platform, chat_id, tenant_id=tenant_id, user_id=user_id, traits=traits
        )
        tx.connection.execute(insert_ignore(tx.kind, conversations, ("tenant_id", "scope_key")), new)
        row = _touch(tx, values)
        if row is None:
            raise LookupError("a conversation that was made is not there")
    return row


def _touch(tx: Transaction, values: Mapping[str, Any]) -> StoredRow | None:
    if tx.kind != "mariadb":
        return tx.connection.execute(_TOUCH_RETURNING, values).mappings().one_or_none()
    if not tx.connection.execute(_TOUCH, values).rowcount:
        return None
    return tx.connection.execute(_BY_SCOPE, values).mappings().one_or_none()


def new_conversation(
    tx: Transaction,
    user_key: str,
    platform: str,
    chat_id: str | None = None,
    *,
    tenant_id: str = "default",
    user_id: str | None = None,
    traits: str | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Return the row of a new current conversation of a user key, for an insert."""
    now = now_of(tx)
    return {
        "public_id": str(uuid.uuid4()),
        "scope_key": user_scope(user_key),
        "tenant_id": tenant_id,
        "user_key": user_key,
        "platform": platform,
        "chat_id": chat_id,
        "user_id": user_id,
        "title": title,
        "traits": traits,
        "created_at": now,
        "last_activity": now,
    }


def get(tx: Transaction, conversation_id: int, *, tenant_id: str | None = None) -> StoredRow:
    """Return a conversation. Raises ConversationNotFound."""
    row = tx.connection.execute(_BY_ID, {"cid": conversation_id}).mappings().one_or_none()
    if row is None or tenant_id not in {None, row["tenant_id"]}:
        raise ConversationNotFound(conversation_id)
    return row


def get_by_user(tx: Transaction, user_key: str, *, tenant_id: str | None = None) -> StoredRow | None:
    """Return the conversation of a user key that was used last, of any scope, archived or not."""
    statement = in_tenant(_BY_USER, tenant_id)
    return tx.connection.execute(statement, {"key": user_key}).mappings().one_or_none()


def get_by_public_id(tx: Transaction, public_id: str, *, tenant_id: str | None = None) -> StoredRow | None:
    """Return the conversation with this public id, or None."""
    statement = in_tenant(select(*_COLUMNS).where(_c.public_id == public_id, _SEEN), tenant_id)
    return tx.connection.execute(statement).mappings().one_or_none()


def in_tenant(statement: Select[Any], tenant_id: str | None) -> Select[Any]:
    """Return the statement for one tenant only, or for all."""
    return statement if tenant_id is None else statement.where(_c.tenant_id == tenant_id)


# ----------------------------------------------------------------------------------------------------- locking

_FIND_LANES = select(_c.scope_key, _c.public_id).where(_c.id == bindparam("cid"), _SEEN)
_LOCK_LANES = (
    select(lanes.c.key)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)))
    .order_by(lanes.c.key)
    .with_for_update()
)
_LOCK = _BY_ID.with_for_update()


def lock_lanes(tx: Transaction, *keys: str, make: bool = False) -> None:
    """Lock the rows of these lanes, so that no message of theirs ends meanwhile. SQLite has one writer anyway.

    ``make``: lanes without a row get one, so that this also keeps two callers apart.
    """
    if tx.kind == "sqlite":
        return
    if make:
        tx.connection.execute(insert_ignore(tx.kind, lanes, ("key",)), [{"key": key} for key in sorted(keys)])
    tx.connection.execute(_LOCK_LANES, {"keys": sorted(keys)}).all()


def lock(tx: Transaction, conversation_id: int) -> StoredRow:
    """Lock a conversation for a change, its lane first, and return it. Raises ConversationNotFound."""
    if tx.kind != "sqlite":
        found = tx.connection.execute(_FIND_LANES, {"cid": conversation_id}).one_or_none()
        if found is not None:
            keys = {f"conv:{found.public_id}", found.scope_key or f"conv:{found.public_id}"}
            lock_lanes(tx, *keys)
    row = tx.connection.execute(_LOCK, {"cid": conversation_id}).mappings().one_or_none()
    if row is None:
        raise ConversationNotFound(conversation_id)
    return row


# ---------------------------------------------------------------------------------------------------- messages

_APPEND = (
    update(conversations)
    .where(_c.id == bindparam("cid"), _SEEN)
    .values(
        last_seq=_c.last_seq + bindparam("added"),
        message_count=_c.message_count + bindparam("added"),
        total_tokens=_c.total_tokens + bindparam("new_tokens"),
        version=_c.version + 1,
        last_activity=bindparam("now"),
        title=func.coalesce(_c.title, bindparam("new_title")),
    )
)
_APPEND_RETURNING = Prepared(_APPEND.returning(_c.last_seq, _c.user_key))
_APPEND_ONLY = Prepared(_APPEND)
_APPENDED = Prepared(
    select(_c.last_seq, _c.user_key).where(_c.id == bindparam("cid"), _SEEN).with_for_update()
)
_INSERT = insert(messages)
_INSERT_ONE = Prepared(
    insert(messages).values({name: bindparam(name) for name in _NEW}).returning(messages.c.id)
)
_INDEX = Prepared(search.ADD)
_NEW_IDS = select(messages.c.id, messages.c.seq).where(
    messages.c.conversation_id == bindparam("cid"), messages.c.seq > bindparam("after")
)
_SAVED = (
    select(*MESSAGE_COLUMNS, NOT_CLEARED.label("present"))
    .join_from(messages, conversations, _c.id == messages.c.conversation_id)
    .where(
        messages.c.conversation_id == bindparam("cid"),
        messages.c.save_key.in_(bindparam("keys", expanding=True)),
    )
)


def append(tx: Transaction, conversation_id: int, new: Sequence[NewMessage]) -> list[StoredRow]:
    """Store messages at the conversation's end and return their rows, in the order given.

    One whose save key the conversation has already is not stored again; its stored row is returned. A user
    message without a speaker is the conversation's own user's. Raises ConversationNotFound.
    """
    if not new:
        get(tx, conversation_id)
        return []
    keys = [m.save_key for m in new if m.save_key is not None]
    known: dict[str, StoredRow] = {}
    if keys:
        if tx.kind != "sqlite":  # whoever saves the same key now comes before or after us
            tx.connection.execute(_LOCK, {"cid": conversation_id}).all()
        found = tx.connection.execute(_SAVED, {"cid": conversation_id, "keys": keys}).mappings()
        known = {row["save_key"]: row for row in without_cleared(tx, found)}
    fresh: dict[str | int, NewMessage] = {}
    for index, message in enumerate(new):
        if message.save_key not in known:
            fresh.setdefault(message.save_key or index, message)
    rows = _append_fresh(tx, conversation_id, list(fresh.values()))
    if not keys:
        return rows
    if not fresh:
        get(tx, conversation_id)
    known |= {row["save_key"]: row for row in rows if row["save_key"] is not None}
    others = iter([row for row in rows if row["save_key"] is None])
    return [next(others) if m.save_key is None else known[m.save_key] for m in new]


def without_cleared(tx: Transaction, found: Iterable[StoredRow]) -> list[StoredRow]:
    """Return the messages of ``found`` that are ``present``; the others were cleared, and go now: keys are unique."""
    rows = [dict(row) for row in found]
    cleared = [row for row in rows if not row.pop("present")]
    _remove(tx, cleared)
    return [row for row in rows if row not in cleared] if cleared else list(rows)


def _append_fresh(tx: Transaction, conversation_id: int, new: Sequence[NewMessage]) -> list[StoredRow]:
    if not new:
        return []
    now = now_of(tx)
    title = next((m.content.strip()[:TITLE_LENGTH] for m in new if m.role == "user"), None)
    values = {
        "cid": conversation_id,
        "added": len(new),
        "new_tokens": sum([m.tokens for m in new]),
        "now": now,
        "new_title": title or None,
    }
    if tx.kind == "mariadb":
        place = _APPENDED.rows(tx.connection, {"cid": conversation_id})
        if place:
            _APPEND_ONLY.rows(tx.connection, values)
            place = [(place[0][0] + len(new), place[0][1])]
    else:
        place = _APPEND_RETURNING.rows(tx.connection, values)
    if not place:
        raise ConversationNotFound(conversation_id)
    ((last_seq, user_key),) = place
    before = last_seq - len(new)
    rows: list[dict[str, Any]] = [
        {
            "conversation_id": conversation_id,
            "seq": seq,
            "role": m.role,
            "content": m.content,
            "sender_id": m.sender_id or (user_key if m.role == "user" else None),
            "source_id": m.source_id,
            "tokens": m.tokens,
            "metadata_json": m.metadata_json,
            "save_key": m.save_key,
            "timestamp": now,
            "search_terms": search.column_value(tx.kind, m.content),
        }
        for seq, m in enumerate(new, before + 1)
    ]
    if len(rows) == 1:
        ((rows[0]["id"],),) = _INSERT_ONE.rows(tx.connection, rows[0])
    else:
        tx.connection.execute(_INSERT, rows)
        found = tx.connection.execute(_NEW_IDS, {"cid": conversation_id, "after": before}).all()
        ids = {seq: number for number, seq in found}
        for row in rows:
            row["id"] = ids[row["seq"]]
    for row in rows:
        if tx.kind == "sqlite":
            _INDEX.rows(tx.connection, {"id": row["id"], "terms": " ".join(terms(row["content"]))})
        row["edited_at"] = row["recalled_at"] = None
        del row["search_terms"]
    return list(rows)


# ----------------------------------------------------------------------------------------------------- history

_IN_CONVERSATION = (
    messages.c.conversation_id == bindparam("cid"),
    # Of a conversation that is not to be seen this is null, and no number is greater.
    messages.c.seq
    > select(func.coalesce(_c.cleared_seq, 0)).where(_c.id == bindparam("cid"), _SEEN).scalar_subquery(),
)
_NEWEST = Prepared(
    select(messages.c.seq, messages.c.role, messages.c.content, messages.c.tokens, messages.c.timestamp)
    .where(*_IN_CONVERSATION, messages.c.seq < bindparam("before"), messages.c.recalled_at.is_(None))
    .order_by(messages.c.seq.desc())
    .limit(bindparam("most", type_=Integer)),
    as_stored=True,
)
_END = 2**62
_MOST_AT_ONCE = 5000


def iso_of(stored: datetime | str) -> str:
    """Return an instant as ISO 8601 with a ``Z``, from what the driver hands out (SQLite keeps a text)."""
    if isinstance(stored, str):
        return f"{stored[:10]}T{stored[11:].removesuffix('.000000')}Z"
    return stored.replace(tzinfo=None).isoformat() + "Z"


def load_turns(
    tx: Transaction, conversation_id: int, turns: int, *, tenant_id: str | None = None
) -> list[dict[str, Any]]:
    """Return the newest turns, oldest first: ``role, content, tokens, timestamp`` (a text that ends in ``Z``).

    A turn is a user message and all that answers it. Only what is older than the oldest of these turns is left
    out, so a conversation with fewer of them comes whole. Reads about what it returns, whatever the
    conversation's length. Raises ConversationNotFound.
    """
    if tenant_id is not None:
        get(tx, conversation_id, tenant_id=tenant_id)
    found: list[dict[str, Any]] = []
    users, before, most = 0, _END, turns * 2  # a question and its answer; tools make a turn longer
    while turns:
        most = min(most, _MOST_AT_ONCE)
        rows = _NEWEST.rows(tx.connection, {"cid": conversation_id, "before": before, "most": most})
        for seq, role, content, tokens, timestamp in rows:
            found.append({"role": role, "content": content, "tokens": tokens, "timestamp": iso_of(timestamp)})
            before = seq
            if role == "user":
                users += 1
                if users == turns:
                    break
        if users == turns or len(rows) < most:
            break
        most *= 4
    if not found:
        get(tx, conversation_id)
    found.reverse()
    return found


_PAGE = (
    select(*MESSAGE_COLUMNS)
    .where(*_IN_CONVERSATION, messages.c.seq > bindparam("after"))
    .order_by(messages.c.seq)
    .limit(bindparam("most"))
    .offset(bindparam("skipped"))
)
_PAGE_BACK = (
    select(*MESSAGE_COLUMNS)
    .where(*_IN_CONVERSATION, messages.c.seq < bindparam("before"))
    .order_by(messages.c.seq.desc())
    .limit(bindparam("most"))
)


def page(
    tx: Transaction, conversation_id: int, *, after: int = 0, most: int = PAGE, skip: int = 0
) -> list[StoredRow]:
    """Return the oldest messages whose ``seq`` is greater than ``after``, without the first ``skip`` of them."""
    values = {"cid": conversation_id, "after": after, "most": most, "skipped": skip}
    return list(tx.connection.execute(_PAGE, values).mappings())


def page_back(
    tx: Transaction, conversation_id: int, *, before: int | None = None, most: int = PAGE
) -> list[StoredRow]:
    """Return the newest messages whose ``seq`` is less than ``before``, newest first."""
    values = {"cid": conversation_id, "before": _END if before is None else before, "most": most}
    return list(tx.connection.execute(_PAGE_BACK, values).mappings())


# ----------------------------------------------------------------------------------- counted, cleared, removed

_ADD_TOKENS = (
    update(conversations)
    .where(_c.id == bindparam("cid"), _SEEN)
    .values(total_tokens=_c.total_tokens + bindparam("used"), last_activity=bindparam("now"))
)
_CLEAR = (
    update(conversations)
    .where(_c.id == bindparam("cid"))
    .values(
        total_tokens=0,
        message_count=0,
        summary=None,
        cleared_seq=_c.last_seq,
        summarized_to=0,
        version=_c.version + 1,
        last_activity=bindparam("now"),
    )
)
_HIDE = (
    update(conversations)
    .where(_c.id == bindparam("cid"))
    .values(hidden_at=bindparam("now"), scope_key=None, version=_c.version + 1)
)
_SOME_MESSAGES = (
    select(messages.c.id, messages.c.content)
    .where(messages.c.conversation_id == bindparam("cid"), messages.c.seq <= bindparam("last"))
    .limit(PIECE)
)
_CLEARED = select(_c.id, _c.cleared_seq).where(_c.cleared_seq.is_not(None), _SEEN)
_ALL_GONE = (
    update(conversations)
    .where(_c.id == bindparam("cid"), _c.cleared_seq == bindparam("last"))
    .values(cleared_seq=None)
)
_SET_PERSONA = (
    update(conversations)
    .where(_c.id == bindparam("cid"))
    .values(active_persona_id=bindparam("persona"), last_activity=bindparam("now"))
)


def add_tokens(tx: Transaction, conversation_id: int, tokens: int) -> None:
    """Add tokens that belong to no stored message. Raises ConversationNotFound."""
    values = {"cid": conversation_id, "used": tokens, "now": now_of(tx)}
    if not tx.connection.execute(_ADD_TOKENS, values).rowcount:
        raise ConversationNotFound(conversation_id)


def set_persona(tx: Transaction, conversation_id: int, persona_id: str | None) -> None:
    """Set or unset the persona that answers in this conversation."""
    values = {"cid": conversation_id, "persona": persona_id, "now": now_of(tx)}
    tx.connection.execute(_SET_PERSONA, values)


def clear(tx: Transaction, conversation_id: int) -> int:
    """Remove all messages, keep the conversation, and return how many there were. Raises ConversationNotFound.

    They are out of sight at once, whatever their number. One piece of their rows goes with that, the others by
    ``remove_cleared``.
    """
    count = int(lock(tx, conversation_id)["message_count"])
    clear_locked(tx, conversation_id)
    return count


def clear_locked(tx: Transaction, conversation_id: int) -> None:
    """Clear a conversation whose lane the transaction holds."""
    tx.connection.execute(_CLEAR, {"cid": conversation_id, "now": now_of(tx)})
    remove_cleared(tx, conversation_id)


def remove_cleared(tx: Transaction, conversation_id: int | None = None) -> int:
    """Remove one piece of the messages that were cleared, of this conversation or of any; return how many rows.

    0: nothing is left.
    """
    which = _CLEARED if conversation_id is None else _CLEARED.where(_c.id == conversation_id)
    found = tx.connection.execute(which.limit(1)).first()
    if found is None:
        return 0
    gone = _remove_some(tx, found.id, found.cleared_seq)
    if gone < PIECE:
        tx.connection.execute(_ALL_GONE, {"cid": found.id, "last": found.cleared_seq})
    return max(1, gone)


def hide(tx: Transaction, conversation_id: int) -> None:
    """Make the conversation disappear at once; ``remove_piece`` takes its rows. Raises ConversationNotFound."""
    lock(tx, conversation_id)
    tx.connection.execute(_HIDE, {"cid": conversation_id, "now": now_of(tx)})


def remove_piece(tx: Transaction, conversation_id: int) -> bool:
    """Remove some rows of a hidden conversation; say whether any are left."""
    if _remove_some(tx, conversation_id, _END):
        return True
    tx.connection.execute(delete(conversations).where(_c.id == conversation_id, _c.hidden_at.is_not(None)))
    return False


def _remove_some(tx: Transaction, conversation_id: int, last: int) -> int:
    """Remove one piece of a conversation's messages up to a number; return how many."""
    values = {"cid": conversation_id, "last": last}
    rows = tx.connection.execute(_SOME_MESSAGES, values).mappings().all()
    _remove(tx, rows)
    return len(rows)


def _remove(tx: Transaction, rows: Sequence[StoredRow]) -> None:
    if rows:
        search.remove_messages(tx.connection, tx.kind, rows)
        tx.connection.execute(delete(messages).where(messages.c.id.in_([row["id"] for row in rows])))


def recount(tx: Transaction, conversation_id: int, *, since: int, messages_by: int, tokens_by: int) -> None:
    """Carry the counters of a locked conversation after a change to its messages, the first of them ``since``.

    A summary that tells of one of these tells something else than what is stored, so it goes.
    """
    outdated = _c.summarized_to >= since
    tx.connection.execute(
        update(conversations)
        .where(_c.id == conversation_id)
        .values(
            message_count=_c.message_count + messages_by,
            total_tokens=_c.total_tokens + tokens_by,
            summary=case((outdated, None), else_=_c.summary),
            summarized_to=case((outdated, 0), else_=_c.summarized_to),
            version=_c.version + 1,
            last_activity=now_of(tx),
        )
    )
