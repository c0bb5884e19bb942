"""What a client sees of an error, and what the log says of it."""

from __future__ import annotations

import logging

import aiohttp
import pytest
from aiohttp import web

from feishu_bot.errors import StoreError, StoreUnavailable, TooLarge
from feishu_bot.web.errors import error_middleware


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TooLarge("larger than max_allowed_packet"), 413, "refused_by_store"),
        (StoreError("refused"), 500, "refused_by_store"),
        (StoreUnavailable("away"), 503, "unavailable"),
        (KeyError("a fault of ours"), 500, "internal"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_what_the_store_refuses_is_an_answer_and_a_line(error, status, code, caplog):
    async def page(_request):
        raise error

    application = web.Application(middlewares=[error_middleware])
    application.router.add_post("/chat", page)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    with caplog.at_level(logging.WARNING, "feishu_bot"):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{site.port}/chat") as response,
        ):
            assert (response.status, (await response.json())["error"]["code"]) == (status, code)
    await runner.cleanup()
    (record,) = caplog.records
    assert (record.exc_info is not None) == isinstance(error, KeyError)
