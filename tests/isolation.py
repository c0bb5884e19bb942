"""Keeps a test run apart from the machine it runs on: no network beyond loopback, no settings from outside."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable

_SETTINGS = {
    "CONVERSATION_DB_URL",
    "CONVERSATION_DATA_DIR",
    "DATABASE_PATH",
    "DEFAULT_ORG_ID",
    "DEFAULT_USER_ID",
    "ENABLE_DB_PERSISTENCE",
    "NO_COLOR",
}
_PREFIXES = ("FEISHU_", "QQ_", "ONEBOT_", "DB_")
_SUFFIXES = ("_PROXY", "_API_KEY")


class NetworkRefused(Exception):
    """A test wanted to reach another host. No OSError, so that code under test does not take it for an outage."""


def clean_environment() -> None:
    """Remove proxies, keys and every variable that the product reads."""
    for name in list(os.environ):
        upper = name.upper()
        if upper in _SETTINGS or upper.startswith(_PREFIXES) or upper.endswith(_SUFFIXES):
            del os.environ[name]


def keep_bytecode() -> None:
    """Let this process and those that it starts keep what they compile, also where the machine says otherwise.

    Hundreds of them import the product; each would compile it, and pytest the tests, anew.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


class NetworkGuard:
    """Refuses connections and look-ups beyond loopback in this process, and remembers them in ``refused``.

    ``allowed`` are hosts all the same: those of the databases that the caller named.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self.refused: list[str] = []
        self._names = {"", "localhost", socket.gethostname(), *allowed}
        self._addresses = {
            str(info[4][0])
            for name in allowed
            for info in socket.getaddrinfo(name, None)  # before the guard is on
        }

    def install(self) -> None:
        """Start to refuse, until the process ends: an audit hook cannot be removed."""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith("socket."):
            return
        if event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
            connection, address = arguments
            if connection.family in {socket.AF_INET, socket.AF_INET6} and address is not None:
                self._check(str(address[0]))
        elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
            host = arguments[0]
            self._check(host.decode() if isinstance(host, bytes) else host or "", lookup=True)

    def _check(self, host: str, *, lookup: bool = False) -> None:
        name = host.lower().rstrip(".")
        if name in self._names or name in self._addresses or name.endswith(".localhost"):
            return
        try:
            address = ipaddress.ip_address(name.split("%")[0])
        except ValueError:
            pass
        else:
            if lookup or address.is_loopback or address.is_unspecified:
                return
        self.refused.append(host)
        raise NetworkRefused(f"tests use no network beyond loopback, but this one wanted {host}")


def database_hosts() -> list[str]:
    """Return the hosts of the database URLs in the environment."""
    hosts = []
    for name in ("TEST_POSTGRES_URL", "TEST_MARIADB_URL"):
        try:
            host = make_url(os.environ.get(name, "")).host
        except ArgumentError:
            continue
        if host:
            hosts.append(host)
    return hosts
