"""Bounding many short waits of one length with one timer.

``asyncio.timeout`` sets up and cancels a timer for each wait, which on a message's way is a noticeable part of the
whole. Here all waits of one kind share a timer that fires for the oldest of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType


class Expires(Protocol):
    """What is told when its time is over."""

    def expire(self) -> None: ...


class Deadlines:
    """Waits of at most ``limit_s`` seconds: ``with deadlines.guard(): await …`` raises TimeoutError after them.

    Anything else that ends or begins after so long is told by its ``expire``: ``add`` it, and ``remove`` it in time.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._guards: dict[Expires, float] = {}  # the oldest, and so the first to end, stands first
        self._timer: asyncio.TimerHandle | None = None

    def guard(self) -> Guard:
        """Return the bound of one wait."""
        return Guard(self)

    def add(self, guard: Expires) -> None:
        loop = asyncio.get_running_loop()
        self._guards[guard] = deadline = loop.time() + self.limit_s
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._tick)

    def remove(self, guard: Expires) -> None:
        self._guards.pop(guard, None)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        while self._guards:
            guard, deadline = next(iter(self._guards.items()))
            if deadline > now:
                self._timer = loop.call_at(deadline, self._tick)
                return
            del self._guards[guard]
            guard.expire()


class Guard:
    """The bound of one wait; used as a context manager, once."""

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_task")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._expired = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._cancelling = self._task.cancelling()
        self._deadlines.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._deadlines.remove(self)
        # Only our own cancellation becomes a TimeoutError; one from outside goes on as what it is.
        if not self._expired or self._task is None or self._task.uncancel() > self._cancelling:
            return
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def expire(self) -> None:
        """Cancel the wait: its time is over."""
        if self._task is not None:
            self._expired = True
            self._task.cancel()
