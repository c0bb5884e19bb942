"""Threads and messages as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

DEFAULT_USER: Final = "default_user"
DEFAULT_ORG: Final = "default_org"
DEFAULT_LIMIT: Final = 100


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message. ``content`` is ``{"type": "text", "text": ..., "metadata": {...}}``."""

    id: str
    chat_thread_id: str
    sender_role: str
    content: dict[str, Any]
    sender_id: str | None
    created_at: datetime
    updated_at: datetime

    @property
    def text(self) -> str:
        return str(self.content.get("text", ""))


@dataclass(frozen=True, slots=True)
class ChatThread:
    """One thread. ``chat_messages`` is filled by ``get_thread`` and empty in lists."""

    id: str
    user_id: str
    org_id: str
    name: str
    created_at: datetime
    updated_at: datetime
    chat_messages: list[ChatMessage] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CreateChatThreadRequest:
    """What a new thread is made from."""

    name: str
    user_id: str = DEFAULT_USER
    org_id: str = DEFAULT_ORG


@dataclass(frozen=True, slots=True)
class CreateChatMessageRequest:
    """What a new message is made from. ``content`` is a text, or a dict with ``text`` and ``metadata``."""

    chat_thread_id: str
    sender_role: str
    content: str | Mapping[str, Any]
    sender_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message as models are asked with."""

    role: str
    content: str
    metadata: dict[str, Any] = field(default_factory=dict)
    timestamp: datetime | None = None
