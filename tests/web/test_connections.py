"""Connections beyond what a process can hold, and what they cost those who have something to say."""

from __future__ import annotations

import asyncio
import itertools
import socket
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from feishu_bot import event_loop
from feishu_bot.web.connections import AT_ONCE, Connections, most_connections
from tests.platforms.onebots import until

HALF = b"GET /ws/onebot HTTP/1.1\r\nHost: x\r\n"


@asynccontextmanager
async def serving(most: int):
    """A server that holds ``most`` connections; requests of ``/wait`` are answered when ``go_on`` is set."""
    go_on = asyncio.Event()
    waiting = itertools.count(1)
    seen = [0]

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/wait":
            seen[0] = next(waiting)
            await go_on.wait()
        return web.Response(text="here")

    connections = Connections(most=lambda: most)
    app = web.Application(middlewares=[connections.middleware])
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    port = await connections.listen(runner.server, host="127.0.0.1", port=0)
    try:
        yield f"http://127.0.0.1:{port}", runner.server, go_on, seen
    finally:
        connections.close()
        await runner.cleanup()


class Visitors:
    """Those who connect and do not say what they want."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []

    async def come(self, url: str) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        self.writers.append(writer)
        writer.write(HALF)
        return reader

    async def leave(self) -> None:
        for writer in self.writers:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in self.writers), return_exceptions=True)


@pytest.fixture
async def visitors():
    made = Visitors()
    yield made
    await made.leave()


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), 20) == b""
    except ConnectionResetError:
        return True


async def test_whoever_asks_for_nothing_makes_room_the_oldest_first(visitors, caplog):
    async with serving(10) as (url, server, _, _), aiohttp.ClientSession() as http:
        held = [await visitors.come(url) for _ in range(10)]
        await until(lambda: len(server.connections) == 10)
        for _ in range(3):
            async with http.get(f"{url}/now", headers={"Connection": "close"}) as response:
                assert await response.text() == "here"
        assert await ended(held[0])
        assert not held[-1].at_eof()
        assert {r.message for r in caplog.records} == {"connections ended"}


async def test_thousands_at_once_leave_no_more_than_are_allowed_and_a_request_is_answered(visitors):
    async with serving(50) as (url, server, _, _), aiohttp.ClientSession() as http:
        await asyncio.gather(*(visitors.come(url) for _ in range(1000)), return_exceptions=True)
        async with http.get(f"{url}/now") as response:
            assert await response.text() == "here"
        # Those of one turn of the event loop are taken before any of them is counted.
        await until(lambda: len(server.connections) <= 50 + AT_ONCE)


def test_a_flood_on_the_servers_own_loop_leaves_no_more_than_are_allowed_and_refuses_in_earnest():
    async def flood() -> tuple[int, bytes]:
        async with serving(20) as (url, server, go_on, seen), aiohttp.ClientSession() as http:
            where = ("127.0.0.1", int(url.rpartition(":")[2]))
            strangers = [
                socket.create_connection(where) for _ in range(100)
            ]  # the loop does not turn meanwhile
            most = 0
            for _ in range(300):
                await asyncio.sleep(0)
                most = max(most, len(server.connections))
            for stranger in strangers:
                stranger.close()
            asked = [asyncio.ensure_future(http.get(f"{url}/wait")) for _ in range(20)]
            await until(lambda: seen[0] == 20)
            reader, writer = await asyncio.open_connection(*where)
            said = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            go_on.set()
            for answer in asked:
                (await answer).close()
        return most, said

    most, said = event_loop.run(flood())
    assert 10 < most <= 20 + AT_ONCE
    assert said == b"", "the connection that is one too many is ended"


async def test_requests_that_are_being_answered_make_room_for_nobody(visitors, caplog):
    async with serving(3) as (url, _, go_on, seen), aiohttp.ClientSession() as http:
        asked = [asyncio.ensure_future(http.get(f"{url}/wait")) for _ in range(3)]
        await until(lambda: seen[0] == 3)
        assert await ended(await visitors.come(url))
        assert [r.message for r in caplog.records] == ["connection refused"]
        go_on.set()
        assert [await (await answer).text() for answer in asked] == ["here"] * 3
        async with http.get(f"{url}/now") as response:
            assert response.status == 200


def test_what_is_allowed_leaves_descriptors_for_the_database_and_the_platforms():
    assert most_connections() >= 16
