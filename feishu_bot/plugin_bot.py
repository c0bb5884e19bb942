"""The bot as commands and plugins see it: what they may ask the server for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from feishu_bot.model import make_key
from feishu_bot.push import chat_target, person_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from feishu_bot.hooks import BudgetView
    from feishu_bot.model import InboundMessage
    from feishu_bot.pipeline import Pipeline


class ChatBot:
    """What commands and plugins may ask the server for. ``sent`` is told of lanes with something to send."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Mapping[str, Any],
        *,
        name: str = "builtin",
        sent: Callable[[str], None] = lambda _lane: None,
    ) -> None:
        self._pipeline = pipeline
        self._name = name
        self._settings = settings
        self._sent = sent

    @property
    def language(self) -> str:
        return self._pipeline.language

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def local_time(self, instant_ms: int) -> str:
        return self._pipeline.local_time(instant_ms)

    async def budgets(self, message: InboundMessage) -> Sequence[BudgetView]:
        return await self._pipeline.budgets_of(message)

    async def send(
        self,
        platform: str,
        text: str,
        *,
        chat: str | None = None,
        user: str | None = None,
        key: str | None = None,
    ) -> None:
        if (chat is None) == (user is None):
            raise ValueError("send: expected one of chat and user")
        to = chat_target(chat) if chat is not None else person_target(platform, user or "")
        rows = self._pipeline.push_rows_of(
            platform, to, text, make_key("plugin", self._name, key or str(uuid4()))
        )
        await self._pipeline.push(*rows)
        self._sent(rows[0]["lane_key"])

    async def call(self, where: InboundMessage | str, action: str, /, **params: Any) -> Any:
        if isinstance(where, str):
            return await self._pipeline.callable_platform(where).call(action, params)
        self_id = str(where.extra.get("self_id") or "")
        return await self._pipeline.callable_platform(where.account).call(action, params, self_id=self_id)

    async def call_later(self, message: InboundMessage, action: str, /, **params: Any) -> None:
        row = self._pipeline.call_row(message, action, params)
        await self._pipeline.push(row)
        self._sent(row["lane_key"])
