"""``/healthz``, ``/readyz`` and ``/metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from feishu_bot.web.errors import json_response

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.metrics import Metrics


class Health:
    """``broken`` names what makes the server unfit to serve; ``degraded`` what an operator should know."""

    def __init__(
        self, metrics: Metrics, *, broken: Callable[[], list[str]], degraded: Callable[[], list[str]]
    ) -> None:
        self._metrics = metrics
        self._broken = broken
        self._degraded = degraded

    async def healthz(self, _request: web.Request) -> web.Response:
        """Alive."""
        return json_response({"status": "ok"})

    async def readyz(self, _request: web.Request) -> web.Response:
        """503 only when nothing can be served here; everything else stands in the body."""
        broken = self._broken()
        if broken:
            return json_response({"status": "unavailable", "reasons": broken}, status=503)
        degraded = self._degraded()
        return json_response({"status": "degraded" if degraded else "ok", "degraded": degraded})

    async def metrics(self, _request: web.Request) -> web.Response:
        """Prometheus's text format."""
        return web.Response(body=await self._metrics.render(), content_type="text/plain", charset="utf-8")
