"""A bot, a message and a context, as hooks and commands get them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from feishu_bot.hooks import Context, ConversationView, StoredMessage
from feishu_bot.model import ChatType, InboundMessage, Scope

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from feishu_bot.hooks import BudgetView, Command


@dataclass
class PlainBot:
    language: str = "en"
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: Sequence[BudgetView] = ()
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def local_time(self, instant_ms: int) -> str:
        return datetime.fromtimestamp(instant_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")

    async def budgets(self, message: InboundMessage) -> Sequence[BudgetView]:
        return self.views

    async def call(self, where: InboundMessage | str, action: str, /, **params: Any) -> Any:
        self.calls.append((action, params))

    async def call_later(self, message: InboundMessage, action: str, /, **params: Any) -> None:
        self.calls.append((action, params))


def context(
    text: str = "",
    *,
    bot: PlainBot | None = None,
    commands: Sequence[Command] = (),
    said: Sequence[tuple[str, str]] = (),
    is_admin: bool = False,
    chat_type: ChatType = ChatType.PRIVATE,
    new: bool = False,
    scope: Scope = Scope.USER_IN_CHAT,
) -> Context:
    """Return what a hook is told; ``said`` is the history, ``new``: there is no conversation yet."""
    message = InboundMessage("web", "m1", text=text, sender_id="ann", sender_name="Ann", chat_type=chat_type)
    return Context(
        bot=bot or PlainBot(),
        message=message,
        conversation=None if new else ConversationView(1, "title", len(said), 10 * len(said)),
        history=[StoredMessage(role, content, 10) for role, content in said],
        commands=commands,
        is_admin=is_admin,
        scope=scope,
    )
