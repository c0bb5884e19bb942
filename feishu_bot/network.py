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
