"""Clients that send too slowly, or too much: they hold up nobody, and are let go."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import aiohttp
import pytest

from tests.e2e.bots import configuration
from tests.e2e.conftest import bots, http, nursery  # noqa: F401
from tests.platforms.onebots import doors, onebot

SLOW = 300


async def test_a_request_whose_headers_never_end_is_closed():
    async with doors(onebot(), idle_s=0.2) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()


async def test_headers_that_come_drop_by_drop_are_closed_all_the_same():
    async with doors(onebot(), idle_s=0.2) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        closed = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(20):
            while not closed.done():
                with suppress(ConnectionError):
                    writer.write(b"X-Slow: x\r\n")
                    await writer.drain()
                await asyncio.wait([closed], timeout=0.05)
        with suppress(ConnectionError):
            assert closed.result() == b""
        writer.close()


@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_comes_drop_by_drop_is_408(length):
    async with doors(onebot(), body_s=0.2) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(b"POST /webhook/onebot HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")
        answered = asyncio.ensure_future(reader.readline())
        async with asyncio.timeout(20):
            while not answered.done():
                writer.write(b"1\r\nx\r\n" if b"chunked" in length else b"x")
                await writer.drain()
                await asyncio.wait([answered], timeout=0.05)
        assert answered.result().startswith(b"HTTP/1.1 408")
        writer.close()


async def test_many_slow_clients_do_not_keep_others_waiting(bots, http, sqlite_url):  # noqa: F811
    bot = await bots.start(configuration(sqlite_url))
    port = int(bot.url.rsplit(":", 1)[1])
    writers = []
    for n in range(SLOW):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        if n % 2:
            writer.write(b"POST /chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        else:
            writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        writers.append(writer)
    async with http.post(f"{bot.url}/chat", json={"message": "hi"}) as response:
        assert response.status == 200
    for writer in writers:
        writer.close()
    assert bot.complaints() == []


@pytest.mark.parametrize("path", ["/chat", "/login", "/send", "/conversations/1/fork", "/chat/stop"])
async def test_what_is_too_large_is_413(bots, http, sqlite_url, path):  # noqa: F811
    bot = await bots.start(configuration(sqlite_url, server={"max_body_bytes": 10_000}))
    body = b'{"message": "' + b"x" * 20_000 + b'"}'

    async def chunks():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    headers = {"Content-Type": "application/json"}
    async with http.post(bot.url + path, data=body, headers=headers) as response:
        assert response.status == 413
    async with http.post(bot.url + path, data=chunks(), headers=headers) as response:
        assert response.status == 413, "also where nobody says how long it is"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\nSet-Cookie: b=c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["path", "header", "smuggled", "both lengths", "negative", "tls"],
)
async def test_what_is_hardly_http_is_refused_and_becomes_no_header_of_ours(bots, sqlite_url, head):  # noqa: F811
    bot = await bots.start(configuration(sqlite_url))
    port = int(bot.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    async with asyncio.timeout(20):
        answer = await reader.read(2000)
    writer.close()
    assert answer[:12] in {b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 403"}
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Set-Cookie" not in head
    assert b"text/html" not in head
    assert b"Traceback" not in body
    async with aiohttp.ClientSession() as session, session.get(f"{bot.url}/healthz") as response:
        assert response.status == 200
