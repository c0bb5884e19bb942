"""Keeps calls below a rate that a platform publishes: no window of time sees more of them than it allows."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_MAX_NAMES = 2000  # above this, names that are at rest are forgotten


class Pace:
    """At most ``count`` calls in any ``per_s`` seconds for each name, over all processes that share the rate.

    ``sharers`` says how many processes those are: each keeps to its part, whatever the others do.
    """

    def __init__(
        self,
        count: int,
        per_s: float,
        *,
        sharers: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._count = count
        self._per_s = per_s
        self._sharers = sharers
        self._clock = clock
        self._sleep = sleep
        self._slots: dict[str, deque[float]] = {}  # instants of the newest calls, also of those to come

    async def wait(self, name: str = "") -> None:
        """Return when the next call may be made; who comes first goes first."""
        pause_s = self._take(name) - self._clock()
        if pause_s > 0:
            await self._sleep(pause_s)

    def _take(self, name: str) -> float:
        """Reserve and return the instant of a call."""
        now = self._clock()
        sharers = max(1, self._sharers())
        most = max(1, self._count // sharers)
        window_s = self._per_s * max(1.0, most * sharers / self._count)
        slots = self._slots.get(name)
        if slots is None:
            if len(self._slots) >= _MAX_NAMES:
                self._forget(now - window_s)
            slots = self._slots[name] = deque(maxlen=self._count)
        at = now if len(slots) < most else max(now, slots[-most] + window_s)
        slots.append(at)
        return at

    def _forget(self, before: float) -> None:
        self._slots = {name: slots for name, slots in self._slots.items() if slots[-1] > before}
