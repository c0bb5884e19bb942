"""The domain: what arrives, what is thought about it, what goes out. Imports nothing of ours but errors.

All instants that end in ``_ms`` are milliseconds since 1970 UTC, by the database's clock where the database
decides with them (leases, retries) and by the platform's where it says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_KEY_LENGTH = 255  # characters of user, chat and event keys
MAX_SCOPE_LENGTH = MAX_KEY_LENGTH + 8  # a scope or lane key is such a key behind its kind


class ChatType(StrEnum):
    """Where somebody speaks. ``channel`` (QQ guild channels) follows the rules of groups."""

    PRIVATE = "private"
    GROUP = "group"
    CHANNEL = "channel"


class End(StrEnum):
    """How a recorded event ended. Every event ends in exactly one of these."""

    ANSWERED = "answered"
    REFUSED = "refused"
    IGNORED = "ignored"
    EXPIRED = "expired"
    DEAD = "dead"


class Scope(StrEnum):
    """Who shares a conversation (design 1.4)."""

    USER = "user"
    USER_IN_CHAT = "user_in_chat"
    CHAT = "chat"
    THREAD = "thread"


# --------------------------------------------------------------------------------------------------- keys


def escape_part(part: str) -> str:
    """Return ``part`` so that it can stand between colons: ``%`` and ``:`` become ``%25`` and ``%3A``."""
    if "%" not in part and ":" not in part:
        return part
    return part.replace("%", "%25").replace(":", "%3A")


def make_key(*parts: str) -> str:
    """Join parts with colons into a key of at most 255 characters.

    A key that would be longer has its last part replaced by ``sha256-`` and 40 hex digits of that part.
    """
    key = ":".join(map(escape_part, parts))
    if len(key) <= MAX_KEY_LENGTH:
        return key
    digest = "sha256-" + hashlib.sha256(parts[-1].encode("utf-8", "surrogatepass")).hexdigest()[:40]
    head = ":".join(map(escape_part, parts[:-1]))
    if len(head) + 1 + len(digest) <= MAX_KEY_LENGTH:
        return f"{head}:{digest}"
    whole = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]
    return f"{parts[0][:32]}:sha256-{whole}"


def user_key(platform: str, chat_type: str, sender_id: str) -> str:
    """Return ``platform:chat_type:sender_id``, the key of a conversation partner (design 1.4)."""
    return make_key(platform, chat_type, sender_id)


def person_key(platform: str, sender_id: str) -> str:
    """Return ``platform:sender_id``, the key of a person: budgets, access and erasure go by it."""
    return make_key(platform, sender_id)


# ------------------------------------------------------------------------------------------------ inbound


@dataclass(frozen=True, slots=True)
class Mention:
    """Somebody named in a message. ``key`` is the placeholder in the text, ``""`` if there is none."""

    id: str
    name: str = ""
    key: str = ""
    is_bot: bool = False


@dataclass(frozen=True, slots=True)
class Attachment:
    """Something beside the text. ``key`` is what the platform fetches it by (a file key or a URL)."""

    kind: Literal["image", "file", "audio", "video", "sticker", "card", "location", "contact", "other"]
    key: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class InboundMessage:
    """One event of a platform, verified and normalised.

    ``addressed`` is True or False where the platform can tell whether the bot is meant, and None while the
    bot's own id is not known yet; such a message waits in the inbox until ``Platform.judge`` can tell.
    ``text`` is without the bot's own mention. ``unreadable`` names the kind of content that the bot cannot
    read (``image``, ``audio``, …, ``mention`` for a bare mention); the sender is told what it can do.
    ``kind`` is ``event`` for everything nobody said: it is recorded and ends ``ignored``.

    An event with a ``change`` says what became of an earlier message: ``message_id`` names it, ``target_key`` is
    the event key it came under, and ``text`` its new text if it was edited. One that says whether the bot is still
    ``welcome`` in its chat: False: to answer, and for nothing else. ``quoted`` and ``quotes_bot``:
    the words of the message that ``reply_to`` names, and that the bot has said it, as the record knows it; of the
    words else what the platform tells.
    A platform keeps the words of a group message that is not addressed only where it replies to another one: if
    that is the bot's, the message is meant for it.
    """

    account: str
    event_key: str
    event_type: str = "message"
    kind: Literal["message", "event"] = "message"
    chat_type: ChatType = ChatType.PRIVATE
    chat_id: str = ""
    sender_id: str = ""
    sender_name: str = ""
    sender_is_bot: bool = False
    outsider: bool = False
    text: str = ""
    addressed: bool | None = True
    mentions: tuple[Mention, ...] = ()
    message_id: str | None = None
    reply_to: str | None = None
    platform_thread_id: str | None = None
    attachments: tuple[Attachment, ...] = ()
    unreadable: str | None = None
    sent_at_ms: int | None = None
    reply_before_ms: int | None = None
    conversation: str | None = None  # public id of the conversation meant, where the door knows it (web)
    continues: bool = False  # that conversation was there when this was said
    agent: str | None = None  # agent asked for, where the door lets one choose (web)
    tokens: int | None = None  # of ``text``, counted once on arrival
    quoted: str = ""
    quotes_bot: bool = False
    change: Literal["recalled", "edited"] | None = None
    target_key: str | None = None
    welcome: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON-able; only the platform's own file reads it

    @property
    def user_key(self) -> str:
        return user_key(self.account, self.chat_type.value, self.sender_id)

    @property
    def person(self) -> str:
        return person_key(self.account, self.sender_id)

    def to_json(self, *, tokens: int | None = None) -> str:
        """Serialise what differs from the defaults; ``from_json`` reads it back. ``tokens``: of the text."""
        out: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
        for name, default in _INBOUND_DEFAULTS:
            value = getattr(self, name)
            if value != default:
                out[name] = value
        return orjson.dumps(out).decode()

    @classmethod
    def from_json(cls, payload: str | bytes) -> InboundMessage:
        """Read what ``to_json`` wrote; keys of a newer version are passed over."""
        data = {k: v for k, v in orjson.loads(payload).items() if k in _INBOUND_NAMES}
        if "chat_type" in data:
            data["chat_type"] = ChatType(data["chat_type"])
        if "mentions" in data:
            data["mentions"] = tuple(Mention(**m) for m in data["mentions"])
        if "attachments" in data:
            data["attachments"] = tuple(Attachment(**a) for a in data["attachments"])
        return cls(**data)


_MISSING = object()
_INBOUND_DEFAULTS: list[tuple[str, Any]] = [
    (f.name, {} if f.name == "extra" else (f.default if f.name not in {"account", "event_key"} else _MISSING))
    for f in fields(InboundMessage)
]
_INBOUND_NAMES = frozenset(name for name, _ in _INBOUND_DEFAULTS)


def scope_key(message: InboundMessage, scope: Scope) -> str:
    """Return the key of the conversation, and so of the lane, that ``message`` belongs to (design 1.4)."""
    if message.conversation is not None:
        return "conv:" + make_key(message.conversation)
    account, chat = message.account, message.chat_id
    if scope is Scope.USER or message.chat_type is ChatType.PRIVATE:
        return "user:" + message.user_key
    if scope is Scope.CHAT:
        return "chat:" + make_key(account, chat)
    if scope is Scope.THREAD and message.platform_thread_id:
        return "thread:" + make_key(account, chat, message.platform_thread_id)
    return "in:" + make_key(account, message.chat_type.value, chat, message.sender_id)


def spans_chats(message: InboundMessage, scope: Scope) -> bool:
    """Say whether the conversation here holds what was said in other groups: then none of it is shown in one."""
    return scope is Scope.USER and message.chat_type is not ChatType.PRIVATE


# ----------------------------------------------------------------------------------------------- outbound


@dataclass(frozen=True, slots=True)
class Target:
    """Where a reply goes. ``reply_to`` is quoted where the platform can; ``thread_id`` is its own thread."""

    chat_type: ChatType
    chat_id: str = ""
    sender_id: str = ""
    reply_to: str | None = None
    thread_id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, message: InboundMessage) -> Target:
        return cls(
            chat_type=message.chat_type,
            chat_id=message.chat_id,
            sender_id=message.sender_id,
            reply_to=message.message_id,
            thread_id=message.platform_thread_id,
            extra=message.extra,
        )


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One part on its way to a platform.

    ``source``, ``kind`` and ``part`` are unique together and the same in every retry: idempotency keys are
    made from ``idempotency_key``. ``possibly_repeated``: an earlier attempt's outcome is unknown and the
    platform may no longer fold a repeat, so the text should carry a mark. ``unknown_since_ms``: when the first
    of the attempts was made since which the outcome is unknown; None: every earlier attempt certainly failed. ``stream``: what
    ``Platform.show_text`` has shown of it already, for this part to finish.
    """

    account: str
    source: str
    kind: str
    part: int
    target: Target
    text: str
    attempts: int = 1
    possibly_repeated: bool = False
    unknown_since_ms: int | None = None
    stream: str | None = None

    @property
    def idempotency_key(self) -> str:
        """Return 40 hex digits, the same for every attempt to send this part."""
        raw = f"{self.account}\n{self.source}\n{self.kind}\n{self.part}"
        return hashlib.sha256(raw.encode()).hexdigest()[:40]


# ------------------------------------------------------------------------------------- models and budgets


@dataclass(frozen=True, slots=True)
class CallUsage:
    """What one model call cost. ``call`` counts the calls of one attempt from 0.

    ``cached_tokens`` are part of the input, ``reasoning_tokens`` of the output; ``cost_micro_usd`` is in millionths
    of a dollar, None where the model has no known price.

    ``outcome``: ``ok`` settles the reservation to the tokens given; ``unknown`` books it whole;
    ``failed`` releases it (the provider certainly did not bill).
    """

    call: int
    model: str
    input_tokens: int
    output_tokens: int
    outcome: Literal["ok", "unknown", "failed"] = "ok"
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost_micro_usd: int | None = None


# What a budget limits: tokens, calls of a model, or their cost in millionths of a dollar.
Unit = Literal["tokens", "requests", "cost"]


@dataclass(frozen=True, slots=True)
class BudgetRefusal:
    """Which budget refused a call, and the numbers that the user is told. ``ends_ms`` None: never.

    The numbers are in ``unit``; with ``unpriced`` the call's cost is not known, so no limit on costs can hold.
    ``degrade_to``: the model that may be called instead.
    """

    budget: str
    used: int
    reserved: int
    limit: int
    wanted: int
    ends_ms: int | None
    unit: Unit = "tokens"
    unpriced: bool = False
    degrade_to: str | None = None
