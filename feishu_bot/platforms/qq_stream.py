"""Answers that appear in a private chat of QQ's while they are written.

Source: tencent-connect/qqbot-nodejs, USAGE.md 11 and types.ts (``stream_messages``): each frame holds the whole text
so far and replaces the one before; a session is one of the five replies.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson

from feishu_bot.errors import RetryLater

if TYPE_CHECKING:
    from feishu_bot.platforms.qq_client import Answer, QQClient

EVERY_S: Final = 0.5  # between two frames; the platform wants at least 0.3
_WRITING, _DONE = 1, 10
_REFUSALS: Final = 3  # in a row, after which nothing is streamed until the next start
_MAX_OPEN: Final = 1000


@dataclass(slots=True)
class _Stream:
    """One answer. ``id`` is known from the first frame on; ``broken``: it is not gone on with."""

    user: str
    msg_id: str
    id: str | None = None
    index: int = 0
    broken: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Streams:
    """The answers that are being written, by the message they answer. ``seq``: their ``msg_seq``."""

    def __init__(self, client: QQClient, *, seq: int, granted: bool) -> None:
        self._client = client
        self._seq = seq
        self._left = _REFUSALS if granted else 0
        self._open: dict[str, _Stream] = {}

    @property
    def granted(self) -> bool:
        """Whether the platform lets us, as far as it is known."""
        return self._left > 0

    async def show(self, user: str, msg_id: str, text: str) -> None:
        """Show how far an answer is. Raises RetryLater or Undeliverable, which nobody minds."""
        stream = self._open.get(msg_id)
        if stream is None:
            if len(self._open) >= _MAX_OPEN:
                del self._open[next(iter(self._open))]
            stream = self._open[msg_id] = _Stream(user, msg_id)
        async with stream.lock:
            if stream.broken or not self.granted:
                return
            try:
                answer = await self._frame(stream, text, _WRITING)
            except RetryLater:
                stream.broken = stream.id is None  # it may be there, and nobody knows under which id
                raise
            if answer.ok:
                self._left = _REFUSALS
                stream.id = stream.id or answer.sent_id
                return
            stream.broken = True
            self._left -= 1
            raise answer.error(is_reply=True)

    async def finish(self, msg_id: str, text: str) -> str | None:
        """Make ``text`` what was being written, and return its id; None where it has to be a message of its own.

        Raises RetryLater while nobody knows if it has arrived.
        """
        stream = self._open.pop(msg_id, None)
        if stream is None:
            return None
        async with stream.lock:
            if stream.broken or stream.id is None:
                return None
            try:
                answer = await self._frame(stream, text, _DONE)
            except RetryLater:
                self._open[msg_id] = stream
                raise
            return (answer.quoted_as or stream.id) if answer.ok else None

    async def _frame(self, stream: _Stream, text: str, state: int) -> Answer:
        body: dict[str, Any] = {
            "input_mode": "replace",
            "input_state": state,
            "content_type": "markdown",
            "content_raw": text,
            "event_id": stream.msg_id,
            "msg_id": stream.msg_id,
            "msg_seq": self._seq,
            "index": stream.index,
        }
        if stream.id is not None:
            body["stream_msg_id"] = stream.id
        stream.index += 1
        path = f"/v2/users/{quote(stream.user, safe='')}/stream_messages"
        return await self._client.call("POST", path, orjson.dumps(body))
