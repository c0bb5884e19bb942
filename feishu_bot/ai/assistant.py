"""The agent for programs of one's own: a user key and a text in, an answer out, both stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from feishu_bot.ai.conversation_store import PersistentConversationManager, check_text
from feishu_bot.config import AISettings as AIConfig
from feishu_bot.config import PersistenceSettings as ConversationPersistenceConfig
from feishu_bot.errors import ModelError

if TYPE_CHECKING:
    from types import TracebackType

    from feishu_bot.ai.agent import Agent
    from feishu_bot.ai.chat_model import ChatModel

__all__ = ["AIAgent", "AIConfig", "ConversationPersistenceConfig"]


class AIAgent:
    """Answers people with the configured model and remembers what was said.

    ``config`` is the ``ai`` part of the settings. ``store`` and ``model`` stand in for the ones it names; what is
    handed in is not closed here. Nothing is opened before the first question. Budgets are the server's: they do
    not hold here.
    """

    def __init__(
        self,
        config: AIConfig | None = None,
        *,
        store: PersistentConversationManager | None = None,
        model: ChatModel | None = None,
    ) -> None:
        self.config = config if config is not None else AIConfig()
        self._given_store = store
        self._given_model = model
        self._store = store
        self._agent: Agent | None = None
        self._opening = asyncio.Lock()

    async def chat(
        self, user_key: str, text: str, *, platform: str | None = None, chat_id: str | None = None
    ) -> str:
        """Return the model's answer; question and answer are stored in one transaction before it returns.

        The history of the user key's current conversation goes along. ``platform`` None is the key's first part.
        Raises ModelError when no model answers (the question alone is stored then), ConfigError when the model
        cannot be asked at all, StoreUnavailable and ValueError as the store does.
        """
        check_text(text, "text")
        agent, store = await self._open()
        conversation_id = None
        rows: list[tuple[str, str, int]] = []
        if store is not None:
            account = platform or user_key.partition(":")[0][:50] or "library"
            turns = self.config.conversation_persistence.max_history_turns
            record = await asyncio.to_thread(store.get_or_create, user_key, account, chat_id)
            conversation_id = record.id
            history = await asyncio.to_thread(store.load_history, conversation_id, turns)
            rows = [(m["role"], m["content"], m["tokens"]) for m in history]
        count = _count(text, self.config.model)
        answer = await agent.answer(agent.plan(rows, text, count), reserve=_unbounded)
        said = [{"role": "user", "content": text, "tokens": count}]
        if answer.text is not None:
            said.append({
                "role": "assistant",
                "content": answer.text,
                "tokens": answer.calls[-1].output_tokens,
                "metadata": {"model": answer.model, "finish_reason": answer.finish},
            })  # fmt: skip
        if store is not None and conversation_id is not None:
            await asyncio.to_thread(store.save_messages, conversation_id, said)
        if answer.text is None:
            raise answer.failure or ModelError("nonsense", "no model has answered")
        return answer.text

    async def close(self) -> None:
        """Close the connections that were opened here. May be called again."""
        agent, self._agent = self._agent, None
        if agent is not None and self._given_model is None:
            await agent.close()
        store, self._store = self._store, self._given_store
        if store is not None and self._given_store is None:
            await asyncio.to_thread(store.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self) -> tuple[Agent, PersistentConversationManager | None]:
        async with self._opening:
            if self._agent is None:
                self._agent = await asyncio.to_thread(self._make_agent)
            persistence = self.config.conversation_persistence
            if self._store is None and persistence.enabled:
                self._store = await asyncio.to_thread(PersistentConversationManager, persistence.db_url)
            return self._agent, self._store

    def _make_agent(self) -> Agent:
        # A web client and a tokenizer, which a program that only stores conversations need not load.
        from feishu_bot.ai.agent import Agent  # noqa: PLC0415  # see above
        from feishu_bot.ai.models import make_model  # noqa: PLC0415  # see above

        return Agent(self.config, model=self._given_model or make_model(self.config))


def _count(text: str, model: str) -> int:
    from feishu_bot.ai.tokens import count_tokens  # noqa: PLC0415  # as in _make_agent

    return count_tokens(text, model)


async def _unbounded(*, call: int, model: str, tokens: int, cost: int | None) -> None:
    """Reserve nothing: budgets are the server's."""
