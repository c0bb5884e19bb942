"""HTTP/1.1 calls to one host over connections that stay open: what a reply needs of a client, and no more.

A general client's session costs several times what the writing and parsing do (docs/decisions/0001-http-client.md).
Answers are parsed by httptools; proxies are aiohttp's business (``Connection``).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urlsplit

import httptools
from aiohappyeyeballs import start_connection
from multidict import CIMultiDict
from yarl import URL

from feishu_bot.errors import RetryLater, Undeliverable

if TYPE_CHECKING:
    from collections.abc import Mapping

KEEP_S: Final = (
    15.0  # an idle connection; some servers close theirs after a minute, and one that races loses a call
)
MOST: Final = 100  # connections to a host; more calls wait
MAX_HEAD_BYTES: Final = 64 * 1024  # of an answer's headers; also what may come between two pieces of a body
NOT_SENT: Final = "nothing was sent"  # the argument of a CancelledError where that is so
_CONNECT_S: Final = 5.0
_HAPPY_EYEBALLS_S: Final = 0.25  # RFC 8305
_AS_IS: Final = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,;=:@/?]*")  # targets that need no quoting
_EMPTY: Final = frozenset({"GET", "DELETE"})  # methods whose missing body needs no length
_METHODS: Final = _EMPTY | {"POST", "PUT", "PATCH"}
_COMPRESSED: Final = frozenset({"gzip", "x-gzip", "deflate"})
_CONTINUE = range(100, 200)


@dataclass(frozen=True, slots=True)
class Response:
    """What came back: any status, with its headers (case-insensitive) and its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool = True  # False: the body was longer than what was asked for


class HttpPool:
    """Calls one host. Opens connections as they are needed; ``close`` ends them. Never follows a redirect.

    ``tls``: what to check the server by, True for the system's certificates.
    """

    def __init__(self, base_url: str, *, tls: ssl.SSLContext | bool) -> None:
        parts, url = urlsplit(base_url), URL(base_url)
        self._is_tls = parts.scheme == "https"
        self._host = url.raw_host or ""
        self._port = url.port or 0
        self._prefix = parts.path.rstrip("/")
        self._itself = parts.path + (f"?{parts.query}" if parts.query else "")
        self._tls = tls
        self._room = asyncio.Semaphore(MOST)
        self._lines: set[_Line] = set()
        self._idle: list[_Line] = []  # the one used last stands last, and is used next
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._fixed = (
            f" HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
            "User-Agent: feishu-bot\r\nContent-Type: application/json; charset=utf-8\r\n"
        )

    async def call(
        self, method: str, path: str, body: bytes | None, *, authorization: str | None, max_bytes: int
    ) -> Response:
        """Make one call with a JSON body and return its answer, as far as ``max_bytes``.

        Raises RetryLater where there is none, and says whether the request may have arrived all the same;
        Undeliverable for what no request can hold. Cancelled, it gives its connection up, and the error's
        argument is NOT_SENT where that is known.
        """
        request = self._request(method, path, body, authorization)
        try:
            await self._room.acquire()
        except asyncio.CancelledError:
            raise asyncio.CancelledError(NOT_SENT) from None
        try:
            line = self._reused()
            if line is not None:
                try:
                    return await self._exchange(line, request, max_bytes)
                except RetryLater:
                    # Closed by the server while nobody used it: what changes nothing may be asked again at once.
                    if method != "GET" or line.has_answered:
                        raise
            return await self._exchange(await self._open(), request, max_bytes)
        finally:
            self._room.release()

    async def close(self) -> None:
        """End all connections, for good: calls that wait for one have none."""
        self._is_closed = True
        self._idle.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines = list(self._lines)
        for line in lines:
            line.close()
        if lines:
            await asyncio.wait([line.closed for line in lines], timeout=_CONNECT_S)

    def _request(self, method: str, path: str, body: bytes | None, authorization: str | None) -> bytes:
        if method not in _METHODS:
            raise Undeliverable(f"no method of a call: {method!r}")
        target = self._prefix + path if path else self._itself
        if not _AS_IS.fullmatch(target):  # quoted, and without what would end the line
            target = URL(f"http://host/{target.removeprefix('/')}").raw_path_qs
        head = f"{method} {target}{self._fixed}"
        if authorization is not None:
            check_header(authorization)
            head += f"Authorization: {authorization}\r\n"
        if body is not None:
            return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        return f"{head}\r\n".encode() if method in _EMPTY else f"{head}Content-Length: 0\r\n\r\n".encode()

    async def _exchange(self, line: _Line, request: bytes, max_bytes: int) -> Response:
        try:
            response = await line.ask(request, max_bytes)
        except BaseException:
            line.close()
            raise
        if line.is_reusable:
            self._idle.append(line)
            if self._timer is None:
                self._timer = line.loop.call_later(KEEP_S, self._sweep)
        else:
            line.close()
        return response

    def _reused(self) -> _Line | None:
        while self._idle:
            line = self._idle.pop()
            if line.is_reusable and line.loop.time() - line.used_at < KEEP_S:
                return line
            line.close()
        return None

    def _sweep(self) -> None:
        """Close what nobody has used for long."""
        self._timer = None
        if not self._idle:
            return
        loop = self._idle[0].loop
        oldest = loop.time() - KEEP_S
        for line in self._idle:
            if line.used_at <= oldest:
                line.close()
        self._idle = [line for line in self._idle if line.is_reusable]
        if self._idle:
            self._timer = loop.call_at(self._idle[0].used_at + KEEP_S, self._sweep)

    async def _open(self) -> _Line:
        if self._is_closed:
            raise RetryLater("no connection: closed")
        loop = asyncio.get_running_loop()
        tls = None
        if self._is_tls:
            tls = self._tls if isinstance(self._tls, ssl.SSLContext) else _system_tls()
        try:
            async with asyncio.timeout(_CONNECT_S):
                addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                connected = await start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_S)
                _, line = await loop.create_connection(
                    lambda: _Line(loop, self._lines),
                    sock=connected,
                    ssl=tls,
                    server_hostname=self._host.rstrip(".") if self._is_tls else None,
                )
        except asyncio.CancelledError:
            raise asyncio.CancelledError(NOT_SENT) from None
        except (OSError, ValueError) as error:  # refused, no such host or none that could be, no TLS, no time
            raise RetryLater(f"no connection: {type(error).__name__}") from None
        if self._is_closed:  # meanwhile
            line.close()
            raise RetryLater("no connection: closed")
        return line


class _Line(asyncio.Protocol):
    """One connection, for one call at a time; in ``lines`` while it is open."""

    _headers: list[tuple[str, str]]
    _head: CIMultiDict[str] | None
    _body: bytearray
    _ends_with_connection: bool  # the body that is being read

    def __init__(self, loop: asyncio.AbstractEventLoop, lines: set[_Line]) -> None:
        self.loop = loop
        self.used_at = 0.0
        self.closed = loop.create_future()
        self.has_answered = False  # whether anything came back since the last call
        self._lines = lines
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._parser = httptools.HttpResponseParser(self)
        # What servers of one's own making get wrong, and aiohttp reads too.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._max_bytes = 0
        self._frame_bytes = 0  # what came since the last piece of a body: headers, trailers, sizes of chunks
        self._is_alive = True
        self._begin()

    @property
    def is_reusable(self) -> bool:
        """Whether another call may use it: open, and nothing came that nobody has asked for."""
        return self._is_alive and self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, max_bytes: int) -> Response:
        """Send a request and return what comes back. Raises RetryLater."""
        if self._transport is None or not self.is_reusable:
            raise RetryLater("no connection: closed")
        self._max_bytes = max_bytes
        self._frame_bytes = 0
        self.has_answered = False
        self._answer = self.loop.create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None
            self.used_at = self.loop.time()

    def close(self) -> None:
        self._is_alive = self._ends_with_connection = False
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------------------------- from the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(
            "asyncio.Transport", transport
        )  # as create_connection says; uvloop's is no subclass
        self._lines.add(self)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # an answer that nobody has asked for would be taken for the next one's
            return
        self.has_answered = True
        self._frame_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(type(error).__name__)
            return
        if self._frame_bytes > MAX_HEAD_BYTES:
            self._break("headers without end")

    def connection_lost(self, error: Exception | None) -> None:
        self._is_alive = False
        if self._ends_with_connection and error is None:
            self._finish()
        self._break("closed" if error is None else type(error).__name__)
        self._lines.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)

    # ------------------------------------------------------------------------------------- from the parser

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():
            self._is_alive = False  # what follows the answer in one piece with it would begin the next one's

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        # So much may be a piece of the body too, so what counts are the headers, as they were written.
        if (
            self._frame_bytes > MAX_HEAD_BYTES
            and sum(len(name) + len(value) + 4 for name, value in self._headers) > MAX_HEAD_BYTES
        ):
            raise ValueError("too long")
        self._head = head = CIMultiDict(self._headers)
        length = head.get("Content-Length")
        if length is None:
            coding = ",".join(head.getall("Transfer-Encoding", ()))
            self._ends_with_connection = "chunked" not in coding.lower()
        elif int(length) > self._max_bytes:
            self._finish(whole=False)

    def on_body(self, piece: bytes) -> None:
        self._frame_bytes = 0
        self._body += piece
        if len(self._body) > self._max_bytes:
            self._finish(whole=False)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() in _CONTINUE:  # "wait, the answer follows"
            self._begin()
            return
        # A server that answers before it has read everything may never read the rest.
        self._is_alive = (
            self._is_alive
            and self._parser.should_keep_alive()
            and self._transport is not None
            and not self._transport.get_write_buffer_size()
        )
        self._finish()

    def _begin(self) -> None:
        self._headers = []
        self._body = bytearray()
        self._head = None
        self._ends_with_connection = False

    def _finish(self, *, whole: bool = True) -> None:
        if not whole:
            self._is_alive = False  # the rest is not waited for
        if self._answer is not None and not self._answer.done():
            headers: CIMultiDict[str] = CIMultiDict() if self._head is None else self._head
            body = bytes(self._body)
            if body and headers.get("Content-Encoding", "").strip().lower() in _COMPRESSED:
                body, whole = _unpacked(body, self._max_bytes, whole=whole)
            if len(body) > self._max_bytes:
                body, whole = body[: self._max_bytes], False
            self._answer.set_result(Response(self._parser.get_status_code(), headers, body, whole))
        self._begin()

    def _break(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RetryLater(f"connection broke: {why}", outcome_unknown=True))
        self.close()


def check_header(value: str) -> None:
    """Raise Undeliverable for credentials with a line break or another sign that no header can hold."""
    if not value.isprintable():
        raise Undeliverable("the account's secret holds a line break or another sign that no header can")


def _unpacked(body: bytes, max_bytes: int, *, whole: bool) -> tuple[bytes, bool]:
    """Return what a server has compressed though it was asked not to; as it is where it cannot be read."""
    for form in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # gzip and zlib by their headers; deflate without one
        unpacker = zlib.decompressobj(wbits=form)
        try:
            plain = unpacker.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        return plain, whole and unpacker.eof and not unpacker.unused_data
    return body, whole


@lru_cache(maxsize=1)
def _system_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
