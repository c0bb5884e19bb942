"""Who may come in by which door."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from aiohttp import web

from feishu_bot.network import is_loopback
from feishu_bot.web.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.typedefs import Handler, Middleware

Networks = Sequence[IPv4Network | IPv6Network]

LOCAL_USER: Final = "local"
_PUBLIC: Final = ("/webhook/", "/ws/", "/healthz")
_FORWARDED: Final = ("forwarded", "x-forwarded-", "x-real-ip")  # what names begin with
HOW_TO_OPEN: Final = (
    "there is no account yet: add one with 'python bot.py user add NAME'; without any, the browser chat answers "
    "only on this machine, as http://127.0.0.1:<port>/ and without a proxy before it"
)


async def _nobody(_request: web.Request) -> bool:
    return False


def private_only(
    networks: Networks,
    proxies: Networks = (),
    *,
    base: str = "",
    is_admin: Callable[[web.Request], Awaitable[bool]] = _nobody,
) -> Middleware:
    """Return a middleware that lets visitors from outside ``networks`` reach the public doors only.

    A request that was forwarded comes from where one of our ``proxies`` says it does; whoever else forwards could
    stand before anybody, so he is outside. ``is_admin``: whether a request has an administrator's token, which
    opens all doors from anywhere.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_private = not request.path.removeprefix(base).startswith(_PUBLIC)
        if is_private and not _is_in(address_of(request, proxies), networks) and not await is_admin(request):
            return error_response(403, "not from this network (server.private_networks)")
        return await handler(request)

    return middleware


def is_from(request: web.Request, proxies: Networks) -> bool:
    """Say whether one of our proxies has sent this request."""
    return _is_in(request.remote, proxies)


def is_forwarded(request: web.Request) -> bool:
    """Say whether a request has any header that proxies add."""
    return any(name.lower().startswith(_FORWARDED) for name in request.headers)


def is_forwarded_https(request: web.Request, proxies: Networks) -> bool:
    """Say whether one of our proxies was asked by https."""
    return is_from(request, proxies) and request.headers.get("X-Forwarded-Proto", "").lower() == "https"


def address_of(request: web.Request, proxies: Networks) -> str | None:
    """Return the address that a request comes from, None where nobody trustworthy tells."""
    remote = request.remote
    if not is_forwarded(request):
        return remote
    if not _is_in(remote, proxies):
        return None
    hops = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")
    # Each proxy appends whom it heard; what stands before the first stranger anybody may have written.
    return next((hop for hop in map(str.strip, reversed(hops)) if not _is_in(hop, proxies)), None)


def _is_in(address_text: str | None, networks: Networks) -> bool:
    try:
        address = ip_address(address_text or "")
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
    if is_forwarded(request):
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
