"""Tells people in time that their platform will soon take no reply to what they asked."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from feishu_bot.errors import StoreUnavailable
from feishu_bot.store.closing import warn

if TYPE_CHECKING:
    from feishu_bot.delivery import Delivery
    from feishu_bot.pipeline import Pipeline
    from feishu_bot.store.store import Store

log = logging.getLogger(__name__)

LOOK_S: Final = 5.0  # how often it is looked


class Closing:
    """Looks for open messages whose reply window is nearly over; only where a platform has such windows."""

    def __init__(self, store: Store, pipeline: Pipeline, delivery: Delivery, *, needed: bool) -> None:
        self._store = store
        self._pipeline = pipeline
        self._delivery = delivery
        self._needed = needed
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._needed:
            self._loop = asyncio.create_task(self._look_again(), name="closing")

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None

    async def look(self) -> int:
        """Send the notes that are due now; return how many lanes got one. Raises StoreUnavailable."""
        lanes = await self._store.run(lambda tx: warn(tx, self._pipeline.closing_note))
        for lane in lanes:
            self._delivery.nudge(lane)
        return len(lanes)

    async def _look_again(self) -> None:
        while True:
            try:
                await self.look()
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "closing", "reason": str(error)})
            await asyncio.sleep(LOOK_S)
