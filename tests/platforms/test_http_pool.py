from __future__ import annotations

import asyncio
import random

import pytest

from feishu_bot.platforms import http_pool
from feishu_bot.platforms.connection import Connection
from tests.platforms.raw_http import (
    CHUNKED,
    Line,
    always,
    answer,
    connected,
    echo,
    end_time,
    fails,
    once,
    serving,
)


def lines(connection):
    return connection._pool._lines


# ---------------------------------------------------------------------------------------- keeping connections


async def test_calls_one_after_the_other_share_a_connection(way):
    async with serving(echo) as site, connected(site, way) as connection:
        for number in range(20):
            body = str(number).encode()
            assert (await connection.call("POST", "/x", body)).body == body
        assert len(site.lines) == 1


async def test_the_connection_that_was_used_last_is_used_next():
    async with serving(echo) as site, connected(site) as connection:
        await asyncio.gather(*(connection.call("POST", "/", b"x") for _ in range(3)))
        assert len(site.lines) == 3
        for _ in range(5):
            await connection.call("POST", "/", b"x")
        assert len({request.line for request in site.requests[-5:]}) == 1
        assert len(site.lines) == 3


@pytest.mark.parametrize("end", ["end", "reset"])
async def test_a_connection_that_the_server_has_closed_is_not_used(end):
    async with serving(once(answer(), end=end)) as site, connected(site) as connection:
        for _ in range(3):
            assert (await connection.call("POST", "/", b"x")).body == b"ok"
            await site.until(lambda: not lines(connection))
        assert [request.line for request in site.requests] == [0, 1, 2]


def closing_at_the_second(end):
    async def talk(line: Line) -> None:
        await line.request()
        await line.send(answer(b"first"))
        await line.request()
        line.end() if end == "end" else line.reset()

    return talk


@pytest.mark.parametrize("end", ["end", "reset"])
async def test_a_get_that_crosses_the_servers_closing_is_asked_again(way, end):
    async with serving(closing_at_the_second(end)) as site, connected(site, way) as connection:
        for _ in range(2):
            assert (await connection.call("GET", "/")).body == b"first"
        assert [request.line for request in site.requests] == [0, 0, 1]


@pytest.mark.parametrize("end", ["end", "reset"])
async def test_a_post_that_crosses_the_servers_closing_is_not(way, end):
    async with serving(closing_at_the_second(end)) as site, connected(site, way) as connection:
        await connection.call("POST", "/", b"x")
        assert (await fails(connection.call("POST", "/", b"x"))).outcome_unknown
        assert len(site.requests) == 2


async def test_a_get_is_asked_again_once_and_not_after_the_beginning_of_an_answer():
    begun = asyncio.Event()

    async def talk(line: Line) -> None:
        if line.number == 0:
            await line.request()
            await line.send(answer())
        await line.request()
        if begun.is_set():
            await line.send(b"HTTP/1.1 2")
        line.end()

    async with serving(talk) as site:
        async with connected(site) as connection:
            await connection.call("GET", "/")
            assert (await fails(connection.call("GET", "/"))).outcome_unknown
            assert len(site.requests) == 3
        site.requests.clear()
        site.lines.clear()
        begun.set()
        async with connected(site) as connection:
            await connection.call("GET", "/")
            assert (await fails(connection.call("GET", "/"))).outcome_unknown
            assert len(site.requests) == 2


async def test_idle_connections_are_closed_after_a_while(monkeypatch):
    async with serving(echo) as site, connected(site) as connection:
        await asyncio.gather(*(connection.call("POST", "/", b"x") for _ in range(3)))
        pool = connection._pool
        now = asyncio.get_running_loop().time()
        for line, used in zip(pool._idle, (now - 16, now - 15.5, now), strict=True):
            line.used_at = used
        pool._timer.cancel()
        pool._sweep()
        await site.until(lambda: site.ended == 2)
        assert len(lines(connection)) == len(pool._idle) == 1
        assert pool._timer.when() == now + http_pool.KEEP_S
        pool._timer.cancel()
        monkeypatch.setattr(http_pool, "KEEP_S", 0.0)
        pool._sweep()
        await site.until(lambda: site.ended == 3)
        assert (lines(connection), pool._idle, pool._timer) == (set(), [], None)


async def test_the_sweep_comes_by_itself(monkeypatch):
    monkeypatch.setattr(http_pool, "KEEP_S", 0.01)
    async with serving(echo) as site, connected(site) as connection:
        await connection.call("POST", "/", b"x")
        await site.until(lambda: site.ended == 1)
        await connection.call("POST", "/", b"x")
        await site.until(lambda: site.ended == 2)
        await site.until(lambda: connection._pool._timer is None)


async def test_a_connection_that_was_idle_too_long_is_not_used_even_before_the_sweep():
    async with serving(echo) as site, connected(site) as connection:
        await connection.call("POST", "/", b"x")
        connection._pool._idle[0].used_at -= http_pool.KEEP_S
        await connection.call("POST", "/", b"x")
        assert [request.line for request in site.requests] == [0, 1]


@pytest.mark.parametrize(
    ("data", "reused"),
    [
        (answer(), True),
        (answer(b"ok", "Connection: close"), False),
        (answer(version="1.0"), False),
        (answer(b"ok", "Connection: keep-alive", version="1.0"), True),
        (answer(b"ok", "Connection: upgrade", "Upgrade: h2c"), True),  # an offer, as Apache makes it
    ],
    ids=["1.1", "close", "1.0", "1.0-keep-alive", "offer"],
)
async def test_the_server_says_whether_a_connection_stays(way, data, reused):
    async with serving(always(data)) as site, connected(site, way) as connection:
        for _ in range(2):
            assert (await connection.call("POST", "/", b"x")).body == b"ok"
        assert len(site.lines) == (1 if reused else 2)


# ----------------------------------------------------------------------------------------- whose answer it is


@pytest.mark.parametrize(
    "extra",
    [
        answer(b"wrong"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"H",
        b"garbage",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
    ids=["answer", "head", "half-a-head", "letter", "garbage", "continue"],
)
@pytest.mark.parametrize("when", ["together", "at-once", "idle"])
async def test_what_nobody_has_asked_for_is_nobodys_answer(extra, when):
    async def talk(line: Line) -> None:
        while True:
            request = await line.request()
            await line.send(answer(request.body) + (extra if when == "together" else b""))
            if when == "at-once":
                await line.send(extra)
            elif when == "idle":
                await asyncio.sleep(0.005)
                await line.send(extra)

    async with serving(talk) as site, connected(site) as connection:
        for number in range(5):
            body = b"%d" % number
            assert (await connection.call("POST", "/", body)).body == body
            if when == "idle":
                await site.until(lambda: not lines(connection))
        assert len(site.lines) == 5 or when == "at-once"


async def test_empty_lines_after_an_answer_harm_nobody():
    async with serving(always(answer() + b"\r\n\r\n")) as site, connected(site) as connection:
        for _ in range(3):
            assert (await connection.call("POST", "/", b"x")).body == b"ok"


async def test_a_call_without_an_answer_ends_in_time_and_gives_its_connection_up(way):
    async def talk(line: Line) -> None:
        request = await line.request()
        if request.first.startswith("POST /slow "):
            with pytest.raises(Exception):  # noqa: B017, PT011  # whatever ends it
                await line.request()
            await line.send(answer(b"late"))
            return
        await line.send(answer(b"own"))

    async with serving(talk) as site, connected(site, way) as connection:
        task = asyncio.create_task(connection.call("POST", "/slow", b"x"))
        await site.until(lambda: site.requests)
        end_time(connection)
        error = await fails(task)
        assert error.reason == "no answer in time"
        assert error.outcome_unknown
        await site.until(lambda: site.ended == 1)
        assert (await connection.call("POST", "/", b"x")).body == b"own"


@pytest.mark.parametrize("most", [10, 1000], ids=["few", "enough"])
async def test_calls_that_are_cancelled_at_any_moment_never_mix_answers(monkeypatch, most):
    monkeypatch.setattr(http_pool, "MOST", most)
    luck = random.Random(7)

    async def talk(line: Line) -> None:
        while True:
            body = (await line.request()).body
            for _ in range(luck.randrange(4)):
                await asyncio.sleep(0.001)
            data = (
                answer(body)
                if luck.random() < 0.5
                else CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            )
            cut = luck.randrange(len(data))
            await line.send(data[:cut])
            await asyncio.sleep(0.001 * luck.randrange(2))
            await line.send(data[cut:])

    async with serving(talk) as site, connected(site) as connection:

        async def one(number: int) -> int:
            for turn in range(5):
                body = f"request {number} {turn} ".encode() * luck.randrange(1, 50)
                assert (await connection.call("POST", "/", body)).body == body
            return number

        tasks = [asyncio.create_task(one(number)) for number in range(200)]
        for task in luck.sample(tasks, 67):
            await asyncio.sleep(0.001 * luck.randrange(2))
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        ended = [number for number in found if isinstance(number, int)]
        assert len(ended) >= 133
        assert all(isinstance(error, int | asyncio.CancelledError) for error in found)
        pool = connection._pool
        assert pool._room._value == most
        assert len(pool._idle) == len(set(pool._idle)) <= most
        await site.until(lambda: site.ended == len(site.lines) - len(pool._idle))
        await site.until(lambda: lines(connection) == set(pool._idle))


# ----------------------------------------------------------------------------------------- how many, how long


async def test_more_calls_than_connections_wait(monkeypatch):
    monkeypatch.setattr(http_pool, "MOST", 2)
    go = asyncio.Event()

    async def talk(line: Line) -> None:
        while True:
            await line.request()
            await go.wait()
            await line.send(answer())

    async with serving(talk) as site, connected(site) as connection:
        tasks = [asyncio.create_task(connection.call("POST", "/", b"x")) for _ in range(7)]
        await site.until(lambda: len(site.requests) == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(site.requests) == 2
        go.set()
        assert [response.body for response in await asyncio.gather(*tasks)] == [b"ok"] * 7
        assert len(site.lines) == 2


async def test_a_call_whose_time_ends_before_it_was_sent_says_so(monkeypatch):
    monkeypatch.setattr(http_pool, "MOST", 1)
    async with serving(once(b"", end="stay")) as site, connected(site) as connection:
        tasks = [asyncio.create_task(connection.call("POST", "/", b"x")) for _ in range(2)]
        await site.until(lambda: site.requests)
        end_time(connection)
        first, second = await asyncio.gather(*tasks, return_exceptions=True)
        assert (first.reason, second.reason) == ("no answer in time", "no answer in time")
        assert (first.outcome_unknown, second.outcome_unknown) == (True, False)
        assert len(site.requests) == 1


@pytest.fixture
def begun(monkeypatch):
    """Set when a connection is being opened, which then takes for ever."""
    begun = asyncio.Event()

    async def start_connection(*arguments, **keys):
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(http_pool, "start_connection", start_connection)
    return begun


async def test_a_call_whose_time_ends_while_it_connects_was_not_sent(begun, monkeypatch):
    connection = Connection("http://127.0.0.1:1", None, total_s=600)
    task = asyncio.create_task(connection.call("POST", "/", b"x"))
    await begun.wait()
    end_time(connection)
    error = await fails(task)
    assert (error.reason, error.outcome_unknown) == ("no answer in time", False)
    monkeypatch.setattr(http_pool, "_CONNECT_S", 0.01)
    error = await fails(connection.call("POST", "/", b"x"))
    assert (error.reason, error.outcome_unknown) == ("no connection: TimeoutError", False)
    await connection.close()


async def test_a_cancelled_call_is_cancelled_whatever_it_waits_for(monkeypatch):
    monkeypatch.setattr(http_pool, "MOST", 1)
    async with serving(once(b"", end="stay")) as site, connected(site) as connection:
        tasks = [asyncio.create_task(connection.call("POST", "/", b"x")) for _ in range(2)]
        await site.until(lambda: len(site.requests) == 1)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        await site.until(lambda: site.ended == 1)


async def test_a_callers_own_bound_sees_its_cancellation(begun):
    connection = Connection("http://127.0.0.1:1", None, total_s=600)
    bound = asyncio.timeout(600)

    async def bounded():
        async with bound:
            await connection.call("POST", "/", b"x")

    task = asyncio.create_task(bounded())
    await begun.wait()
    bound.reschedule(0.0)
    with pytest.raises(TimeoutError):
        await task
    await connection.close()


async def test_closing_ends_the_calls_that_run_and_those_that_wait(monkeypatch):
    monkeypatch.setattr(http_pool, "MOST", 2)
    async with serving(once(b"", end="stay")) as site, connected(site) as connection:
        tasks = [asyncio.create_task(connection.call("POST", "/", b"x")) for _ in range(4)]
        await site.until(lambda: len(site.requests) == 2)
        pool = connection._pool
        await connection.close()
        errors = [await fails(task) for task in tasks]
        assert [error.outcome_unknown for error in errors] == [True, True, False, False]
        await site.until(lambda: site.ended == 2)
        assert (len(site.lines), pool._lines, pool._idle, pool._timer) == (2, set(), [], None)


async def test_closing_does_not_end_a_body_that_ends_with_its_connection():
    async with (
        serving(once(b"HTTP/1.1 200 OK\r\n\r\nhello", end="stay")) as site,
        connected(site) as connection,
    ):
        task = asyncio.create_task(connection.call("POST", "/", b"x"))
        await site.until(lambda: connection._pool and any(line._body for line in lines(connection)))
        await connection.close()
        assert (await fails(task)).outcome_unknown


async def test_a_connection_that_opens_while_all_is_closed_is_closed_too(monkeypatch):
    start, go = http_pool.start_connection, asyncio.Event()

    async def start_connection(*arguments, **keys):
        found = await start(*arguments, **keys)
        await go.wait()
        return found

    monkeypatch.setattr(http_pool, "start_connection", start_connection)
    async with serving(echo) as site, connected(site) as connection:
        task = asyncio.create_task(connection.call("POST", "/", b"x"))
        await site.until(lambda: len(site.lines) == 1)
        pool = connection._pool
        await connection.close()
        go.set()
        error = await fails(task)
        assert (error.reason, error.outcome_unknown) == ("no connection: closed", False)
        await site.until(lambda: site.ended == 1 and not pool._lines)
        assert not site.requests


async def test_a_closed_connection_can_be_used_again(way):
    async with serving(echo) as site, connected(site, way) as connection:
        for _ in range(2):
            assert (await connection.call("POST", "/", b"x")).body == b"x"
            await connection.close()
        await site.until(lambda: site.ended == 2)
