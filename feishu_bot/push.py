"""Messages that answer nobody: an operator's words, alerts, the sentence of a pause. They go through the outbox."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from feishu_bot.model import ChatType, Target, make_key
from feishu_bot.parts import part_payload
from feishu_bot.split import fit_text

if TYPE_CHECKING:
    from feishu_bot.platforms.base import Platform

_ESCAPED: Final = re.compile(r"%(?:25|3A)")


def chat_target(chat: str, chat_type: ChatType = ChatType.GROUP) -> Target:
    """Return a chat by its platform's id."""
    return Target(chat_type=chat_type, chat_id=chat)


def person_target(account: str, user: str) -> Target:
    """Return a private chat with somebody: the platform's id of him, a person or a user key.

    Raises ValueError for a key of another account, or of a group.
    """
    parts = [_ESCAPED.sub(lambda match: unquote(match[0]), part) for part in user.split(":")]
    if len(parts) == 1:
        return Target(chat_type=ChatType.PRIVATE, sender_id=parts[0])
    if parts[0] != account:
        raise ValueError(f"{user} is nobody of {account}")
    if len(parts) > 2 and parts[1] != ChatType.PRIVATE.value:  # noqa: PLR2004  # account, chat type and sender
        raise ValueError(f"{user} is no key of a private chat; name the chat, or the person as {account}:ID")
    return Target(chat_type=ChatType.PRIVATE, sender_id=parts[-1])


def push_rows(
    account: str,
    platform: Platform | type[Platform],
    *,
    source: str,
    target: Target,
    text: str,
    max_chars: int,
    kind: str = "push",
    reply_before: int | None = None,
) -> list[dict[str, Any]]:
    """Return the outbox rows of a message, for ``store.outbox.push``. The same source is sent once."""
    texts = fit_text(
        text,
        max_chars=max_chars,
        platform_chars=platform.max_part_chars,
        max_bytes=platform.max_part_bytes,
        max_parts=platform.max_parts,
    )
    lane = "push:" + make_key(account, target.chat_id or target.sender_id)
    return [
        {
            "source": source,
            "kind": kind,
            "part": number,
            "lane_key": lane,
            "account": account,
            "payload": part_payload(target, part),
            "reply_before": reply_before,
        }
        for number, part in enumerate(texts)
    ]
