"""An answer while it is being written: whoever waits for it sees it grow, and may stop it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


class Live:
    """The text of one attempt so far. Called with each piece, it hands on the piece and where it begins.

    ``has_listener`` says whether anybody waits for the answer at the moment.
    """

    def __init__(
        self, grown: Callable[[int, str], None], *, has_listener: Callable[[], bool] = lambda: True
    ) -> None:
        self._grown = grown
        self.has_listener = has_listener
        self._pieces: list[str] = []
        self._length = 0
        self._stopped = asyncio.Event()

    def __call__(self, text: str) -> None:
        at = self._length
        self._pieces.append(text)
        self._length += len(text)
        self._grown(at, text)

    @property
    def said(self) -> str:
        """All that there is of the answer."""
        return "".join(self._pieces)

    def stop(self) -> None:
        """Have the answer end where it is."""
        self._stopped.set()

    async def until_stopped(self, asking: Coroutine[Any, Any, T]) -> T | None:
        """Return what ``asking`` returns, or None once the answer was stopped; it is cancelled then."""
        task = asyncio.ensure_future(asking)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
