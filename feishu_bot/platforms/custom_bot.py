"""Feishu's custom bot: a URL that takes messages for one group and gives none. Used for alerts.

Source: open.feishu.cn, "Custom bot usage guide".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.platforms.connection import Connection, unreadable, wait_of, words_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.config import NetworkSettings

MAX_CHARS: Final = 4000  # a body of 20 KB, in which a character can take four bytes
_TOO_OFTEN: Final = frozenset({9499, 11232})


def sign(timestamp: str, secret: str) -> str:
    """Return the signature of a message sent at ``timestamp`` (Unix seconds): over nothing, with both as the key."""
    key = f"{timestamp}\n{secret}".encode()
    return base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()


class CustomBot:
    """One such URL. ``secret`` is None where the bot checks no signature."""

    def __init__(
        self,
        url: str,
        secret: str | None = None,
        *,
        network: NetworkSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        parts = urlsplit(url)
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._connection = Connection(f"{parts.scheme}://{parts.netloc}", network)
        self._secret = secret
        self._clock = clock

    async def send(self, text: str) -> None:
        """Send a text. Raises RetryLater or Undeliverable; neither holds the URL or the secret."""
        body: dict[str, Any] = {"msg_type": "text", "content": {"text": text[:MAX_CHARS]}}
        if self._secret is not None:
            timestamp = str(int(self._clock()))
            body = {"timestamp": timestamp, "sign": sign(timestamp, self._secret), **body}
        response = await self._connection.call("POST", self._path, orjson.dumps(body))
        after_s = wait_of(response.headers.get("Retry-After"))
        try:
            answer = orjson.loads(response.body)
        except ValueError:
            raise unreadable(response.status, after_s) from None
        code = answer.get("code", answer.get("StatusCode")) if isinstance(answer, dict) else None
        if code is None:
            raise unreadable(response.status, after_s)
        if code != 0:
            hidden = (self._path.rpartition("/")[2], self._secret or "")
            reason = f"code {code}: {words_of(answer.get('msg'), without=hidden)}"
            raise RetryLater(reason, after_s=after_s) if code in _TOO_OFTEN else Undeliverable(reason)

    async def close(self) -> None:
        """End the session."""
        await self._connection.close()
