"""What people and the bot say in chats, put on record as the server does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from feishu_bot.model import ChatType, End, InboundMessage, Target
from feishu_bot.parts import part_payload
from feishu_bot.store.inbox import receive
from feishu_bot.store.work import (
    Arrival,
    NewConversation,
    NewMessage,
    NewPart,
    NoWork,
    Outcome,
    PartToSend,
    Quote,
    Reply,
    SendResult,
)

if TYPE_CHECKING:
    from tests.transact import Database

ACCOUNT = "feishu"


def message(
    key: str, text: str = "", *, chat: str = "oc_team", who: str = "ann", **more: Any
) -> InboundMessage:
    """Return what somebody says in a group; ``chat`` "" is a private chat without an id."""
    kind = ChatType.GROUP if chat else ChatType.PRIVATE
    fields = {"chat_type": kind, "chat_id": chat, "sender_id": who, "message_id": key, **more}
    return InboundMessage(ACCOUNT, f"om:{key}", text=text, tokens=len(text.split()), **fields)


def lane_of(said: InboundMessage) -> str:
    return f"in:{said.chat_id}:{said.sender_id}"


def arrival(said: InboundMessage, *, lane: str | None = None, **more: Any) -> Arrival:
    return Arrival(said.account, said.event_key, lane or lane_of(said), said.to_json(), **more)


def unaddressed_reply(said: InboundMessage) -> Arrival:
    """Return a reply as the intake hands it over: not for the bot, unless the bot said what it replies to."""
    meant = arrival(said)
    reply = Reply(Quote.of(said, said.reply_to or ""), meant)
    bare = InboundMessage(said.account, said.event_key)
    return Arrival(
        said.account,
        f"{said.event_key}#seen",
        meant.lane_key,
        bare.to_json(),
        "ignored",
        "not addressed",
        reply=reply,
    )


def converse(
    db: Database, said: InboundMessage, answer: str, *, parts: int = 1, lane: str | None = None, **noted: Any
) -> list[str]:
    """Have a message recorded, answered and the answer sent; return the platform's ids of the answer's parts.

    ``noted``: what the metadata of both messages hold.
    """
    place = lane or lane_of(said)
    db.run(receive, [arrival(said, lane=place)])
    work = db.begin_one(place, token=f"t-{said.message_id}")
    committed = db.commit_one(outcome(work, said, answer, parts=parts, **noted))
    return send_all(db, committed.sending)


def outcome(work: Any, said: InboundMessage, answer: str, *, parts: int = 1, **noted: Any) -> Outcome:
    key, lane = f"in:{work.inbox_id}", work.lease.lane_key
    metadata = orjson.dumps(noted).decode() if noted else None
    return Outcome(
        work,
        End.ANSWERED,
        messages=(
            NewMessage("user", work.message.text, 3, said.user_key, said.message_id, metadata, f"{key}:user"),
            NewMessage("assistant", answer, 5, metadata_json=metadata, save_key=f"{key}:assistant"),
        ),
        conversation=NewConversation(
            f"public-{lane}"[:36], lane, said.user_key, ACCOUNT, said.chat_id or None, said.person, None,
            work.message.text[:50],
        ),
        parts=tuple(
            NewPart("answer", n, part_payload(Target.of(said), f"{answer} {n}" if n else answer)) for n in range(parts)
        ),
    )  # fmt: skip


def send_all(db: Database, part: PartToSend | NoWork | None) -> list[str]:
    """Send a part and all that follow it in its lane."""
    sent: list[str] = []
    while isinstance(part, PartToSend):
        sent.append(f"om_bot_{part.source}_{part.kind}_{part.part}")
        part = db.step(part.lease, SendResult(part.id, "sent", sent_id=sent[-1]))
    return sent
