"""Answers that appear in a Feishu chat while they are written, as a card of CardKit.

A card is made first and seen by nobody; then it is sent, once, and its text replaced again and again. Whoever knows the
card can finish it, in whatever process. Source: open.feishu.cn, "CardKit", "Streaming updates".
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.platforms.base import text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from feishu_bot.model import Target
    from feishu_bot.platforms.feishu_client import Answer, FeishuClient

EVERY_S: Final = 0.7  # between two updates; a card takes 10 a second, an app 50
_APP_EVERY_S: Final = 1 / 30  # between two updates of any cards; other processes may use the app too
_REST_S: Final = 5.0  # after a refusal for too many calls that names no time
_LONGEST_REST_S: Final = 60.0
MAX_BYTES: Final = 20_000  # of the text; a card may have 30 KB
_CARDS: Final = "/open-apis/cardkit/v1/cards"
_ELEMENT: Final = "answer"
_OLD: Final = 300317  # a later update was taken before
_CLOSED: Final = frozenset({200850, 300309})  # nothing was written for ten minutes, or it is finished
_REFUSALS: Final = 3  # in a row, after which nothing is streamed until the next start
_FINISHING: Final = 1_000_000_000  # numbers of what finishes a card, above all that is written before
_MAX_OPEN: Final = 1000


@dataclass(slots=True)
class _Card:
    """A card of this process. ``tried``: it may be seen. ``message_id``: it is, as this message."""

    id: str
    made_at: float
    tried: bool = False
    message_id: str = ""
    number: int = field(default=0)


class Cards:
    """The cards of one app. ``reply`` sends a message to a target; ``clock`` gives Unix seconds."""

    def __init__(
        self,
        client: FeishuClient,
        reply: Callable[[Target, dict[str, Any]], Awaitable[Answer]],
        *,
        granted: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._reply = reply
        self._clock = clock
        self._left = _REFUSALS if granted else 0
        self._open: dict[str, _Card] = {}  # by the message that is answered
        self._next_at = 0.0  # no card is written into before

    @property
    def granted(self) -> bool:
        """Whether the platform lets us, as far as it is known."""
        return self._left > 0

    async def show(self, target: Target, text: str) -> str | None:
        """Show how far an answer is, and return what it is finished by.

        The first call makes the card and shows nothing yet. Raises RetryLater or Undeliverable.
        """
        question = target.reply_to or ""
        card = self._open.get(question)
        if card is None:
            if not self.granted:
                return None
            card = await self._make()
            if len(self._open) >= _MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[question] = card
        elif not card.message_id:
            card.tried = True
            sent = await self._send(target, card.id)
            self._check(sent)
            card.message_id = _message_id(sent)
            await self._write(card, text)
        else:
            await self._write(card, text)
        return f"{card.id}@{int(card.made_at)}"

    async def finish(self, target: Target, stream: str, text: str) -> str | None:
        """Make ``text`` the whole of a card and return its message's id; None where it cannot be.

        Safe to do again, by any process. Raises RetryLater.
        """
        card_id, made_at = _read(stream)
        message_id = self._known(target, card_id)
        if not message_id:
            sent = await self._send(target, card_id)
            if sent.code:
                _raise_later(sent)
                return None
            message_id = _message_id(sent)
        if len(text.encode()) <= MAX_BYTES and await self._close(card_id, made_at, text):
            self._forget(target, card_id)
            return message_id or None
        with suppress(Undeliverable):  # then it stays as it is, and the answer comes below it
            await self._recall(message_id)
        self._forget(target, card_id)
        return None

    async def _close(self, card_id: str, made_at: float, text: str) -> bool:
        """Write the whole text and end the writing; False where the platform refuses. Raises RetryLater."""
        number = _FINISHING + max(0, int((self._clock() - made_at) * 10))
        written = await self._put(card_id, text, number)
        if written.code in _CLOSED:
            written = await self._replace(card_id, text, number)
        elif written.code in {0, _OLD}:
            settings = orjson.dumps({"config": {"streaming_mode": False}}).decode()
            body = {"settings": settings, "sequence": number + 1, "uuid": _uuid(card_id, number + 1)}
            path = f"{_CARDS}/{quote(card_id, safe='')}/settings"
            closed = await self._client.call("PATCH", path, orjson.dumps(body))
            written = written if closed.code in {0, _OLD} | _CLOSED else closed
        _raise_later(written)
        return written.code in {0, _OLD}

    async def drop(self, target: Target, stream: str) -> None:
        """Take back a card that nobody finishes. Raises RetryLater or Undeliverable."""
        card_id = _read(stream)[0]
        card = self._open.get(target.reply_to or "")
        if card is None or card.id != card_id or card.tried:
            message_id = self._known(target, card_id)
            if not message_id:
                sent = await self._send(target, card_id)  # the same message again: it tells its id
                self._check(sent)
                message_id = _message_id(sent)
            await self._recall(message_id)
        self._forget(target, card_id)

    def _known(self, target: Target, card_id: str) -> str:
        """Return the message of a card that this process has sent: to ask for it, its question must be there yet."""
        card = self._open.get(target.reply_to or "")
        return card.message_id if card is not None and card.id == card_id else ""

    def _forget(self, target: Target, card_id: str) -> None:
        card = self._open.get(target.reply_to or "")
        if card is not None and card.id == card_id:
            del self._open[target.reply_to or ""]

    async def _make(self) -> _Card:
        answer = await self._client.call(
            "POST", _CARDS, orjson.dumps({"type": "card_json", "data": _card("", streaming=True)})
        )
        card_id = text_of((answer.body.get("data") or {}).get("card_id"))
        if answer.code or not card_id:
            error = answer.error() if answer.code else Undeliverable("the answer names no card")
            self._left -= isinstance(error, Undeliverable)  # what passes says nothing of what is granted
            raise error
        self._left = _REFUSALS
        return _Card(card_id, self._clock())

    async def _send(self, target: Target, card_id: str) -> Answer:
        content = orjson.dumps({"type": "card", "data": {"card_id": card_id}}).decode()
        uuid = _uuid(card_id, 0)
        return await self._reply(target, {"msg_type": "interactive", "content": content, "uuid": uuid})

    async def _write(self, card: _Card, text: str) -> None:
        now = self._clock()
        if 0 < self._next_at - now <= _LONGEST_REST_S:  # more: the clock has been set back
            return  # the next update holds all that this one would have shown
        self._next_at = now + _APP_EVERY_S
        card.number = max(card.number + 1, int((now - card.made_at) * 10))
        text = text.encode()[:MAX_BYTES].decode(errors="ignore")
        answer = await self._put(card.id, text, card.number)
        if answer.code and isinstance(error := answer.error(), RetryLater):
            self._next_at = now + min(_LONGEST_REST_S, _REST_S if error.after_s is None else error.after_s)
        self._check(answer)

    async def _put(self, card_id: str, text: str, number: int) -> Answer:
        body = {"content": text, "sequence": number, "uuid": _uuid(card_id, number)}
        path = f"{_CARDS}/{quote(card_id, safe='')}/elements/{_ELEMENT}/content"
        return await self._client.call("PUT", path, orjson.dumps(body))

    async def _replace(self, card_id: str, text: str, number: int) -> Answer:
        card = {"type": "card_json", "data": _card(text, streaming=False)}
        body = {"card": card, "sequence": number, "uuid": _uuid(card_id, number)}
        return await self._client.call("PUT", f"{_CARDS}/{quote(card_id, safe='')}", orjson.dumps(body))

    async def _recall(self, message_id: str) -> None:
        if message_id:
            path = f"/open-apis/im/v1/messages/{quote(message_id, safe='')}"
            self._check(await self._client.call("DELETE", path))

    @staticmethod
    def _check(answer: Answer) -> None:
        if answer.code:
            raise answer.error()


def _message_id(sent: Answer) -> str:
    return text_of((sent.body.get("data") or {}).get("message_id"))


def _raise_later(answer: Answer) -> None:
    if answer.code not in {0, _OLD} and isinstance(error := answer.error(), RetryLater):
        raise error


def _card(text: str, *, streaming: bool) -> str:
    config: dict[str, Any] = {"streaming_mode": streaming, "update_multi": True}
    if streaming:
        config["summary"] = {"content": "…"}
    element = {"tag": "markdown", "element_id": _ELEMENT, "content": text or "…"}
    return orjson.dumps({"schema": "2.0", "config": config, "body": {"elements": [element]}}).decode()


def _uuid(card_id: str, number: int) -> str:
    return hashlib.sha256(f"{card_id}\n{number}".encode()).hexdigest()[:40]


def _read(stream: str) -> tuple[str, float]:
    card_id, _, made_at = stream.rpartition("@")
    return card_id, float(made_at) if made_at.isdecimal() else 0.0
