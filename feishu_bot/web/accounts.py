"""Who asks: an account by its session, its token or its proxy, or the local user while there is no account."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from http.cookies import CookieError
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import quote, urlsplit

from aiohttp import web

from feishu_bot.store import accounts
from feishu_bot.store.accounts import API, SESSION, Role
from feishu_bot.web.errors import error_response
from feishu_bot.web.visitors import (
    HOW_TO_OPEN,
    LOCAL_USER,
    address_of,
    is_forwarded_https,
    is_from,
    local_user,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.typedefs import Handler

    from feishu_bot.config import ServerSettings
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction

COOKIE: Final = "session"
CSRF_HEADER: Final = "X-CSRFToken"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
# Where more than one of these stands, the first of this list is the one that is meant: the others are for old servers.
_BROWSERS: Final = (("Edg/", "Edge"), ("OPR/", "Opera"), ("Firefox/", "Firefox"), ("FxiOS/", "Firefox"), ("CriOS/", "Chrome"),
                    ("Chrome/", "Chrome"), ("Version/", "Safari"))  # fmt: skip
_SYSTEMS: Final = (("Windows", "Windows"), ("Android", "Android"), ("iPhone", "iPhone"), ("iPad", "iPad"),
                   ("Mac OS X", "macOS"), ("CrOS", "ChromeOS"), ("Linux", "Linux"))  # fmt: skip
_BEARER: Final = "bearer "
_LOG_IN: Final = "log in at /login, or send a token: Authorization: Bearer …"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks. ``csrf`` has to come with each change; None: what proves him is nothing a browser sends by itself."""

    name: str
    role: Role
    by: Literal["local", "session", "token", "proxy"]
    token_id: int | None = None
    csrf: str | None = None


VISITOR: Final = web.RequestKey("visitor", Visitor)


@dataclass(frozen=True, slots=True)
class _Nobody:
    """Why a request is nobody's: ``first``, as there is no account that it could be of."""

    first: bool


class Accounts:
    """Finds out who asks, and stands before the handlers that only some may reach."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self._store = store
        self._proxies = settings.trusted_proxies
        self._user_header = settings.user_header
        self._base = settings.base_path
        self._is_https = (settings.public_url or "").startswith("https://")
        self._key: bytes | None = None

    # ------------------------------------------------------------------------------------ before handlers

    def api(self, handler: Handler, role: Role = Role.USER, *, local: bool = False) -> Handler:
        """Return the handler for visitors of this role only; everybody else hears why in JSON.

        ``local``: for the local user too, whatever the role. A change needs the CSRF token where a cookie or a proxy
        vouches for the visitor: a browser sends these with requests of any page.
        """

        async def guarded(request: web.Request) -> web.StreamResponse:
            visitor = await self.who(request)
            if isinstance(visitor, _Nobody):
                if visitor.first:
                    return error_response(403, HOW_TO_OPEN)
                return error_response(401, _LOG_IN, headers={"WWW-Authenticate": "Bearer"})
            if not (visitor.role.may(role) or (local and visitor.by == "local")):
                return error_response(403, f"only for accounts with the role {role.value}")
            if visitor.csrf is not None and request.method not in SAFE_METHODS:
                sent = request.headers.get(CSRF_HEADER, "")
                if not hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), visitor.csrf.encode()):
                    return error_response(403, f"the header {CSRF_HEADER} is missing or wrong", code="csrf")
            request[VISITOR] = visitor
            return await handler(request)

        guarded.__doc__ = handler.__doc__
        guarded.role = role  # type: ignore[attr-defined]  # for the description of the API
        return guarded

    def page(
        self,
        handler: Handler,
        refused: Callable[[web.Request, str], Awaitable[web.StreamResponse]],
        role: Role = Role.USER,
    ) -> Handler:
        """Return the handler of an HTML page: who has not logged in is led to where he can.

        ``refused`` tells others why they see nothing, by the key of a sentence.
        """

        async def guarded(request: web.Request) -> web.StreamResponse:
            visitor = await self.who(request)
            if isinstance(visitor, _Nobody):
                if visitor.first:
                    return await refused(request, "how_first")
                raise web.HTTPSeeOther(f"{self._base}/login?next={quote(request.path_qs, safe='/')}")
            if not visitor.role.may(role):
                return await refused(request, "only_role")
            request[VISITOR] = visitor
            return await handler(request)

        return guarded

    # -------------------------------------------------------------------------------------------- who asks

    async def who(self, request: web.Request) -> Visitor | _Nobody:
        """Return who asks. Raises StoreUnavailable."""
        bearer, proxied = _bearer(request), self._proxied(request)
        cookie = None if bearer is not None or proxied is not None else _cookie(request)
        local = self._user_header is None and local_user(request) is not None

        def look(tx: Transaction) -> tuple[accounts.Known | Visitor | None, bytes | None, bool]:
            key = self._key or accounts.cookie_key(tx)
            found: accounts.Known | Visitor | None = None
            if bearer is not None:
                found = accounts.who_has(tx, API, bearer)
            elif proxied is not None:
                found = _proxied_account(tx, proxied)
            elif cookie is not None and key is not None and (secret := unsigned(key, cookie)) is not None:
                found = accounts.who_has(tx, SESSION, secret)
            return found, key, found is not None or accounts.any_account(tx)

        found, self._key, there_are_accounts = await self._store.read(look)
        if isinstance(found, Visitor):
            key = await self.key()
            return Visitor(found.name, found.role, found.by, csrf=csrf_token(key, f"name {found.name}"))
        if isinstance(found, accounts.Known):
            if found.stale:
                address, token_id = self.address(request), found.token_id
                await self._store.run(lambda tx: accounts.note_use(tx, token_id, address))
            if bearer is not None:
                return Visitor(found.account, found.role, "token", found.token_id)
            csrf = csrf_token(await self.key(), f"session {cookie}")
            return Visitor(found.account, found.role, "session", found.token_id, csrf)
        if bearer is None and local and not there_are_accounts:
            return Visitor(LOCAL_USER, Role.USER, "local")
        return _Nobody(first=not there_are_accounts and bearer is None)

    async def is_admin_token(self, request: web.Request) -> bool:
        """Say whether a request carries the API token of an administrator. Raises StoreUnavailable."""
        bearer = _bearer(request)
        if bearer is None:
            return False
        known = await self._store.read(lambda tx: accounts.who_has(tx, API, bearer))
        return known is not None and known.role is Role.ADMIN

    def _proxied(self, request: web.Request) -> str | None:
        """Return whom an authenticating proxy of ours names; a header of anybody else means nothing."""
        if self._user_header is None or not is_from(request, self._proxies):
            return None
        names = request.headers.getall(self._user_header, ())
        return names[0] if len(names) == 1 and accounts.NAME.fullmatch(names[0]) else None

    def address(self, request: web.Request) -> str:
        """Return the address that a visitor comes from, as far as anybody trustworthy tells."""
        return address_of(request, self._proxies) or request.remote or ""

    def is_https(self, request: web.Request) -> bool:
        """Say whether the browser reaches us by https, so that a cookie is to travel by that alone."""
        return self._is_https or request.secure or is_forwarded_https(request, self._proxies)

    # ---------------------------------------------------------------------------------------------- cookies

    async def key(self) -> bytes:
        """Return the key that cookies are signed with."""
        if self._key is None:
            self._key = await self._store.run(accounts.make_cookie_key)
        return self._key

    async def set_cookie(self, request: web.Request, response: web.StreamResponse, secret: str) -> str:
        """Give a browser a session's secret, and return its CSRF token."""
        key = await self.key()
        value = signed(key, secret)
        response.set_cookie(
            COOKIE,
            value,
            max_age=accounts.SESSION_MS // 1000,
            path=self._base or "/",
            httponly=True,
            samesite="Lax",
            secure=self.is_https(request),
        )
        return csrf_token(key, f"session {value}")

    def forget_cookie(self, response: web.StreamResponse) -> None:
        """Have a browser forget its session."""
        response.del_cookie(COOKIE, path=self._base or "/")


def _proxied_account(tx: Transaction, name: str) -> Visitor | None:
    """Return the visitor a proxy has let in: an account, or somebody without one. The local user is no such body."""
    account = accounts.find_account(tx, name)
    if account is not None:
        return Visitor(account.name, account.role, "proxy")
    return None if name == LOCAL_USER else Visitor(name, Role.USER, "proxy")


def _bearer(request: web.Request) -> str | None:
    value = request.headers.get("Authorization", "")
    return value[len(_BEARER) :].strip() if value.lower().startswith(_BEARER) else None


def _cookie(request: web.Request) -> str | None:
    try:
        return request.cookies.get(COOKIE)
    except CookieError:
        return None


def _mac(key: bytes, purpose: str, value: str) -> str:
    message = f"{purpose}\n{value}".encode("utf-8", "surrogatepass")
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def signed(key: bytes, secret: str) -> str:
    """Return a secret with its signature, for a cookie."""
    return f"{secret}.{_mac(key, 'cookie', secret)}"


def unsigned(key: bytes, value: str) -> str | None:
    """Return the secret of a signed cookie; None where the signature is not ours."""
    secret, _, mac = value.rpartition(".")
    right = _mac(key, "cookie", secret).encode()
    return secret if hmac.compare_digest(mac.encode("utf-8", "surrogatepass"), right) else None


def csrf_token(key: bytes, whose: str) -> str:
    """Return the token that changes of this session, or of this proxy's user, have to bring."""
    return _mac(key, "csrf", whose)


def browser_of(label: str) -> str:
    """Return a browser as people call it, from what it says of itself; anything else as it is."""
    name = next(((said, told) for said, told in _BROWSERS if said in label), None)
    system = next((told for said, told in _SYSTEMS if said in label), None)
    if not label.startswith("Mozilla/") or name is None or system is None:
        return label
    version = label.split(name[0], 1)[1].partition(".")[0]
    return f"{name[1]} {version} · {system}" if version.isdecimal() else label


def is_same_origin(request: web.Request) -> bool:
    """Say whether no other site has made the browser send this, as far as the browser tells."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = request.headers.get("Origin")
    try:
        return origin is None or urlsplit(origin).netloc == request.host
    except ValueError:
        return False
