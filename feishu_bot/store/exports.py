"""Conversations out of a database, a message at a time, whatever their number.

No transaction stays open over a file: an export reads pages.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID, uuid5

from sqlalchemy import case, func, select

from feishu_bot.errors import ConversationNotFound
from feishu_bot.store.formats import FORMATS, HEAD_FIELDS, make_writer
from feishu_bot.store.people import Person
from feishu_bot.store.schema import conversations, messages
from feishu_bot.store.values import load_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement, Connection, RowMapping

    from feishu_bot.store.transactions import Transactions
    from feishu_bot.store.work import Transaction

    Progress = Callable[[int, int], None]  # what is done, of how much

PAGE: Final = 500  # messages that are read or written at once
_FILE_NAME_CHARS: Final = 60
_UNFIT_FOR_A_FILE: Final = re.compile(r"[^\w.@%+-]")

_c, _m = conversations.c, messages.c
_SEEN = _c.hidden_at.is_(None)
_MESSAGE_COLUMNS = (
    _m.id,
    _m.seq,
    _m.role,
    _m.content,
    _m.timestamp,
    _m.tokens,
    _m.metadata_json,
    _m.sender_id,
    _m.source_id,
    _m.save_key,
    _m.edited_at,
    _m.recalled_at,
)


class _Chosen(NamedTuple):
    """A conversation to export. ``only``: of a conversation that is not the person's own, what he said."""

    head: dict[str, Any]
    cleared_seq: int
    last_seq: int
    only: ColumnElement[bool] | None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    conversations: int
    messages: int
    files: int


def export_conversation(
    connection: Connection, conversation_id: int, *, tenant_id: str | None = None
) -> dict[str, Any]:
    """Return a conversation and all its messages as JSON can hold them. Raises ConversationNotFound."""
    for chosen in _choose(connection, _c.id == conversation_id, None, tenant_id=tenant_id):
        said: list[dict[str, Any]] = []
        after = chosen.cleared_seq
        while page := _page(connection, chosen, after):
            said += [_message(row) for row in page]
            after = page[-1]["seq"]
        return {"conversation": chosen.head, "messages": said}
    raise ConversationNotFound(conversation_id)


def write_conversation(
    read: Callable[[Callable[[Transaction], Any]], Any], conversation_id: int, file: IO[str], kind: str
) -> None:
    """Write one conversation to an open text file; each page of it is one call of ``read``.

    Raises ConversationNotFound.
    """
    _check_kind(kind)
    found = read(lambda tx: _choose(tx.connection, _c.id == conversation_id, None))
    if not found:
        raise ConversationNotFound(conversation_id)
    chosen = found[0]
    after = chosen.cleared_seq
    writer = make_writer(file, kind, single=True)
    writer.begin(chosen.head)
    while page := read(lambda tx, last=after: _page(tx.connection, chosen, last)):  # type: ignore[misc]
        for row in page:
            writer.message(_message(row))
        after = page[-1]["seq"]
    writer.end()
    writer.close()


def iter_messages(database: Transactions, conversation_id: int) -> Iterator[dict[str, Any]]:
    """Yield a conversation's messages as an export has them; no transaction is open between two.

    Raises ConversationNotFound.
    """
    chosen = database.read(lambda tx: _choose(tx.connection, _c.id == conversation_id, None))
    if not chosen:
        raise ConversationNotFound(conversation_id)
    for row in _rows(database, chosen[0]):
        yield _message(row)


def export_all(
    database: Transactions,
    path: str | Path,
    kind: str = "json",
    *,
    user: str | None = None,
    tenant_id: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write conversations to a file, or one file each to a folder (a path that is one, or ends with a slash).

    ``kind``: json, jsonl, csv or md. ``user``: the conversations of a person (or user key), and what that person
    said in those of others. A file is replaced when all is written. Raises OSError, StoreUnavailable.
    """
    _check_kind(kind)
    told = _Progress(database, user, tenant_id, progress)
    into_folder = str(path).endswith(("/", os.sep)) or Path(path).is_dir()
    if not into_folder:
        with atomic_file(Path(path)) as file:
            return write_all(database, file, kind, user=user, tenant_id=tenant_id, progress=told)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    count = said = 0
    for chosen in _conversations(database, user, tenant_id):
        with atomic_file(folder / f"{file_name(chosen.head)}.{kind}") as file:
            said += _write(database, chosen, file, kind, told)
        count += 1
    return Exported(count, said, count)


def write_all(
    database: Transactions,
    file: IO[str],
    kind: str = "json",
    *,
    user: str | None = None,
    tenant_id: str | None = None,
    progress: Progress | _Progress | None = None,
) -> Exported:
    """Write conversations to an open text file, as ``export_all`` does."""
    _check_kind(kind)
    told = progress if isinstance(progress, _Progress) else _Progress(database, user, tenant_id, progress)
    writer = make_writer(file, kind)
    count = said = 0
    for chosen in _conversations(database, user, tenant_id):
        writer.begin(chosen.head)
        for row in _rows(database, chosen):
            writer.message(_message(row))
            said += 1
            told.step()
        writer.end()
        count += 1
    writer.close()
    return Exported(count, said, 1)


def _write(database: Transactions, chosen: _Chosen, file: IO[str], kind: str, told: _Progress) -> int:
    writer = make_writer(file, kind, single=True)
    writer.begin(chosen.head)
    said = 0
    for row in _rows(database, chosen):
        writer.message(_message(row))
        said += 1
        told.step()
    writer.end()
    writer.close()
    return said


def file_name(head: Mapping[str, Any]) -> str:
    """Return a name for a conversation's file: its user key with ``_`` for ``:``, and its id, so that none is taken."""
    plain = _UNFIT_FOR_A_FILE.sub("_", head["user_key"])[:_FILE_NAME_CHARS]
    return f"{plain.lstrip('.-') or '_'}_{head['id']}"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """Give a text file that takes the place of ``path`` when the block ends well, and otherwise leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # Private, as what people said is.
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class _Progress:
    """Counts messages, and tells of every page."""

    def __init__(
        self, database: Transactions, user: str | None, tenant_id: str | None, tell: Progress | None
    ) -> None:
        self._tell = tell
        self._done = self._total = 0
        if tell is not None:
            self._total = database.read(lambda tx: _count(tx.connection, user, tenant_id))
            tell(0, self._total)

    def step(self) -> None:
        self._done += 1
        if self._tell is not None and self._done % PAGE == 0:
            self._tell(self._done, max(self._done, self._total))


def _check_kind(kind: str) -> None:
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {kind!r}")


def _count(connection: Connection, user: str | None, tenant_id: str | None) -> int:
    """Return how many messages an export has, without looking at them where all are meant."""
    statement = select(func.sum(_c.message_count)).where(_SEEN)
    if tenant_id is not None:
        statement = statement.where(_c.tenant_id == tenant_id)
    if user is not None:
        statement = statement.where(Person.of(user).owns)
    return int(connection.execute(statement).scalar_one() or 0)


def _conversations(database: Transactions, user: str | None, tenant_id: str | None) -> Iterator[_Chosen]:
    """Yield what is to be exported, by id."""
    person = None if user is None else Person.of(user)
    after = 0
    while True:
        ids = database.read(lambda tx, last=after: _ids(tx.connection, person, last))  # type: ignore[misc]
        if not ids:
            return
        after = ids[-1]
        yield from database.read(
            lambda tx, some=ids: _choose(tx.connection, _c.id.in_(some), person, tenant_id=tenant_id)  # type: ignore[misc]
        )


def _ids(connection: Connection, person: Person | None, after: int, most: int = 100) -> list[int]:
    own = select(_c.id).where(_SEEN, _c.id > after).order_by(_c.id).limit(most)
    if person is None:
        return list(connection.execute(own).scalars())
    shared = (
        select(_m.conversation_id)
        .where(person.said, _m.conversation_id > after)
        .group_by(_m.conversation_id)
        .order_by(_m.conversation_id)
        .limit(most)
    )
    found = set(connection.execute(own.where(person.owns)).scalars()) | set(
        connection.execute(shared).scalars()
    )
    return sorted(found)[:most]


def _choose(
    connection: Connection,
    which: ColumnElement[bool],
    person: Person | None,
    *,
    tenant_id: str | None = None,
) -> list[_Chosen]:
    statement = select(conversations).where(which, _SEEN).order_by(_c.id)
    if tenant_id is not None:
        statement = statement.where(_c.tenant_id == tenant_id)
    if person is not None:
        statement = statement.add_columns(case((person.owns, 1), else_=0).label("own"))
    found = []
    for row in connection.execute(statement).mappings().all():
        head, cleared = _head(connection, row), row["cleared_seq"] or 0
        if person is None or row["own"]:
            found.append(_Chosen(head, cleared, row["last_seq"], None))
            continue
        said = (person.said, _m.conversation_id == row["id"], _m.seq > cleared)
        count, tokens = connection.execute(select(func.count(), func.sum(_m.tokens)).where(*said)).one()
        part = {
            # Another conversation than the whole: who imports both has both.
            "public_id": str(uuid5(uuid_of(head["public_id"]), person.ids[-1])),
            "scope_key": None,
            "summary": None,
            "message_count": count,
            "total_tokens": int(tokens or 0),
        }
        found.append(_Chosen(head | part, cleared, row["last_seq"], person.said))
    return found


def uuid_of(public_id: str) -> UUID:
    """Return a public id as what it mostly is; always the same for one that is not."""
    try:
        return UUID(public_id)
    except ValueError:
        return uuid5(UUID(int=0), public_id)


def _head(connection: Connection, row: RowMapping) -> dict[str, Any]:
    values = dict(row)
    values["created_at"], values["last_activity"] = _iso(row["created_at"]), _iso(row["last_activity"])
    values["traits"] = load_object(row["traits"])
    values["forked_from"], values["forked_at"] = _fork_point(connection, row)
    return {name: values[name] for name in HEAD_FIELDS}


def _fork_point(connection: Connection, row: RowMapping) -> tuple[str | None, int | None]:
    """Return the public id of the conversation this one was forked from, and after how many messages."""
    if row["parent_id"] is None:
        return None, None
    parent = connection.execute(
        select(_c.public_id, func.coalesce(_c.cleared_seq, 0).label("cleared")).where(
            _c.id == row["parent_id"], _SEEN
        )
    ).one_or_none()
    if parent is None:
        return None, None
    present = (_m.conversation_id == row["parent_id"], _m.seq > parent.cleared)
    at = select(_m.seq).where(_m.id == row["forked_at"], *present)
    count = select(func.count()).where(*present, _m.seq <= at.scalar_subquery())
    return parent.public_id, connection.execute(count).scalar_one() or None


def _rows(database: Transactions, chosen: _Chosen) -> Iterator[RowMapping]:
    after = chosen.cleared_seq
    while True:
        page = database.read(lambda tx, last=after: _page(tx.connection, chosen, last))  # type: ignore[misc]
        yield from page
        if len(page) < PAGE:
            return
        after = page[-1]["seq"]


def _page(connection: Connection, chosen: _Chosen, after: int) -> Sequence[RowMapping]:
    # What was said after the head was read is left out: the numbers in it are right.
    statement = select(*_MESSAGE_COLUMNS).where(
        _m.conversation_id == chosen.head["id"], _m.seq > after, _m.seq <= chosen.last_seq
    )
    if chosen.only is not None:
        statement = statement.where(chosen.only)
    return connection.execute(statement.order_by(_m.seq).limit(PAGE)).mappings().all()


def _message(row: RowMapping) -> dict[str, Any]:
    return {
        "id": row["id"],
        "role": row["role"],
        "content": row["content"],
        "timestamp": _iso(row["timestamp"]),
        "tokens": row["tokens"],
        "metadata": load_object(row["metadata_json"]),
        "sender_id": row["sender_id"],
        "source_id": row["source_id"],
        "save_key": row["save_key"],
        "edited_at": _iso(row["edited_at"]),
        "recalled_at": _iso(row["recalled_at"]),
    }


def _iso(instant: datetime | None) -> str | None:
    return None if instant is None else instant.replace(tzinfo=None).isoformat() + "Z"
