"""Requests that are too large, not what they say, or nothing at all: refused, logged once, never stored."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from io import BytesIO

import pytest
from yarl import URL

from feishu_bot.store import schema
from feishu_bot.testing.feishu import sign, sign_and_encrypt, text_event
from tests.e2e.bots import KEY, configuration, until

MARK = "mark-of-the-body"
DEEP = b"[" * 200_000
WIDE = b'{"' + MARK.encode() + b'": [' + b"{}," * 200_000 + b"{}]}"


def signed(body, **headers):
    return {**sign(body, encrypt_key=KEY), **headers}, body


def cases():
    good_headers, good = sign_and_encrypt(text_event(MARK), encrypt_key=KEY)
    yield "2 MiB", signed(b"x" * (2 * 1024 * 1024)), 413
    yield "2 MiB of JSON in pieces", ({}, [b'{"encrypt":"' + b"A" * 1024 * 1024, b"A" * 1024 * 1024]), 413
    yield "nested too deeply", signed(DEEP), 400
    yield "nested too deeply, unsigned", ({}, DEEP), 401
    yield "wide", signed(WIDE), 400
    yield (
        "nested too deeply inside",
        sign_and_encrypt(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, encrypt_key=KEY),
        400,
    )
    yield "UTF-16", signed(f'{{"{MARK}": 1}}'.encode("utf-16")), 400
    yield "UTF-16 inside", sign_and_encrypt(f'{{"{MARK}": 1}}'.encode("utf-16"), encrypt_key=KEY), 400
    yield "Latin-1 inside", sign_and_encrypt(b'{"text": "\xe9"}', encrypt_key=KEY), 400
    yield "lone surrogate inside", sign_and_encrypt(b'{"text": "\\ud800"}', encrypt_key=KEY), 400
    yield "a form", signed(b"payload=" + MARK.encode()), 400
    yield "not a number", ({**good_headers, "X-Lark-Request-Timestamp": "yesterday"}, good), 401
    yield "an endless number", ({**good_headers, "X-Lark-Request-Timestamp": "9" * 4000}, good), 401
    yield "no timestamp", ({k: v for k, v in good_headers.items() if "Timestamp" not in k}, good), 401
    yield "no nonce", ({k: v for k, v in good_headers.items() if "Nonce" not in k}, good), 401
    yield "no signature", ({k: v for k, v in good_headers.items() if "Signature" not in k}, good), 401
    yield "no headers at all", ({}, good), 401
    yield "an empty body", signed(b""), 400
    yield "says gzip and is none", ({**good_headers, "Content-Encoding": "gzip"}, good), 400
    yield "says deflate and is none", ({**good_headers, "Content-Encoding": "deflate"}, good), 400
    yield "a gzip bomb", ({"Content-Encoding": "gzip"}, gzip.compress(b"0" * 50_000_000)), 413
    yield "a deflate bomb", ({"Content-Encoding": "deflate"}, zlib.compress(b"0" * 50_000_000)), 413
    yield "a body of another length", signed(b'{"encrypt": "AAAA"}'), 400


CASES = list(cases())


async def pieces(parts):
    for part in parts:
        yield part


@pytest.mark.parametrize(("request_", "status"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
async def test_a_bad_request_is_refused_with_one_line_that_does_not_hold_its_body(
    bots, people, feishu, sqlite_url, sqlite_record, request_, status, shared_bot
):
    bot, record = shared_bot
    headers, body = request_
    before = len(bot.lines())
    got = await people.send(bot, pieces(body) if isinstance(body, list) else BytesIO(body), headers)
    assert got == status
    (line,) = await until(lambda: bot.lines()[before:], "a line")
    assert (line["event"], line["status"], line["account"]) == ("request refused", status, "feishu")
    assert line["level"] == "warning"
    assert all(len(str(value)) < 200 and MARK not in str(value) for value in line.values())
    for table in (schema.inbox, schema.lanes, schema.outbox):
        assert record.rows(table) == []


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "nonsense", "application/json; charset=x"]
)
async def test_the_content_type_of_a_signed_event_does_not_matter(
    bots, people, feishu, sqlite_url, sqlite_record, content_type
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    headers, body = sign_and_encrypt(people.event("hi"), encrypt_key=KEY)
    assert await people.send(bot, body, {**headers, "Content-Type": content_type}) == 200
    assert await people.replies(1) == ["hi"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/webhook/nobody", 404),
        ("POST", "/webhook/web", 404),
        ("POST", "/webhook/", 404),
        ("POST", "/webhook/feishu/more", 404),
        ("PUT", "/webhook/feishu", 405),
        ("GET", "/webhook/feishu", 401),
        ("GET", "/chat", 405),
        ("GET", "/nothing", 404),
        ("GET", "/static/../chat.html", 404),
        ("GET", "/static/%2e%2e/server.py", 404),
    ],
)
async def test_other_paths_and_methods_get_json_errors(people, shared_bot, method, path, status):
    bot, _ = shared_bot
    url = URL(bot.url + path, encoded=True)
    async with people.http.request(method, url, data=b"x" if method != "GET" else None) as response:
        assert response.status == status
        assert (await response.json()).keys() == {"error"}
        assert "Server" not in response.headers


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /webhook/feishu HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /webhook/feishu HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /webhook/feishu HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /webhook/feishu HTTP/1.1\r\nHost: x\r\nX-Lark-Signature: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /webhook/feishu HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /webhook/%ff%fe HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /webhook/feishu HTTP/1.1\r\nHost: [\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /chat HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=range(9),
)
async def test_what_is_hardly_http_is_a_client_error_without_a_traceback(shared_bot, raw):
    bot, _ = shared_bot
    host, port = bot.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    if b"chunked\r\n\r\nzz" in raw or b"Length: 3" in raw:
        writer.write_eof()
    answer = await reader.read(20_000)
    writer.close()
    # After a broken chunk, or the end in the middle of a body, the connection may just be closed.
    if answer or not (b"zz" in raw or b"Length: 3" in raw):
        assert answer[:10].startswith(b"HTTP/1.")
        assert 400 <= int(answer[9:12]) < 500
    assert b"Traceback" not in answer
    assert bot.complaints() == []
