"""The doors for people: who may come in by which, and the pages behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from feishu_bot import __version__
from feishu_bot.web.accounts import VISITOR, Accounts
from feishu_bot.web.admin import Desk, routes
from feishu_bot.web.admin_orders import Orders
from feishu_bot.web.admin_people import People
from feishu_bot.web.admin_views import Views
from feishu_bot.web.conversations import Conversations
from feishu_bot.web.errors import json_response
from feishu_bot.web.login import Login
from feishu_bot.web.openapi import document
from feishu_bot.web.pages import Pages, Static

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.config import ServerSettings
    from feishu_bot.store.store import Store
    from feishu_bot.web.admin import Inside
    from feishu_bot.web.words import Language

_ID: Final = "{id:[0-9]{1,15}}"


@dataclass(frozen=True, slots=True)
class ChatView:
    """What the chat page has to know of the bot: what commands begin with, and what the model can be shown."""

    prefix: str
    images: bool
    files: bool


class Doors:
    """Accounts, pages and files, made once and shared by everything that people open in a browser."""

    def __init__(
        self,
        store: Store,
        settings: ServerSettings,
        *,
        account: str | None,
        language: Callable[[], Language],
        chat: Callable[[], ChatView],
        inside: Inside,
    ) -> None:
        self.accounts = Accounts(store, settings)
        self.static = Static()
        self.pages = Pages(settings.base_path, language, self.static)
        self._chat_view = chat
        self._most = settings.max_body_bytes
        self._conversations = Conversations(store, account)
        self._document: dict[str, Any] = {}
        self._base = settings.base_path
        self._desk = Desk(
            store, self.accounts, self.pages, inside, account=account or "web", base=settings.base_path
        )
        self._login = Login(store, self.accounts, self.pages, base=settings.base_path)

    def routes(self) -> list[web.RouteDef]:
        """Return the routes, without the path that all begin with."""
        api, page, login, own = self.accounts.api, self.accounts.page, self._login, self._conversations
        orders = Orders(self._desk, own.remove_rows)
        return [
            *routes(self._desk, Views(self._desk), orders, People(self._desk, login.hashed)),
            web.get("/conversations", api(own.list)),
            web.get(f"/conversations/{_ID}", api(own.get)),
            web.patch(f"/conversations/{_ID}", api(own.rename)),
            web.delete(f"/conversations/{_ID}", api(own.delete)),
            web.get(f"/conversations/{_ID}/messages", api(own.messages)),
            web.get(f"/conversations/{_ID}/export", api(own.export)),
            web.post(f"/conversations/{_ID}/clear", api(own.clear)),
            web.post(f"/conversations/{_ID}/fork", api(own.fork)),
            web.get("/search", api(own.search)),
            web.get("/", page(self._chat, self.pages.refused)),
            web.get("/openapi.json", self._openapi),
            web.get("/docs", self._docs),
            web.get("/login", login.page),
            web.post("/login", login.login),
            web.post("/logout", api(login.logout)),
            web.get("/account", page(login.account, self.pages.refused)),
            web.get("/account/sessions", api(login.sessions)),
            web.delete("/account/sessions/" + _ID, api(login.end_session)),
            web.get("/account/tokens", api(login.tokens)),
            web.post("/account/tokens", api(login.make_token)),
            web.delete("/account/tokens/" + _ID, api(login.revoke_token)),
            web.post("/account/password", api(login.password)),
        ]

    def describe(self, routes: Sequence[web.RouteDef]) -> None:
        """Have ``/openapi.json`` and ``/docs`` describe these routes."""
        self._document = document(routes, base=self._base, version=__version__)

    async def _openapi(self, _request: web.Request) -> web.StreamResponse:
        return json_response(self._document)

    async def _docs(self, request: web.Request) -> web.StreamResponse:
        return self.pages.render(request, "docs.html")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        view = self._chat_view()
        return self.pages.render(
            request,
            "chat.html",
            visitor=request[VISITOR],
            prefix=view.prefix,
            takes=view,
            most=self._most,
            opens="c" in request.query,
        )
