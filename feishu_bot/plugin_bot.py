"""What commands and plugins may ask the server for: the ``bot`` of their hooks."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import orjson

from feishu_bot.errors import Undeliverable
from feishu_bot.model import Target, make_key
from feishu_bot.parts import CALL, part_payload, storable
from feishu_bot.push import chat_target, person_target, push_rows
from feishu_bot.store import outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from feishu_bot.hooks import BudgetView
    from feishu_bot.model import InboundMessage
    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.store import Store


class Asked(Protocol):
    """Who knows what plugins ask about."""

    @property
    def language(self) -> str: ...
    @property
    def max_message_length(self) -> int: ...
    def local_time(self, instant_ms: int) -> str: ...
    async def budgets_of(self, message: InboundMessage) -> Sequence[BudgetView]: ...


class ChatBot:
    """The ``bot`` of one plugin: ``name``, and its own ``settings``. ``sent`` is told of lanes with something to send."""

    def __init__(
        self,
        asked: Asked,
        store: Store,
        platforms: Mapping[str, Platform],
        settings: Mapping[str, Any],
        *,
        name: str = "builtin",
        sent: Callable[[str], None] = lambda _lane: None,
    ) -> None:
        self._asked = asked
        self._store = store
        self._platforms = platforms
        self._settings = settings
        self._name = name
        self._sent = sent

    @property
    def language(self) -> str:
        return self._asked.language

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def local_time(self, instant_ms: int) -> str:
        return self._asked.local_time(instant_ms)

    async def budgets(self, message: InboundMessage) -> Sequence[BudgetView]:
        return await self._asked.budgets_of(message)

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
        account = self._platforms.get(platform)
        if account is None or account.pull:
            raise Undeliverable(f"{platform} is no account that is enabled and can send")
        if not text.strip():
            raise Undeliverable("the text is empty")
        rows = push_rows(
            platform,
            account,
            source=make_key("plugin", self._name, key or str(uuid4())),
            target=chat_target(chat) if chat is not None else person_target(platform, user or ""),
            text=storable(text),
            max_chars=self._asked.max_message_length,
        )
        await self._push(*rows)

    async def call(self, where: InboundMessage | str, action: str, /, **params: Any) -> Any:
        if isinstance(where, str):
            return await self._callable(where).call(action, params)
        self_id = str(where.extra.get("self_id") or "")
        return await self._callable(where.account).call(action, params, self_id=self_id)

    async def call_later(self, message: InboundMessage, action: str, /, **params: Any) -> None:
        self._callable(message.account)
        call = orjson.dumps({"action": action, "params": params}, option=orjson.OPT_SORT_KEYS)
        digest = hashlib.sha256(f"{message.event_key}\n".encode() + call).hexdigest()[:40]
        source = make_key("call", message.account, digest)
        own = {name: value for name, value in message.extra.items() if name == "self_id"}
        target = replace(Target.of(message), reply_to=None, extra=own)
        await self._push(
            {
                "source": source,
                "kind": CALL,
                "part": 0,
                "lane_key": source,
                "account": message.account,
                "payload": part_payload(target, call.decode()),
                "reply_before": None,
            }
        )

    def _callable(self, account: str) -> Platform:
        """Return an account on which plugins may make calls. Raises Undeliverable with the reason."""
        platform = self._platforms.get(account)
        if platform is None:
            raise Undeliverable(f"{account} is no account that is enabled")
        if not platform.takes_calls:
            raise Undeliverable(f"plugins cannot make calls on {account}, which is of type {platform.name}")
        return platform

    async def _push(self, *rows: dict[str, Any]) -> None:
        await self._store.run(lambda tx: outbox.push(tx, rows))
        self._sent(rows[0]["lane_key"])
