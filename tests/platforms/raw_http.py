"""Servers of single bytes: what they send is written out in the test, also what no HTTP server would."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from feishu_bot.errors import RetryLater
from feishu_bot.platforms.connection import Connection

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Coroutine
    from typing import Any

    from feishu_bot.config import NetworkSettings

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Request:
    head: str
    body: bytes
    line: int  # the how-manieth connection of the server it came by

    @property
    def first(self) -> str:
        return self.head.partition("\r\n")[0]

    @property
    def headers(self) -> dict[str, str]:
        """By small names."""
        fields = (row.partition(": ") for row in self.head.split("\r\n")[1:] if row)
        return {name.lower(): value for name, _, value in fields}


class Line:
    """One connection, as the server has it."""

    def __init__(self, site: Site, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._site = site
        self.number = len(site.lines)

    async def request(self) -> Request:
        """Read one. Raises EndOfConnection."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            request = Request(head, b"", self.number)
            request.body = await self.reader.readexactly(int(request.headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, OSError):
            raise EndOfConnection from None
        self._site.requests.append(request)
        return request

    async def send(self, data: bytes, *, piece: int = 0) -> None:
        """Send, in pieces of so many bytes that arrive one by one."""
        size = piece or max(1, len(data))
        for start in range(0, len(data), size):
            self.writer.write(data[start : start + size])
            with suppress(OSError):
                await self.writer.drain()
            if piece:
                await asyncio.sleep(0)

    def end(self) -> None:
        """Close as one does who has said everything."""
        self.writer.close()

    def reset(self) -> None:
        """Close as one does who crashed."""
        found = self.writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class EndOfConnection(Exception):
    """The client has closed it."""


@dataclass
class Site:
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    ended: int = 0  # of the lines, how many the client has ended or the server is done with

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # what is waited for is in the client
                await asyncio.sleep(0.001)


Talk = "Callable[[Line], Awaitable[None]]"


@asynccontextmanager
async def serving(
    talk: Talk, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Site]:
    """Run ``talk`` for each connection."""
    site = Site()
    talks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        line = Line(site, reader, writer)
        site.lines.append(line)
        try:
            await talk(line)
        except (EndOfConnection, OSError, asyncio.CancelledError):
            pass
        finally:
            site.ended += 1

    server = await asyncio.start_server(one, host, 0, ssl=tls)
    name = f"[{host}]" if ":" in host else host
    site.url = f"http{'s' if tls else ''}://{name}:{server.sockets[0].getsockname()[1]}"
    try:
        yield site
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        for line in site.lines:
            line.writer.transport.abort()
        await asyncio.sleep(0.001)


def answer(body: bytes = b"ok", *headers: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    """Return a whole answer with its length."""
    rows = [f"HTTP/{version} {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(rows).encode() + b"\r\n\r\n" + body


def always(data: bytes, *, piece: int = 0) -> Talk:
    """Return what gives every request the same answer."""

    async def talk(line: Line) -> None:
        while True:
            await line.request()
            await line.send(data, piece=piece)

    return talk


def once(data: bytes, *, end: str = "end") -> Talk:
    """Return what gives the first request of each connection this and then ends it: "end", "reset" or "stay"."""

    async def talk(line: Line) -> None:
        await line.request()
        await line.send(data)
        if end == "end":
            line.end()
        elif end == "reset":
            await asyncio.sleep(0.02)  # a reset overtakes what was sent before it
            line.reset()
        else:
            await line.request()

    return talk


async def echo(line: Line) -> None:
    """Answer with the request's body."""
    while True:
        request = await line.request()
        await line.send(answer(request.body))


@asynccontextmanager
async def connected(
    site: Site,
    way: str = "",
    *,
    path: str = "",
    network: NetworkSettings | None = None,
) -> AsyncIterator[Connection]:
    """Yield a connection to a site. ``way``: what stands before its host."""
    url = site.url.replace("://", f"://{way}") + path
    connection = Connection(url, network, total_s=600)
    try:
        yield connection
    finally:
        await connection.close()


async def fails(call: Coroutine[Any, Any, Any]) -> RetryLater:
    """Return why a call had no answer."""
    with pytest.raises(RetryLater) as found:
        await call
    return found.value


def end_time(connection: Connection) -> None:
    """Let the time of all calls that run be over."""
    for guard in list(connection._calls._guards):
        guard.expire()
