"""How the bot behaves in each chat: what holds everywhere, and what ``chats`` says of some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from feishu_bot.access import applies

if TYPE_CHECKING:
    from feishu_bot.config import BotSettings
    from feishu_bot.config.settings import ChatSettings
    from feishu_bot.model import InboundMessage

_OWN: Final = ("scope", "language", "require_at_in_groups")  # what a chat may have otherwise


class Chats:
    """The ``chat`` settings as they hold in each chat; of the rules in ``chats`` the first that matches wins."""

    def __init__(self, settings: BotSettings) -> None:
        self._general = settings.chat
        self._rules = []
        for rule in settings.chats:
            own = {name: value for name in _OWN if (value := getattr(rule, name)) is not None}
            self._rules.append((rule.match, settings.chat.model_copy(update=own)))

    def of(self, message: InboundMessage) -> ChatSettings:
        """Return what holds in the chat of a message."""
        for match, chat in self._rules:
            if applies(match, message):
                return chat
        return self._general

    @property
    def all_require_mention(self) -> bool:
        """Whether no group is answered where the bot is not mentioned."""
        return self._general.require_at_in_groups and all(c.require_at_in_groups for _, c in self._rules)
