"""Plugins and a QQ client on a real socket: what it tells them, and what they have it do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from feishu_bot.testing.onebot import Failure, FakeOneBot, request_event
from tests.e2e.bots import ROOT, configuration, until

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "token-of-the-tests"
SECRET = "secret-of-the-tests"


def documented(name: str) -> str:
    """Return the example of the documentation that uses a call."""
    text = (ROOT / "docs" / "plugins.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (found,) = [example for example in examples if f'"{name}"' in example]
    return str(found)


@pytest.fixture
async def qq():
    async with FakeOneBot(access_token=TOKEN, secret=SECRET) as fake:
        yield fake


def with_plugin(db_url: str, folder: Path, source: str) -> dict:
    folder.mkdir()
    (folder / "ours.py").write_text(source)
    account = {"enabled": True, "access_token": TOKEN, "secret": SECRET, "api_url": None}
    plugins = {"directory": str(folder), "enabled": ["ours"]}
    return configuration(db_url, platforms={"onebot": account}, plugins=plugins)


async def test_the_documented_plugin_accepts_a_friend_and_tells_a_member_who_he_is(
    bots, qq, db_url, record, tmp_path
):
    config = with_plugin(db_url, tmp_path / "plugins", documented("set_friend_add_request"))
    bot = await bots.start(config)
    await qq.connect(f"{bot.url}/ws/onebot")
    await qq.tell(request_event("flag-1", comment="I am Ann"))
    await until(lambda: qq.requests == {"flag-1": True}, "the approval")
    await qq.say("who am I?", group_id=30003, at=True, card="Ann of sales")
    await until(lambda: qq.texts() == ["Ann of sales, member"], "the answer")
    await record.settled()
    (call,) = [row for row in record.outbox() if row.kind == "call"]
    assert (call.state, call.attempts) == ("sent", 1)
    assert [row.state for row in record.inbox()] == ["ignored", "answered"]
    assert bot.complaints() == []


async def test_a_call_that_was_recorded_is_made_after_a_crash_and_once(bots, qq, db_url, record, tmp_path):
    config = with_plugin(db_url, tmp_path / "plugins", documented("set_friend_add_request"))
    bot = await bots.start(config)
    link = await qq.connect(f"{bot.url}/ws/onebot")
    qq.fail(Failure(drop=True), on="set_friend_add_request")
    await qq.tell(request_event("flag-1"))
    await until(link.closed.is_set, "the end of the socket")
    await until(lambda: [r.state for r in record.outbox()] == ["pending"], "a call that waits")
    await bot.kill()
    assert qq.requests == {"flag-1": None}
    bot = await bots.start(config)
    link = await qq.connect(f"{bot.url}/ws/onebot")
    await qq.tell(request_event("flag-1"))  # the client tells of it again after it has connected
    await record.settled()
    assert qq.requests == {"flag-1": True}
    made = [action for _, action, _ in qq.calls]
    assert made == ["set_friend_add_request"] * 2
    assert [(r.kind, r.state) for r in record.outbox()] == [("call", "sent")]


async def test_a_call_that_the_client_refuses_is_kept_for_a_person(
    bots, qq, sqlite_url, sqlite_record, tmp_path
):
    config = with_plugin(sqlite_url, tmp_path / "plugins", documented("set_friend_add_request"))
    bot = await bots.start(config)
    await qq.connect(f"{bot.url}/ws/onebot")
    qq.fail(Failure(words="请求已过期"), on="set_friend_add_request")
    await qq.tell(request_event("flag-1"))
    await until(lambda: [r.state for r in sqlite_record.outbox()] == ["refused"], "the refusal")
    (call,) = sqlite_record.outbox()
    assert call.last_error == "1200 请求已过期"


NOTES = """
import json

HEARD = open("heard", "a")


async def on_event(context):
    event = context.message
    heard = [event.event_type, event.chat_id, event.sender_id, event.addressed, event.extra]
    print(json.dumps(heard), file=HEARD, flush=True)


async def on_message(context):
    try:
        await context.bot.call("web", "x")
    except Exception as error:
        first = str(error)
    try:
        await context.bot.call_later(context.message, "x", odd={1, 2})
    except TypeError as error:
        second = type(error).__name__
    try:
        await context.bot.call("nobody", "x")
    except Exception as error:
        return f"{first}; {second}; {error}"
"""


def notice(kind: str, **fields) -> dict:
    base = {"time": 1_767_225_600, "self_id": 10001, "post_type": "notice", "notice_type": kind}
    return {**base, "group_id": 30003, "user_id": 20002, **fields}


async def test_pokes_joins_leaves_recalls_and_requests_reach_plugins_once_with_their_details(
    bots, qq, sqlite_url, sqlite_record, tmp_path
):
    bot = await bots.start(with_plugin(sqlite_url, tmp_path / "plugins", NOTES))
    await qq.connect(f"{bot.url}/ws/onebot")
    told = [
        notice("notify", sub_type="poke", target_id=10001),
        notice("notify", sub_type="poke", target_id=40004),
        notice("group_increase", sub_type="approve", operator_id=7),
        notice("group_decrease", sub_type="kick", operator_id=7),
        notice("group_recall", operator_id=20002, message_id=5),
        request_event("flag-2", kind="group", comment="please"),
    ]
    for event in told + told:
        await qq.tell(event)
    await until(lambda: len(sqlite_record.inbox()) == len(told), "the record")
    await sqlite_record.settled()
    heard = sorted((tmp_path / "heard").read_text().splitlines())
    wanted = [
        '["notice.group_decrease.kick", "30003", "20002", false, {"self_id": "10001",',
        '["notice.group_increase.approve", "30003", "20002", false, {"self_id": "10001",',
        '["notice.group_recall", "30003", "20002", false, {"self_id": "10001",',
        '["notice.notify.poke", "30003", "20002", false, {"self_id": "10001",',
        '["notice.notify.poke", "30003", "20002", true, {"self_id": "10001",',
        '["request.group.add", "30003", "20002", false, {"self_id": "10001",',
    ]
    assert [line[: len(start)] for line, start in zip(heard, wanted, strict=True)] == wanted
    for detail in ('"operator_id": 7', '"target_id": 40004', '"flag": "flag-2"', '"comment": "please"'):
        assert any(detail in line for line in heard), detail
    await qq.say("hello")
    answer = "plugins cannot make calls on web, which is of type web; TypeError; nobody is no account that is enabled"
    await until(lambda: qq.texts() == [answer], "the plugin's answer")
