"""Connections are taken as long as the process can hold them; then the oldest that asks for nothing makes room.

A process that runs out of file descriptors can neither take connections nor open its database, and asyncio then
spends all its time on failing to accept. Whoever opens thousands of connections and sends nothing must not get there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING, Any, Final, cast

from aiohttp import web

from feishu_bot.log import Seldom

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_protocol import RequestHandler

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

BACKLOG: Final = 1024  # connections that wait to be taken
AT_ONCE: Final = 16  # taken in one turn of the event loop, so before any of them is looked at
_WANTED_FILES: Final = 65_536
_FEWEST: Final = 16
_DEFAULT_FILES: Final = 1024


def raise_file_limit() -> None:
    """Let this process open as many files as it may: many systems begin with 1024 and allow far more."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:  # some systems allow less than they say
            log.debug("file limit kept", extra={"reason": str(error)})


def most_connections() -> int:
    """Return how many connections leave enough descriptors for everything else."""
    soft = _DEFAULT_FILES
    if resource is not None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft == resource.RLIM_INFINITY:
            soft = _WANTED_FILES
    # What is taken in a turn is counted in the next one, and what makes room for it is closed in the one after.
    return max(_FEWEST, soft * 3 // 4 - 4 * AT_ONCE)


class _Refusing(asyncio.Protocol):
    """A connection that is ended as soon as it is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).abort()  # not by isinstance: of uvloop it is none


class Connections:
    """Takes connections for a server of aiohttp's. ``most`` is asked each time."""

    def __init__(self, *, most: Callable[[], int] = most_connections) -> None:
        self._most = most
        self._busy: set[Any] = set()
        self._server: web.Server | None = None
        self._listeners: list[asyncio.Server] = []
        self._seldom = Seldom(log)

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Remember whose request is being answered: such a connection makes room for nobody."""
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)

    async def listen(self, server: web.Server, **where: Any) -> int:
        """Take connections for ``server``; ``where``: as asyncio's ``create_server``. Return the port.

        Raises OSError for a port in use.
        """
        self._server = server
        listener = await asyncio.get_running_loop().create_server(self._take, backlog=AT_ONCE, **where)
        self._listeners.append(listener)
        for listening in listener.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as same:
                same.listen(BACKLOG)  # asyncio has one number for the queue and for its turn
        return int(listener.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Take no new connection; those that are open stay."""
        for listener in self._listeners:
            listener.close()

    def _take(self) -> asyncio.BaseProtocol:
        server = self._server
        if server is None:
            raise AssertionError("listen sets it")
        surplus = len(server.connections) + 1 - self._most()
        if surplus > 0 and not self._make_room(server.connections, surplus):
            self._seldom.warning("connection refused", {"reason": "too many are being answered"})
            return _Refusing()
        return server()

    def _make_room(self, connections: list[RequestHandler], surplus: int) -> bool:
        """End the oldest connections without a request that is being answered; say whether that was enough."""
        idle = []
        for connection in connections:
            if connection.transport is None or connection.transport.is_closing():
                surplus -= 1
            elif connection not in self._busy:
                idle.append(connection)
        ended = idle[: max(0, surplus)]
        for connection in ended:
            connection.force_close()
        if ended:
            reason = "too many are open, and these ask for nothing"
            self._seldom.warning("connections ended", {"connections": len(ended), "reason": reason})
        return len(ended) >= surplus
