from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from feishu_bot.config import NetworkSettings
from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.network import is_public
from feishu_bot.platforms.download import download

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("[::1]", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("2001:0:1::", False),
        ("example.com", None),
        ("2130706433", None),
        ("0x7f.1", None),
        ("", None),
    ],
)
def test_an_address_is_public_or_not_and_a_name_says_nothing(host, public):
    assert is_public(host) is public


class Server:
    """The platform's own server: content, and what leads elsewhere."""

    url = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        name = request.path.strip("/")
        if name.startswith("to="):
            raise web.HTTPFound(request.query["where"])
        if name == "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b"x" * 65536)
        if name == "bomb":
            bomb = gzip.compress(b"x" * 50_000_000)[:100]
            return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})
        if name.isdigit():
            return web.Response(status=int(name))
        return web.Response(body=b"content", headers={"Seen": request.headers.get("Authorization", "")})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    runner = web.ServerRunner(web.Server(made.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{site.port}"
    yield made
    await runner.cleanup()


def fetch(server: Server, path: str, **more):
    options = {"max_bytes": 100, "network": NetworkSettings(), "own": server.url + "/api", **more}
    return download(path if "://" in path else server.url + path, **options)


async def test_what_lies_on_the_platforms_own_server_is_fetched_also_after_a_redirect_there(server):
    assert await fetch(server, "/a") == b"content"
    assert await fetch(server, "/to=?where=/to=%3Fwhere%3D/a") == b"content"


@pytest.mark.parametrize(
    "path",
    ["/404", "/403", "/304", "/endless", "/to=?where=https://127.0.0.1:9/a", "/to=?where=http://192.0.2.1/",
     "/to=?where=file:///etc/passwd", "https://localhost:9/", "http://localhost:9/", "ftp://x/"],
)  # fmt: skip
async def test_what_is_missing_too_large_or_elsewhere_is_never_fetched(server, path):
    with pytest.raises(Undeliverable):
        await fetch(server, path)


async def test_what_is_packed_is_not_unpacked(server):
    assert (await fetch(server, "/bomb"))[:2] == b"\x1f\x8b"


async def test_a_circle_of_redirects_ends(server):
    circle = "/to=?where=/to=%3Fwhere=%2Fto=%3Fwhere=%252Fto=%253Fwhere=%25252Fto=%25253Fwhere=%2525252Fa"
    with pytest.raises(Undeliverable):
        await fetch(server, circle)


@pytest.mark.parametrize("path", ["/429", "/500", "/503"])
async def test_a_server_that_fails_may_be_asked_again(server, path):
    with pytest.raises(RetryLater):
        await fetch(server, path)


async def test_without_a_server_of_its_own_even_loopback_over_http_is_refused(server):
    with pytest.raises(Undeliverable):
        await fetch(server, "/a", own=None)


async def test_another_port_of_the_platforms_host_is_not_its_server(server):
    with pytest.raises(Undeliverable):
        await fetch(server, "/a", own="http://127.0.0.1:9")


async def test_a_private_address_is_refused_behind_a_proxy_too(server):
    network = NetworkSettings(proxy=server.url)
    with pytest.raises(Undeliverable, match="private"):
        await fetch(server, "https://10.0.0.1/a", network=network)
