"""OneBot's events beside messages, and a chat's history: what stands in a payload.

Sources: the OneBot 11 standard, "event"; NapCat's additions.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import orjson

from feishu_bot.errors import BadPayload
from feishu_bot.model import ChatType, InboundMessage, make_key
from feishu_bot.platforms.onebot_content import id_of, outgoing_message, plain_text, quoted_id, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MAX_TYPE: Final = 100
_MAX_EXTRA: Final = 4000  # bytes of an event that are kept for plugins
_LATEST_S: Final = 10**11  # a later instant must be milliseconds (NapCat, where QQ names no time)
_CLOCKS_S: Final = 120  # by which QQ's clock and the database's may differ
_RECALLS: Final = frozenset({"group_recall", "friend_recall"})
_COMMON: Final = frozenset({"post_type", "self_id", "time", "user_id", "group_id", "message_id"})


def self_id_of(value: object) -> str:
    """Return a bot's number. Raises BadPayload for anything else."""
    text = id_of(value).strip()
    if not text.isascii() or not text.isdigit():
        raise BadPayload("there is no self_id")
    return text


def group_id_of(value: object) -> str:
    """Return a group's id, ``""`` if there is none; NapCat writes 0 then."""
    group_id = id_of(value)
    return "" if group_id == "0" else group_id


def milliseconds(value: object) -> int | None:
    """Read an instant in seconds, or in milliseconds where it can be nothing else; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LATEST_S * 1000:
        return None
    return value if value > _LATEST_S else value * 1000


def digest_key(kind: str, payload: Mapping[str, Any]) -> str:
    """Return a key of all that an event says: by either transport it has the same."""
    content = orjson.dumps(payload, option=orjson.OPT_SORT_KEYS)
    return f"{kind}:sha256-{hashlib.sha256(content).hexdigest()[:40]}"


def message_key(self_id: str, group_id: str, user_id: str, message_id: str) -> str:
    """Return the event key of a message: with its chat, as two of a day's messages may share an id of 31 bits."""
    return make_key("m", f"g{group_id}" if group_id else f"p{user_id}", self_id, message_id)


def event_of(payload: Mapping[str, Any], account: str, self_id: str) -> InboundMessage:
    """Return an event that nobody said; plugins find its details in ``extra``."""
    post_type = text_of(payload.get("post_type"))
    group_id, user_id = group_id_of(payload.get("group_id")), id_of(payload.get("user_id"))
    message_id = id_of(payload.get("message_id"))
    kind, flag = text_of(payload.get(f"{post_type}_type")), text_of(payload.get("flag"))
    names = [name for name in (post_type, kind, text_of(payload.get("sub_type"))) if name]
    recalled = kind in _RECALLS and bool(message_id)
    if recalled:
        # The recall of the bot's own message is told twice, at different times.
        key = make_key("n", self_id, kind, group_id or user_id, message_id)
    elif post_type == "request" and flag:
        key = make_key("r", self_id, flag)
    else:
        key = digest_key("n", payload)
    return InboundMessage(
        account=account,
        event_key=key,
        event_type=".".join(names)[:_MAX_TYPE],
        kind="event",
        chat_type=ChatType.GROUP if group_id else ChatType.PRIVATE,
        chat_id=group_id,
        sender_id=user_id,
        addressed=id_of(payload.get("target_id")) == self_id,
        message_id=message_id or None,
        sent_at_ms=milliseconds(payload.get("time")),
        change="recalled" if recalled else None,
        target_key=message_key(self_id, group_id, user_id, message_id) if recalled else None,
        extra=_details(payload, self_id),
    )


def _details(payload: Mapping[str, Any], self_id: str) -> dict[str, Any]:
    """Return an event's own fields (``flag``, ``operator_id``, …), those of a sensible size."""
    found: dict[str, Any] = {"self_id": self_id}
    room = _MAX_EXTRA
    for name, value in payload.items():
        if name in _COMMON:
            continue
        size = len(orjson.dumps(value)) + len(name)
        if size <= room:
            found[name] = value
            room -= size
    return found


def author_of(message: object) -> str:
    """Return who wrote a message that was asked for, ``""`` if that is not told."""
    if not isinstance(message, dict):
        return ""
    sender = message.get("sender")
    named = id_of(sender.get("user_id")) if isinstance(sender, dict) else ""
    return named or id_of(message.get("user_id"))


class History:
    """A chat's last messages, as a bot's implementation tells them."""

    def __init__(self, messages: object, self_id: str) -> None:
        found = messages if isinstance(messages, list) else []
        self._messages = [m for m in found if isinstance(m, dict)]
        self._self_id = self_id

    def find(
        self, text: str, quoted: str | None, since_s: float, *, known: Callable[[str], bool]
    ) -> str | None:
        """Return the id of the bot's message that holds ``text``, None if there is none.

        It is not older than ``since_s``, quotes ``quoted`` or nothing, and is not ``known`` as another answer.
        """
        wanted = plain_text(outgoing_message(text))
        for message in reversed(self._messages):
            sent_ms = milliseconds(message.get("time"))
            message_id = id_of(message.get("message_id"))
            if (
                message_id
                and author_of(message) == self._self_id
                and (sent_ms is None or sent_ms / 1000 >= since_s - _CLOCKS_S)
                and quoted_id(message.get("message")) in {"", quoted}
                and plain_text(message.get("message")) == wanted
                and not known(message_id)
            ):
                return message_id
        return None

    def reaches(self, quoted: str | None, since_s: float) -> bool:
        """Say whether all is here that was said since an instant: then what is missing was not sent."""
        if quoted is not None and any(id_of(m.get("message_id")) == quoted for m in self._messages):
            return True
        times = [at for m in self._messages if (at := milliseconds(m.get("time"))) is not None]
        return bool(times) and min(times) / 1000 <= since_s - _CLOCKS_S
