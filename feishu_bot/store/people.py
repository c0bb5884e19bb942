"""Whom a row belongs to: one person, under every user key that person speaks under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sqlalchemy import or_

from feishu_bot.model import ChatType, person_key
from feishu_bot.model import user_key as key_of
from feishu_bot.store.schema import conversations, messages

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

SHARED = "chat"  # the second part of the user key of a conversation that a whole group shares


@dataclass(frozen=True, slots=True)
class Person:
    """A person ``platform:sender_id``, found by that name or by a user key.

    ``keys``: the user keys in use, ``ids``: the values of a column that names persons. Both hold the name that was
    given, so a user key of another form than ``platform:chat_type:sender_id`` stands for itself.
    """

    name: str
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    platform: str | None = None
    sender_id: str | None = None

    @classmethod
    def of(cls, name: str) -> Self:
        parts = name.split(":")
        if not all(parts) or len(parts) not in {2, 3} or (len(parts) == 3 and parts[1] == SHARED):  # noqa: PLR2004  # platform:sender_id or platform:chat_type:sender_id
            return cls(name, (name,), (name,))
        platform, sender = _unescape(parts[0]), _unescape(parts[-1])
        keys = [name, *(key_of(platform, kind.value, sender) for kind in ChatType)]
        ids = [name, person_key(platform, sender)]
        return cls(name, tuple(dict.fromkeys(keys)), tuple(dict.fromkeys(ids)), platform, sender)

    @property
    def owns(self) -> ColumnElement[bool]:
        """Select the conversations that are this person's alone."""
        user_id = conversations.c.user_id
        # Never unknown, so that its opposite is right too.
        named = user_id.is_not(None) & user_id.in_(self.ids)
        return or_(conversations.c.user_key.in_(self.keys), named)

    @property
    def said(self) -> ColumnElement[bool]:
        """Select the messages that this person wrote, wherever."""
        return messages.c.sender_id.in_(self.keys)


def _unescape(part: str) -> str:
    return part.replace("%3A", ":").replace("%25", "%")
