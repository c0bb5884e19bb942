from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import aiohttp
import pytest

from feishu_bot.testing.qq import FakeQQ
from feishu_bot.testing.serving import Failure


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


async def token_of(http: aiohttp.ClientSession, fake: FakeQQ, secret: str = "s") -> dict[str, Any]:
    async with http.post(fake.token_url, json={"appId": "1", "clientSecret": secret}) as answer:
        assert answer.status == 200
        return await answer.json()


async def reply(
    http: aiohttp.ClientSession, fake: FakeQQ, token: str, **body: Any
) -> tuple[int, dict[str, Any]]:
    path, headers = body.pop("path", "/v2/groups/G/messages"), {"Authorization": f"QQBot {token}"}
    sent = {"content": "hi", "msg_type": 0, "msg_id": "m", "msg_seq": 1, **body}
    sent = {name: value for name, value in sent.items() if value is not None}
    async with http.post(fake.url + path, json=sent, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_a_sixth_reply_to_a_message_is_refused(http):
    async with FakeQQ() as fake:
        token = (await token_of(http, fake))["access_token"]
        codes = [(await reply(http, fake, token, msg_seq=n))[1].get("code") for n in range(1, 7)]
        assert codes == [None] * 5 + [22009]


async def test_a_number_used_twice_is_refused_and_shown_once(http):
    async with FakeQQ() as fake:
        token = (await token_of(http, fake))["access_token"]
        assert (await reply(http, fake, token))[0] == 200
        assert (await reply(http, fake, token))[1]["code"] == 40054005
        assert len(fake.visible) == 1


async def test_the_window_begins_when_the_message_was_said(http):
    now = [100.0]
    async with FakeQQ(clock=lambda: now[0]) as fake:
        token = (await token_of(http, fake))["access_token"]
        fake.know_message("m", 0.0)
        now[0] = 301.0
        assert (await reply(http, fake, token))[1]["code"] == 304027
        assert (await reply(http, fake, token, path="/v2/users/U/messages"))[0] == 200


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ({"msg_id": None}, 40034102),
        ({"content": ""}, 50006),
        ({"content": "see example.com"}, 40054010),
        ({"msg_type": 2, "markdown": {"content": "*x*"}}, 40034012),
        ({"msg_seq": "1"}, 40034025),
    ],
)
async def test_what_the_platform_does_not_take_is_refused(http, sent, code):
    async with FakeQQ() as fake:
        token = (await token_of(http, fake))["access_token"]
        assert (await reply(http, fake, token, **sent))[1]["code"] == code
        assert not fake.visible


async def test_a_strict_platform_knows_every_message(http):
    async with FakeQQ(strict=True) as fake:
        token = (await token_of(http, fake))["access_token"]
        assert (await reply(http, fake, token))[1]["code"] == 40034025


async def test_a_token_counts_down_and_its_successor_comes_in_the_last_minute(http):
    now = [0.0]
    async with FakeQQ(clock=lambda: now[0]) as fake:
        first = await token_of(http, fake)
        now[0] = 7100.0
        assert await token_of(http, fake) == {**first, "expires_in": "100"}
        now[0] = 7150.0
        assert (await token_of(http, fake))["access_token"] != first["access_token"]
        assert (await reply(http, fake, first["access_token"]))[0] == 200
        now[0] = 7201.0
        assert await reply(http, fake, first["access_token"], msg_seq=2) == (
            401,
            {"message": "token not exist or expire", "code": 11244, "err_code": 11244, "trace_id": "fake"},
        )


async def test_a_wrong_secret_gets_a_refusal_that_is_http_200(http):
    async with FakeQQ(app_secret="right") as fake:
        assert "access_token" not in await token_of(http, fake, "wrong")
        assert "access_token" in await token_of(http, fake, "right")


async def test_a_slow_call_passes(http):
    async with FakeQQ() as fake:
        token = (await token_of(http, fake))["access_token"]
        fake.fail(Failure(delay_s=0.01))
        assert (await reply(http, fake, token))[0] == 200


async def test_what_is_remembered_is_bounded(http):
    async with FakeQQ(keep=2) as fake:
        token = (await token_of(http, fake))["access_token"]
        for n in range(5):
            await reply(http, fake, token, msg_id=f"m{n}")
        assert [m.msg_id for m in fake.visible] == ["m3", "m4"]
        assert (fake.accepted, len(fake._seqs), len(fake._said_at)) == (5, 2, 2)


async def test_it_runs_alone_and_takes_orders(http):
    command = [sys.executable, "-m", "feishu_bot.testing.qq", "--any-link", "--markdown"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    line = (await process.stdout.readline()).decode()
    url = line.split()[3].rstrip(",")
    async with http.post(url + "/_control", json={"down": True}) as answer:
        assert answer.status == 200
    async with http.post(url + "/app/getAppAccessToken", json={}) as answer:
        assert answer.status == 503
    async with http.get(url + "/_visible") as answer:
        assert (await answer.json())["messages"] == []
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 20) == 0
