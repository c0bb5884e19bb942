"""What the model is told of a question beside its words: who asks, where several share a conversation, and what is quoted.

Only the prompt has it. Stored are the plain words, with the speaker and, where needed, the chat in the metadata.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.ai.tokens import count_tokens
from feishu_bot.model import ChatType, Scope
from feishu_bot.store.history import SPEAKER
from feishu_bot.store.quotes import CHAT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.model import InboundMessage
    from feishu_bot.store.work import HistoryRow

_MAX_NAME: Final = 40  # characters of a name
_ID_END: Final = 6  # characters of an id that stand for a name
_BLANKS: Final = re.compile(r"[\s\x00-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]+")


def is_shared(message: InboundMessage, scope: Scope) -> bool:
    """Say whether several people share the conversation that a message belongs to."""
    if message.conversation is not None or message.chat_type is ChatType.PRIVATE:
        return False
    return scope is Scope.CHAT or (scope is Scope.THREAD and message.platform_thread_id is not None)


def speaker(message: InboundMessage) -> str:
    """Return how the model is told who speaks: the name, or the end of the id where the platform names nobody.

    One line without a colon, so that no name can look like somebody else's words.
    """
    name = _BLANKS.sub(" ", message.sender_name).replace(":", "\uff1a").strip()[:_MAX_NAME]
    return name or f"user {message.sender_id[-_ID_END:]}"


def metadata(message: InboundMessage, lane_key: str) -> dict[str, Any]:
    """Return what is noted beside the words of a message, by the lane of its conversation."""
    if lane_key.startswith(("chat:", "thread:")):
        return {SPEAKER: speaker(message)}
    if lane_key.startswith("user:") and message.chat_type is not ChatType.PRIVATE:
        return {CHAT: message.chat_id}  # the conversation spans all groups of this person
    return {}


def question(message: InboundMessage, scope: Scope, model: str) -> tuple[str, int]:
    """Return the question as the model gets it, and its tokens."""
    text = message.text
    if is_shared(message, scope):
        text = f"{speaker(message)}: {text}"
    if message.quoted.strip():
        quote = "\n".join([f"> {line}" for line in message.quoted.strip().splitlines()])
        text = f"{quote}\n\n{text}"
    if text is message.text and message.tokens is not None:
        return text, message.tokens
    return text, count_tokens(text, model)


def with_speakers(history: Sequence[HistoryRow], model: str) -> Sequence[HistoryRow]:
    """Return the history with each speaker's name before the words."""
    return [
        row
        if row.speaker is None
        else row._replace(
            content=f"{row.speaker}: {row.content}", tokens=row.tokens + _name_tokens(row.speaker, model)
        )
        for row in history
    ]


@lru_cache(maxsize=10_000)
def _name_tokens(name: str, model: str) -> int:
    return count_tokens(f"{name}: ", model) + 1  # words may be cut otherwise behind a name
