from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime

import pytest

from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.errors import ConfigError
from feishu_bot.state import (
    ChatMessage,
    ConversationHistory,
    CreateChatMessageRequest,
    DatabaseConfig,
    MockConversationRepository,
    PostgreSQLConversationRepository,
    SQLConversationRepository,
    StateConfig,
    StateManager,
    create_repository,
)


@pytest.fixture
def repository(db_url):
    opened = SQLConversationRepository(db_url)
    yield opened
    opened.close()


@pytest.fixture
def manager(repository):
    return StateManager(repository=repository, user_id="alice", org_id="acme_corp")


async def test_a_thread_keeps_what_was_said(manager):
    thread = await manager.create_thread("Product Planning")
    assert uuid.UUID(thread.id)
    assert (thread.user_id, thread.org_id, thread.name) == ("alice", "acme_corp", "Product Planning")
    asked = await manager.add_message("user", "What first?", metadata={"tags": ["a"]})
    await manager.add_message("assistant", "你好", sender_id="bot-1")
    messages = await manager.get_messages()
    assert messages[0] == asked
    assert asked.content == {"type": "text", "text": "What first?", "metadata": {"tags": ["a"]}}
    assert [(m.sender_role, m.text, m.sender_id) for m in messages] == [
        ("user", "What first?", "alice"),
        ("assistant", "你好", "bot-1"),
    ]
    assert all(isinstance(m.id, str) and m.chat_thread_id == thread.id for m in messages)
    found = await manager.get_thread(thread.id)
    assert [m.text for m in found.chat_messages] == ["What first?", "你好"]
    assert found.updated_at >= found.created_at
    assert found.created_at.tzinfo is UTC
    history = await manager.load_conversation_history()
    assert [(m.role, m.content) for m in history] == [("user", "What first?"), ("assistant", "你好")]


async def test_threads_are_kept_apart_and_listed_newest_first(manager):
    one = await manager.create_thread("one")
    two = await manager.create_thread("two")
    assert manager.current_thread_id == two.id
    await manager.set_current_thread(one.id)
    await manager.add_message("user", "in one")
    await manager.add_message("user", "in two", thread_id=two.id)
    await manager.add_message("user", "in one again")
    assert [t.name for t in await manager.list_threads()] == ["one", "two"]
    assert [t.name for t in await manager.list_threads(limit=1)] == ["one"]
    assert [m.text for m in await manager.get_messages(two.id)] == ["in two"]
    assert (await manager.get_current_thread()).id == one.id
    assert await manager.list_threads(org_id="another") == []
    await manager.create_thread("bob's", user_id="bob")
    assert {t.name for t in await manager.repository.list_threads(org_id="acme_corp")} == {
        "one",
        "two",
        "bob's",
    }


async def test_messages_are_read_in_pages(manager):
    await manager.create_thread("t")
    for n in range(7):
        await manager.add_message("user", f"{n}")
    assert [m.text for m in await manager.get_messages(limit=3, offset=2)] == ["2", "3", "4"]
    assert [m.text for m in await manager.get_messages(offset=5)] == ["5", "6"]
    assert await manager.get_messages(offset=50) == []


async def test_clear_keeps_the_thread_and_delete_takes_it(manager):
    thread = await manager.create_thread("t")
    for n in range(3):
        await manager.add_message("user", f"{n}")
    message = (await manager.get_messages())[0]
    assert await manager.repository.delete_message(message.id)
    assert not await manager.repository.delete_message(message.id)
    assert not await manager.repository.delete_message("no id")
    assert await manager.clear_thread() == 2
    assert await manager.get_messages() == []
    renamed = await manager.repository.update_thread(thread.id, "renamed")
    assert renamed.name == "renamed"
    assert await manager.delete_thread()
    assert await manager.get_current_thread() is None
    assert await manager.get_thread(thread.id) is None
    assert not await manager.delete_thread(thread.id)
    assert await manager.repository.update_thread(thread.id, "x") is None


async def test_what_is_not_there_is_none_or_a_value_error(manager):
    unknown = str(uuid.uuid4())
    assert await manager.get_thread(unknown) is None
    assert await manager.get_thread("not a uuid \0") is None
    for call in (
        manager.set_current_thread(unknown),
        manager.add_message("user", "x", thread_id=unknown),
        manager.get_messages(unknown),
        manager.clear_thread(unknown),
    ):
        with pytest.raises(ValueError, match=f"Thread not found: {unknown}"):
            await call
    for call in (manager.add_message("user", "x"), manager.get_messages(), manager.clear_thread()):
        with pytest.raises(ValueError, match=r"^No active thread$"):
            await call
    await manager.create_thread("t")
    for role, content in (("robot", "x"), ("user", "\0"), ("user", 7)):
        with pytest.raises(ValueError, match=r"role|content"):
            await manager.add_message(role, content)
    with pytest.raises(ValueError, match="of type text"):
        await manager.repository.create_message(
            CreateChatMessageRequest(manager.current_thread_id, "user", {"type": "image"})
        )
    assert await manager.get_messages() == []


async def test_another_process_resumes_the_thread_and_the_library_sees_it(db_url, manager):
    thread = await manager.create_thread("Travel")
    await manager.add_message("user", "Plan a trip to Tokyo")
    other = SQLConversationRepository(db_url)
    resumed = StateManager(repository=other)
    await resumed.set_current_thread(thread.id)
    await resumed.add_message("user", "And the weather?")
    other.close()
    assert len(await manager.get_messages()) == 2
    with PersistentConversationManager(db_url) as library:
        record = library.get_conversation_by_public_id(thread.id)
        assert (record.user_key, record.tenant_id, record.title) == ("alice", "acme_corp", "Travel")
        assert record.message_count == 2
        assert library.get_or_create("alice", "state", tenant_id="acme_corp").id == record.id


async def test_many_tasks_at_once_lose_nothing(manager):
    await manager.create_thread("t")
    await asyncio.gather(*(manager.add_message("user", f"{n}") for n in range(40)))
    assert {m.text for m in await manager.get_messages()} == {f"{n}" for n in range(40)}


# --------------------------------------------------------------------------------------------- history


async def test_a_history_keeps_itself(manager):
    thread = await manager.create_thread("t")
    history = ConversationHistory(state_manager=manager, persist_to_db=True)
    history.add_user_message("Hello!")  # on disk when it returns, also inside a running event loop
    history.add_assistant_message("Hi there!", {"model": "echo"})
    assert [m.text for m in await manager.get_messages()] == ["Hello!", "Hi there!"]
    loaded = await ConversationHistory(state_manager=manager).load_from_db(thread.id)
    assert [(m.role, m.content) for m in loaded] == [("user", "Hello!"), ("assistant", "Hi there!")]
    assert loaded[1].metadata == {"model": "echo"}


async def test_a_history_without_a_thread_or_a_database_says_so_or_stays_in_memory():
    history = ConversationHistory(state_manager=StateManager(), persist_to_db=True)
    with pytest.raises(ValueError, match="No active thread"):
        history.add_user_message("x")
    assert history.messages == []
    alone = ConversationHistory()
    alone.add_system_message("be brief")
    alone.add_user_message("x")
    assert [m.role for m in alone.messages] == ["system", "user"]
    with pytest.raises(ValueError, match="role"):
        alone.add_message("robot", "x")
    with pytest.raises(ValueError, match="state_manager"):
        await alone.load_from_db("x")
    alone.clear()
    assert alone.messages == []


def test_a_history_holds_the_newest_messages_within_both_bounds():
    history = ConversationHistory(max_messages=3, max_tokens=8)
    for n in range(5):
        history.add_user_message(f"{n}")
    assert [m.content for m in history.messages] == ["2", "3", "4"]
    history.add_user_message("one two three four five six seven")
    assert [m.content for m in history.messages] == ["4", "one two three four five six seven"]
    history.add_user_message("a much longer message than the bound allows at all, by far")
    assert len(history.messages) == 1


# --------------------------------------------------------------------------------------- configuration


async def test_the_mock_is_a_database_of_its_own():
    one, two = StateManager(), StateManager()
    assert isinstance(one.repository, MockConversationRepository)
    assert (one.user_id, one.org_id) == ("default_user", "default_org")
    await one.create_thread("t")
    assert len(await one.list_threads()) == 1
    assert await two.list_threads() == []
    one.repository.close()
    two.repository.close()


def test_the_configuration_is_read_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert StateConfig.from_env() == StateConfig()
    assert create_repository(StateConfig().database).__class__ is MockConversationRepository
    (tmp_path / ".env").write_text("DB_BACKEND=postgresql\nDB_NAME=below\nDEFAULT_ORG_ID=org\nDB_PORT=1\n")
    monkeypatch.setenv("DB_NAME", "my db")
    monkeypatch.setenv("DB_USER", "me")
    monkeypatch.setenv("DB_PASSWORD", "p@ss")
    monkeypatch.setenv("DEFAULT_USER_ID", "user")
    monkeypatch.setenv("ENABLE_DB_PERSISTENCE", "TRUE")
    monkeypatch.setenv("DB_POOL_SIZE", "2")
    config = StateConfig.from_env()
    assert (config.user_id, config.org_id, config.enable_persistence) == ("user", "org", True)
    assert config.database.url == "postgresql://me:p%40ss@localhost:1/my%20db"
    assert (config.database.pool_size, config.database.max_overflow) == (2, 10)
    assert "p@ss" not in repr(config)
    monkeypatch.setenv("CONVERSATION_DB_URL", "sqlite:///x.db")
    assert StateConfig.from_env().database.url == "sqlite:///x.db"
    monkeypatch.setenv("DB_PORT", "many")
    with pytest.raises(ValueError, match="DB_PORT"):
        StateConfig.from_env()
    (tmp_path / ".env").write_text("no assignment\n")
    with pytest.raises(ConfigError):
        StateConfig.from_env()


async def test_a_repository_is_made_for_each_kind_of_database(db_url):
    made = create_repository(DatabaseConfig(connection_string=db_url, pool_size=2))
    assert isinstance(made, PostgreSQLConversationRepository) == db_url.startswith("postgresql")
    assert await made.list_threads() == []
    made.close()
    with pytest.raises(ValueError, match="postgresql"):
        PostgreSQLConversationRepository("sqlite://")
    with pytest.raises(ValueError, match="mongodb"):
        create_repository(DatabaseConfig(backend="mongodb", connection_string="mongodb://x/y"))


def test_messages_are_plain_values():
    now = datetime.now(UTC)
    message = ChatMessage("1", "t", "user", {"type": "text", "text": "x"}, None, now, now)
    assert StateManager.convert_to_conversation_messages(None, [message])[0].content == "x"
