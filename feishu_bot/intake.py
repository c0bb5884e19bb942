"""Step 2: an event becomes a row of the inbox, before anybody is told that it has arrived."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from feishu_bot.ai.tokens import count_aside
from feishu_bot.chats import Chats
from feishu_bot.model import MAX_KEY_LENGTH, ChatType, End, InboundMessage, make_key, scope_key
from feishu_bot.store.schema import OPEN
from feishu_bot.store.work import Arrival, Quote, Recorded, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.access import Access
    from feishu_bot.config import BotSettings
    from feishu_bot.store.store import Store

SEEN = (
    "#seen"  # added to the key of an event that is not meant for the bot, so that an addressed copy is taken
)
NOT_ADDRESSED = "not addressed"


@dataclass(slots=True)
class IntakeCounts:
    """What arrived since the start, by account, for ``/metrics``."""

    received: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)  # of those received: ended on arrival


class Intake:
    """Records events. ``recorded`` is called with the lanes that have new work."""

    def __init__(
        self,
        settings: BotSettings,
        store: Store,
        access: Access,
        *,
        recorded: Callable[[str], None],
        wants_events: Callable[[], bool],
        is_order: Callable[[InboundMessage], bool] = lambda _message: False,
        told: Callable[[InboundMessage], None] = lambda _message: None,
    ) -> None:
        self.configure(settings)
        self._store = store
        self._access = access
        self._recorded = recorded
        self._wants_events = wants_events
        self._is_order = is_order
        self._told = told  # each new message that waits for an answer, once it is on disk
        self.counts = IntakeCounts()

    def configure(self, settings: BotSettings) -> None:
        """Go on with other settings."""
        self._chat = settings.chat
        self._chats = Chats(settings)
        self._model = settings.ai.model

    async def record(self, messages: Sequence[InboundMessage]) -> list[Recorded]:
        """Record events durably; returns when they are on disk. Raises StoreUnavailable.

        A repeat (same account and event key) changes nothing, whatever process took the first. Who does not wait
        for the end leaves what may be on disk all the same: it is counted and worked on when it is.
        """
        if not messages:
            return []
        cleaned = [_clean(m) for m in messages]
        arrivals = [self._arrival(m, await self._tokens(m)) for m in cleaned]
        recording = self._store.receive(arrivals)
        recording.add_done_callback(partial(self._count, cleaned, arrivals))
        return await asyncio.shield(recording)

    def _count(
        self,
        messages: Sequence[InboundMessage],
        arrivals: Sequence[Arrival],
        recording: asyncio.Future[list[Recorded]],
    ) -> None:
        if recording.cancelled() or recording.exception() is not None:
            return
        for message, arrival, result in zip(messages, arrivals, recording.result(), strict=True):
            if result is Recorded.REPEAT:
                self.counts.duplicates[arrival.account] += 1
                continue
            self.counts.received[arrival.account] += 1
            if arrival.state == OPEN or result is Recorded.TO_BOT:
                self._recorded(arrival.lane_key)
                self._told(message)
            else:
                self.counts.ignored[arrival.account] += 1

    async def _tokens(self, message: InboundMessage) -> int | None:
        """Count the text's tokens, once and for all."""
        return await count_aside(message.text, self._model) if message.text else None

    def _arrival(self, message: InboundMessage, tokens: int | None) -> Arrival:
        reason = self._not_for_us(message)
        key, lane = _bounded(message.event_key), self.lane_of(message)
        if message.target_key is not None:
            message = replace(message, target_key=_bounded(message.target_key))
        if reason is None:
            reply = None
            if message.addressed is None and message.reply_to is not None:
                reply = _reply(message, key, lane, tokens)
            payload = message.to_json(tokens=tokens)
            return Arrival(
                message.account, key, lane, payload, reply_before=message.reply_before_ms, reply=reply
            )
        bare = replace(
            message,
            text="",
            sender_name="",
            mentions=(),
            attachments=(),
            unreadable=None,
            quoted="",
            extra={},
        )
        reply = None
        if reason == NOT_ADDRESSED:
            if message.reply_to is not None and (message.text or message.unreadable is not None):
                reply = _reply(message, key, lane, tokens)
            key += SEEN
        return Arrival(message.account, key, lane, bare.to_json(), End.IGNORED.value, reason, reply=reply)

    def lane_of(self, message: InboundMessage) -> str:
        """Return the lane an event belongs to: its conversation's scope key."""
        if message.kind == "event":
            return "event:" + make_key(message.account, message.chat_id or message.sender_id)
        if self._is_order(message):  # it must not wait behind a question that waits for it
            return "order:" + message.user_key
        return scope_key(message, self._chats.of(message).scope)

    def _not_for_us(self, message: InboundMessage) -> str | None:
        """Return why an event needs no answer, or None."""
        if message.kind == "event":
            known = message.change is not None or message.welcome is not None
            return None if known or self._wants_events() else "event"
        if message.sender_is_bot:
            return "from a bot"
        if message.outsider and not self._access.outsiders:
            return "from outside the company"
        if message.chat_type is ChatType.PRIVATE:
            return None if self._chat.enable_private else "private chats are off"
        if not self._chat.enable_in_groups:
            return "groups are off"
        if message.addressed is False and self._chats.of(message).require_at_in_groups:
            return NOT_ADDRESSED
        return None


def _reply(message: InboundMessage, key: str, lane: str, tokens: int | None) -> Reply:
    """Return what a group message is if the one that it replies to turns out to be the bot's."""
    assert message.reply_to is not None  # noqa: S101  # the callers have looked
    meant = replace(message, addressed=None, quotes_bot=True)
    payload = meant.to_json(tokens=tokens)
    to_bot = Arrival(message.account, key, lane, payload, reply_before=message.reply_before_ms)
    return Reply(Quote.of(message, message.reply_to), to_bot)


def _clean(message: InboundMessage) -> InboundMessage:
    """Bring a message into what every database takes: no NUL in texts, and ids of bounded length."""
    if len(message.chat_id) > MAX_KEY_LENGTH or len(message.message_id or "") > MAX_KEY_LENGTH:
        message = replace(
            message,
            chat_id=message.chat_id[:MAX_KEY_LENGTH],
            message_id=message.message_id[:MAX_KEY_LENGTH] if message.message_id else None,
        )
    if "\0" not in message.text and "\0" not in message.sender_name:
        return message
    return replace(
        message,
        text=message.text.replace("\0", "\N{REPLACEMENT CHARACTER}"),
        sender_name=message.sender_name.replace("\0", "\N{REPLACEMENT CHARACTER}"),
    )


def _bounded(event_key: str) -> str:
    return event_key if len(event_key) <= MAX_KEY_LENGTH else make_key("event", event_key)
