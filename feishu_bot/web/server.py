"""The HTTP server: routes and what stands before them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from feishu_bot.web.errors import HttpLog, error_middleware
from feishu_bot.web.visitors import private_only

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from aiohttp.typedefs import Handler

    from feishu_bot.config import ServerSettings
    from feishu_bot.web.chat import Chat
    from feishu_bot.web.health import Health
    from feishu_bot.web.send import Send
    from feishu_bot.web.sockets import Sockets
    from feishu_bot.web.webhooks import Webhooks

_STATIC: Final = Path(__file__).parent / "static"
BACKLOG: Final = 1024  # connections that wait to be taken
_LAST_REQUESTS_S: Final = 3.0  # what open requests may take when everything else has stopped
_SECURITY: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def _security_headers(_request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _SECURITY.items():
        response.headers.setdefault(name, value)
    response.headers.pop("Server", None)


class Server:
    """Listens for HTTP on one port. ``listening`` gives the sockets where several processes share it."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        webhooks: Webhooks,
        sockets: Sockets,
        chat: Chat,
        health: Health,
        send: Send | None = None,
        listening: Callable[[], Sequence[socket.socket]] | None = None,
    ) -> None:
        self._settings = settings
        self._listening = listening
        application = web.Application(
            client_max_size=settings.max_body_bytes,
            middlewares=[error_middleware, private_only(settings.private_networks, settings.trusted_proxies)],
        )
        application.on_response_prepare.append(_security_headers)
        application.router.add_routes(
            [
                web.post("/webhook/{account}", webhooks.handle),
                web.get("/webhook/{account}", webhooks.handle),
                web.get("/ws/{account}", sockets.handle),
                web.post("/chat", chat.handle),
                web.get("/healthz", health.healthz),
                web.get("/readyz", health.readyz),
                web.get("/metrics", health.metrics),
                web.get("/", _page(_STATIC / "chat.html")),
                web.static("/static", _STATIC),
            ]
        )
        if send is not None:
            application.router.add_post("/send", send.handle)
        self._sockets = sockets
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=HttpLog(logging.getLogger("aiohttp.server"), {}),
            shutdown_timeout=_LAST_REQUESTS_S,
        )
        self._sites: list[web.BaseSite] = []
        self._port = 0

    @property
    def port(self) -> int:
        """The port that is listened on; 0 before the start."""
        return self._port

    async def start(self) -> None:
        """Listen. Raises OSError for a port in use."""
        await self._runner.setup()
        if self._listening is None:
            site = web.TCPSite(self._runner, self._settings.host, self._settings.port, backlog=BACKLOG)
            await site.start()
            self._sites, self._port = [site], site.port
            return
        for shared in self._listening():
            self._port = shared.getsockname()[1]
            self._sites.append(web.SockSite(self._runner, shared, backlog=BACKLOG))
            await self._sites[-1].start()

    async def refuse_connections(self) -> None:
        """Take no new connection; those that are open are answered."""
        for site in self._sites:
            await site.stop()

    async def stop(self) -> None:
        """Close every connection."""
        await self._runner.cleanup()
        await self._sockets.stop()


def _page(path: Path) -> Handler:
    body = path.read_bytes()

    async def page(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="text/html", charset="utf-8")

    return page
