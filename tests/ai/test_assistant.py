from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from feishu_bot.ai import AIAgent, AIConfig, ConversationPersistenceConfig
from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.errors import ConfigError, ModelError
from feishu_bot.testing.model import Behaviour, FakeModelServer

USER = "terminal:private:me"


@pytest.fixture
def store():
    with PersistentConversationManager("sqlite://") as opened:
        yield opened


async def test_the_agent_answers_and_stores_what_was_said(store):
    async with AIAgent(AIConfig(model="echo"), store=store) as agent:
        assert await agent.chat(USER, "hello") == "hello"
        assert await agent.chat(USER, "again", chat_id="c") == "again"
    conversation = store.get_conversation_by_user(USER)
    said = list(store.iter_messages(conversation.id))
    assert [(m.role, m.content) for m in said] == [
        ("user", "hello"),
        ("assistant", "hello"),
        ("user", "again"),
        ("assistant", "again"),
    ]
    assert all(m.tokens > 0 for m in said)
    assert said[1].get_metadata()["model"] == "echo"
    assert (conversation.platform, conversation.chat_id) == ("terminal", "c")


async def test_the_history_goes_along_to_the_model(store):
    async with FakeModelServer() as server:
        config = AIConfig(
            model="openai:gpt-4o", base_url=server.base_url, api_key="key", system_prompt="Be brief."
        )
        async with AIAgent(config, store=store) as agent:
            await agent.chat(USER, "first")
            await agent.chat(USER, "second")
        asked = server.requests[-1].body["messages"]
    assert [m["role"] for m in asked] == ["system", "user", "assistant", "user"]
    assert [asked[1]["content"], asked[3]["content"]] == ["first", "second"]


async def test_after_a_failed_call_the_question_alone_is_stored(store):
    async with FakeModelServer() as server:
        server.script(Behaviour("status", status=400), times=9)
        config = AIConfig(model="openai:gpt-4o", base_url=server.base_url, api_key="key")
        async with AIAgent(config, store=store) as agent:
            with pytest.raises(ModelError):
                await agent.chat(USER, "hello")
    conversation = store.get_conversation_by_user(USER)
    assert [(m.role, m.content) for m in store.iter_messages(conversation.id)] == [("user", "hello")]


async def test_the_agent_opens_the_database_that_its_configuration_names(tmp_path):
    url = f"sqlite:///{tmp_path}/named.db"
    config = AIConfig(conversation_persistence=ConversationPersistenceConfig(enabled=True, db_url=url))
    async with AIAgent(config) as agent:
        answers = await asyncio.gather(*(agent.chat(f"a:b:{n}", f"text {n}") for n in range(5)))
        assert answers == [f"text {n}" for n in range(5)]
    with PersistentConversationManager(url) as store:
        assert store.get_stats()["total_messages"] == 10


async def test_without_persistence_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = AIConfig(conversation_persistence=ConversationPersistenceConfig(enabled=False))
    async with AIAgent(config) as agent:
        assert await agent.chat(USER, "hello") == "hello"
    assert list(tmp_path.iterdir()) == []


async def test_an_agent_that_cannot_be_asked_says_so_with_the_first_question(store):
    agent = AIAgent(AIConfig(model="openai:gpt-4o"), store=store)
    with pytest.raises(ConfigError, match="api_key"):
        await agent.chat(USER, "hello")
    with pytest.raises(ValueError, match="NUL"):
        await agent.chat(USER, "nul\0")
    assert store.get_stats()["total_conversations"] == 0


def test_the_names_are_imported_without_a_web_client():
    program = "import sys; from feishu_bot.ai import AIAgent, AIConfig, ConversationPersistenceConfig as C\n"
    program += "AIAgent(AIConfig(conversation_persistence=C(enabled=True))); print('aiohttp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import feishu_bot.ai as package  # noqa: PLC0415  # the package itself is the subject

    with pytest.raises(AttributeError, match="Nothing"):
        _ = package.Nothing
