"""Feishu and QQ with their makers' own code: lark-oapi stands where our door stands, and calls what we call; botpy reads
what QQ sends us, and says what it would send in our place.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from typing import Any

import orjson
import pytest
from multidict import CIMultiDict

from feishu_bot.errors import Refused
from feishu_bot.model import ChatType, Outgoing, Target
from feishu_bot.platforms.base import PlatformContext, WebhookRequest
from feishu_bot.platforms.feishu import Feishu, FeishuSettings
from feishu_bot.testing.feishu import FakeFeishu, make_event, sign_and_encrypt, text_event
from feishu_bot.testing.qq import (
    FakeQQ,
    button_event,
    channel_event,
    full_group_event,
    group_event,
    mention,
    private_event,
)
from feishu_bot.testing.qq import (
    make_event as qq_event,
)
from tests.ai.pictures import png
from tests.platforms.test_qq_receive import VECTORS, got
from tests.platforms.test_qq_send import connected

KEY, TOKEN, NOW = "key-of-the-tests", "token-of-the-tests", 1767225600


class _Later:
    """Imports them when the first test asks: they take seconds, in every process that only lists the tests."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks whatever stands in a module whether it is a fixture
            raise AttributeError(name)
        return getattr(importlib.import_module("tests.platforms.makers"), name)


makers = _Later()


# --------------------------------------------------------------------------------------- Feishu: its own door


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("Lark").setLevel(logging.CRITICAL)


class TheirDoor:
    """lark-oapi's dispatcher; ``told`` holds the events it has handed on."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        made = makers.lark.EventDispatcherHandler.builder(KEY, TOKEN)
        for name in (
            "im_message_receive_v1",
            "im_message_recalled_v1",
            "im_chat_member_bot_added_v1",
            "im_chat_member_bot_deleted_v1",
        ):
            made = getattr(made, f"register_p2_{name}")(self.told.append)
        self._handler = made.register_p2_card_action_trigger(self._card).build()

    def _card(self, event: Any) -> Any:
        self.told.append(event)
        return makers.P2CardActionTriggerResponse({})

    def __call__(self, headers: Any, body: bytes) -> int:
        request = makers.RawRequest()
        request.uri, request.headers, request.body = "/webhook/feishu", dict(headers), body
        return int(self._handler.do(request).status_code)


def our_door() -> Feishu:
    settings = FeishuSettings(
        type="feishu",
        app_id="cli_x",
        app_secret="s",
        encrypt_key=KEY,
        verification_token=TOKEN,
        bot_open_id="ou_bot",
    )
    return Feishu("feishu", settings, PlatformContext())


def ours(headers: Any, body: bytes) -> Any:
    """Return the message, None for what has none, or the status of a refusal."""
    try:
        received = our_door().receive(WebhookRequest("POST", CIMultiDict(headers), {}, body, NOW))
    except Refused as refused:
        return refused.status
    return received.messages[0] if received.messages else None


def built(text: str, *, chat_type: str = "p2p", mentioned: bool = False) -> bytes:
    """Return an event built by lark-oapi's own types, as JSON by its own code."""
    message = makers.EventMessage()
    message.message_id, message.chat_id, message.chat_type = "om_1", "oc_1", chat_type
    message.message_type, message.content = "text", makers.lark.JSON.marshal({"text": text})
    message.create_time = f"{NOW}000"
    if mentioned:
        who = makers.UserId()
        who.open_id = "ou_bot"
        named = makers.MentionEvent()
        named.key, named.name, named.id = "@_user_1", "bot", who
        message.mentions = [named]
    sender, user = makers.EventSender(), makers.UserId()
    user.open_id, user.union_id = "ou_ann", "on_ann"
    sender.sender_id, sender.sender_type, sender.tenant_key = user, "user", "t"
    data = makers.P2ImMessageReceiveV1Data()
    data.sender, data.message = sender, message
    event = makers.P2ImMessageReceiveV1()
    event.event = data
    plain = orjson.loads(makers.lark.JSON.marshal(event))
    envelope = make_event({}, event_type="im.message.receive_v1", token=TOKEN)
    return orjson.dumps({**envelope, "event": plain["event"]})


@pytest.mark.parametrize("text", ["hello", '{"a": "\\u4f60"} \\ "quoted"', "你好 🎉", "@_user_1 look"])
@pytest.mark.parametrize("chat_type", ["p2p", "group"])
def test_an_event_of_feishus_own_types_means_to_us_what_it_says(text, chat_type):
    headers, body = sign_and_encrypt(
        built(text, chat_type=chat_type, mentioned="@_user_1" in text), encrypt_key=KEY, timestamp=NOW
    )
    their_door = TheirDoor()
    assert their_door(headers, body) == 200
    (theirs,) = their_door.told
    message = ours(headers, body)
    assert (message.message_id, message.chat_id, message.sender_id) == (
        theirs.event.message.message_id,
        theirs.event.message.chat_id,
        theirs.event.sender.sender_id.open_id,
    )
    told = orjson.loads(theirs.event.message.content)["text"]
    addressed = chat_type == "p2p" or "@_user_1" in text
    assert message.addressed is addressed
    assert message.text == (told.replace("@_user_1", "").strip() if addressed else "")
    assert message.sent_at_ms == int(theirs.event.message.create_time)


EVENTS = {
    "text": lambda: text_event("hi", token=TOKEN),
    "group": lambda: text_event("hi", chat_type="group", mention_bot=True, token=TOKEN),
    "recalled": lambda: make_event(
        {"message_id": "om_1", "chat_id": "oc_1"}, event_type="im.message.recalled_v1", token=TOKEN
    ),
    "added": lambda: make_event({"chat_id": "oc_1"}, event_type="im.chat.member.bot.added_v1", token=TOKEN),
    "removed": lambda: make_event(
        {"chat_id": "oc_1"}, event_type="im.chat.member.bot.deleted_v1", token=TOKEN
    ),
    "card": lambda: make_event(
        {
            "operator": {"open_id": "ou_ann"},
            "token": "c-1",
            "action": {"value": {"k": "v"}, "tag": "button"},
            "context": {"open_message_id": "om_1", "open_chat_id": "oc_1"},
        },
        event_type="card.action.trigger",
        token=TOKEN,
    ),
}


@pytest.mark.parametrize("name", EVENTS)
def test_what_the_fake_feishu_sends_is_read_by_feishus_own_code(name):
    event = EVENTS[name]()
    headers, body = sign_and_encrypt(event, encrypt_key=KEY, timestamp=NOW)
    their_door = TheirDoor()
    assert their_door(headers, body) == 200
    (theirs,) = their_door.told
    message = ours(headers, body)
    assert theirs.header.event_type == message.event_type
    if name == "card":
        assert theirs.event.action.value == message.extra["value"]
        assert theirs.event.operator.open_id == message.sender_id
        assert theirs.event.context.open_message_id == message.message_id


def test_whatever_feishus_own_code_refuses_our_door_refuses_too():
    headers, body = sign_and_encrypt(text_event("hi", token=TOKEN), encrypt_key=KEY, timestamp=NOW)
    _, other = sign_and_encrypt(text_event("hi", token="wrong"), encrypt_key=KEY, timestamp=NOW)
    wrong_token = sign_and_encrypt(text_event("hi", token="wrong"), encrypt_key=KEY, timestamp=NOW)
    wrong_key = sign_and_encrypt(text_event("hi", token=TOKEN), encrypt_key="another", timestamp=NOW)
    posts = [
        wrong_token,
        wrong_key,
        (headers, other),
        (headers, body.replace(b'"}', b'A"}')),
        ({**headers, "X-Lark-Request-Timestamp": str(NOW + 1)}, body),
        ({**headers, "X-Lark-Request-Nonce": "1"}, body),
        ({**headers, "X-Lark-Signature": "0" * 64}, body),
        *(({k: v for k, v in headers.items() if k != name}, body) for name in headers if "Lark" in name),
        (headers, b""),
        (headers, b"{}"),
        ({}, orjson.dumps(text_event("hi", token=TOKEN))),
    ]
    for post in posts:
        assert TheirDoor()(*post) == 500
        assert ours(*post) in {400, 401, 403}


# -------------------------------------------------------------------------------------- Feishu: its own calls


@pytest.fixture
async def feishu():
    async with FakeFeishu() as fake:
        yield fake


def client_of(fake: FakeFeishu) -> Any:
    app_id = f"cli_{fake.url}"  # its tokens are kept by this for the whole process
    return makers.lark.Client.builder().app_id(app_id).app_secret("s").domain(fake.url).build()


async def called(method: Any, request: Any) -> Any:
    answer = await asyncio.to_thread(method, request)
    assert answer.success(), (answer.code, answer.msg)
    return answer


async def test_we_reply_and_write_with_the_same_bodies_as_feishus_own_client(feishu):
    client = client_of(feishu)
    body = (
        makers.ReplyMessageRequestBody.builder()
        .msg_type("text")
        .content(makers.lark.JSON.marshal({"text": "hi"}))
    )
    body = body.reply_in_thread(False).uuid("u1").build()
    reply = makers.ReplyMessageRequest.builder().message_id("om_1").request_body(body).build()
    theirs = await called(client.im.v1.message.reply, reply)
    body = makers.CreateMessageRequestBody.builder().receive_id("oc_1").msg_type("text")
    body = body.content(makers.lark.JSON.marshal({"text": "hi"})).uuid("u2").build()
    create = makers.CreateMessageRequest.builder().receive_id_type("chat_id").request_body(body).build()
    await called(client.im.v1.message.create, create)
    platform = Feishu(
        "feishu",
        FeishuSettings(type="feishu", app_id="cli_x", app_secret="s", encrypt_key=KEY, base_url=feishu.url),
        PlatformContext(),
    )
    calls = list(feishu.requests)
    for number, reply_to in enumerate(("om_1", None)):
        target = Target(ChatType.GROUP, chat_id="oc_1", reply_to=reply_to)
        await platform.send(Outgoing("feishu", "in:1", "answer", number, target, "hi"))
    await platform.stop()
    said = [(m.reply_to, m.chat, m.thread, m.msg_type, orjson.loads(m.content)) for m in feishu.visible]
    assert said[:2] == said[2:]
    assert theirs.data.message_id == feishu.visible[0].message_id
    assert list(feishu.requests)[len(calls) :] == calls  # token, reply, message


async def test_feishus_own_client_fetches_resources_and_sets_reactions_where_we_do(feishu):
    feishu.resources["om_1", "img_1"] = png()
    client = client_of(feishu)
    asked = (
        makers.GetMessageResourceRequest.builder().message_id("om_1").file_key("img_1").type("image").build()
    )
    found = await called(client.im.v1.message_resource.get, asked)
    assert found.file.read() == png()
    emoji = makers.Emoji.builder().emoji_type("Typing").build()
    body = makers.CreateMessageReactionRequestBody.builder().reaction_type(emoji).build()
    asked = makers.CreateMessageReactionRequest.builder().message_id("om_1").request_body(body).build()
    set_ = await called(client.im.v1.message_reaction.create, asked)
    assert feishu.shown == {set_.data.reaction_id: ("om_1", "Typing")}


# ---------------------------------------------------------------------------------------------- QQ: its events


def parsed(event: dict[str, Any]) -> Any:
    """Return what botpy makes of an event."""
    told: list[Any] = []
    state = makers.ConnectionState(lambda _name, *args: told.extend(args), api=None)
    state.parsers[event["t"].lower()](event)
    return told[0]


SAID = [
    private_event("hello", message_id="m1"),
    group_event("hello", message_id="m2"),
    channel_event("a < b", message_id="m3"),
    channel_event("hello", direct=True, message_id="m4"),
    private_event(
        " ",
        message_id="m5",
        attachments=[{"content_type": "image/png", "url": "https://x.test/a", "filename": "a"}],
    ),
]
RECORDED = [
    event
    for case in VECTORS["event_cases"]
    if case["expect"]["status"] == 200
    and (event := orjson.loads(case["request"]["body"])).get("t")
    in {"C2C_MESSAGE_CREATE", "GROUP_AT_MESSAGE_CREATE", "AT_MESSAGE_CREATE", "DIRECT_MESSAGE_CREATE"}
]


@pytest.mark.parametrize("event", SAID + RECORDED, ids=lambda event: event["d"]["id"][:20])
def test_botpy_reads_from_a_message_what_we_read(event):
    theirs, message = parsed(event), got(event)
    assert theirs.id == message.message_id
    assert theirs.timestamp == event["d"]["timestamp"]
    who = {
        "C2C_MESSAGE_CREATE": lambda: (theirs.author.user_openid, theirs.author.user_openid),
        "GROUP_AT_MESSAGE_CREATE": lambda: (theirs.author.member_openid, theirs.group_openid),
        "AT_MESSAGE_CREATE": lambda: (theirs.author.id, theirs.channel_id),
        "DIRECT_MESSAGE_CREATE": lambda: (theirs.author.id, theirs.guild_id),
    }[event["t"]]()
    assert (message.sender_id, message.chat_id) == who
    kinds = [a.content_type.partition("/")[0] for a in theirs.attachments]
    assert [a.kind for a in message.attachments] == [{"voice": "audio"}.get(k, k) for k in kinds]
    assert [a.key.removeprefix("https://") for a in message.attachments] == [
        a.url.removeprefix("https://") for a in theirs.attachments
    ]
    if not theirs.attachments and "<" not in theirs.content and "&" not in theirs.content:
        assert message.text.startswith(theirs.content.strip())


def test_botpy_reads_from_buttons_and_from_who_comes_and_goes_what_we_read():
    event = button_event("approve:42")
    theirs, message = parsed(event), got(event)
    assert (theirs.id, theirs.event_id) == (message.extra["interaction_id"], message.extra["event_id"])
    resolved = theirs.data.resolved
    assert (resolved.button_id, resolved.button_data) == (
        message.extra["button_id"],
        message.extra["button_data"],
    )
    assert theirs.user_openid == message.sender_id == message.chat_id
    for name in ("FRIEND_ADD", "FRIEND_DEL", "C2C_MSG_REJECT", "C2C_MSG_RECEIVE"):
        event = qq_event({"openid": "U", "timestamp": NOW}, event_type=name)
        theirs, message = parsed(event), got(event)
        assert (message.sender_id, message.chat_id, message.event_key) == ("U", "U", f"ev:{theirs.event_id}")
        assert theirs.openid == "U"
    for name in ("GROUP_ADD_ROBOT", "GROUP_DEL_ROBOT", "GROUP_MSG_REJECT", "GROUP_MSG_RECEIVE"):
        data = {"group_openid": "G", "op_member_openid": "M", "timestamp": NOW}
        event = qq_event(data, event_type=name)
        theirs, message = parsed(event), got(event)
        assert (
            (message.chat_id, message.sender_id)
            == (theirs.group_openid, theirs.op_member_openid)
            == ("G", "M")
        )


def test_a_full_group_message_is_one_that_botpy_does_not_know_yet_and_we_do():
    event = full_group_event("hi", mention_bot=True, mentions=[mention("X", name="x")])
    with pytest.raises(KeyError):
        parsed(event)
    assert got(event).addressed


# ----------------------------------------------------------------------------------------------- QQ: its calls


class Recorder:
    """Stands for botpy's connection: keeps what it would send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, dict[str, Any]]] = []

    async def request(self, route: Any, json: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        path = route.path.format_map(route.parameters)
        body = {k: v for k, v in (json or {}).items() if v is not None and k not in route.parameters}
        self.sent.append((route.method, path, body))
        return {}


@pytest.mark.parametrize(
    ("target", "call"),
    [
        (
            Target(ChatType.GROUP, chat_id="G", sender_id="M", reply_to="m1"),
            lambda api: api.post_group_message(group_openid="G", content="hi", msg_id="m1", msg_seq=1),
        ),
        (
            Target(ChatType.PRIVATE, chat_id="U", sender_id="U", reply_to="m1"),
            lambda api: api.post_c2c_message(openid="U", content="hi", msg_id="m1", msg_seq=1),
        ),
        (
            Target(ChatType.CHANNEL, chat_id="100", sender_id="1", reply_to="m1"),
            lambda api: api.post_message(
                channel_id="100",
                content="hi",
                msg_id="m1",
                message_reference={"message_id": "m1", "ignore_get_message_error": True},
            ),
        ),
        (
            Target(ChatType.PRIVATE, chat_id="187", sender_id="1", reply_to="m1", extra={"dms": True}),
            lambda api: api.post_dms(guild_id="187", content="hi", msg_id="m1"),
        ),
    ],
    ids=["group", "private", "channel", "direct"],
)
async def test_we_send_what_botpy_would_send(target, call):
    recorder = Recorder()
    await call(makers.BotAPI(recorder))
    ((method, path, theirs),) = recorder.sent
    async with FakeQQ() as fake, connected(fake) as platform:
        await platform.send(Outgoing("qq", "in:1", "answer", 0, target, "hi"))
        assert fake.requests[-1] == (method, path)
        body = dict(fake.visible[0].body)
    if not path.startswith("/v2/"):
        assert body.pop("msg_seq") == 1  # folds repeats where the platform looks at it
    assert body == theirs


async def test_markdown_media_and_confirmations_are_botpys_too():
    recorder = Recorder()
    api = makers.BotAPI(recorder)
    await api.post_group_message(
        group_openid="G", msg_type=2, markdown={"content": "**hi**"}, msg_id="m1", msg_seq=51
    )
    await api.post_group_file(group_openid="G", file_type=1, url="https://x.test/a.png")
    await api.on_interaction_result("I", 0)
    async with FakeQQ(markdown=True) as fake, connected(fake) as platform:
        target = Target(ChatType.GROUP, chat_id="G", sender_id="M", reply_to="m1")
        await platform.send(Outgoing("qq", "in:1", "answer", 0, target, "**hi**"))
        message = ("POST", fake.requests[-1][1], dict(fake.visible[0].body))
        asked = {"file_type": 1, "url": "https://x.test/a.png", "srv_send_msg": False}
        found = await platform.call("POST /v2/groups/G/files", asked)
        file = ("POST", fake.requests[-1][1], dict(fake.uploaded[found["file_info"]][1]))
        platform.recorded([got(button_event("x", event_id="e"))])
        await asyncio.gather(*platform._confirming)
        ((pressed, code),) = fake.confirmed.items()
        confirmed = (fake.requests[-1][0], fake.requests[-1][1].replace(pressed, "I"), {"code": code})
    assert recorder.sent == [message, file, confirmed]
