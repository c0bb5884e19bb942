from __future__ import annotations

import asyncio
import gzip
import socket
import zlib

import pytest

from feishu_bot.platforms import http_pool
from feishu_bot.platforms.connection import Connection
from tests.platforms.raw_http import CHUNKED, Line, always, answer, connected, fails, once, serving

HELLO = CHUNKED + b"4;x=y\r\nhell\r\n1\r\no\r\n0\r\nTrailer: z\r\n\r\n"
OPEN_END = b"HTTP/1.1 200 OK\r\n\r\nhello"


def lines(connection):
    return connection._pool._lines


# ------------------------------------------------------------------------------------------- no answer at all


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


async def test_a_refused_connection_has_sent_nothing(way):
    connection = Connection(f"http://{way}127.0.0.1:{free_port()}", None)
    error = await fails(connection.call("POST", "/", b"x"))
    assert error.reason.startswith("no connection: ")
    assert not error.outcome_unknown
    await connection.close()


@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "no such host"), UnicodeError("label too long")], ids=type
)
async def test_a_name_without_a_host_has_sent_nothing(monkeypatch, error):
    async def start_connection(*arguments, **keys):
        raise error

    monkeypatch.setattr(http_pool, "start_connection", start_connection)
    connection = Connection("http://127.0.0.1:1", None)
    found = await fails(connection.call("POST", "/", b"x"))
    assert found.reason.startswith("no connection: ")
    assert not found.outcome_unknown
    await connection.close()


@pytest.mark.parametrize("end", ["end", "reset"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
        CHUNKED,
        CHUNKED + b"5\r\nhell",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
    ids=[
        "none",
        "a-word",
        "head",
        "no-body",
        "body",
        "no-chunk",
        "chunk",
        "last-chunk",
        "trailer",
        "continue",
    ],
)
async def test_an_answer_that_breaks_off_is_none(way, data, end):
    async with serving(once(data, end=end)) as site, connected(site, way) as connection:
        error = await fails(connection.call("POST", "/", b"x"))
        assert error.reason.startswith("connection broke: ")
        assert error.outcome_unknown
        assert len(site.requests) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"220 mail.example.test ESMTP\r\n",
        b"\x00\x01\x02\x03" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"fffffffffffffffff\r\n",
        CHUNKED + b"-1\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nabc",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
    ids=[
        "mail",
        "zeros",
        "http2",
        "lengths",
        "negative",
        "letters",
        "length-and-chunks",
        "huge-chunk",
        "negative-chunk",
        "upgrade",
        "upgrade-to-nothing",
    ],
)
async def test_what_is_no_http_is_no_answer(data):
    async with serving(once(data, end="stay")) as site, connected(site) as connection:
        assert (await fails(connection.call("POST", "/", b"x"))).outcome_unknown
        await site.until(lambda: site.ended == 1)
        assert not lines(connection)


async def endless(line: Line, beginning: bytes, more: bytes) -> None:
    await line.request()
    await line.send(beginning)
    while not line.writer.transport.is_closing():
        await line.send(more)
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 10_000),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 10_000),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000 + b"Content-Length: 0\r\n\r\n", b"x" * 10_000),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"a: b\r\n" * 10_000),
        (CHUNKED + b"5\r\nhello\r\n0\r\nX: ", b"x" * 10_000),
        (CHUNKED + b"5;x=", b"x" * 10_000),
    ],
    ids=["headers", "header", "many", "trailers", "trailer", "extension"],
)
async def test_what_surrounds_a_body_is_bounded(beginning, more):
    async with serving(lambda line: endless(line, beginning, more)) as site, connected(site) as connection:
        assert (await fails(connection.call("POST", "/", b"x"))).outcome_unknown
        await site.until(lambda: site.ended == 1)


async def test_headers_that_come_in_one_piece_with_the_body_are_bounded_alike():
    long = "x" * (http_pool.MAX_HEAD_BYTES - 100)
    async with serving(always(answer(b"y" * 90_000, f"X: {long}"))) as site, connected(site) as connection:
        response = await connection.call("POST", "/", b"x")
        assert (response.headers["x"], len(response.body)) == (long, 90_000)
    for headers in ([f"X: {long}{long}"], ["a: b"] * 12_000):
        async with serving(always(answer(b"y" * 90_000, *headers))) as site, connected(site) as connection:
            assert (await fails(connection.call("POST", "/", b"x"))).outcome_unknown


# ---------------------------------------------------------------------------------------------- whole answers


@pytest.mark.parametrize("piece", [0, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize(
    ("data", "status", "body"),
    [
        (answer(b"hello"), 200, b"hello"),
        (HELLO, 200, b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO, 200, b"hello"),
        (
            b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\nContent-Length: 9\r\n\r\n" + answer(b"hello"),
            200,
            b"hello",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + answer(b"no", status="404 Not Found"), 404, b"no"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 50\r\n\r\n", 304, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 2 \r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", 200, b"ok"),
        (answer(b""), 200, b""),
        (answer(b"", "Content-Encoding: gzip"), 200, b""),
    ],
    ids=[
        "length",
        "chunks",
        "100",
        "103",
        "100-9",
        "204",
        "304",
        "no-reason",
        "no-cr",
        "empty",
        "empty-gzip",
    ],
)
async def test_an_answer_is_read_whole_however_it_arrives(way, data, status, body, piece):
    async with serving(always(data, piece=piece)) as site, connected(site, way) as connection:
        for _ in range(2):
            response = await connection.call("POST", "/", b"x")
            assert (response.status, response.body, response.whole) == (status, body, True)
        assert len(site.lines) == 1


async def test_a_chunked_answer_may_be_cut_at_any_byte(way):
    cuts = iter(range(1, len(HELLO)))

    async def talk(line: Line) -> None:
        for cut in cuts:
            await line.request()
            await line.send(HELLO[:cut])
            await asyncio.sleep(0.001)
            await line.send(HELLO[cut:])

    async with serving(talk) as site, connected(site, way) as connection:
        for _ in range(1, len(HELLO)):
            assert (await connection.call("POST", "/", b"x")).body == b"hello"
        assert len(site.lines) == 1


@pytest.mark.parametrize(
    "data",
    [OPEN_END, OPEN_END.replace(b"1.1", b"1.0"), b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"],
    ids=["1.1", "1.0", "close"],
)
async def test_a_body_without_a_length_ends_with_the_connection(way, data):
    async with serving(once(data)) as site, connected(site, way) as connection:
        for _ in range(2):
            response = await connection.call("POST", "/", b"x")
            assert (response.body, response.whole) == (b"hello", True)
        assert len(site.lines) == 2


async def test_a_body_without_a_length_that_is_reset_is_broken():
    async with serving(once(OPEN_END, end="reset")) as site, connected(site) as connection:
        assert (await fails(connection.call("POST", "/", b"x"))).outcome_unknown


async def test_headers_are_found_by_any_spelling(way):
    async with serving(always(answer(b"", "reTry-aFter: 7"))) as site, connected(site, way) as connection:
        assert (await connection.call("POST", "/", b"x")).headers["Retry-After"] == "7"


async def test_a_redirect_is_an_answer_and_not_followed(way):
    data = answer(b"", "Location: /other", status="302 Found")
    async with serving(always(data)) as site, connected(site, way) as connection:
        response = await connection.call("GET", "/")
        assert (response.status, response.headers["location"]) == (302, "/other")
        assert len(site.requests) == 1


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("gzip", gzip.compress(b"hello" * 100)),
        ("GZIP ", gzip.compress(b"hello" * 100)),
        ("deflate", zlib.compress(b"hello" * 100)),
        ("deflate", raw_deflate(b"hello" * 100)),
    ],
    ids=["gzip", "GZIP", "zlib", "raw"],
)
async def test_what_is_compressed_unasked_is_read_all_the_same(way, coding, packed):
    data = answer(packed, f"Content-Encoding: {coding}")
    async with serving(always(data)) as site, connected(site, way) as connection:
        for limit in (500, 1_000):
            response = await connection.call("POST", "/", b"x", max_bytes=limit)
            assert (response.body, response.whole) == (b"hello" * 100, True)
        response = await connection.call("POST", "/", b"x", max_bytes=499)
        assert (len(response.body), response.whole) == (499, False)


async def test_a_bomb_is_unpacked_as_far_as_asked():
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(50)) + packer.flush()
    assert len(bomb) < 60_000
    async with serving(always(answer(bomb, "Content-Encoding: gzip"))) as site, connected(site) as connection:
        response = await connection.call("POST", "/", b"x", max_bytes=60_000)
        assert (len(response.body), response.whole) == (60_000, False)


async def test_what_cannot_be_unpacked_stays_as_it_is():
    async with (
        serving(always(answer(b"hello", "Content-Encoding: gzip"))) as site,
        connected(site) as connection,
    ):
        assert (await connection.call("POST", "/", b"x")).body == b"hello"


# ----------------------------------------------------------------------------------------------- long answers


async def test_a_body_that_is_longer_than_asked_is_not_waited_for(way):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    async with serving(once(head, end="stay")) as site, connected(site, way) as connection:
        for _ in range(2):
            response = await connection.call("POST", "/", b"x", max_bytes=999_999)
            assert (response.status, response.body, response.whole) == (200, b"", False)
        assert len(site.lines) == 2


@pytest.mark.parametrize(
    ("beginning", "more"),
    [(CHUNKED, b"400\r\n" + b"x" * 1024 + b"\r\n"), (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1024)],
    ids=["chunks", "open-end"],
)
async def test_a_body_that_grows_longer_than_asked_is_cut_there(way, beginning, more):
    async with (
        serving(lambda line: endless(line, beginning, more)) as site,
        connected(site, way) as connection,
    ):
        for _ in range(2):
            response = await connection.call("POST", "/", b"x", max_bytes=10_000)
            assert (response.body, response.whole) == (b"x" * 10_000, False)
        assert len(site.lines) == 2
        await site.until(lambda: site.ended == 2)


@pytest.mark.parametrize("data", [answer(b"hello"), HELLO], ids=["length", "chunks"])
async def test_a_body_of_just_the_length_asked_for_is_whole(way, data):
    async with serving(always(data)) as site, connected(site, way) as connection:
        for _ in range(2):
            response = await connection.call("POST", "/", b"x", max_bytes=5)
            assert (response.body, response.whole) == (b"hello", True)
        assert len(site.lines) == 1


async def test_a_server_that_answers_before_it_has_read_everything_is_not_asked_on_that_connection():
    async def talk(line: Line) -> None:
        await line.reader.readuntil(b"\r\n\r\n")
        line.reader._transport.pause_reading()
        await line.send(answer(b"", status="413 Too Large"))
        await asyncio.Event().wait()

    async with serving(talk) as site, connected(site) as connection:
        for _ in range(2):
            assert (await connection.call("POST", "/", bytes(20_000_000))).status == 413
        assert len(site.lines) == 2
