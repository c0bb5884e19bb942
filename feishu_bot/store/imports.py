"""Conversations into a database, a message at a time, whatever their number.

An import writes pieces. A long conversation stays hidden until its last message is in, so that it is there as a
whole or not at all.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4, uuid5

from sqlalchemy import func, insert, select, update

from feishu_bot.errors import InvalidImport
from feishu_bot.model import MAX_SCOPE_LENGTH
from feishu_bot.store import search
from feishu_bot.store.engine import database_now_ms
from feishu_bot.store.exports import PAGE, uuid_of
from feishu_bot.store.formats import Found, Incoming, read_file
from feishu_bot.store.schema import conversations, messages
from feishu_bot.store.values import (
    MAX_PLATFORM_LENGTH,
    MAX_TITLE_LENGTH,
    ROLES,
    check_key,
    check_number,
    check_optional_key,
    check_text,
    dump_object,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import ColumnElement, Connection

    from feishu_bot.store.exports import Progress
    from feishu_bot.store.transactions import Transactions
    from feishu_bot.store.work import Transaction

STAGED_FOR: Final = timedelta(days=1)  # an import that is not ready by then has died, and is cleaned up
_MAX_PUBLIC_ID: Final = 36
_MAX_AGENT: Final = 64
_EARLIEST: Final = datetime(1000, 1, 1, tzinfo=UTC)  # what each database's calendar holds

_c, _m = conversations.c, messages.c
_SEEN = _c.hidden_at.is_(None)


@dataclass(frozen=True, slots=True)
class Imported:
    """What was stored. ``known``: conversations that were there already; nothing of them was changed."""

    conversations: int
    messages: int
    known: int


def import_conversation(
    connection: Connection,
    kind: str,
    data: Mapping[str, Any],
    *,
    tenant_id: str | None = None,
    user_id: str | None = None,
    traits: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> int:
    """Store a conversation as ``export_conversation`` gives it, and return its id; all of it or nothing.

    One whose ``public_id`` is known is left as it is. Without a ``public_id``: one whose user key is known. Counters
    are counted, not believed. ``tenant_id``, ``user_id`` and ``traits`` go before what the data says. ``kind`` is
    that of the database. Raises InvalidImport, and nothing is written.
    """
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise InvalidImport('expected an object with "conversation" and "messages"')
    now = now or datetime.fromtimestamp(database_now_ms(connection) / 1000, UTC)
    target = _Target(tenant_id, user_id, traits)
    head = _checked_head(Found("conversation", data.get("conversation")), target, now)
    known = _find_known(connection, head)
    if known is not None:
        return known
    rows = [_checked_message(Found(f"messages[{n}]", m), now) for n, m in enumerate(data["messages"])]
    _check_save_keys(rows)
    conversation_id = _insert_head(connection, head)
    for start in range(0, len(rows), PAGE):
        _insert_messages(connection, kind, conversation_id, start, rows[start : start + PAGE])
    _finish(connection, conversation_id, head)
    return conversation_id


def import_all(
    database: Transactions,
    path: str | Path,
    *,
    tenant_id: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Store the conversations of a file, or of all files in a folder; again, and nothing is doubled.

    Each conversation is stored as a whole or not at all. At the first that is damaged it ends: those before it are
    stored. Raises InvalidImport with the line and the reason, OSError, StoreUnavailable.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in {".json", ".jsonl", ".csv"})
        if not files:
            raise InvalidImport(f"{path}: no .json, .jsonl or .csv file in this folder")
    total, done = sum(file.stat().st_size for file in files), 0

    def advance(read: int) -> None:
        nonlocal done
        done += read
        if progress is not None and read:
            progress(done, total)

    count = said = known = 0
    for file in files:
        try:
            for incoming in read_file(file, advance=advance):
                stored = _import_one(database, incoming, _Target(tenant_id))
                count, said, known = (
                    count + (stored is not None),
                    said + (stored or 0),
                    known + (stored is None),
                )
        except InvalidImport as error:
            before = f" ({count} conversations before it were imported)" if count else ""
            raise InvalidImport(f"{file.name}: {error}{before}") from None
    return Imported(count, said, known)


class _Target(NamedTuple):
    """What the caller says about a conversation, whatever the data says."""

    tenant_id: str | None = None
    user_id: str | None = None
    traits: Mapping[str, Any] | None = None


def _import_one(database: Transactions, incoming: Incoming, target: _Target) -> int | None:
    """Store a conversation and return the number of its messages; None if it is known."""
    now = database.clock()
    head = _checked_head(incoming.head, target, now)
    found = (_checked_message(message, now) for message in incoming.messages)
    if database.read(lambda tx: _find_known(tx.connection, head)) is not None:
        for _ in found:  # damage is told, also where nothing is stored
            pass
        return None
    first = _take(found)
    if len(first) < PAGE:
        _check_save_keys(first)
        stored = database.write(lambda tx: _store_at_once(tx, head, first), repeatable=True)
        return len(first) if stored else None
    return _store_staged(database, head, first, found)


def _take(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    taken = []
    for row in rows:
        taken.append(row)
        if len(taken) == PAGE:
            break
    return taken


def _store_at_once(tx: Transaction, head: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    if _find_known(tx.connection, head) is not None:
        return False
    conversation_id = _insert_head(tx.connection, head)
    _insert_messages(tx.connection, tx.kind, conversation_id, 0, rows)
    _finish(tx.connection, conversation_id, head)
    return True


def _store_staged(
    database: Transactions,
    head: dict[str, Any],
    rows: list[dict[str, Any]],
    rest: Iterator[dict[str, Any]],
) -> int | None:
    """Store a long conversation piece by piece, hidden until it is whole."""
    name = str(uuid4())
    conversation_id = database.write(
        lambda tx: _insert_head(tx.connection, head, staged_as=name, until=database.clock() + STAGED_FOR),
        repeatable=True,
    )
    keys: set[str] = set()
    stored = 0
    try:
        while rows:
            _check_save_keys(rows, keys)
            database.write(
                lambda tx, start=stored, some=rows: _insert_messages(  # type: ignore[misc]
                    tx.connection, tx.kind, conversation_id, start, some
                ),
                repeatable=True,
            )
            stored += len(rows)
            rows = _take(rest)
        made = database.write(lambda tx: _show(tx, conversation_id, head), repeatable=True)
    except BaseException:
        _abandon(database, conversation_id)
        raise
    if not made:
        _abandon(database, conversation_id)
        return None
    return stored


def _show(tx: Transaction, conversation_id: int, head: dict[str, Any]) -> bool:
    """Make a staged conversation visible under its own name, unless another import was quicker."""
    known = _find_known(tx.connection, head)
    if known is not None:
        return known == conversation_id
    _finish(tx.connection, conversation_id, head)
    return True


def _abandon(database: Transactions, conversation_id: int) -> None:
    """Leave what was staged to the next cleanup."""
    database.write(
        lambda tx: tx.connection.execute(
            update(conversations)
            .where(_c.id == conversation_id, _c.hidden_at.is_not(None))
            .values(hidden_at=database.clock())
        ),
        repeatable=True,
    )


# ------------------------------------------------------------------------------------------- what is stored


def _find_known(connection: Connection, head: Mapping[str, Any]) -> int | None:
    """Return the conversation that this one is, if it is there."""
    which: tuple[ColumnElement[bool], ...]
    if head["given_public_id"]:
        which = (_c.public_id == head["public_id"], _SEEN)
    else:
        which = (_c.tenant_id == head["tenant_id"], _c.user_key == head["user_key"], _SEEN)
    newest = select(_c.id).where(*which).order_by(_c.last_activity.desc(), _c.id.desc()).limit(1)
    found = connection.execute(newest).scalar_one_or_none()
    return None if found is None else int(found)


_NOT_COLUMNS: Final = frozenset({"given_public_id", "forked_from", "forked_at"})


def _insert_head(
    connection: Connection,
    head: Mapping[str, Any],
    *,
    staged_as: str | None = None,
    until: datetime | None = None,
) -> int:
    """Insert a conversation without messages, hidden until ``_finish``; return its id."""
    name = staged_as or str(uuid4())
    row = {key: value for key, value in head.items() if key not in _NOT_COLUMNS}
    row |= {"public_id": name, "scope_key": None, "hidden_at": until or head["last_activity"]}
    known = connection.execute(select(_c.id).where(_c.public_id == name)).scalar_one_or_none()
    if known is None:
        connection.execute(insert(conversations), row)
        known = connection.execute(select(_c.id).where(_c.public_id == name)).scalar_one()
    return int(known)


def _insert_messages(
    connection: Connection, kind: str, conversation_id: int, start: int, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert one piece of messages, the first of them with ``start`` before it; twice is once."""
    last = connection.execute(
        select(func.max(_m.seq)).where(_m.conversation_id == conversation_id)
    ).scalar_one_or_none()
    if not rows or (last or 0) > start:
        return
    connection.execute(
        insert(messages),
        [
            {
                **row,
                "conversation_id": conversation_id,
                "seq": seq,
                "search_terms": search.column_value(kind, row["content"]),
            }
            for seq, row in enumerate(rows, start + 1)
        ],
    )
    search.index_inserted(connection, kind, [row["content"] for row in rows])


def _finish(connection: Connection, conversation_id: int, head: Mapping[str, Any]) -> None:
    """Count what was inserted and show the conversation, current in its scope if that has no other."""
    count, tokens, last = connection.execute(
        select(func.count(), func.sum(_m.tokens), func.max(_m.seq)).where(
            _m.conversation_id == conversation_id
        )
    ).one()
    scope = head["scope_key"]
    if scope is not None:
        taken = select(_c.id).where(_c.tenant_id == head["tenant_id"], _c.scope_key == scope)
        scope = None if connection.execute(taken).first() is not None else scope
    # One that was deleted and is on its way out gives its name up.
    connection.execute(
        update(conversations)
        .where(_c.public_id == head["public_id"], _c.hidden_at.is_not(None), _c.id != conversation_id)
        .values(public_id=str(uuid4()))
    )
    parent_id, forked_at = _find_fork_point(connection, head)
    connection.execute(
        update(conversations)
        .where(_c.id == conversation_id)
        .values(
            public_id=head["public_id"],
            scope_key=scope,
            parent_id=parent_id,
            forked_at=forked_at,
            message_count=count,
            total_tokens=int(tokens or 0),
            last_seq=last or 0,
            version=1,
            hidden_at=None,
        )
    )


def _find_fork_point(connection: Connection, head: Mapping[str, Any]) -> tuple[int | None, int | None]:
    if head["forked_from"] is None:
        return None, None
    parent = connection.execute(
        select(_c.id, func.coalesce(_c.cleared_seq, 0).label("cleared")).where(
            _c.public_id == head["forked_from"], _c.tenant_id == head["tenant_id"], _SEEN
        )
    ).one_or_none()
    if parent is None:
        return None, None
    if head["forked_at"] is None:
        return parent.id, None
    at = select(_m.id).where(_m.conversation_id == parent.id, _m.seq > parent.cleared).order_by(_m.seq)
    message = connection.execute(at.offset(head["forked_at"] - 1).limit(1)).scalar_one_or_none()
    return parent.id, message


# ------------------------------------------------------------------------------------------- what is believed


@contextmanager
def _at(where: str) -> Iterator[None]:
    try:
        yield
    except InvalidImport:
        raise
    except ValueError as error:
        raise InvalidImport(f"{where}: {error}") from None


def _checked_head(found: Found, target: _Target, now: datetime) -> dict[str, Any]:
    """Return the row of a conversation. Raises InvalidImport."""
    with _at(found.where):
        if not isinstance(found.value, dict):
            raise ValueError("the conversation is no object")  # noqa: TRY004  # told with its place, above
        head: dict[str, Any] = found.value
        key = check_key(head.get("user_key"), "user_key")
        tenant_id = target.tenant_id or head.get("tenant_id") or "default"
        public_id = check_optional_key(head.get("public_id"), "public_id", longest=_MAX_PUBLIC_ID) or None
        if public_id is not None and target.tenant_id not in {None, head.get("tenant_id") or "default"}:
            # A tenant's own copy; it neither finds nor hides another tenant's.
            public_id = str(uuid5(uuid_of(public_id), tenant_id))
        scope = f"user:{key}" if public_id is None else head.get("scope_key")
        forked_at = head.get("forked_at")
        created = _instant(head.get("created_at"), "created_at") or now
        return {
            "given_public_id": public_id is not None,
            "public_id": public_id or str(uuid4()),
            "scope_key": check_optional_key(scope, "scope_key", longest=MAX_SCOPE_LENGTH) or None,
            "tenant_id": check_key(tenant_id, "tenant_id"),
            "user_key": key,
            "platform": check_key(head.get("platform"), "platform", longest=MAX_PLATFORM_LENGTH),
            "chat_id": check_optional_key(head.get("chat_id"), "chat_id"),
            "user_id": check_optional_key(target.user_id or head.get("user_id"), "user_id"),
            "agent": check_optional_key(head.get("agent"), "agent", longest=_MAX_AGENT),
            "title": check_optional_key(head.get("title"), "title", longest=MAX_TITLE_LENGTH),
            "traits": _object(target.traits or head.get("traits"), "traits"),
            "summary": None if head.get("summary") is None else check_text(head["summary"], "summary"),
            "active_persona_id": check_optional_key(head.get("active_persona_id"), "active_persona_id"),
            "created_at": created,
            "last_activity": _instant(head.get("last_activity"), "last_activity") or created,
            "forked_from": check_optional_key(head.get("forked_from"), "forked_from"),
            "forked_at": None if forked_at is None else check_number(forked_at, "forked_at", least=1),
        }


def _checked_message(found: Found, now: datetime) -> dict[str, Any]:
    """Return the row of a message. Raises InvalidImport."""
    with _at(found.where):
        if not isinstance(found.value, dict):
            raise ValueError("the message is no object")  # noqa: TRY004  # told with its place, above
        message: dict[str, Any] = found.value
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role must be one of user, assistant, system, tool, not {role!r}")
        tokens = message.get("tokens")
        return {
            "role": role,
            "content": check_text(message.get("content"), "content"),
            "timestamp": _instant(message.get("timestamp"), "timestamp") or now,
            "tokens": 0 if tokens is None else check_number(tokens, "tokens"),
            "metadata_json": _object(message.get("metadata"), "metadata"),
            "sender_id": check_optional_key(message.get("sender_id"), "sender_id"),
            "source_id": check_optional_key(message.get("source_id"), "source_id"),
            "save_key": check_optional_key(message.get("save_key"), "save_key"),
            "edited_at": _instant(message.get("edited_at"), "edited_at"),
            "recalled_at": _instant(message.get("recalled_at"), "recalled_at"),
        }


def _check_save_keys(rows: Iterable[Mapping[str, Any]], seen: set[str] | None = None) -> None:
    seen = set() if seen is None else seen
    for row in rows:
        key = row["save_key"]
        if key is not None and key in seen:
            raise InvalidImport(f"two messages have the save_key {key!r}")
        if key is not None:
            seen.add(key)


def _object(value: object, name: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {type(value).__name__}")  # noqa: TRY004  # as above
    return dump_object(value, name)


def _instant(value: object, name: str) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {type(value).__name__}")  # noqa: TRY004  # as above
    try:
        instant = datetime.fromisoformat(value)
        instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be an instant like 2025-01-08T10:00:00Z, not {value[:40]!r}") from None
    if instant < _EARLIEST:
        raise ValueError(f"{name} lies before the year 1000")
    return instant
