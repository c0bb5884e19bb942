"""HTTP calls to a platform's API: connections that stay open, and what a call without an answer means for a retry."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from feishu_bot.deadlines import Deadlines
from feishu_bot.errors import ConfigError, RetryLater, Undeliverable
from feishu_bot.network import proxy_for, ssl_context
from feishu_bot.platforms.http_pool import NOT_SENT, HttpPool, Response, check_header

if TYPE_CHECKING:
    from collections.abc import Iterable

    from feishu_bot.config import NetworkSettings
    from feishu_bot.errors import DeliveryError

MAX_WAIT_S = 3600.0

_CONNECT_S = 5.0
_TOTAL_S = 20.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
_MAX_WORDS = 200
_OK_STATUSES = range(200, 300)
_UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE  # nobody took the request, so nothing was sent
_TOO_LARGE = frozenset({413, 414, 431})


class Connection:
    """Calls one host. Opens its connections at the first call; ``close`` ends them. Never follows a redirect.

    Raises ConfigError for an address, a proxy or a file of certificates that cannot be used.
    """

    def __init__(self, base_url: str, network: NetworkSettings | None, *, total_s: float = _TOTAL_S) -> None:
        try:
            has_user = "@" in URL(base_url).raw_authority
        except ValueError:  # whose words may hold the password
            raise ConfigError(["an address that cannot be called: its host or port is none"]) from None
        self._base_url = base_url
        self._calls = Deadlines(total_s)
        self._proxy = proxy_for(base_url, network)
        self._tls = ssl_context(network)
        self._is_plain = self._proxy is None and not has_user
        self._pool: HttpPool | None = None
        self._session: aiohttp.ClientSession | None = None

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        authorization: str | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Response:
        """Make one call with a JSON body and return its answer, whatever the status.

        Raises RetryLater where there is none, and says whether the request may have arrived all the same.
        """
        try:
            with self._calls.guard():
                if not self._is_plain:
                    return await self._by_session(method, path, body, authorization, max_bytes)
                if self._pool is None:
                    self._pool = HttpPool(self._base_url, tls=self._tls)
                return await self._pool.call(
                    method, path, body, authorization=authorization, max_bytes=max_bytes
                )
        except TimeoutError as error:
            cause = error.__cause__  # the cancellation, which may know more
            not_sent = isinstance(cause, asyncio.CancelledError) and cause.args == (NOT_SENT,)
            raise RetryLater("no answer in time", outcome_unknown=not not_sent) from None

    async def close(self) -> None:
        """End the connections."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _by_session(
        self, method: str, path: str, body: bytes | None, authorization: str | None, max_bytes: int
    ) -> Response:
        """Make a call as ``call`` does, through a proxy or with a name and password in the address."""
        if self._session is None:
            self._session = self._open()
        headers = None
        if authorization is not None:
            check_header(authorization)
            headers = {"Authorization": authorization}
        try:
            async with self._session.request(
                method,
                self._base_url + path,
                data=body,
                headers=headers,
                proxy=self._proxy,
                allow_redirects=False,
            ) as response:
                found, whole = await read_bounded(response, max_bytes)
                return Response(response.status, response.headers, found, whole)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            # Refused, no such host, no TLS: the request was not sent.
            raise RetryLater(f"no connection: {type(error).__name__}") from None
        except aiohttp.ClientHttpProxyError as error:
            raise RetryLater(f"the proxy refuses: HTTP {error.status}") from None
        except TimeoutError:  # of ``call``, not of the connection
            raise
        except (aiohttp.ClientError, OSError) as error:
            raise RetryLater(f"connection broke: {type(error).__name__}", outcome_unknown=True) from None

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls),
            headers={"Content-Type": "application/json; charset=utf-8"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        )


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> tuple[bytes, bool]:
    """Return the body as far as ``max_bytes``, and whether that is all of it."""
    length = response.content_length
    if length is not None and length > max_bytes:
        return b"", False
    found = bytearray()
    async for piece in response.content.iter_any():
        found += piece
        if len(found) > max_bytes:
            return bytes(found[:max_bytes]), False
    return bytes(found), True


def unreadable(status: int, after_s: float | None) -> DeliveryError:
    """Return what an answer means that is not the platform's own: a gateway, a proxy or an error page."""
    reason = f"HTTP {status} without a readable answer"
    if status in _TOO_LARGE:
        return Undeliverable(reason)
    return RetryLater(reason, after_s=after_s, outcome_unknown=status in _OK_STATUSES or is_unsure(status))


def is_unsure(status: int) -> bool:
    """Return whether a server error leaves open what became of the request."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != _UNAVAILABLE


def wait_of(header: str | None) -> float | None:
    """Read a header's number of seconds, at most an hour; anything else is no advice."""
    if header is None or not header.isascii():
        return None
    try:
        seconds = float(header)
    except ValueError:
        return None
    return min(seconds, MAX_WAIT_S) if seconds >= 0 else None


def words_of(words: Any, *, without: Iterable[str]) -> str:
    """Return a platform's words short, printable and without any of the secrets given."""
    if not isinstance(words, str):
        return ""
    for secret in without:
        if secret:
            words = words.replace(secret, "***")
    return "".join(c if c.isprintable() else " " for c in words[:_MAX_WORDS])
