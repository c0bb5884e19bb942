"""What the outbox holds of one part of an answer: where it goes, and its text."""

from __future__ import annotations

from typing import Any, Final

import orjson

from feishu_bot.model import ChatType, Target

CALL: Final = "call"  # the kind of a part that is a call of the platform's API: its text says which
_STREAM: Final = "stream"


def part_payload(target: Target, text: str) -> str:
    """Serialise one part of an answer for the outbox; ``read_part`` reads it back."""
    out: dict[str, Any] = {"chat_type": target.chat_type.value, "text": text}
    for name in ("chat_id", "sender_id", "reply_to", "thread_id", "extra"):
        value = getattr(target, name)
        if value:
            out[name] = value
    return orjson.dumps(out).decode()


def with_stream(payload: str, stream: str) -> str:
    """Return a part that finishes what is shown of it already."""
    return orjson.dumps({**orjson.loads(payload), _STREAM: stream}).decode()


def read_stream(payload: str) -> str | None:
    """Return what a part finishes, if anything."""
    if f'"{_STREAM}"' not in payload:
        return None
    stream = orjson.loads(payload).get(_STREAM)
    return stream if isinstance(stream, str) else None


def read_part(payload: str) -> tuple[Target, str]:
    """Read what ``part_payload`` wrote."""
    data = orjson.loads(payload)
    text = data.pop("text", "")
    data.pop(_STREAM, None)
    data["chat_type"] = ChatType(data.get("chat_type", "private"))
    return Target(**data), text


def storable(text: str) -> str:
    """Return ``text`` without what no database and no platform takes: NUL, and halves of surrogate pairs."""
    if text.isascii():
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
