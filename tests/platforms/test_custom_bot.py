"""Feishu's custom bot: signed messages out, and what its answers mean."""

from __future__ import annotations

import orjson
import pytest
from aiohttp import web

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.platforms.custom_bot import MAX_CHARS, CustomBot, sign

TOKEN = "11111111-2222-hook"
SIGNATURES = [
    ("1757900000", "lark-test-secret", "rWW3ygiAdSmKEIysYTVjbdbv4Xnqjn35pAGLgGJZsNg="),
    ("1599360473", "SECfoo", "VgwdUg6rLo4a9ZWy+sSxWsgJbqhBWKFOOTuuUKpq1xg="),
    ("1767225600", "密钥", "6kFZ2G/kfKUiK/9tk3xN/qIp1za1HUKhqiUCHN9jw20="),
    ("0", "", "53Dh/MqIJzmbXR1ky1eoAPGAmY2mY/DJucsfzM60KVk="),
]
WRONG = {
    "signed as for DingTalk": "4kHvY6UiMgcm7G/ndO5Y4hXoCO7Dyzpr+crM+UJMMxM=",
    "in milliseconds": "wgAMTYnIiE3zA5Hx5hQBbzEVy8+sO053ODBL/WQsTB4=",
    "with another secret": "RMUWE1p4l6xaAhtu7H04R+M/Ntdq/Qvj/l9Sg/LVwLI=",
}


class Group:
    """The group behind a custom bot: keeps the bodies, answers as scripted."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.answer: tuple[int, bytes] = (200, b'{"code":0,"msg":"success","data":{}}')
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        assert request.path == f"/open-apis/bot/v2/hook/{TOKEN}"
        self.bodies.append(orjson.loads(await request.read()))
        status, body = self.answer
        return web.Response(status=status, body=body)


@pytest.fixture
async def group():
    made = Group()
    application = web.Application()
    application.router.add_post("/{path:.*}", made.take)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{site.port}/open-apis/bot/v2/hook/{TOKEN}"
    yield made
    await runner.cleanup()


@pytest.mark.parametrize(("timestamp", "secret", "signature"), SIGNATURES)
def test_a_message_is_signed_with_timestamp_and_secret_as_the_key(timestamp, secret, signature):
    assert sign(timestamp, secret) == signature


@pytest.mark.parametrize("signature", WRONG.values(), ids=WRONG)
def test_what_the_platform_refuses_is_not_what_we_send(signature):
    assert sign("1757900000", "lark-test-secret") != signature


async def test_a_signed_text_has_the_form_that_the_platform_takes(group):
    bot = CustomBot(group.url, "lark-test-secret", clock=lambda: 1757900000.9)
    await bot.send("hello")
    await bot.close()
    assert group.bodies == [
        {
            "timestamp": "1757900000",
            "sign": "rWW3ygiAdSmKEIysYTVjbdbv4Xnqjn35pAGLgGJZsNg=",
            "msg_type": "text",
            "content": {"text": "hello"},
        }
    ]


async def test_without_a_secret_nothing_is_signed_and_a_long_text_is_cut(group):
    bot = CustomBot(group.url)
    await bot.send("x" * 5000)
    await bot.close()
    assert group.bodies == [{"msg_type": "text", "content": {"text": "x" * MAX_CHARS}}]


@pytest.mark.parametrize("body", [b'{"code":0}', b'{"StatusCode":0,"StatusMessage":"success","Extra":null}'])
async def test_success_is_told_in_either_form(group, body):
    group.answer = (200, body)
    bot = CustomBot(group.url)
    await bot.send("hello")
    await bot.close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b'{"code":19021,"msg":"sign match fail or timestamp is not within one hour"}', Undeliverable),
        (200, b'{"code":19001,"msg":"param invalid: incoming webhook access token invalid"}', Undeliverable),
        (200, b'{"code":19024,"msg":"Key Words Not Found"}', Undeliverable),
        (200, b'{"code":11232,"msg":"frequency limited psm"}', RetryLater),
        (200, b"<html>", RetryLater),
        (200, b"[]", RetryLater),
        (502, b"", RetryLater),
    ],
)
async def test_what_is_not_taken_is_an_error_that_holds_neither_url_nor_secret(group, status, body, error):
    group.answer = (status, body)
    bot = CustomBot(group.url, "lark-test-secret")
    with pytest.raises(error) as caught:
        await bot.send("hello")
    await bot.close()
    assert TOKEN not in str(caught.value)
    assert "lark-test-secret" not in str(caught.value)


async def test_a_bot_that_cannot_be_reached_is_tried_later():
    bot = CustomBot("http://127.0.0.1:9/hook/x")
    with pytest.raises(RetryLater):
        await bot.send("hello")
    await bot.close()
