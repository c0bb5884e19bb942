"""Fetching what users have attached, from an address that a platform names. It may not lead into our own network."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.network import is_public, proxy_for, ssl_context
from feishu_bot.platforms.connection import read_bounded

if TYPE_CHECKING:
    from feishu_bot.config import NetworkSettings

_CONNECT_S: Final = 5.0
_TOTAL_S: Final = 20.0
_MAX_REDIRECTS: Final = 3
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class _PublicAddresses(AbstractResolver):
    """Resolves names, and refuses one of which any address is not public: nobody is asked where it leads then."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not all(is_public(each["host"]) for each in found):
            raise Undeliverable("the address leads into a private network")
        return found

    async def close(self) -> None:
        await self._resolver.close()


async def download(
    address: str, *, max_bytes: int, network: NetworkSettings | None, own: str | None = None
) -> bytes:
    """Return what lies at ``address``: HTTPS and public, or on the server of the URL ``own``.

    No credentials go along. Raises RetryLater or Undeliverable.
    """
    try:
        url = URL(address)
        async with asyncio.timeout(_TOTAL_S):
            for _ in range(_MAX_REDIRECTS + 1):
                found = await _get(url, max_bytes, network, own)
                if isinstance(found, bytes):
                    return found
                url = found
    except TimeoutError:
        raise RetryLater("no answer in time") from None
    except (aiohttp.ClientError, OSError) as error:
        raise RetryLater(f"no connection: {type(error).__name__}") from None
    except ValueError:
        raise Undeliverable("no address that can be fetched") from None
    raise Undeliverable("redirected too often")


async def _get(url: URL, max_bytes: int, network: NetworkSettings | None, own: str | None) -> bytes | URL:
    """Return the content, or where it is said to be instead."""
    trusted = own is not None and url.absolute and url.origin() == URL(own).origin()
    proxy = proxy_for(str(url), network)
    if not trusted:
        await _check(url, through_proxy=proxy is not None)
    resolver = None if trusted or proxy is not None else _PublicAddresses()
    connector = aiohttp.TCPConnector(ssl=ssl_context(network), resolver=resolver, use_dns_cache=False)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
    async with (
        aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small answer could become a very large one
            headers={"Accept-Encoding": "identity"},
        ) as session,
        session.get(url, proxy=proxy, allow_redirects=False) as response,
    ):
        status = response.status
        if status in _REDIRECTS and "Location" in response.headers:
            return url.join(URL(response.headers["Location"]))
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise RetryLater(f"HTTP {status}")
        if status != HTTPStatus.OK:
            raise Undeliverable(f"HTTP {status}")
        body, whole = await read_bounded(response, max_bytes)
        if not whole:
            raise Undeliverable(f"larger than {max_bytes} bytes")
        return body


async def _check(url: URL, *, through_proxy: bool) -> None:
    """Raise Undeliverable for what is not public. A proxy resolves by itself: names it alone knows pass."""
    if url.scheme != "https" or not url.host or url.user or url.password:
        raise Undeliverable("not an HTTPS address")
    if is_public(url.host) is False:
        raise Undeliverable("the address leads into a private network")
    if through_proxy:
        resolver = _PublicAddresses()
        try:
            await resolver.resolve(url.host, url.port or 443, socket.AF_UNSPEC)
        except OSError:
            return
        finally:
            await resolver.close()
