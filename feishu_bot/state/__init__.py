"""Threads and messages for asyncio programs: a small asynchronous face of the same tables.

::

    state_manager = StateManager(repository=MockConversationRepository(), user_id="alice", org_id="acme_corp")
    thread = await state_manager.create_thread("Product planning")
    await state_manager.add_message("user", "What should we build first?")
    history = await state_manager.load_conversation_history()

A thread is a conversation: its id is the conversation's public id, its user the user key, its organisation the
tenant. What is done here is seen by ``PersistentConversationManager``, and the other way round.
"""

from feishu_bot.state.config import DatabaseConfig, StateConfig
from feishu_bot.state.manager import ConversationHistory, StateManager
from feishu_bot.state.models import (
    ChatMessage,
    ChatThread,
    CreateChatMessageRequest,
    CreateChatThreadRequest,
    Message,
)
from feishu_bot.state.repository import (
    ConversationRepository,
    MockConversationRepository,
    PostgreSQLConversationRepository,
    SQLConversationRepository,
    create_repository,
)

__all__ = [
    "ChatMessage",
    "ChatThread",
    "ConversationHistory",
    "ConversationRepository",
    "CreateChatMessageRequest",
    "CreateChatThreadRequest",
    "DatabaseConfig",
    "Message",
    "MockConversationRepository",
    "PostgreSQLConversationRepository",
    "SQLConversationRepository",
    "StateConfig",
    "StateManager",
    "create_repository",
]
