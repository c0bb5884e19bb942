from __future__ import annotations

import asyncio
import sys
from typing import Any

import aiohttp
import orjson
import pytest

from feishu_bot.testing.feishu import BOT_OPEN_ID, FakeFeishu
from feishu_bot.testing.serving import Failure

TOKEN_PATH = "/open-apis/auth/v3/tenant_access_token/internal"


class App:
    """An app that calls the fake as it would call the platform."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session
        self.token = ""

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.token}"}
        data = None if body is None else orjson.dumps(body)
        async with self.session.request(method, self.url + path, data=data, headers=headers) as response:
            return response.status, orjson.loads(await response.read())

    async def log_in(self, secret: str = "s") -> dict[str, Any]:
        _, answer = await self.call("POST", TOKEN_PATH, {"app_id": "cli_x", "app_secret": secret})
        self.token = answer.get("tenant_access_token", "")
        return answer

    async def create(self, text: str = "hi", **keys: Any) -> dict[str, Any]:
        body = {
            "receive_id": "oc_1",
            "msg_type": "text",
            "content": orjson.dumps({"text": text}).decode(),
            **keys,
        }
        return (await self.call("POST", "/open-apis/im/v1/messages?receive_id_type=chat_id", body))[1]


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def fake(clock):
    async with FakeFeishu(app_secret="s", clock=clock) as server:
        yield server


@pytest.fixture
async def app(fake):
    async with aiohttp.ClientSession() as session:
        client = App(fake.url, session)
        await client.log_in()
        yield client


async def test_a_wrong_secret_gets_no_token(fake, app):
    assert (await app.log_in("other"))["code"] == 10014
    assert fake.token_calls == 2


async def test_the_same_token_comes_back_until_its_last_half_hour(app, clock):
    first = app.token
    clock.now += 5000
    assert (await app.log_in())["tenant_access_token"] == first
    clock.now += 1000
    assert (await app.log_in())["tenant_access_token"] != first


async def test_a_token_ends_after_its_lifetime_or_when_told(fake, app, clock):
    assert (await app.create())["code"] == 0
    clock.now += 7201
    assert (await app.create())["code"] == 99991663
    await app.log_in()
    assert (await app.create())["code"] == 0
    fake.expire_tokens()
    assert (await app.create())["code"] == 99991663


async def test_the_bot_stands_at_the_top_of_its_answer(app):
    _, answer = await app.call("GET", "/open-apis/bot/v3/info")
    assert answer["bot"]["open_id"] == BOT_OPEN_ID
    assert "data" not in answer


async def test_messages_are_visible_in_the_order_of_their_acceptance(fake, app):
    for text in "abc":
        await app.create(text)
    assert fake.texts("oc_1") == ["a", "b", "c"]
    assert fake.accepted == 3


async def test_a_reply_is_shown_in_the_chat_of_its_question(fake, app):
    fake.know_message("om_q", "oc_known")
    body = {"msg_type": "text", "content": '{"text":"a"}', "reply_in_thread": True}
    assert (await app.call("POST", "/open-apis/im/v1/messages/om_q/reply", body))[1]["code"] == 0
    (message,) = fake.visible
    assert (message.chat, message.reply_to, message.thread) == ("oc_known", "om_q", True)


async def test_equal_keys_are_folded_for_an_hour(fake, app, clock):
    first = await app.create(uuid="u1")
    assert (await app.create(uuid="u1"))["data"]["message_id"] == first["data"]["message_id"]
    assert (await app.create(uuid="u2"))["data"]["message_id"] != first["data"]["message_id"]
    assert (len(fake.visible), fake.folded) == (2, 1)
    clock.now += 3601
    await app.create(uuid="u1")
    assert len(fake.visible) == 3


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"uuid": "u" * 51}, 230001),
        ({"content": "no json"}, 230001),
        ({"content": {"text": "an object"}}, 230001),
        ({"content": '{"text":""}'}, 230001),
        ({"msg_type": "post", "content": '{"zh_cn":"x"}'}, 230001),
        ({"receive_id": ""}, 230001),
        ({"text": "x" * 154_000}, 230025),
        (
            {
                "msg_type": "post",
                "content": '{"zh_cn":{"content":[[{"tag":"md","text":"%s"}]]}}' % ("x" * 31_000),
            },
            230025,
        ),
    ],
)
async def test_what_the_platform_would_refuse_is_refused(fake, app, keys, code):
    assert (await app.create(**keys))["code"] == code
    assert not fake.visible


async def test_scripted_failures_come_once_each_and_in_order(fake, app):
    fake.fail(Failure(code=230020), times=2)
    fake.fail(Failure(status=500, raw=b'{"code": 7}'))
    assert [(await app.create())["code"] for _ in range(4)] == [230020, 230020, 7, 0]


@pytest.mark.parametrize(("drop", "seen"), [("before", 0), ("after", 1)])
async def test_a_dropped_connection_is_dropped_before_or_after_the_message_was_taken(fake, app, drop, seen):
    fake.fail(Failure(drop=drop))
    with pytest.raises(aiohttp.ClientError):
        await app.create()
    assert len(fake.visible) == seen


async def test_a_slow_call_passes_in_the_end(fake, app):
    fake.fail(Failure(delay_s=0.01))
    assert (await app.create())["code"] == 0


async def test_a_platform_that_is_down_answers_503_to_everything(fake, app):
    fake.down = True
    async with app.session.post(fake.url + TOKEN_PATH, data=b"{}") as response:
        assert response.status == 503


async def test_what_is_remembered_can_be_bounded():
    async with FakeFeishu(keep=2) as fake, aiohttp.ClientSession() as session:
        app = App(fake.url, session)
        await app.log_in()
        for number in range(5):
            await app.create(str(number), uuid=f"u{number}")
        assert fake.texts() == ["3", "4"]
        assert fake.accepted == 5
        assert len(fake._by_uuid) == 2


async def test_it_runs_alone_and_other_processes_see_and_control_it():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "feishu_bot.testing.feishu", "--port", "0", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        url = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().split()[-1]
        async with aiohttp.ClientSession() as session:
            app = App(url, session)
            await app.log_in()
            assert (await app.call("POST", "/_control", {"fail": {"times": 1, "code": 230002}}))[0] == 200
            assert (await app.create("refused"))["code"] == 230002
            assert (await app.create("seen"))["code"] == 0
            _, state = await app.call("GET", "/_visible")
        assert [message["text"] for message in state["messages"]] == ["seen"]
        assert (state["accepted"], state["token_calls"]) == (1, 1)
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
