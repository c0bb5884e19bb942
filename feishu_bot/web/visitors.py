"""Who may come in by which door."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from aiohttp import web

from feishu_bot.network import is_loopback
from feishu_bot.web.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.typedefs import Handler, Middleware

LOCAL_USER: Final = "local"
_PUBLIC: Final = ("/webhook/", "/ws/", "/healthz")
_FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP")
HOW_TO_OPEN: Final = (
    "the browser chat answers only on this machine: open it there as http://127.0.0.1:<port>/, "
    "without a proxy before it"
)


def private_only(networks: Sequence[IPv4Network | IPv6Network]) -> Middleware:
    """Return a middleware that lets peers outside ``networks`` reach the public doors only."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith(_PUBLIC) and not _is_in(request.remote, networks):
            return error_response(403, "not from this network (server.private_networks)")
        return await handler(request)

    return middleware


def _is_in(remote: str | None, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    try:
        address = ip_address(remote or "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def local_user(request: web.Request) -> str | None:
    """Return the local user's name, or None for everybody else.

    The peer and the Host must be loopback, nothing may have forwarded the request, and a browser must say that it
    comes from our own page: otherwise any page somebody has open could talk to the bot.
    """
    if not is_loopback(request.remote or "") or not is_loopback(_host_name(request.host)):
        return None
    if any(name in request.headers for name in _FORWARDED):
        return None
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"{request.scheme}://{request.host}":
        return None
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        return None
    return LOCAL_USER


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
