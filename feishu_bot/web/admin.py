"""``/admin``: who may see the console, its routes, and how its pages and orders are made."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode

import orjson
from aiohttp import web

from feishu_bot.config import secret_values
from feishu_bot.errors import BadPayload
from feishu_bot.log import SecretFilter
from feishu_bot.model import make_key, person_key
from feishu_bot.store import audit
from feishu_bot.store.accounts import Role
from feishu_bot.store.audit import Order
from feishu_bot.store.console import Page
from feishu_bot.web.accounts import CSRF_HEADER, VISITOR, is_same_origin
from feishu_bot.web.admin_words import console_words
from feishu_bot.web.errors import error_response
from feishu_bot.web.webhooks import read_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from aiohttp.typedefs import Handler

    from feishu_bot.budgets import Budgets
    from feishu_bot.config import BotSettings
    from feishu_bot.log import RecentLines
    from feishu_bot.platforms.base import Platform
    from feishu_bot.schedule import Schedule
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction
    from feishu_bot.web.accounts import Accounts
    from feishu_bot.web.pages import Pages

PER_PAGE: Final = 50
MAX_PAGE: Final = 200  # behind it one searches
MAX_TEXT: Final = 200  # characters of what is looked for
SECTIONS: Final = (
    *("overview", "dead", "conversations", "budgets", "jobs", "platforms"),
    *("config", "logs", "people", "audit"),
)
_MAX_FORM: Final = 64 * 1024  # bytes
_MAX_FIELDS: Final = 20
_ORDER: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Inside:
    """What the console sees of the server it runs in; what is asked may be another one after a reload.

    ``problems`` are what ``/readyz`` tells; ``lines`` what this process has logged. ``retried`` has the work that
    was opened again begun at once.
    """

    settings: Callable[[], BotSettings]
    origins: Callable[[], Mapping[str, str]]
    budgets: Callable[[], Budgets]
    schedule: Schedule
    platforms: Mapping[str, Platform]
    problems: Callable[[], list[str]]
    lines: RecentLines | None
    retried: Callable[[], None]


class Desk:
    """What every page and order of the console needs: who may, how it looks, and that orders are on record."""

    def __init__(
        self, store: Store, accounts: Accounts, pages: Pages, inside: Inside, *, account: str, base: str
    ) -> None:
        self.store = store
        self.inside = inside
        self.base = base
        self._accounts = accounts
        self._pages = pages
        self._account = account  # whose persons the accounts are
        self._words = {"zh": console_words("zh"), "en": console_words("en")}

    # ---------------------------------------------------------------------------------------------- who may

    def page(self, handler: Handler, role: Role = Role.VIEWER) -> Handler:
        """Return the handler of a page or of an order, for this role."""
        return self._where_enabled(self._accounts.page(handler, self._refused, role), handler, role)

    def api(self, handler: Handler) -> Handler:
        """Return the handler of what pages ask for themselves."""
        return self._where_enabled(self._accounts.api(handler, Role.VIEWER), handler, Role.VIEWER)

    def _where_enabled(self, guarded: Handler, handler: Handler, role: Role) -> Handler:
        """Return the handler, 404 for everybody where there is to be no console."""

        async def enabled(request: web.Request) -> web.StreamResponse:
            if not self.inside.settings().admin.enabled:
                raise web.HTTPNotFound
            return await guarded(request)

        enabled.__doc__ = handler.__doc__
        enabled.role = role  # type: ignore[attr-defined]  # for the description of the API
        return enabled

    async def _refused(self, request: web.Request, _reason: str) -> web.StreamResponse:
        return self._pages.render(request, "admin/refused.html", status=403, w=self.words(request))

    # ----------------------------------------------------------------------------------------------- pages

    def words(self, request: web.Request) -> dict[str, str]:
        """Return the console's words in the visitor's language."""
        return self._words[self._pages.language(request)]

    def render(self, request: web.Request, section: str, **values: Any) -> web.StreamResponse:
        """Return a page of the console."""
        visitor, query = request[VISITOR], request.query
        template = values.pop("template", section)
        # What macros need of a page: they see nothing of it but what they are given.
        shared = {
            "w": self.words(request),
            "base": self.base,
            "visitor": visitor,
            "order": secrets.token_hex(8),
            "when": self.when,
            "link": self._link(request),
        } | {name: values.get(name) for name in ("q", "number", "previous", "next")}
        return self._pages.render(
            request,
            f"admin/{template}.html",
            visitor=visitor,
            w=shared["w"],
            c=shared,
            section=section,
            sections=SECTIONS,
            may=visitor.role.may(Role.ADMIN),
            ago=ago,
            done=query.get("done"),
            not_done=query.get("not"),
            **values,
        )

    @staticmethod
    def _link(request: web.Request) -> Callable[..., str]:
        """Return what makes an address of this page with other values in its query."""
        own = {key: value for key, value in request.query.items() if key not in {"done", "not"}}

        def link(**values: Any) -> str:
            query = {k: v for k, v in (own | values).items() if v not in (None, "")}
            return "?" + urlencode(query)

        return link

    def when(self, instant: Any) -> str:
        """Return an instant (ms, or a date and time) by the clock of ``schedule.timezone``."""
        if not isinstance(instant, datetime):
            instant = datetime.fromtimestamp(instant / 1000, UTC)
        here: datetime = instant.astimezone(self.inside.settings().schedule.zone)
        return here.strftime("%Y-%m-%d %H:%M:%S")

    def secrets(self) -> SecretFilter:
        """Return what hides every secret of the configuration."""
        return SecretFilter(secret_values(self.inside.settings()))

    # ----------------------------------------------------------------------------------------------- orders

    async def form(self, request: web.Request) -> dict[str, str] | web.StreamResponse:
        """Return the fields of an order, or the response to one that is not from our own page."""
        if request.content_type != "application/x-www-form-urlencoded" or not is_same_origin(request):
            return error_response(403, "expected a form of our own page", code="csrf")
        body = await read_body(request)
        if len(body) > _MAX_FORM:
            raise BadPayload("too long")
        try:
            text = body.decode("ascii")
            pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
        except ValueError:
            raise BadPayload("expected a form") from None
        fields = dict(pairs)
        if any("\0" in text for pair in pairs for text in pair):
            raise BadPayload("expected a form")
        csrf = request[VISITOR].csrf
        if csrf is not None:
            sent = request.headers.get(CSRF_HEADER) or fields.get("csrf", "")
            if not hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), csrf.encode()):
                return error_response(403, "the page is out of date; load it again", code="csrf")
        return fields

    def confirmed(
        self, request: web.Request, fields: dict[str, str], section: str, ask: str
    ) -> web.StreamResponse | None:
        """Return the page that asks whether it is meant, or None for who has said so."""
        if fields.get("sure") == "yes":
            return None
        kept = {key: value for key, value in fields.items() if key not in {"csrf", "sure"}}
        return self.render(
            request, section, template="confirm", ask=ask, fields=kept, back=self.place(section)
        )

    def order_of(self, request: web.Request, fields: Mapping[str, str], target: str) -> Order:
        """Return who orders what; the same form sent twice is one order, another form of the same page another."""
        actor, number = self.person(request[VISITOR].name), fields.get("order", "")
        if not _ORDER.fullmatch(number):
            number = secrets.token_hex(8)
        said = sorted((key, value) for key, value in fields.items() if key not in {"csrf", "sure", "order"})
        digest = hashlib.sha256(orjson.dumps(said)).hexdigest()[:16]
        return Order(actor, target[:255], make_key("console", actor, f"{number}-{digest}"))

    def person(self, name: str) -> str:
        """Return the person that an account is."""
        return person_key(self._account, name)

    async def carry_out(
        self,
        action: str,
        order: Order,
        change: Callable[[Transaction], Any],
        *,
        told: Callable[[Any], Any] = lambda _found: None,
    ) -> Any:
        """Change something and put it on record in one transaction; return what ``change`` returns, None: done before.

        What has changed nothing (``change`` returns something empty) is not put down. ``told`` says what is kept of it.
        """

        def carry(tx: Transaction) -> Any:
            if audit.known(tx, order.source):
                return None
            found = change(tx)
            if found:
                audit.note(tx, action, order, after=told(found))
            return found

        return await self.store.run(carry)

    def place(self, section: str, **query: Any) -> str:
        """Return the address of a page."""
        path = f"{self.base}/admin" + ("" if section == "overview" else f"/{section}")
        return path + ("?" + urlencode(query) if query else "")

    def back(self, section: str, done: Any = None, why: str | None = None) -> web.StreamResponse:
        """Return to a page that says what was done, or (``why``, a key of words) why nothing was."""
        query = {"not": why} if why else {"done": str(done)}
        return web.Response(status=303, headers={"Location": self.place(section, **query)})


def page_of(request: web.Request) -> tuple[Page, int]:
    """Return what of a list is asked for, with one row more than is shown, and the page's number from 1."""
    text, number = request.query.get("q", "").strip(), request.query.get("page", "1")
    if len(text) > MAX_TEXT or "\0" in text:
        raise BadPayload(f"q: expected at most {MAX_TEXT} characters")
    if not re.fullmatch(r"[0-9]{1,3}", number, re.ASCII) or not 1 <= int(number) <= MAX_PAGE:
        raise BadPayload(f"page: expected a number from 1 to {MAX_PAGE}")
    return Page(text, (int(number) - 1) * PER_PAGE, PER_PAGE + 1), int(number)


def listing(rows: Sequence[Any], page: Page, number: int) -> dict[str, Any]:
    """Return what a template needs of a list: its rows, what was looked for, and the pages beside this one."""
    more = len(rows) > PER_PAGE and number < MAX_PAGE
    return {
        "rows": rows[:PER_PAGE],
        "q": page.text,
        "number": number,
        "previous": number - 1 if number > 1 else None,
        "next": number + 1 if more else None,
    }


def filtered(rows: Sequence[Any], text: str, words: Callable[[Any], str]) -> list[Any]:
    """Return those of a short list in whose words the text occurs."""
    wanted = text.casefold()
    return [row for row in rows if wanted in words(row).casefold()]


def ago(ms: float | None) -> str:
    """Return a length of time for people."""
    if ms is None:
        return "–"
    seconds = int(ms // 1000)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def routes(desk: Desk, views: Any, orders: Any, people: Any) -> list[web.RouteDef]:
    """Return the routes, without the path that all begin with."""
    look: Callable[[Handler], Handler] = desk.page
    letter, conversation = (
        "/admin/dead/{letter:(?:in|out)-[0-9]{1,15}}",
        "/admin/conversations/{id:[0-9]{1,15}}",
    )
    person = "/admin/people/{name:[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}}"

    def order(handler: Callable[[web.Request, dict[str, str]], Awaitable[web.StreamResponse]]) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            fields = await desk.form(request)
            return await handler(request, fields) if isinstance(fields, dict) else fields

        checked.__doc__ = handler.__doc__
        return desk.page(checked, Role.ADMIN)

    return [
        web.get("/admin", look(views.overview)),
        web.get("/admin/live", desk.api(views.live)),
        web.get("/admin/dead", look(views.dead)),
        web.get(letter, look(views.letter)),
        web.post("/admin/dead", order(orders.dead)),
        web.get("/admin/conversations", look(views.conversations)),
        web.get(conversation, look(views.conversation)),
        web.get(conversation + "/export", look(views.export)),
        web.post("/admin/conversations", order(orders.conversations)),
        web.get("/admin/budgets", look(views.budgets)),
        web.post("/admin/budgets", order(orders.budgets)),
        web.get("/admin/jobs", look(views.jobs)),
        web.post("/admin/jobs", order(orders.jobs)),
        web.get("/admin/platforms", look(views.platforms)),
        web.post("/admin/platforms", order(orders.platforms)),
        web.get("/admin/config", look(views.config)),
        web.get("/admin/logs", look(views.logs)),
        web.get("/admin/people", look(people.list)),
        web.get(person, look(people.person)),
        web.post("/admin/people", order(people.order)),
        web.get("/admin/audit", look(views.audit)),
    ]
