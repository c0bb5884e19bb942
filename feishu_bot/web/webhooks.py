"""``/webhook/{account}``: steps 1 to 3 of a message's way. Who is answered 200 has been recorded."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from aiohttp import web

from feishu_bot.deadlines import Deadlines
from feishu_bot.errors import BadPayload, Refused, StoreUnavailable
from feishu_bot.log import Seldom
from feishu_bot.platforms.base import WebhookRequest
from feishu_bot.web.errors import error_response, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from feishu_bot.gate import Gate
    from feishu_bot.intake import Intake
    from feishu_bot.metrics import Metrics
    from feishu_bot.platforms.base import Platform, Received

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0  # for a request's body; platforms post from close by
BODY_WITHIN_S = web.AppKey("body within", float)  # that time, where an application has another
RECORD_TIMEOUT_S = 2.5  # Feishu gives up after 3 s; then it shall hear "later" rather than nothing

# The same body for every refusal of one kind: a difference would tell an attacker how far he got.
REFUSALS = {400: "bad request", 401: "unauthorized", 403: "forbidden"}


class Webhooks:
    """The platforms' door."""

    def __init__(
        self,
        platforms: Mapping[str, Platform],
        intake: Intake,
        gate: Gate,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
        reached: Callable[[str], None] | None = None,
    ) -> None:
        self._platforms = {name: p for name, p in platforms.items() if p.has_webhook}
        self._intake = intake
        self._gate = gate
        self._metrics = metrics
        self._clock = clock
        self._refused = Seldom(log)
        self._recording = Deadlines(RECORD_TIMEOUT_S)
        self._reached = reached  # told of each step; tests stop the process there

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Verify, record, acknowledge."""
        started = time.perf_counter()
        account = request.match_info["account"]
        platform = self._platforms.get(account)
        if platform is None:
            return error_response(404, "no such account")
        try:
            body = await read_body(request)
            received = platform.receive(
                WebhookRequest(request.method, request.headers, request.query, body, self._clock())
            )
        except Refused as error:
            self._refuse(request, account, error.status, error.reason)
            return error_response(error.status, REFUSALS[error.status])
        except web.HTTPClientError as error:
            self._refuse(request, account, error.status, error.reason)
            raise
        self._step("received")
        if received.messages:
            closed = self._gate.closed()
            if closed is not None:
                log.warning("request put off", extra={"account": account, "reason": closed})
                return unavailable()
            try:
                with self._recording.guard():
                    await self._intake.record(received.messages)
            except (StoreUnavailable, TimeoutError) as error:
                # What takes longer may be on disk all the same: the platform's repeat finds it there.
                log.warning("request put off", extra={"account": account, "reason": str(error) or "too slow"})
                return unavailable()
            self._step("recorded")
            platform.recorded(received.messages)
        self._metrics.acknowledged.observe(time.perf_counter() - started)
        return await self._acknowledge(request, received)

    def _refuse(self, request: web.Request, account: str, status: int, reason: str) -> None:
        self._refused.warning(
            "request refused",
            {"account": account, "status": status, "reason": reason, "peer": request.remote},
        )
        self._metrics.refused[account, str(status)] += 1

    async def _acknowledge(self, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.Response(
            body=received.body, status=received.status, content_type=received.content_type
        )
        if self._reached is not None:
            await response.prepare(request)
            await response.write_eof()
            self._reached("acknowledged")
        return response

    def _step(self, step: str) -> None:
        if self._reached is not None:
            self._reached(step)


async def read_body(request: web.Request) -> bytes:
    """Return the body. Raises HTTP 413 for one that is too large, 408 for one that does not come, BadPayload."""
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
    try:
        if request.content.is_eof():  # all of it has come with the headers: nothing to wait for
            return await request.read()
        async with asyncio.timeout(request.config_dict.get(BODY_WITHIN_S, READ_TIMEOUT_S)):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    except web.RequestPayloadError:
        raise BadPayload("the body is not encoded as its headers say") from None
