"""A browser as far as HTTP goes: it keeps cookies, and its page knows the CSRF token."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import orjson
from argon2 import PasswordHasher

from feishu_bot.store import accounts
from feishu_bot.store.accounts import Role
from tests.stores import opened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.e2e.bots import Bot

PASSWORD = "correct horse battery"


async def add_accounts(db_url: str, **roles: str) -> dict[str, str]:
    """Make accounts with one password, and return an API token of each."""
    # A hash as ours but quick, and so is every login with it: how slow ours are is not what these tests are about.
    hashed = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(PASSWORD)
    secrets = {name: accounts.new_secret() for name in roles}
    async with opened(db_url) as store:
        for name, role in roles.items():
            await store.run(lambda tx, n=name, r=role: accounts.add_account(tx, n, hashed, Role(r)))
            await store.run(
                lambda tx, n=name: accounts.add_token(tx, n, accounts.API, secrets[n], label="tests")
            )
    return secrets


@dataclass
class Browser:
    """Asks one server. ``token``: a script's, sent as it is; else cookies."""

    bot: Bot
    token: str | None = None
    csrf: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    session: aiohttp.ClientSession = field(init=False)

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> tuple[int, Any]:
        """Return status and what came: JSON, text, or None for nothing."""
        sent = {**self.headers, **(headers or {})}
        if self.token is not None:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        if self.csrf is not None:
            sent.setdefault("X-CSRFToken", self.csrf)
        if body is not None:
            more["data"] = body if isinstance(body, bytes) else orjson.dumps(body)
            sent.setdefault("Content-Type", "application/json")
        async with self.session.request(
            method, self.bot.url + path, headers=sent, allow_redirects=False, **more
        ) as response:
            self.response = response
            data = await response.read()
            if response.content_type == "application/json":
                return response.status, orjson.loads(data)
            return response.status, data.decode() if data else None

    async def log_in(self, name: str, password: str = PASSWORD) -> tuple[int, Any]:
        """Log in, and read the page for its CSRF token."""
        found = await self.ask("POST", "/login", {"name": name, "password": password})
        if found[0] == 200:
            await self.open()
        return found

    async def open(self, path: str = "/") -> str:
        """Return a page."""
        status, text = await self.ask("GET", path)
        assert status == 200, (status, text)
        match = re.search(r'data-csrf="(\w+)"', text)
        self.csrf = match[1] if match else None
        return text
