"""The console's accounts: who there is, what stands for them, and what administrators change of that.

A password or a token that is made here is in the one page that answers the order, and nowhere else.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from feishu_bot.errors import BadPayload, OrderRefused
from feishu_bot.store import accounts, console
from feishu_bot.store.accounts import API, SESSION, Role
from feishu_bot.web.accounts import VISITOR, browser_of
from feishu_bot.web.admin import listing, page_of
from feishu_bot.web.errors import error_response
from feishu_bot.web.login import MAX_LABEL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from feishu_bot.store.work import Transaction
    from feishu_bot.web.admin import Desk

Fields = dict[str, str]

_ID: Final = re.compile(r"[0-9]{1,15}", re.ASCII)


class People:
    """``hashed`` returns the hash of a password, beside the event loop."""

    def __init__(self, desk: Desk, hashed: Callable[[str], Awaitable[str]]) -> None:
        self._desk = desk
        self._hashed = hashed
        self._orders: dict[str, Callable[[web.Request, Fields, str], Awaitable[web.StreamResponse]]] = {
            "add": self._add,
            "role": self._role,
            "password": self._password,
            "remove": self._remove,
            "sessions": self._end,
            "session": self._end,
            "token": self._token,
            "revoke": self._end,
        }

    # ----------------------------------------------------------------------------------------------- pages

    async def list(self, request: web.Request) -> web.StreamResponse:
        """Show accounts, and the sessions and tokens that stand for them."""
        page, number = page_of(request)

        def read(tx: Transaction) -> tuple[Any, Any]:
            return console.list_people(tx, page), console.list_tokens(tx, page)

        people, tokens = await self._desk.store.read(read)
        shown = listing(people, page, number)
        more = listing(tokens, page, number)
        shown["next"] = shown["next"] or more["next"]
        return self._desk.render(
            request, "people", tokens=more["rows"], browser=browser_of, roles=list(Role), **shown
        )

    async def person(self, request: web.Request) -> web.StreamResponse:
        """Show one account with what stands for it, and what may be done to it."""
        name = request.match_info["name"]

        def read(tx: Transaction) -> tuple[Any, Any, Any]:
            found = accounts.find_account(tx, name)
            return found, accounts.list_tokens(tx, name, SESSION), accounts.list_tokens(tx, name, API)

        account, sessions, tokens = await self._desk.store.read(read)
        if account is None:
            raise web.HTTPNotFound
        return self._desk.render(
            request,
            "people",
            template="person",
            account=account,
            sessions=sessions,
            tokens=tokens,
            roles=list(Role),
            most=MAX_LABEL,
            browser=browser_of,
        )

    # ---------------------------------------------------------------------------------------------- orders

    async def order(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        """Make, change or remove an account, or what stands for one."""
        desk, do, name = self._desk, fields.get("do", ""), fields.get("name", "").strip()
        act = self._orders.get(do)
        if act is None:
            raise BadPayload("expected what to do")
        if accounts.NAME.fullmatch(name) is None:
            # One may mistype it, so the page says what a name looks like.
            if do == "add":
                return desk.back("people", why="why_name")
            raise BadPayload("expected an account's name")
        if request[VISITOR].by == "token":  # one that gets about must not make others, which outlive it
            return error_response(403, "only for a browser that has logged in; or: bot.py user")
        ask = desk.words(request)[f"ask_{do}_account" if do in {"add", "remove"} else f"ask_{do}"]
        ask = ask.replace("{name}", name).replace(
            "{role}", desk.words(request)[f"role_of_{_role(fields, do)}"]
        )
        asked = desk.confirmed(request, fields, "people", ask)
        if asked is not None:
            return asked
        try:
            return await act(request, fields, name)
        except OrderRefused as refused:
            return desk.back("people", why=f"why_{refused.why}")

    async def _add(self, request: web.Request, fields: Fields, name: str) -> web.StreamResponse:
        role, password = _role(fields, "add"), accounts.new_password()
        stored = await self._hashed(password)

        def add(tx: Transaction) -> bool:
            if not accounts.add_account(tx, name, stored, role):
                raise OrderRefused("taken")
            return True

        done = await self._carry(request, fields, "account.add", name, add, told={"role": role.value})
        return self._shown(request, name, "password", password if done else None)

    async def _role(self, request: web.Request, fields: Fields, name: str) -> web.StreamResponse:
        role = _role(fields, "role")

        def change(tx: Transaction) -> bool:
            if role is not Role.ADMIN and accounts.is_last_admin(tx, name):
                raise OrderRefused("last_admin")
            return _there(accounts.set_role(tx, name, role))

        await self._carry(request, fields, "account.role", name, change, told={"role": role.value})
        return self._desk.back("people", name)

    async def _password(self, request: web.Request, fields: Fields, name: str) -> web.StreamResponse:
        password = accounts.new_password()
        stored = await self._hashed(password)
        done = await self._carry(
            request,
            fields,
            "account.password",
            name,
            lambda tx: _there(accounts.set_password(tx, name, stored)),
        )
        return self._shown(request, name, "password", password if done else None)

    async def _remove(self, request: web.Request, fields: Fields, name: str) -> web.StreamResponse:
        def remove(tx: Transaction) -> bool:
            if accounts.is_last_admin(tx, name):
                raise OrderRefused("last_admin")
            return _there(accounts.remove_account(tx, name))

        await self._carry(request, fields, "account.remove", name, remove)
        return self._desk.back("people", name)

    async def _token(self, request: web.Request, fields: Fields, name: str) -> web.StreamResponse:
        label, secret = fields.get("label", "").strip()[:MAX_LABEL], accounts.new_secret()
        if not label:
            raise BadPayload("label: expected what the token is for")
        done = await self._carry(
            request,
            fields,
            "token.add",
            name,
            lambda tx: _there(accounts.add_token(tx, name, API, secret, label=label) is not None),
            told={"label": label},
        )
        return self._shown(request, name, "token", secret if done else None)

    async def _end(self, request: web.Request, fields: Fields, name: str) -> web.StreamResponse:
        """End one session or all of an account, or revoke a token."""
        do, number = fields["do"], fields.get("id", "")
        if do != "sessions" and not _ID.fullmatch(number):
            raise BadPayload("expected the id of a session or token")
        kind, one = API if do == "revoke" else SESSION, None if do == "sessions" else int(number)
        await self._carry(
            request,
            fields,
            "token.revoke" if kind == API else "session.end",
            name,
            lambda tx: _there(accounts.revoke(tx, name, kind, one)),
            told={"id": one},
        )
        return self._desk.back("people", name)

    async def _carry(
        self,
        request: web.Request,
        fields: Fields,
        action: str,
        name: str,
        change: Callable[[Transaction], bool],
        *,
        told: Any = None,
    ) -> bool:
        """Carry an order out; False: it was done before, so what it has made was shown before."""
        order = self._desk.order_of(request, fields, self._desk.person(name))
        return bool(await self._desk.carry_out(action, order, change, told=lambda _done: told))

    def _shown(self, request: web.Request, name: str, kind: str, secret: str | None) -> web.StreamResponse:
        """Return the page with what is shown once; None: it was shown before, and is not kept."""
        if secret is None:
            return self._desk.back("people", why="why_shown")
        return self._desk.render(request, "people", template="secret", name=name, kind=kind, secret=secret)


def _role(fields: Fields, do: str) -> Role:
    text = fields.get("role", "")
    if do not in {"add", "role"}:
        return Role.USER
    if text not in set(Role):
        raise BadPayload("role: expected user, viewer or admin")
    return Role(text)


def _there(found: object) -> bool:
    """Return that something was changed. Raises OrderRefused where there was nothing to change."""
    if not found:
        raise OrderRefused("gone")
    return True
