"""For how long a conversation is kept without activity: one number of days, and rules for some chats."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple, Self

from feishu_bot.model import ChatType

if TYPE_CHECKING:
    from feishu_bot.config import BotSettings, ChatMatchSettings

_SHARED = (
    "chat"  # stands for the chat type in the user key of a conversation that a whole group or channel shares
)


class Rule(NamedTuple):
    """Days for the conversations that ``match`` names; ``days`` None: for ever."""

    match: ChatMatchSettings | None
    days: int | None


@dataclass(frozen=True, slots=True)
class Retention:
    """Days without activity after which conversations are removed; None: never. The first rule that matches wins."""

    days: int | None
    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, settings: BotSettings, days: int | None = None) -> Self:
        """Return what a configuration says: ``schedule.retention`` first, then ``chats``, then ``cleanup_days``.

        ``days`` stands in for ``cleanup_days``; 0 is for ever, here and in the configuration.
        """
        default = settings.ai.conversation_persistence.cleanup_days if days is None else days
        rules = [Rule(rule.match, rule.days) for rule in settings.schedule.retention]
        rules += [
            Rule(chat.match, default if chat.cleanup_days is None else chat.cleanup_days)
            for chat in settings.chats
        ]
        return cls(default or None, tuple(Rule(match, kept or None) for match, kept in rules))

    def days_of(self, platform: str, chat_id: str | None, user_key: str) -> int | None:
        """Return the days of a conversation; None: it is kept for ever."""
        for rule in self.rules:
            if rule.match is None or _matches(rule.match, platform, chat_id, user_key):
                return rule.days
        return self.days

    @property
    def shortest(self) -> int | None:
        """The least number of days after which any conversation may go; None: all are kept for ever."""
        days = [kept for kept in (self.days, *(rule.days for rule in self.rules)) if kept is not None]
        return min(days, default=None)


def _matches(match: ChatMatchSettings, platform: str, chat_id: str | None, user_key: str) -> bool:
    return (
        (match.platform is None or fnmatchcase(platform, match.platform))
        and (match.chat is None or fnmatchcase(chat_id or "", match.chat))
        and (match.type is None or _has_type(user_key, match.type))
    )


def _has_type(user_key: str, chat_type: str) -> bool:
    parts = user_key.split(":")
    if len(parts) != 3:  # noqa: PLR2004  # platform:chat_type:sender_id, or a key of another program's own
        return False
    return parts[1] == chat_type or (parts[1] == _SHARED and chat_type != ChatType.PRIVATE.value)
