"""The HTTP server: routes and what stands before them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from aiohttp import web

from feishu_bot.store.accounts import Role
from feishu_bot.web.connections import Connections
from feishu_bot.web.errors import HttpLog, error_middleware
from feishu_bot.web.pages import page_errors
from feishu_bot.web.visitors import private_only
from feishu_bot.web.webhooks import BODY_WITHIN_S, READ_TIMEOUT_S

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from feishu_bot.config import ServerSettings
    from feishu_bot.web.chat import Chat
    from feishu_bot.web.doors import Doors
    from feishu_bot.web.health import Health
    from feishu_bot.web.send import Send
    from feishu_bot.web.sockets import Sockets
    from feishu_bot.web.webhooks import Webhooks

IDLE_S: Final = 75.0  # a connection on which no request comes to its end; longer than proxies keep theirs
_LAST_REQUESTS_S: Final = 3.0  # what open requests may take when everything else has stopped
_SECURITY: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
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
        send: Send,
        doors: Doors,
        listening: Callable[[], Sequence[socket.socket]] | None = None,
        connections: Connections | None = None,
        idle_s: float = IDLE_S,
        body_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._settings = settings
        self._listening = listening
        self._connections = connections or Connections()
        base, accounts = settings.base_path, doors.accounts
        guard = private_only(
            settings.private_networks, settings.trusted_proxies, base=base, is_admin=accounts.is_admin_token
        )
        application = web.Application(
            client_max_size=settings.max_body_bytes,
            middlewares=[self._connections.middleware, page_errors(doors.pages), error_middleware, guard],
        )
        application[BODY_WITHIN_S] = body_s
        application.on_response_prepare.append(_security_headers)
        routes = [
            web.post("/webhook/{account}", webhooks.handle),
            web.get("/webhook/{account}", webhooks.handle),
            web.get("/ws/{account}", sockets.handle),
            web.get("/healthz", health.healthz),
            web.get("/readyz", health.readyz),
            web.get("/metrics", health.metrics),
            web.get("/static/{name:.+}", doors.static.handle),
            web.post("/chat", accounts.api(chat.handle)),
            web.post("/chat/stop", accounts.api(chat.stop)),
            web.get("/chat/pending", accounts.api(chat.pending)),
            web.get("/agents", accounts.api(chat.agents)),
            web.post("/send", accounts.api(send.handle, Role.ADMIN, local=True)),
            *doors.routes(),
        ]
        doors.describe(routes)
        for route in routes:
            application.router.add_route(route.method, base + route.path, route.handler)
        for path, probe in (("/healthz", health.healthz), ("/readyz", health.readyz)):
            application.router.add_head(base + path, probe)  # many monitors ask so
        if base:  # whoever asks without the proxy whether the process is alive
            application.router.add_get("/healthz", health.healthz)
        self._sockets = sockets
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=HttpLog(logging.getLogger("aiohttp.server")),
            shutdown_timeout=_LAST_REQUESTS_S,
            keepalive_timeout=idle_s,
        )
        self._port = 0

    @property
    def port(self) -> int:
        """The port that is listened on; 0 before the start."""
        return self._port

    async def start(self) -> None:
        """Listen. Raises OSError for a port in use."""
        await self._runner.setup()
        server = self._runner.server
        if server is None:
            raise AssertionError("set up above")
        if self._listening is None:
            host, port = self._settings.host, self._settings.port
            self._port = await self._connections.listen(server, host=host, port=port)
            return
        for shared in self._listening():
            self._port = await self._connections.listen(server, sock=shared)

    async def refuse_connections(self) -> None:
        """Take no new connection; those that are open are answered."""
        self._connections.close()

    async def stop(self) -> None:
        """Close every connection."""
        self._connections.close()
        await self._runner.cleanup()
        await self._sockets.stop()
