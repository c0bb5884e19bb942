"""OneBot with other people's code: both libraries stand where we stand, and know the same clients.

``aiocqhttp`` and ``nonebot`` read what the fake client of these tests sends, so it sends what clients send; and they
read what this server sends, so clients can read it.
"""

from __future__ import annotations

import asyncio
import warnings
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import aiocqhttp
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from nonebot.adapters.onebot.v11 import Adapter, Message
    from nonebot.adapters.onebot.v11 import event as models
    from nonebot.adapters.onebot.v11.bot import _check_at_me
    from nonebot.compat import type_validate_python

from feishu_bot.platforms.base import PlatformContext
from feishu_bot.platforms.onebot_content import decode_cq, encode_cq, outgoing_message
from feishu_bot.testing.onebot import FakeOneBot, heartbeat_event, message_event, request_event, sign
from tests.platforms.onebots import SECRET, TOKEN, VECTORS, doors, group, onebot, part, private, until
from tests.platforms.test_onebot_receive import got

HOSTILE = "[CQ:at,qq=all] [CQ:record,file=file:///etc/passwd] &#91;CQ:at,qq=all&#93; a,b & ]["
EVERYTHING = PlatformContext(require_at_in_groups=False)
FACE = {"type": "face", "data": {"id": "178"}}
NOTICE = {"time": 1_767_225_600, "self_id": 10001, "post_type": "notice", "group_id": 30003, "user_id": 20002}

EVENTS: dict[str, tuple[dict[str, Any], type]] = {
    "group": (message_event("hi", message_id=1, group_id=30003, at=True), models.GroupMessageEvent),
    "group, as a string": (
        message_event(
            [{"type": "text", "data": {"text": HOSTILE}}, FACE], message_id=1, group_id=3, form="string"
        ),
        models.GroupMessageEvent,
    ),
    "private": (message_event("hi", message_id=1), models.PrivateMessageEvent),
    "heartbeat": (heartbeat_event(), models.HeartbeatMetaEvent),
    "friend": (request_event("flag"), models.FriendRequestEvent),
    "join": (request_event("flag", kind="group"), models.GroupRequestEvent),
    "poke": (
        {**NOTICE, "notice_type": "notify", "sub_type": "poke", "target_id": 10001},
        models.PokeNotifyEvent,
    ),
    "recall": (
        {**NOTICE, "notice_type": "group_recall", "operator_id": 20002, "message_id": 5},
        models.GroupRecallNoticeEvent,
    ),
    "joined": (
        {**NOTICE, "notice_type": "group_increase", "sub_type": "approve", "operator_id": 7},
        models.GroupIncreaseNoticeEvent,
    ),
    "left": (
        {**NOTICE, "notice_type": "group_decrease", "sub_type": "kick", "operator_id": 7},
        models.GroupDecreaseNoticeEvent,
    ),
}


def read(payload: dict[str, Any]) -> Any:
    """Return an event as nonebot understands it, with the mention of the bot taken out."""
    event = Adapter.json_to_event(orjson.loads(orjson.dumps(payload)))
    _check_at_me(None, event)  # type: ignore[arg-type]  # it asks the bot nothing
    return event


# ----------------------------------------------------------------------------------------- what the fake tells


@pytest.mark.parametrize("name", EVENTS)
def test_what_the_fake_client_tells_is_of_the_kind_that_others_know(name):
    payload, kind = EVENTS[name]
    assert type(read(payload)) is kind
    theirs = aiocqhttp.Event.from_payload(payload)
    assert theirs is not None
    assert theirs.name.startswith(payload["post_type"])


MESSAGES = {f"fake {name}": payload for name, (payload, _) in EVENTS.items()} | {
    f"recorded {number}": event["payload"] for number, event in enumerate(VECTORS["events"])
}


@pytest.mark.parametrize(
    "payload",
    [pytest.param(p, id=name) for name, p in MESSAGES.items() if p.get("post_type") == "message"],
)
def test_a_message_means_to_us_what_it_means_to_others(payload):
    theirs, ours = read(payload), got(payload, onebot(context=EVERYTHING))
    assert str(theirs.user_id) == ours.sender_id or ours.sender_id.startswith("anonymous-")
    assert str(theirs.message_id) == ours.message_id
    assert ours.chat_id == (str(theirs.group_id) if theirs.message_type == "group" else "")
    # Theirs is to the bot where a mention stands at one end, ours wherever it stands.
    assert ours.addressed or not theirs.to_me
    plain = theirs.message.extract_plain_text().strip()
    kinds = {segment.type for segment in theirs.message}
    if kinds <= {"text", "image", "face", "reply", "record", "video", "file"}:
        assert ours.text == plain


@given(st.text().filter(lambda text: "\0" not in text), st.text("abc[]&,:=CQ#;91", max_size=30))
def test_a_message_in_string_form_is_read_as_others_read_it(text, markup):
    written = encode_cq([{"type": "text", "data": {"text": text + markup}}, FACE])
    for theirs in (Message(written), aiocqhttp.Message(written)):
        assert "".join(s.data["text"] for s in theirs if s.type == "text") == text + markup
        assert [dict(s.data) for s in theirs if s.type == "face"] == [FACE["data"]]
    assert decode_cq(written)[-1] == FACE


# ------------------------------------------------------------------------------------------- what this server sends


@given(st.text().filter(lambda text: "\0" not in text))
def test_no_text_of_a_model_is_a_code_to_others(text):
    clean = text.encode("utf-8", "replace").decode()
    for words in (clean, clean + HOSTILE, HOSTILE + clean):
        sent = type_validate_python(Message, outgoing_message(words, quote="7"))
        assert [segment.type for segment in sent] == ["reply", "text"]
        assert sent.extract_plain_text() == words
        # A client that writes it down as a string and reads it again still finds no code in it.
        for again in (Message(str(sent)), aiocqhttp.Message(str(sent))):
            assert [s.type for s in again if s.type != "text"] == ["reply"]
            assert "".join(s.data["text"] for s in again if s.type == "text") == words


async def test_the_calls_that_are_made_are_calls_that_others_make():
    """The same calls by aiocqhttp's own client leave the same messages with the fake."""
    async with FakeOneBot(access_token=TOKEN) as fake:
        platform = onebot(api_url=fake.url)
        await platform.send(part(HOSTILE, target=group(reply_to=None)))
        await platform.send(part(HOSTILE, target=private()))
        theirs = aiocqhttp.CQHttp(api_root=fake.url, access_token=TOKEN)
        await theirs.send_group_msg(group_id=30003, message=aiocqhttp.MessageSegment.text(HOSTILE))
        await theirs.send_private_msg(user_id=20002, message=aiocqhttp.MessageSegment.text(HOSTILE))
        told = [(m.chat, m.text, [s["type"] for s in m.segments]) for m in fake.visible]
        assert told[:2] == told[2:]
        login = await theirs.get_login_info()
        assert login == await platform.call("get_login_info", {})
        with pytest.raises(aiocqhttp.ActionFailed):
            await theirs.call_action("no_such_action")
        await platform.stop()


# ---------------------------------------------------------------------------------- the same client before both


@asynccontextmanager
async def their_server():
    """A bot of aiocqhttp's behind a real server; yields its address and what it has heard."""
    bot = aiocqhttp.CQHttp(access_token=TOKEN, secret=SECRET, message_class=aiocqhttp.Message)
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async def hear(event: Any) -> None:
        heard.put_nowait(event)

    bot.on_message(hear)
    bot.on_notice(hear)
    bot.on_request(hear)
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    sockets = config.create_sockets()
    port = sockets.insecure_sockets[0].getsockname()[1]
    config.create_sockets = lambda: sockets
    stopping = asyncio.Event()
    running = asyncio.ensure_future(serve(bot.asgi, config, shutdown_trigger=stopping.wait))
    try:
        yield bot, f"http://127.0.0.1:{port}", heard
    finally:
        stopping.set()
        with suppress(asyncio.CancelledError):
            await running


async def test_a_client_that_others_let_in_is_let_in_here_and_one_that_they_refuse_is_refused():
    event = message_event("hello", message_id=7)
    body = orjson.dumps(event)
    async with (
        their_server() as (_, theirs, heard),
        doors(onebot()) as ours,
        FakeOneBot(access_token=TOKEN, secret=SECRET) as fake,
    ):
        for url in (theirs + "/", ours.webhook):
            assert (await fake.post(url, event))[0] in {200, 204}
            assert (await fake.post(url, event, headers=sign(body, "wrong")))[0] == 403
            assert (await fake.post(url, event, headers={"X-Self-ID": "10001"}))[0] == 401
        assert str((await asyncio.wait_for(heard.get(), 20)).message) == "hello"
        assert ours.record.texts == ["hello"]


async def test_a_client_on_a_socket_tells_others_and_us_the_same_and_answers_both():
    async with (
        their_server() as (bot, theirs, heard),
        doors(onebot()) as ours,
        FakeOneBot(access_token=TOKEN) as fake,
    ):
        await fake.connect(theirs + "/ws/")
        await fake.connect(ours.ws)
        await fake.say([FACE, {"type": "text", "data": {"text": HOSTILE}}], group_id=30003, at=True)
        event = await asyncio.wait_for(heard.get(), 20)
        assert event.message.extract_plain_text() == HOSTILE
        await until(lambda: ours.record.texts == [HOSTILE])
        await bot.send(event, aiocqhttp.MessageSegment.text(HOSTILE))
        await ours.platform.send(part(HOSTILE, target=group(reply_to=None)))
        assert [(m.chat, m.text) for m in fake.visible] == [("group:30003", HOSTILE)] * 2
