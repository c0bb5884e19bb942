"""``/login``, ``/logout`` and ``/account``: coming in, leaving, and what stands for one's account."""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from feishu_bot.errors import BadPayload
from feishu_bot.passwords import hash_password, is_right
from feishu_bot.platforms.base import parse_json
from feishu_bot.store import accounts as store_accounts
from feishu_bot.store.accounts import API, SESSION, Account, Token
from feishu_bot.web.accounts import COOKIE, VISITOR, Visitor, browser_of, is_same_origin, unsigned
from feishu_bot.web.errors import error_response, json_response
from feishu_bot.web.webhooks import read_body

if TYPE_CHECKING:
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction
    from feishu_bot.web.accounts import Accounts
    from feishu_bot.web.pages import Pages

log = logging.getLogger(__name__)

HASHING_AT_ONCE: Final = 2  # passwords looked at at once by a process: each takes 64 MiB and a core
MAX_LABEL: Final = 100  # characters of what a token is for
_PLACE: Final = re.compile(r"/(?![/\\])[^\x00-\x20\\]*")


class Login:
    """Passwords are looked at beside the event loop, after the attempt has been counted in the database."""

    def __init__(self, store: Store, accounts: Accounts, pages: Pages, *, base: str) -> None:
        self._store = store
        self._accounts = accounts
        self._pages = pages
        self._base = base
        self._hashing = asyncio.Semaphore(HASHING_AT_ONCE)

    # ---------------------------------------------------------------------------------------- coming in

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Return the form; who is in already is led on."""
        place = safe_place(request.query.get("next"), self._base)
        if isinstance(await self._accounts.who(request), Visitor):
            raise web.HTTPSeeOther(place)
        return self._pages.render(request, "login.html", place=place)

    async def login(self, request: web.Request) -> web.StreamResponse:
        """Take ``{name, password}``; 200 with a new session's cookie, 401, or 429 with ``Retry-After``."""
        if request.content_type != "application/json" or not is_same_origin(request):
            return error_response(
                403, "expected JSON from our own page"
            )  # another site's form logs nobody in
        name, password = _texts(parse_json(await read_body(request)), "name", "password")
        address = self._accounts.address(request)
        wait_ms = await self._store.run(lambda tx: store_accounts.take_attempt(tx, name, address))
        if wait_ms:
            log.warning("login refused", extra={"reason": "too many attempts", "peer": address})
            headers = {"Retry-After": str(-(-wait_ms // 1000))}
            return error_response(
                429, "too many attempts; try again later", code="too_many_attempts", headers=headers
            )
        stored = await self._store.read(lambda tx: store_accounts.password_of(tx, name))
        if not await self._is_right(stored, password):
            log.warning("login refused", extra={"reason": "wrong name or password", "peer": address})
            return error_response(401, "the name or the password is not right", code="wrong_password")
        return await self._let_in(request, name, address)

    async def _let_in(self, request: web.Request, name: str, address: str) -> web.StreamResponse:
        """Begin a session with a secret of its own; what the browser had before is ended, whoever gave it that."""
        secret, before = store_accounts.new_secret(), request.cookies.get(COOKIE)
        old = None if before is None else unsigned(await self._accounts.key(), before)

        def begin(tx: Transaction) -> Account | None:
            if old is not None and (known := store_accounts.who_has(tx, SESSION, old)) is not None:
                store_accounts.revoke(tx, known.account, SESSION, known.token_id)
            store_accounts.forget_attempts(tx, name, address)
            label = request.headers.get("User-Agent", "")
            if store_accounts.who_has(tx, SESSION, secret) is None:
                store_accounts.add_token(tx, name, SESSION, secret, label=label, address=address)
            return store_accounts.find_account(tx, name)

        account = await self._store.run(begin)
        if account is None:  # removed while its password was looked at
            return error_response(401, "the name or the password is not right", code="wrong_password")
        log.info("logged in", extra={"account": name, "peer": address})
        response = json_response({"name": account.name, "role": account.role.value})
        await self._accounts.set_cookie(request, response, secret)
        response.headers["Cache-Control"] = "no-store"
        return response

    async def _is_right(self, stored: str | None, password: str) -> bool:
        async with self._hashing:
            return await asyncio.to_thread(is_right, stored, password)

    async def hashed(self, password: str) -> str:
        """Return the hash to store. Raises ValueError for a password that will not do."""
        async with self._hashing:
            return await asyncio.to_thread(hash_password, password)

    async def logout(self, request: web.Request) -> web.StreamResponse:
        """End this session."""
        visitor = request[VISITOR]
        if visitor.by == "session" and visitor.token_id is not None:
            await self._revoke(visitor.name, SESSION, visitor.token_id)
        response = web.Response(status=204)
        self._accounts.forget_cookie(response)
        return response

    # -------------------------------------------------------------------------------- what stands for one

    async def account(self, request: web.Request) -> web.StreamResponse:
        """Return the page of one's own account: sessions, tokens, password."""
        visitor = request[VISITOR]
        return self._pages.render(request, "account.html", visitor=visitor)

    async def sessions(self, request: web.Request) -> web.StreamResponse:
        """Return the browsers that are logged in."""
        visitor = request[VISITOR]
        found = await self._store.read(lambda tx: store_accounts.list_tokens(tx, visitor.name, SESSION))
        items = [_token_json(token) | {"current": token.id == visitor.token_id} for token in found]
        return json_response({"items": items, "next": None})

    async def tokens(self, request: web.Request) -> web.StreamResponse:
        """Return one's API tokens, without their secrets."""
        visitor = request[VISITOR]
        found = await self._store.read(lambda tx: store_accounts.list_tokens(tx, visitor.name, API))
        return json_response({"items": [_token_json(token) for token in found], "next": None})

    async def make_token(self, request: web.Request) -> web.StreamResponse:
        """Make an API token ``{label}``; its secret is in this answer and nowhere else."""
        visitor = request[VISITOR]
        if visitor.by != "session":
            return error_response(403, "only for a browser that has logged in; or: bot.py user token NAME")
        (label,) = _texts(parse_json(await read_body(request)), "label")
        secret = store_accounts.new_secret()
        token_id = await self._store.run(
            lambda tx: store_accounts.add_token(tx, visitor.name, API, secret, label=label[:MAX_LABEL])
        )
        response = json_response({"id": token_id, "label": label[:MAX_LABEL], "token": secret}, status=201)
        response.headers["Cache-Control"] = "no-store"
        return response

    async def end_session(self, request: web.Request) -> web.StreamResponse:
        """End one of one's sessions."""
        return await self._end(request, SESSION)

    async def revoke_token(self, request: web.Request) -> web.StreamResponse:
        """Revoke one of one's API tokens."""
        return await self._end(request, API)

    async def _end(self, request: web.Request, kind: str) -> web.StreamResponse:
        ended = await self._revoke(request[VISITOR].name, kind, int(request.match_info["id"]))
        return web.Response(status=204) if ended else error_response(404, "there is none with this id")

    async def _revoke(self, name: str, kind: str, token_id: int) -> int:
        return await self._store.run(lambda tx: store_accounts.revoke(tx, name, kind, token_id))

    async def password(self, request: web.Request) -> web.StreamResponse:
        """Change one's password ``{old, new}``; all other sessions end."""
        visitor, address = request[VISITOR], self._accounts.address(request)
        old, new = _texts(parse_json(await read_body(request)), "old", "new")
        wait_ms = await self._store.run(lambda tx: store_accounts.take_attempt(tx, visitor.name, address))
        if wait_ms:
            return error_response(429, "too many attempts; try again later", code="too_many_attempts")
        stored = await self._store.read(lambda tx: store_accounts.password_of(tx, visitor.name))
        if not await self._is_right(stored, old):
            return error_response(403, "the current password is not right", code="wrong_password")
        try:
            fresh = await self.hashed(new)
        except ValueError as error:
            return error_response(400, str(error), code="bad_password")
        keep = visitor.token_id if visitor.by == "session" else None
        await self._store.run(lambda tx: store_accounts.set_password(tx, visitor.name, fresh, keep=keep))
        return web.Response(status=204)


def safe_place(wanted: str | None, base: str) -> str:
    """Return where to go after the login: a path of ours, never another site."""
    home = f"{base}/"
    if wanted is None or _PLACE.fullmatch(wanted) is None or not wanted.startswith(home):
        return home
    return wanted


def _texts(data: Any, *names: str) -> list[str]:
    if not isinstance(data, dict):
        raise BadPayload("expected a JSON object")
    for name in names:
        value = data.get(name)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise BadPayload(f"{name}: expected a text that is not empty")
    return [data[name] for name in names]


def _token_json(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "label": token.label,
        "told": browser_of(token.label) if token.kind == SESSION else token.label,
        "address": token.address,
        "created_at": _iso(token.created_at),
        "used_at": _iso(token.used_at),
    }


def _iso(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
