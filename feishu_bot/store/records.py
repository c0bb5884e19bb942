"""The mapped classes: what the library hands out, and what its users query.

A record belongs to no session and stays readable for ever; it shows the row as it was when it was read. The
server's own way of a message does not use these classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.orm import DeclarativeBase, class_mapper, relationship
from sqlalchemy.orm.attributes import instance_dict, instance_state, manager_of_class

from feishu_bot.store import schema
from feishu_bot.store.values import load_object

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Mapped

    from feishu_bot.store.work import StoredRow


def iso(instant: datetime | None) -> str | None:
    """Return an instant as ISO 8601 in UTC, with a ``Z``."""
    return None if instant is None else instant.replace(tzinfo=None).isoformat() + "Z"


class Record(DeclarativeBase):
    """The base of both records."""

    metadata = schema.metadata


class ConversationRecord(Record):
    """One conversation.

    ``messages`` is read from the database only inside a session, when it is asked for: a conversation may have
    a hundred thousand. ``PersistentConversationManager.iter_messages`` reads them in pages.
    """

    __table__ = schema.conversations

    if not TYPE_CHECKING:
        traits_json = schema.conversations.c.traits
    messages = relationship(
        "MessageRecord",
        primaryjoin=(schema.messages.c.conversation_id == schema.conversations.c.id) & schema.NOT_CLEARED,
        back_populates="conversation",
        order_by=schema.messages.c.seq,
        cascade="all, delete-orphan",
        passive_deletes=True,
        lazy="select",
    )

    if TYPE_CHECKING:
        traits_json: Mapped[str | None]
        id: Mapped[int]
        public_id: Mapped[str]
        scope_key: Mapped[str | None]
        tenant_id: Mapped[str]
        user_key: Mapped[str]
        platform: Mapped[str]
        chat_id: Mapped[str | None]
        user_id: Mapped[str | None]
        agent: Mapped[str | None]
        title: Mapped[str | None]
        summary: Mapped[str | None]
        active_persona_id: Mapped[str | None]
        parent_id: Mapped[int | None]
        forked_at: Mapped[int | None]
        total_tokens: Mapped[int]
        message_count: Mapped[int]
        last_seq: Mapped[int]
        version: Mapped[int]
        hidden_at: Mapped[datetime | None]
        created_at: Mapped[datetime]
        last_activity: Mapped[datetime]

    @property
    def traits(self) -> dict[str, Any]:
        """What is known about the user, as it was given; an empty dict if nothing is."""
        return load_object(self.traits_json)

    @property
    def is_current(self) -> bool:
        """Whether this is the current conversation of its scope, not an archived one."""
        return self.scope_key is not None

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; instants end in ``Z``."""
        return {
            "id": self.id,
            "public_id": self.public_id,
            "user_key": self.user_key,
            "platform": self.platform,
            "chat_id": self.chat_id,
            "created_at": iso(self.created_at),
            "last_activity": iso(self.last_activity),
            "summary": self.summary,
            "total_tokens": self.total_tokens,
            "message_count": self.message_count,
            "active_persona_id": self.active_persona_id,
            "tenant_id": self.tenant_id,
            "user_id": self.user_id,
            "agent": self.agent,
            "title": self.title,
            "traits": self.traits,
            "parent_id": self.parent_id,
            "forked_at": self.forked_at,
            "current": self.is_current,
        }

    def __repr__(self) -> str:
        values = instance_dict(self)
        return f"ConversationRecord(id={values.get('id')}, user_key={values.get('user_key')!r})"


class MessageRecord(Record):
    """One message of a conversation. ``seq`` is its place there; places of deleted messages stay empty."""

    __table__ = schema.messages
    __mapper_args__ = {  # noqa: RUF012  # SQLAlchemy's own way of saying it
        "exclude_properties": ["search_terms"]
    }

    conversation = relationship("ConversationRecord", back_populates="messages", lazy="select")

    if TYPE_CHECKING:
        id: Mapped[int]
        conversation_id: Mapped[int]
        seq: Mapped[int]
        role: Mapped[str]
        content: Mapped[str]
        sender_id: Mapped[str | None]
        source_id: Mapped[str | None]
        tokens: Mapped[int]
        metadata_json: Mapped[str | None]
        save_key: Mapped[str | None]
        timestamp: Mapped[datetime]
        edited_at: Mapped[datetime | None]
        recalled_at: Mapped[datetime | None]

    def get_metadata(self) -> dict[str, Any]:
        """Return the metadata; an empty dict if there is none or it is no JSON object."""
        return load_object(self.metadata_json)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; instants end in ``Z``."""
        return {
            "id": self.id,
            "conversation_id": self.conversation_id,
            "role": self.role,
            "content": self.content,
            "timestamp": iso(self.timestamp),
            "tokens": self.tokens,
            "metadata": self.get_metadata(),
            "sender_id": self.sender_id,
            "edited_at": iso(self.edited_at),
        }

    def __repr__(self) -> str:
        values = instance_dict(self)
        return f"MessageRecord(id={values.get('id')}, role={values.get('role')!r})"


_Record = TypeVar("_Record", bound=Record)


def conversation_record(row: StoredRow) -> ConversationRecord:
    """Return the record of a row with all columns."""
    values = dict(row)
    values["traits_json"] = values.pop("traits")
    return _detached(ConversationRecord, values)


def message_record(row: StoredRow) -> MessageRecord:
    """Return the record of a row with all columns."""
    return _detached(MessageRecord, row)


def _detached(kind: type[_Record], values: StoredRow) -> _Record:
    """Return a record as a session would leave it behind, at a tenth of its price.

    It has an identity and no session: what is not among the values raises, and nothing of it counts as changed.
    """
    record: _Record = manager_of_class(kind).new_instance()
    instance_dict(record).update(values)
    instance_state(record).key = (kind, (values["id"],), None)
    return record


def prepare() -> None:
    """Configure the mapping now rather than in the middle of the first message."""
    for kind in (ConversationRecord, MessageRecord):
        class_mapper(kind)
