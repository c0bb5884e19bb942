"""A user's threads, and a history that keeps itself in one of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from feishu_bot.state.models import (
    DEFAULT_LIMIT,
    DEFAULT_ORG,
    DEFAULT_USER,
    ChatMessage,
    ChatThread,
    CreateChatMessageRequest,
    CreateChatThreadRequest,
    Message,
)
from feishu_bot.state.repository import MockConversationRepository
from feishu_bot.store import values

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from feishu_bot.state.repository import ConversationRepository

T = TypeVar("T")


class StateManager:
    """The threads of a user in an organisation, one of them current.

    ``repository`` None is a new ``MockConversationRepository``.
    """

    def __init__(
        self,
        repository: ConversationRepository | None = None,
        user_id: str = DEFAULT_USER,
        org_id: str = DEFAULT_ORG,
    ) -> None:
        self.repository = MockConversationRepository() if repository is None else repository
        self.user_id = user_id
        self.org_id = org_id
        self.current_thread_id: str | None = None

    async def create_thread(
        self, name: str, user_id: str | None = None, org_id: str | None = None
    ) -> ChatThread:
        """Make a thread, make it the current one, and return it."""
        request = CreateChatThreadRequest(name, user_id or self.user_id, org_id or self.org_id)
        thread = await self.repository.create_thread(request)
        self.current_thread_id = thread.id
        return thread

    async def get_thread(self, thread_id: str) -> ChatThread | None:
        """Return a thread with its messages, or None."""
        return await self.repository.get_thread(thread_id)

    async def set_current_thread(self, thread_id: str) -> ChatThread:
        """Make a thread the current one and return it. ValueError for an unknown one."""
        thread = await self.repository.get_thread(thread_id)
        if thread is None:
            raise ValueError(f"Thread not found: {thread_id}")
        self.current_thread_id = thread.id
        return thread

    async def get_current_thread(self) -> ChatThread | None:
        """Return the current thread, or None."""
        return None if self.current_thread_id is None else await self.get_thread(self.current_thread_id)

    async def list_threads(
        self, user_id: str | None = None, org_id: str | None = None, limit: int = DEFAULT_LIMIT
    ) -> list[ChatThread]:
        """Return the user's threads, the one used last first."""
        return await self.repository.list_threads(user_id or self.user_id, org_id or self.org_id, limit)

    async def delete_thread(self, thread_id: str | None = None) -> bool:
        """Remove a thread and its messages, the current one without an id; say whether there was one."""
        target = self._target(thread_id)
        if target == self.current_thread_id:
            self.current_thread_id = None
        return await self.repository.delete_thread(target)

    async def add_message(
        self,
        role: str,
        content: str,
        thread_id: str | None = None,
        sender_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ChatMessage:
        """Store a message and return it. A user message without ``sender_id`` is the thread's user's.

        ValueError without a thread, for an unknown one, and for an unknown role.
        """
        said = {"type": "text", "text": content, "metadata": dict(metadata or {})}
        return await self.repository.create_message(
            CreateChatMessageRequest(self._target(thread_id), role, said, sender_id)
        )

    async def get_messages(
        self, thread_id: str | None = None, limit: int | None = None, offset: int = 0
    ) -> list[ChatMessage]:
        """Return the messages of a thread, oldest first."""
        return await self.repository.get_messages(self._target(thread_id), limit, offset)

    async def clear_thread(self, thread_id: str | None = None) -> int:
        """Remove a thread's messages, keep the thread, and return how many there were."""
        return await self.repository.clear_thread(self._target(thread_id))

    def convert_to_conversation_messages(self, chat_messages: Sequence[ChatMessage]) -> list[Message]:
        """Return stored messages as models are asked with them."""
        return [
            Message(m.sender_role, m.text, dict(m.content.get("metadata") or {}), m.created_at)
            for m in chat_messages
        ]

    async def load_conversation_history(self, thread_id: str | None = None) -> list[Message]:
        """Return all messages of a thread as models are asked with them."""
        return self.convert_to_conversation_messages(await self.get_messages(thread_id))

    def _target(self, thread_id: str | None) -> str:
        target = thread_id or self.current_thread_id
        if target is None:
            raise ValueError("No active thread")
        return target


class ConversationHistory:
    """The newest messages of a conversation in memory, and with ``persist_to_db`` in the manager's current thread.

    At most ``max_messages`` messages of ``max_tokens`` tokens together are held (the newest one always); what
    falls out stays stored.
    """

    def __init__(
        self,
        max_messages: int = 100,
        max_tokens: int = 8000,
        state_manager: StateManager | None = None,
        persist_to_db: bool = False,  # noqa: FBT001, FBT002  # the seed's signature
    ) -> None:
        self.max_messages = values.check_number(max_messages, "max_messages", least=1)
        self.max_tokens = values.check_number(max_tokens, "max_tokens")
        self.state_manager = state_manager
        self.persist_to_db = persist_to_db
        self.messages: list[Message] = []

    def add_user_message(self, content: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Add what the user said; it is on disk when this returns."""
        self.add_message("user", content, metadata)

    def add_assistant_message(self, content: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Add what the model said; it is on disk when this returns."""
        self.add_message("assistant", content, metadata)

    def add_system_message(self, content: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Add an instruction; it is on disk when this returns."""
        self.add_message("system", content, metadata)

    def add_message(self, role: str, content: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Add a message of any role. ValueError where it cannot be stored; it is not held then either."""
        values.new_message(role, content, 0, metadata)
        manager = self.state_manager
        if self.persist_to_db and manager is not None:
            stored = _wait_for(manager.add_message(role, content, metadata=metadata))
            self.messages += manager.convert_to_conversation_messages([stored])
        else:
            self.messages.append(Message(role, content, dict(metadata or {})))
        self._trim()

    def clear(self) -> None:
        """Forget what is held in memory; what is stored stays."""
        self.messages.clear()

    async def load_from_db(self, thread_id: str | None = None) -> list[Message]:
        """Hold the newest messages of a stored thread, make it the current one, and return them."""
        if self.state_manager is None:
            raise ValueError("there is no state_manager to load from")
        if thread_id is not None:
            await self.state_manager.set_current_thread(thread_id)
        self.messages = await self.state_manager.load_conversation_history()
        self._trim()
        return self.messages

    def _trim(self) -> None:
        from feishu_bot.ai.tokens import count_tokens  # noqa: PLC0415  # half a second that few programs need

        kept, used = 0, 0
        for message in reversed(self.messages):
            used += count_tokens(message.content, "echo")
            if kept and (kept >= self.max_messages or used > self.max_tokens):
                break
            kept += 1
        del self.messages[: len(self.messages) - kept]


def _wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from synchronous code, also where an event loop is running already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
