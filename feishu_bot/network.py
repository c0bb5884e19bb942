"""How to reach the outside: which proxy, which certificates. Never a proxy for loopback."""

from __future__ import annotations

import ipaddress
import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from feishu_bot.errors import ConfigError

if TYPE_CHECKING:
    from feishu_bot.config import NetworkSettings


def is_loopback(host: str) -> bool:
    """Return whether ``host`` names this machine: ``localhost``, 127.0.0.0/8 or ::1."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: an IPv4 address in its last bits


def is_public(host: str) -> bool | None:
    """Return whether an IP address is one of the internet's; None for a name, which says nothing.

    IPv6 forms that carry an IPv4 address are as public as that one.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            address = inner
        elif address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


def proxy_for(url: str, network: NetworkSettings | None) -> str | None:
    """Return the HTTP proxy to reach ``url`` by, or None for a direct connection.

    The configured proxy comes first, then the variables of the environment (HTTPS_PROXY, NO_PROXY, …), read
    once by whoever keeps the answer: aiohttp's own ``trust_env`` reads them, and .netrc, at every request.
    Raises ConfigError for a proxy that does not speak HTTP.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    if network is not None and network.proxy:
        return network.proxy
    found = getproxies()
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy or proxy_bypass(host):
        return None
    if "://" not in proxy:
        proxy = "http://" + proxy
    if urlsplit(proxy).scheme not in {"http", "https"}:
        raise ConfigError([f"{parts.scheme.upper()}_PROXY: expected an http:// proxy"])
    return proxy


def ssl_context(network: NetworkSettings | None) -> ssl.SSLContext | bool:
    """Return what to check servers by: the system's certificates, and those of ``ca_file`` besides.

    True stands for the default. Raises ConfigError for a file that cannot be used.
    """
    if network is None or not network.ca_file:
        return True
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(network.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([f"network.ca_file: {network.ca_file}: {error.strerror or error}"]) from None
    return context
