"""What one person sees of his own conversations: lists in pages, messages both ways, questions not answered yet.

Whatever is somebody else's does not exist here: it is found by its owner only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from sqlalchemy import and_, func, or_, select

from feishu_bot.errors import ConversationNotFound
from feishu_bot.model import InboundMessage, make_key
from feishu_bot.store.conversations import MESSAGE_COLUMNS
from feishu_bot.store.schema import OPEN, conversations, inbox, messages

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from feishu_bot.store.work import StoredRow, Transaction

MAX_PENDING: Final = 100

_c, _m = conversations.c, messages.c


def check_own(tx: Transaction, conversation_id: int, person: str) -> None:
    """Raise ConversationNotFound unless the conversation is this person's, and not removed."""
    own_row(tx, conversation_id, person)


def own_row(tx: Transaction, conversation_id: int, person: str) -> StoredRow:
    """Return a conversation of this person's. Raises ConversationNotFound."""
    row = (
        tx.connection.execute(select(conversations).where(_c.id == conversation_id, *_mine(person)))
        .mappings()
        .one_or_none()
    )
    if row is None:
        raise ConversationNotFound(conversation_id)
    return row


def _mine(person: str) -> tuple[ColumnElement[bool], ...]:
    return _c.user_id == person, _c.hidden_at.is_(None)


def list_own(tx: Transaction, person: str, *, before: int | None, limit: int) -> list[StoredRow]:
    """Return conversations of this person's, the one used last first; ``before``: those behind this one."""
    statement = select(conversations).where(*_mine(person))
    if before is not None:
        place = tx.connection.execute(
            select(_c.last_activity).where(_c.id == before, _c.user_id == person)
        ).scalar_one_or_none()
        if place is None:  # removed meanwhile: by the order in which they were made
            statement = statement.where(_c.id < before)
        else:
            older = and_(_c.last_activity == place, _c.id < before)
            statement = statement.where(or_(_c.last_activity < place, older))
    ordered = statement.order_by(_c.last_activity.desc(), _c.id.desc()).limit(limit)
    return list(tx.connection.execute(ordered).mappings())


def list_messages(
    tx: Transaction, conversation_id: int, *, before: int | None = None, after: int | None = None, limit: int
) -> list[StoredRow]:
    """Return messages, the newest first: the newest of all, those before one, or the next ones after one.

    ``before`` and ``after`` are ids of messages, which need not be there any more.
    """
    cleared = select(func.coalesce(_c.cleared_seq, 0)).where(_c.id == conversation_id).scalar_subquery()
    here = _m.conversation_id == conversation_id, _m.seq > cleared, _m.recalled_at.is_(None)
    statement = select(*MESSAGE_COLUMNS).where(*here).limit(limit)
    if after is not None:
        ordered = statement.where(_m.seq > _seq_at(tx, conversation_id, after)).order_by(_m.seq)
        return list(reversed(tx.connection.execute(ordered).mappings().all()))
    if before is not None:
        statement = statement.where(_m.seq < _seq_at(tx, conversation_id, before - 1) + 1)
        statement = statement.where(_m.id != before)
    return list(tx.connection.execute(statement.order_by(_m.seq.desc())).mappings())


def _seq_at(tx: Transaction, conversation_id: int, message_id: int) -> int:
    """Return the number of a message in its conversation, else that of the last one that is older."""
    own = select(_m.seq).where(_m.conversation_id == conversation_id)
    exact = tx.connection.execute(own.where(_m.id == message_id)).scalar_one_or_none()
    if exact is not None:
        return int(exact)
    upto = select(func.max(_m.seq)).where(_m.conversation_id == conversation_id, _m.id < message_id)
    return int(tx.connection.execute(upto).scalar() or 0)


def find_own_message(tx: Transaction, conversation_id: int, message_id: int) -> int | None:
    """Return the id of a conversation's message, or None where it has none such."""
    found = select(_m.id).where(_m.conversation_id == conversation_id, _m.id == message_id)
    message: int | None = tx.connection.execute(found).scalar_one_or_none()
    return message


def pending(tx: Transaction, account: str, user: str) -> list[dict[str, Any]]:
    """Return the questions of a door's user that are not answered yet, the oldest first.

    With the request id each came under, so that one can wait for its answer again. ``follows`` is that of an earlier one
    in the same conversation, while this has no id yet.
    """
    head = make_key("request", user) + ":"
    rows = tx.connection.execute(
        select(inbox.c.event_key, inbox.c.payload, inbox.c.received_at)
        .where(inbox.c.state == OPEN, inbox.c.account == account)
        .where(inbox.c.event_key.startswith(head, autoescape=True))
        .order_by(inbox.c.id)
        .limit(MAX_PENDING)
    ).all()
    found = []
    begun: dict[str | None, str] = {}  # a conversation that is not there yet -> the question that begins it
    for row in rows:
        request_id = row.event_key.removeprefix(head)
        if ":" in request_id or request_id.startswith("sha256-"):  # too long to be kept as it was
            continue
        message = InboundMessage.from_json(row.payload)
        public_id = message.conversation
        known = tx.connection.execute(
            select(_c.id).where(_c.public_id == public_id, _c.hidden_at.is_(None))
        ).scalar_one_or_none()
        first = begun.setdefault(public_id, unquote(request_id))
        found.append(
            {
                "request_id": unquote(request_id),
                "conversation_id": known,
                "follows": first if known is None and first != unquote(request_id) else None,
                "message": message.text,
                "agent": message.agent,
                "files": [attachment.name for attachment in message.attachments],
            }
        )
    return found
