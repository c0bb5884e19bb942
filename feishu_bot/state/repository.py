"""Where threads are kept: an interface, and one implementation over the product's own tables."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, TypeVar

from feishu_bot.errors import ConversationNotFound, MessageNotFound
from feishu_bot.state.models import (
    DEFAULT_LIMIT,
    ChatMessage,
    ChatThread,
    CreateChatMessageRequest,
    CreateChatThreadRequest,
)
from feishu_bot.store import conversations, threads, values
from feishu_bot.store.transactions import MEMORY, Transactions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from feishu_bot.state.config import DatabaseConfig
    from feishu_bot.store.work import StoredRow, Transaction

_PLATFORM: Final = "state"
_MOST: Final = 2**31

T = TypeVar("T")


class ConversationRepository(ABC):
    """Where threads and messages are kept. Everything here may be called from any event loop."""

    @abstractmethod
    async def create_thread(self, request: CreateChatThreadRequest) -> ChatThread: ...

    @abstractmethod
    async def get_thread(self, thread_id: str) -> ChatThread | None: ...

    @abstractmethod
    async def list_threads(
        self, user_id: str | None = None, org_id: str | None = None, limit: int = DEFAULT_LIMIT
    ) -> list[ChatThread]: ...

    @abstractmethod
    async def update_thread(self, thread_id: str, name: str) -> ChatThread | None: ...

    @abstractmethod
    async def delete_thread(self, thread_id: str) -> bool: ...

    @abstractmethod
    async def create_message(self, request: CreateChatMessageRequest) -> ChatMessage: ...

    @abstractmethod
    async def get_messages(
        self, thread_id: str, limit: int | None = None, offset: int = 0
    ) -> list[ChatMessage]: ...

    @abstractmethod
    async def delete_message(self, message_id: str) -> bool: ...

    @abstractmethod
    async def clear_thread(self, thread_id: str) -> int: ...


class SQLConversationRepository(ConversationRepository):
    """Threads in one database: SQLite, PostgreSQL or MariaDB, on threads of their own beside the event loop.

    Raises StoreUnavailable, a ValueError, when the database cannot be used.
    """

    def __init__(self, connection_string: str, *, pool_size: int = 5, max_overflow: int = 10) -> None:
        self._database = Transactions(connection_string, pool_size=pool_size, max_overflow=max_overflow)
        try:
            self._database.prepare()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close all connections. May be called again."""
        self._database.close()

    async def create_thread(self, request: CreateChatThreadRequest) -> ChatThread:
        """Make a thread and return it."""
        name = values.check_key(request.name, "name", longest=values.MAX_TITLE_LENGTH)
        user = values.check_key(request.user_id, "user_id")
        org = values.check_key(request.org_id, "org_id")

        def create(tx: Transaction) -> StoredRow:
            return threads.create(tx, user, name, platform=_PLATFORM, tenant_id=org, user_id=user)

        return _thread(await self._write(create))

    async def get_thread(self, thread_id: str) -> ChatThread | None:
        """Return a thread with all its messages, or None."""

        def find(tx: Transaction) -> tuple[StoredRow | None, list[StoredRow]]:
            row = conversations.get_by_public_id(tx, thread_id)
            return row, [] if row is None else conversations.page(tx, row["id"], most=_MOST)

        if not _may_exist(thread_id):
            return None
        row, messages = await self._read(find)
        return None if row is None else _thread(row, messages)

    async def list_threads(
        self, user_id: str | None = None, org_id: str | None = None, limit: int = DEFAULT_LIMIT
    ) -> list[ChatThread]:
        """Return threads without their messages, the one used last first."""
        user = None if user_id is None else values.check_key(user_id, "user_id")
        org = None if org_id is None else values.check_key(org_id, "org_id")
        most = values.check_number(limit, "limit", most=_MOST)
        rows = await self._read(lambda tx: threads.list_threads(tx, user, limit=most, tenant_id=org))
        return [_thread(row) for row in rows]

    async def update_thread(self, thread_id: str, name: str) -> ChatThread | None:
        """Rename a thread and return it, or None."""
        title = values.check_key(name, "name", longest=values.MAX_TITLE_LENGTH)
        row = await self._change(thread_id, lambda tx, number: threads.rename(tx, number, title))
        return None if row is None else _thread(row)

    async def delete_thread(self, thread_id: str) -> bool:
        """Remove a thread and its messages; say whether there was one."""

        def hide(tx: Transaction, number: int) -> int:
            conversations.hide(tx, number)
            return number

        number = await self._change(thread_id, hide)
        if number is None:
            return False
        while await self._write(lambda tx: conversations.remove_piece(tx, number)):
            pass
        return True

    async def create_message(self, request: CreateChatMessageRequest) -> ChatMessage:
        """Store a message and return it. ValueError for an unknown thread or role."""
        content = request.content
        text, metadata = (content, None) if isinstance(content, str) else _parts(content)
        message = values.new_message(request.sender_role, text, 0, metadata, sender_id=request.sender_id)
        rows = await self._change(
            request.chat_thread_id, lambda tx, number: conversations.append(tx, number, [message])
        )
        if rows is None:
            raise ValueError(f"Thread not found: {request.chat_thread_id}")
        return _message(request.chat_thread_id, rows[0])

    async def get_messages(
        self, thread_id: str, limit: int | None = None, offset: int = 0
    ) -> list[ChatMessage]:
        """Return messages, oldest first. ValueError for an unknown thread."""
        most = _MOST if limit is None else values.check_number(limit, "limit", most=_MOST)
        skip = values.check_number(offset, "offset", most=_MOST)

        def find(tx: Transaction) -> list[StoredRow] | None:
            row = conversations.get_by_public_id(tx, thread_id)
            return None if row is None else conversations.page(tx, row["id"], most=most, skip=skip)

        rows = await self._read(find) if _may_exist(thread_id) else None
        if rows is None:
            raise ValueError(f"Thread not found: {thread_id}")
        return [_message(thread_id, row) for row in rows]

    async def delete_message(self, message_id: str) -> bool:
        """Remove a message; say whether there was one."""
        if not message_id.isascii() or not message_id.isdecimal() or len(message_id) > 18:  # noqa: PLR2004  # digits of any id
            return False
        try:
            await self._write(lambda tx: threads.delete_message(tx, int(message_id)))
        except MessageNotFound:
            return False
        return True

    async def clear_thread(self, thread_id: str) -> int:
        """Remove the messages of a thread and return how many there were. ValueError for an unknown thread."""
        cleared = await self._change(thread_id, lambda tx, number: (number, conversations.clear(tx, number)))
        if cleared is None:
            raise ValueError(f"Thread not found: {thread_id}")
        number, count = cleared
        while await self._write(lambda tx: conversations.remove_cleared(tx, number)):
            pass
        return count

    async def _write(self, function: Callable[[Transaction], T]) -> T:
        return await asyncio.to_thread(self._database.write, function)

    async def _read(self, function: Callable[[Transaction], T]) -> T:
        return await asyncio.to_thread(self._database.read, function)

    async def _change(self, thread_id: str, function: Callable[[Transaction, int], T]) -> T | None:
        """Run a change of the thread in one transaction; None if there is no such thread."""

        def change(tx: Transaction) -> T | None:
            row = conversations.get_by_public_id(tx, thread_id)
            return None if row is None else function(tx, row["id"])

        if not _may_exist(thread_id):
            return None
        try:
            return await self._write(change)
        except ConversationNotFound:
            return None


class MockConversationRepository(SQLConversationRepository):
    """A database of its own for tests and demonstrations, gone with the object; safe for threads."""

    def __init__(self) -> None:
        super().__init__(MEMORY)


class PostgreSQLConversationRepository(SQLConversationRepository):
    """Threads in PostgreSQL, for any number of processes and machines."""

    def __init__(self, connection_string: str, *, pool_size: int = 5, max_overflow: int = 10) -> None:
        if not connection_string.startswith(("postgresql:", "postgresql+", "postgres:")):
            raise ValueError("connection_string must begin with postgresql://")
        super().__init__(connection_string, pool_size=pool_size, max_overflow=max_overflow)


def create_repository(config: DatabaseConfig) -> ConversationRepository:
    """Return the repository that a configuration names. Raises StoreUnavailable, a ValueError."""
    url = config.url
    if url == MEMORY:
        return MockConversationRepository()
    pool = {"pool_size": config.pool_size, "max_overflow": config.max_overflow}
    if url.startswith("postgres"):
        return PostgreSQLConversationRepository(url, **pool)
    return SQLConversationRepository(url, **pool)


def _may_exist(thread_id: str) -> bool:
    """Say whether a thread can have this id at all."""
    try:
        values.check_key(thread_id, "thread_id")
    except ValueError:
        return False
    return True


def _parts(content: Mapping[str, Any]) -> tuple[object, Mapping[str, Any] | None]:
    if content.get("type", "text") != "text":
        raise ValueError(f"content must be of type text, not {content.get('type')!r}")
    return content.get("text"), content.get("metadata")


def _thread(row: StoredRow, messages: Iterable[StoredRow] = ()) -> ChatThread:
    return ChatThread(
        id=row["public_id"],
        user_id=row["user_key"],
        org_id=row["tenant_id"],
        name=row["title"] or "",
        created_at=row["created_at"],
        updated_at=row["last_activity"],
        chat_messages=[_message(row["public_id"], message) for message in messages],
    )


def _message(thread_id: str, row: StoredRow) -> ChatMessage:
    return ChatMessage(
        id=str(row["id"]),
        chat_thread_id=thread_id,
        sender_role=row["role"],
        content={
            "type": "text",
            "text": row["content"],
            "metadata": values.load_object(row["metadata_json"]),
        },
        sender_id=row["sender_id"],
        created_at=row["timestamp"],
        updated_at=row["edited_at"] or row["timestamp"],
    )
