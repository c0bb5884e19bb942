"""Reading an answer back from the record, for whoever asked and waits or comes again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import select

from feishu_bot.model import End, make_key
from feishu_bot.store.schema import OPEN, conversations, inbox, messages, outbox, usage
from feishu_bot.store.work import Change

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from feishu_bot.model import CallUsage
    from feishu_bot.store.work import Transaction


@dataclass(frozen=True, slots=True)
class Answer:
    """How a question ended: the text that was said, and where it is stored. ``text`` None: it is not kept."""

    end: End
    reason: str
    text: str | None
    conversation_id: int | None
    message_id: int | None
    input_tokens: int
    output_tokens: int
    model: str


def count_calls(calls: Iterable[CallUsage]) -> tuple[int, int, str]:
    """Return input tokens, output tokens and the last model of those calls that the ledger holds."""
    tokens_in = tokens_out = 0
    model = ""
    for call in calls:
        if call.outcome == "failed":
            continue
        tokens_in += call.input_tokens
        tokens_out += call.output_tokens
        model = call.model
    return tokens_in, tokens_out, model


def find_answer(tx: Transaction, account: str, event_key: str) -> Answer | None:
    """Return how the event ended; None while it is open or unknown."""
    row = tx.connection.execute(
        select(inbox.c.id, inbox.c.state, inbox.c.reason, inbox.c.lane_key).where(
            inbox.c.account == account, inbox.c.event_key == event_key
        )
    ).one_or_none()
    if row is None or row.state == OPEN:
        return None
    payload = tx.connection.execute(
        select(outbox.c.payload)
        .where(outbox.c.source == f"in:{row.id}")
        .order_by(outbox.c.id.desc())
        .limit(1)
    ).scalar_one_or_none()
    said: Mapping[str, Any] = orjson.loads(payload) if payload else {}
    conversation_id, message_id = _place_of(tx, row.id, row.lane_key.removeprefix("conv:"))
    if row.reason == f"command {Change.ARCHIVE}":
        conversation_id = None  # what is said next begins another
    booked = tx.connection.execute(
        select(usage.c.attempt, usage.c.input_tokens, usage.c.output_tokens, usage.c.model)
        .where(usage.c.inbox_id == row.id)
        .order_by(usage.c.attempt.desc(), usage.c.call.desc())
    ).all()
    calls = [call for call in booked if call.attempt == booked[0].attempt]
    return Answer(
        end=End(row.state),
        reason=row.reason or "",
        text=said.get("text"),
        conversation_id=conversation_id,
        message_id=message_id if row.state == End.ANSWERED.value else None,
        input_tokens=sum(call.input_tokens for call in calls),
        output_tokens=sum(call.output_tokens for call in calls),
        model=calls[0].model if calls else "",
    )


def _place_of(tx: Transaction, inbox_id: int, public_id: str) -> tuple[int | None, int | None]:
    """Return the conversation an answer belongs to, and its own message where one was stored."""
    conversation = tx.connection.execute(
        select(conversations.c.id).where(conversations.c.public_id == public_id)
    ).scalar_one_or_none()
    if conversation is None:
        return None, None
    keys = [f"in:{inbox_id}:assistant", f"in:{inbox_id}:user"]
    stored = tx.connection.execute(
        select(messages.c.id)
        .where(messages.c.conversation_id == conversation, messages.c.save_key.in_(keys))
        .order_by(messages.c.seq.desc())
        .limit(1)
    ).scalar_one_or_none()
    return conversation, stored


@dataclass(frozen=True, slots=True)
class OwnConversation:
    """A conversation that a door may lead to."""

    id: int
    public_id: str


def own_conversation(tx: Transaction, conversation_id: int, user_id: str) -> OwnConversation | None:
    """Return the conversation if it is this person's and not removed; somebody else's does not exist for him."""
    row = tx.connection.execute(
        select(conversations.c.id, conversations.c.public_id).where(
            conversations.c.id == conversation_id,
            conversations.c.user_id == user_id,
            conversations.c.hidden_at.is_(None),
        )
    ).one_or_none()
    return None if row is None else OwnConversation(row.id, row.public_id)


def event_key_of(user: str, request_id: str) -> str:
    """Return the key under which a door's question is recorded; the same request of a user is one event."""
    return make_key("request", user, request_id)
