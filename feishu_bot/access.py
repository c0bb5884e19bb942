"""Who may talk to the bot, and who may give it orders."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from feishu_bot.model import make_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.config import AccessSettings, ChatMatchSettings, MatchSettings
    from feishu_bot.model import InboundMessage


class Patterns:
    """A list of persons, user keys, chats (``account:chat_id``) and patterns with ``*`` and ``?``."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._exact = frozenset(p for p in patterns if not _is_pattern(p))
        self._wild = tuple(p for p in patterns if _is_pattern(p))

    def __bool__(self) -> bool:
        return bool(self._exact or self._wild)

    def match(self, message: InboundMessage) -> bool:
        """Say whether the speaker, as a person or a user key, or the chat is in the list."""
        names = [message.person, message.user_key]
        if message.chat_id:
            names.append(make_key(message.account, message.chat_id))
        if not self._exact.isdisjoint(names):
            return True
        return any(fnmatchcase(name, pattern) for pattern in self._wild for name in names)


def _is_pattern(text: str) -> bool:
    return any(c in text for c in "*?[")


class Access:
    """The rules of ``access`` and ``chat.admins``."""

    def __init__(self, settings: AccessSettings, admins: Sequence[str]) -> None:
        self.configure(settings, admins)

    def configure(self, settings: AccessSettings, admins: Sequence[str]) -> None:
        """Go on with other rules."""
        self._default = settings.default == "allow"
        self._allow = Patterns(settings.allow)
        self._deny = Patterns(settings.deny)
        self._admins = frozenset(admins)
        self.outsiders = settings.outsiders == "allow"

    def allows(self, message: InboundMessage) -> bool:
        """Say whether the speaker may use the bot; ``deny`` wins over ``allow``."""
        if self._deny and self._deny.match(message):
            return False
        return self._default or self._allow.match(message)

    def is_admin(self, message: InboundMessage) -> bool:
        return bool(self._admins) and (message.person in self._admins or message.user_key in self._admins)


def applies(
    match: MatchSettings | ChatMatchSettings | None, message: InboundMessage, *, tenant: str = "default"
) -> bool:
    """Say whether a rule's ``match`` (patterns; what is absent matches all) holds for a message of a tenant."""
    if match is None:
        return True
    wanted, kind, user = (getattr(match, name, None) for name in ("tenant", "type", "user"))
    if wanted is not None and not fnmatchcase(tenant, wanted):
        return False
    if kind is not None and kind != message.chat_type:
        return False
    return (
        (match.platform is None or fnmatchcase(message.account, match.platform))
        and (match.chat is None or fnmatchcase(message.chat_id, match.chat))
        and (user is None or fnmatchcase(message.person, user) or fnmatchcase(message.user_key, user))
    )
