"""Models, tokens and the agent that answers; and the agent for programs that bring their own way of messages.

The names here are imported when they are first asked for: who uses the conversation store alone never loads a web
client or a tokenizer.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from feishu_bot.ai.assistant import AIAgent, AIConfig, ConversationPersistenceConfig
    from feishu_bot.ai.conversation_store import PersistentConversationManager

__all__ = ["AIAgent", "AIConfig", "ConversationPersistenceConfig", "PersistentConversationManager"]

_HOMES: Final = MappingProxyType({
    "AIAgent": "feishu_bot.ai.assistant",
    "AIConfig": "feishu_bot.ai.assistant",
    "ConversationPersistenceConfig": "feishu_bot.ai.assistant",
    "PersistentConversationManager": "feishu_bot.ai.conversation_store",
})  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
