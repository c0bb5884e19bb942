"""An app's access token: asked for by one caller for all, renewed early while the old one still works."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from feishu_bot.errors import DeliveryError, RetryLater

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_ASK_AGAIN_S = 1.0  # after a failure, so that a hundred waiting parts do not ask a hundred times


class AccessToken:
    """Keeps one token. ``fetch`` returns a token and its seconds to live, or raises a DeliveryError.

    ``refresh_before_s``: how long before its end a token is renewed; at half its life at the earliest.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[tuple[str, float]]],
        clock: Callable[[], float],
        *,
        refresh_before_s: float,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._refresh_before_s = refresh_before_s
        self._value = ""
        self._refresh_at = float("-inf")
        self._expires_at = float("-inf")
        self._ask_again_at = float("-inf")
        self._problem = "no token yet"
        self._task: asyncio.Task[None] | None = None

    @property
    def value(self) -> str:
        """The last token, ``""`` before the first."""
        return self._value

    async def get(self) -> str:
        """Return a token that is valid by our clock. Raises RetryLater; nothing was sent then."""
        now = self._clock()
        if now < self._refresh_at:
            return self._value
        if self._task is None and now >= self._ask_again_at:
            self._task = asyncio.get_running_loop().create_task(self._renew())
        if now < self._expires_at:
            return self._value
        if self._task is not None:
            await asyncio.shield(self._task)
        if self._clock() < self._expires_at:
            return self._value
        raise RetryLater(self._problem)

    def drop(self, value: str) -> None:
        """Forget a token the platform has refused, unless it was replaced meanwhile."""
        if value == self._value:
            self._refresh_at = self._expires_at = float("-inf")

    async def close(self) -> None:
        """Stop a renewal that runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _renew(self) -> None:
        try:
            value, lifetime_s = await self._fetch()
        except DeliveryError as error:
            self._problem = f"no token: {error.reason}"
            self._ask_again_at = self._clock() + _ASK_AGAIN_S
        else:
            now = self._clock()
            self._value = value
            self._expires_at = now + lifetime_s
            self._refresh_at = now + max(lifetime_s - self._refresh_before_s, lifetime_s / 2)
        finally:
            self._task = None
