"""A sign in the chat that an answer is being made, where that takes a while. Nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.errors import DeliveryError
from feishu_bot.model import Target

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from feishu_bot.model import InboundMessage
    from feishu_bot.platforms.base import Platform

log = logging.getLogger(__name__)

AFTER_S: Final = 1.0  # an answer that is quicker needs no sign
_GRACE_S: Final = 2.0  # at the end, for signs that are still to be taken back


class Indicator:
    """Shows that an answer is being made, once it has taken ``after_s`` seconds, and takes that back."""

    def __init__(self, *, after_s: float = AFTER_S) -> None:
        self.after_s = after_s
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextmanager
    def watch(self, platform: Platform | None, message: InboundMessage) -> Iterator[None]:
        """Show it while this block lasts. A failure to show it, or to take it back, changes nothing."""
        if platform is None or not platform.shows_typing:
            yield
            return
        target, shown = Target.of(message), []

        def show() -> None:
            shown.append(self._start(platform.show_typing(target)))

        timer = asyncio.get_running_loop().call_later(self.after_s, show)
        try:
            yield
        finally:
            timer.cancel()
            if shown:
                self._start(self._hide(platform, target, shown[0]))

    async def stop(self) -> None:
        """Take back what is shown, for at most a moment."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _hide(self, platform: Platform, target: Target, showing: asyncio.Task[str | None]) -> None:
        await asyncio.wait([showing])
        if showing.cancelled() or showing.exception() is not None:
            return
        shown = showing.result()
        if shown is not None:
            await platform.hide_typing(target, shown)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, DeliveryError):
            log.debug("typing not shown", extra={"reason": error.reason})
        elif error is not None:
            log.error("typing failed", exc_info=error)
