"""The event loop that the server runs on: uvloop's where it is installed, the standard library's elsewhere.

uvloop (libuv) takes about a tenth off what a message costs; see docs/performance.md. Everything works on both.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end in a new event loop, as ``asyncio.run`` does."""
    with asyncio.Runner(loop_factory=_factory()) as runner:
        return runner.run(main)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415  # not made for every system
    except ImportError:
        return None
    return uvloop.new_event_loop
