from __future__ import annotations

from contextlib import asynccontextmanager
from ipaddress import ip_network

import aiohttp
import pytest
from aiohttp import web

from feishu_bot.web.errors import error_middleware
from feishu_bot.web.visitors import local_user, private_only

LOOPBACK = (ip_network("127.0.0.0/8"),)
INSIDE = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@asynccontextmanager
async def door(networks, proxies=()):
    """A server with one private and one public page; yields a function that asks for them."""

    async def page(request):
        return web.json_response({"user": local_user(request)})

    application = web.Application(middlewares=[error_middleware, private_only(networks, proxies)])
    application.router.add_get("/private", page)
    application.router.add_get("/webhook/x", page)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()

    async with aiohttp.ClientSession(f"http://127.0.0.1:{site.port}") as session:

        async def ask(path, *headers):
            async with session.get(path, headers=list(headers)) as response:
                return response.status, (await response.json()).get("user")

        yield ask
    await runner.cleanup()


async def test_a_visitor_from_a_private_network_comes_in_and_another_reaches_the_public_doors_only():
    async with door(LOOPBACK) as ask:
        assert await ask("/private") == (200, "local")
    async with door(INSIDE) as ask:
        assert (await ask("/private"))[0] == 403
        assert (await ask("/webhook/x"))[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        "X-Forwarded-For",
        "Forwarded",
        "X-Real-IP",
        "X-Forwarded-Proto",
        "X-Forwarded-Port",
        "x-forwarded-user",
    ],
)
async def test_what_a_stranger_forwards_is_from_outside_whatever_it_says(name):
    async with door(LOOPBACK) as ask:
        assert (await ask("/private", (name, "127.0.0.1")))[0] == 403
        assert await ask("/webhook/x", (name, "127.0.0.1")) == (200, None)


@pytest.mark.parametrize(
    ("hops", "status"),
    [
        ("10.0.0.7", 200),
        ("fd00::7", 200),
        ("192.0.2.1", 403),
        ("10.0.0.7, 192.0.2.1", 403),
        ("192.0.2.1, 10.0.0.7", 200),
        ("10.0.0.7, 127.0.0.9", 200),
        ("192.0.2.1, 127.0.0.9", 403),
        ("127.0.0.9", 403),
        ("nonsense", 403),
        ("", 403),
    ],
)
async def test_a_trusted_proxy_says_where_a_request_comes_from(hops, status):
    async with door(INSIDE, proxies=LOOPBACK) as ask:
        assert (await ask("/private", ("X-Forwarded-For", hops)))[0] == status


async def test_hops_in_several_headers_count_in_their_order():
    async with door(INSIDE, proxies=LOOPBACK) as ask:
        first, last = ("X-Forwarded-For", "10.0.0.7"), ("X-Forwarded-For", "192.0.2.1")
        assert (await ask("/private", first, last))[0] == 403
        assert (await ask("/private", last, first))[0] == 200


async def test_a_forwarded_visitor_is_never_the_local_user():
    async with door(LOOPBACK + INSIDE, proxies=LOOPBACK) as ask:
        assert await ask("/private", ("X-Forwarded-For", "10.0.0.7")) == (200, None)
