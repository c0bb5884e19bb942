from __future__ import annotations

import time

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from feishu_bot.errors import BadPayload, BadSignature, BadToken, Refused
from feishu_bot.model import Attachment, ChatType, InboundMessage
from feishu_bot.platforms.base import PlatformContext, Received, SocketRequest, WebhookRequest, platform_types
from feishu_bot.platforms.onebot import OneBot, OneBotSettings
from feishu_bot.platforms.onebot_content import (
    decode_cq,
    encode_cq,
    outgoing_message,
    read_message,
)
from feishu_bot.testing.onebot import FakeOneBot, heartbeat_event, message_event, sign
from tests.platforms.onebots import NOW, SECRET, TOKEN, VECTORS, doors, onebot, until

EVERYTHING = PlatformContext(require_at_in_groups=False)


def post(headers, body: bytes, *, now: float = NOW) -> WebhookRequest:
    return WebhookRequest("POST", CIMultiDict(headers), {}, body, now)


def got(payload, platform: OneBot | None = None) -> InboundMessage:
    (message,) = received(payload, platform).messages
    return message


def received(payload, platform: OneBot | None = None) -> Received:
    body = orjson.dumps(payload)
    return (platform or onebot(context=EVERYTHING)).receive(post(sign(body, SECRET), body))


def said(message, **fields) -> InboundMessage:
    return got(message_event(message, **{"message_id": 7, "group_id": 30003, **fields}))


def vector(name: str):
    return next(e for e in VECTORS["events"] if e["name"] == name)["payload"]


def text(words: str):
    return {"type": "text", "data": {"text": words}}


def at(who: str, **data):
    return {"type": "at", "data": {"qq": who, **data}}


# ------------------------------------------------------------------------------------------- authenticity


def signature_case(case):
    body = bytes.fromhex(case["body_hex"]) if case.get("body_hex") else case["body"].encode()
    platform = onebot(secret=case["secret"], insecure=not case["secret"])
    return platform, case["headers"], body


@pytest.mark.parametrize("case", VECTORS["signature_cases"], ids=lambda case: case["name"])
def test_every_recorded_request_ends_in_the_status_that_is_right_for_it(case):
    platform, headers, body = signature_case(case)
    try:
        answer = platform.receive(post(headers, body))
        status = answer.status
    except Refused as refused:
        answer, status = None, refused.status
    expected = case["expect"]["status"]
    assert status in (expected if isinstance(expected, list) else [expected])
    if answer is not None:
        assert answer.body == b""
        if case["expect"].get("dedupe_key"):
            (message,) = answer.messages
            assert message.event_key.endswith(":" + case["expect"]["dedupe_key"])


@pytest.mark.parametrize("case", VECTORS["signature_cases"], ids=lambda case: case["name"])
async def test_every_recorded_request_gets_that_status_at_the_real_door(case):
    platform, headers, body = signature_case(case)
    async with doors(platform) as server, FakeOneBot() as fake:
        headers = {k: v.encode().decode("utf-8") for k, v in headers.items()}
        status, answer = await fake.post(server.webhook, body, headers=headers)
        expected = case["expect"]["status"]
        assert status in (expected if isinstance(expected, list) else [expected])
        assert (answer == b"") == (status == 204)
        assert bool(server.record.messages) <= (status == 204)


async def test_a_request_that_is_sent_again_is_recorded_once():
    case = next(c for c in VECTORS["signature_cases"] if c["name"] == "ok_group_at_bot")
    platform, headers, body = signature_case(case)
    async with doors(platform) as server, FakeOneBot() as fake:
        for _ in range(3):
            assert (await fake.post(server.webhook, body, headers=headers))[0] == 204
        assert server.record.texts == ["/help now"]


def test_every_flipped_byte_of_a_signed_body_is_refused():
    body = orjson.dumps(message_event("hello", message_id=7))
    headers = sign(body, SECRET)
    platform = onebot()
    for position in range(len(body)):
        broken = bytearray(body)
        broken[position] ^= 1
        with pytest.raises(BadToken):
            platform.receive(post(headers, bytes(broken)))


def test_both_secrets_are_good_while_one_rotates():
    body = orjson.dumps(message_event("hello", message_id=7))
    platform = onebot(secret=["new", "old"])
    for secret in ("new", "old"):
        assert platform.receive(post(sign(body, secret), body)).status == 204
    with pytest.raises(BadToken):
        platform.receive(post(sign(body, "older"), body))


def test_without_a_secret_there_is_no_webhook_and_without_a_token_no_socket():
    assert (onebot(secret="").has_webhook, onebot(secret="").has_socket) == (False, True)
    assert (onebot(access_token="").has_webhook, onebot(access_token="").has_socket) == (True, False)
    open_to_all = onebot(secret="", access_token="", insecure=True)
    assert (open_to_all.has_webhook, open_to_all.has_socket) == (True, True)
    with pytest.raises(BadSignature):
        onebot(secret="").receive(post({}, b"{}"))
    with pytest.raises(BadSignature):
        onebot(access_token="").admit(SocketRequest(CIMultiDict({"X-Self-ID": "10001"}), {}))


async def test_a_door_without_its_secret_is_not_there():
    async with FakeOneBot(secret=SECRET) as fake, doors(onebot(secret="")) as server:
        status, _ = await fake.post(server.webhook, message_event("hello", message_id=7))
        assert status == 404


def test_an_enabled_account_without_any_secret_does_not_start_unless_it_is_told_so():
    assert OneBotSettings(type="onebot").missing() == ["secret or access_token"]
    assert OneBotSettings(type="onebot", secret="s").missing() == []
    assert OneBotSettings(type="onebot", access_token="t").missing() == []
    assert OneBotSettings(type="onebot", insecure=True).missing() == []


def test_a_web_page_cannot_speak_for_an_account_without_secrets():
    platform = onebot(secret="", access_token="", insecure=True)
    body = orjson.dumps(message_event("hello", message_id=7))
    page = {"Origin": "https://evil.example"}
    with pytest.raises(BadToken):
        platform.receive(post({**sign(body, ""), **page}, body))
    with pytest.raises(BadToken):
        platform.admit(SocketRequest(CIMultiDict({"X-Self-ID": "10001", **page}), {}))


def test_only_the_bots_in_self_ids_are_let_in():
    platform = onebot(self_ids=["10001", "10002"])
    for self_id in (10001, 10002):
        assert got_from(platform, self_id).extra == {"self_id": str(self_id)}
    with pytest.raises(BadToken, match="10003"):
        got_from(platform, 10003)


def test_without_self_ids_the_first_bot_that_proves_itself_stays_the_only_one():
    platform = onebot()
    body = orjson.dumps(message_event("hello", message_id=7, self_id=10009))
    with pytest.raises(BadToken):
        platform.receive(post(sign(body, "wrong", self_id=10009), body))
    assert got_from(platform, 10001)
    with pytest.raises(BadToken):
        got_from(platform, 10009)


def got_from(platform: OneBot, self_id: int) -> InboundMessage:
    body = orjson.dumps(message_event("hello", message_id=7, self_id=self_id))
    (message,) = platform.receive(post(sign(body, SECRET, self_id=self_id), body)).messages
    return message


def test_a_request_without_the_header_of_its_bot_is_refused():
    body = orjson.dumps(message_event("hello", message_id=7))
    headers = sign(body, SECRET)
    del headers["x-self-id"]
    with pytest.raises(BadPayload):
        onebot().receive(post(headers, body))


@pytest.mark.parametrize(("age", "refused"), [(0, False), (3600, False), (3601, True), (-3601, True)])
def test_an_event_that_is_older_or_later_than_allowed_is_refused(age, refused):
    platform = onebot(max_event_age_s=3600)
    for stamp in (int(NOW), int(NOW) * 1000):
        body = orjson.dumps(message_event("hello", message_id=7, at_time=stamp))
        request = post(sign(body, SECRET), body, now=NOW + age)
        if refused:
            with pytest.raises(BadSignature):
                platform.receive(request)
        else:
            assert platform.receive(request).status == 204


def test_the_platform_is_found_by_its_name():
    assert platform_types()["onebot"] is OneBot


# ------------------------------------------------------------------------------------------------ vectors

KINDS = {  # what an event means -> how its type begins
    "recall": ("notice.friend_recall", "notice.group_recall"),
    "member_joined": ("notice.group_increase.",),
    "bot_removed": ("notice.group_decrease.kick_me",),
    "friend_added": ("notice.friend_add",),
    "file_uploaded": ("notice.group_upload",),
    "poke": ("notice.notify.poke",),
    "reaction": ("notice.group_msg_emoji_like",),
    "request": ("request.",),
}


@pytest.mark.parametrize("case", VECTORS["events"], ids=lambda case: case["name"])
def test_every_recorded_event_is_understood(case):
    expected, payload = case["expect"], case["payload"]
    messages = received(payload).messages
    if expected["kind"] in {"meta", "ignore"}:
        assert all(m.sender_is_bot for m in messages)
        return
    (message,) = messages
    if expected["kind"] != "message":
        assert message.kind == "event"
        assert message.event_type.startswith(KINDS[expected["kind"]])
    understood = {
        "message_id": message.message_id,
        "addressed": message.addressed,
        "reply_to": message.reply_to,
        "chat": f"{message.chat_type}:{message.chat_id or message.sender_id}",
        "plain_text": message.text,
        "mentions": [m.id for m in message.mentions],
        "mentions_all": [m.id for m in message.mentions] == ["all"],
        "attachments": [a.kind for a in message.attachments],
        "segments": decode_cq(str(payload.get("message"))),
    }
    assert {k: v for k, v in understood.items() if k in expected} == {
        k: v for k, v in expected.items() if k in understood
    }


@pytest.mark.parametrize("case", VECTORS["events"], ids=lambda case: case["name"])
async def test_every_recorded_event_goes_through_the_web_socket_as_through_the_webhook(case):
    async with doors(onebot()) as server, FakeOneBot(access_token=TOKEN, secret=SECRET) as fake:
        assert (await fake.post(server.webhook, case["payload"]))[0] == 204
        by_webhook = list(server.record.messages)
        server.record.messages.clear()
        link = await fake.connect(server.ws)
        await link.push(case["payload"])
        await link.push(message_event("last", message_id=1))
        await until(lambda: server.record.texts[-1:] == ["last"])
        assert server.record.messages[:-1] == by_webhook


@pytest.mark.parametrize("case", VECTORS["cq"]["decode"], ids=lambda case: case["cq"][:20] or "empty")
def test_every_recorded_string_is_read(case):
    assert decode_cq(case["cq"]) == case["segments"]


@pytest.mark.parametrize("case", VECTORS["cq"]["encode"], ids=lambda case: case["cq"][:20])
def test_every_recorded_segment_is_written(case):
    assert encode_cq(case["segments"]) == case["cq"]


NAMES = st.text("abcxyz019_.-", min_size=1, max_size=8)
SEGMENTS = st.lists(
    st.one_of(
        st.text(min_size=1).filter(lambda t: "\0" not in t).map(text),
        st.builds(
            lambda kind, data: {"type": kind, "data": data},
            NAMES.filter(lambda name: name != "text"),
            st.dictionaries(NAMES, st.text().filter(lambda t: "\0" not in t)),
        ),
    )
)


@given(SEGMENTS)
def test_what_is_written_as_a_string_is_read_as_it_was(segments):
    merged: list = []
    for segment in segments:
        if merged and segment["type"] == merged[-1]["type"] == "text":
            merged[-1] = text(merged[-1]["data"]["text"] + segment["data"]["text"])
        else:
            merged.append(segment)
    assert decode_cq(encode_cq(segments)) == merged


def test_a_string_full_of_beginnings_is_read_in_time_that_grows_with_its_length():
    def seconds(size: int) -> float:
        hostile = "[CQ:a,b=" * size
        start = time.perf_counter()
        assert decode_cq(hostile) == [text(hostile)]
        return time.perf_counter() - start

    seconds(1000)
    # Were it to grow with the square, this would be 400 times as much.
    assert seconds(40_000) < 200 * max(seconds(2000), 1e-4)


# ------------------------------------------------------------------------------------------------ messages


def test_the_bots_own_mention_is_taken_out_with_the_blanks_around_it():
    assert said([text("请问 "), at("10001"), text(" 怎么办")]).text == "请问 怎么办"
    assert said([at("10001"), at("10001"), text("\u3000hi")]).text == "hi"
    assert said([text("one\n"), at("10001"), text(" two")]).text == "one\ntwo"


def test_others_are_named_by_their_names_where_these_are_told():
    assert said([at("10001"), at("40004", name="@Bob"), text(" and "), at("50005")]).text == "@Bob and @50005"


def test_a_mention_of_everybody_is_none_of_the_bot():
    message = said([at("all"), text(" 开会")])
    assert (message.addressed, message.text) == (False, "@全体成员 开会")


def test_the_words_of_an_unaddressed_message_are_not_kept():
    payload = message_event("secret plans", message_id=7, group_id=30003, card="Ann")
    message = got(payload, onebot())
    assert message.addressed is False
    assert "secret" not in message.to_json()
    assert "Ann" not in message.to_json()
    assert said("secret plans").text == "secret plans"


def test_a_members_card_is_his_name_and_else_the_nickname():
    assert said("hi", card="三哥", nickname="张三").sender_name == "三哥"
    assert said("hi", nickname="张三").sender_name == "张三"


def test_anonymous_members_are_apart_and_nothing_of_the_real_one_is_kept():
    payload = vector("group_anonymous")
    one = got(payload)
    other = got({**payload, "anonymous": {"id": 1001, "name": "小飞侠", "flag": "f"}})
    assert (one.sender_id, one.sender_name) == ("anonymous-30003-1000", "大力鬼王")
    assert one.person != other.person
    assert "张三" not in one.to_json()
    assert "20002" not in one.to_json()


def test_a_temporary_conversation_remembers_the_group_it_came_from():
    payload = message_event("hi", message_id=7, sub_type="group", group_id=30003, message_type="private")
    message = got(payload)
    assert (message.chat_type, message.chat_id, message.user_key) == (
        ChatType.PRIVATE,
        "",
        "onebot:private:20002",
    )
    assert message.extra == {"self_id": "10001", "group_id": "30003"}
    nested = message_event("hi", message_id=7, sub_type="group")
    nested["sender"]["group_id"] = 30003
    assert got(nested).extra["group_id"] == "30003"


def test_the_bots_own_words_and_those_of_its_siblings_come_from_a_bot():
    platform = onebot(self_ids=["10001", "10002"])
    for user_id in (10001, 10002):
        payload = message_event("hi", message_id=7, group_id=30003, user_id=user_id, at=True)
        assert got(payload, platform).sender_is_bot
    assert received(vector("message_sent_self")).messages == ()


def test_ids_may_be_negative_zero_or_words():
    assert got(vector("gocq_negative_message_id")).message_id == "-2055178943"
    assert said("hi", message_id=0).message_id == "0"
    assert said("hi", message_id="abc-1").message_id == "abc-1"


def test_a_message_without_an_id_is_known_by_its_whole_content():
    payload = message_event("hi", message_id=7)
    del payload["message_id"]
    first, same, other = got(payload), got(dict(reversed(payload.items()))), got({**payload, "font": 15})
    assert first.event_key == same.event_key != other.event_key


def test_equal_ids_in_two_chats_are_two_messages():
    keys = {said("hi").event_key, said("hi", group_id=30004).event_key, said("hi", group_id=None).event_key}
    assert len(keys) == 3
    assert said("hi").event_key != said("hi", self_id=10001, message_id=8).event_key


def test_a_time_in_milliseconds_is_one_in_seconds():
    assert said("hi", at_time=1767225600).sent_at_ms == said("hi", at_time=1767225600000).sent_at_ms
    assert said("hi", at_time=True).sent_at_ms is None


@pytest.mark.parametrize(
    ("segments", "unreadable"),
    [
        ([at("10001")], "mention"),
        ([{"type": "face", "data": {"id": 178}}], "sticker"),
        ([{"type": "image", "data": {"url": "https://x/y.png"}}], "image"),
        ([{"type": "record", "data": {"file": "a.amr"}}], "audio"),
        ([{"type": "forward", "data": {"id": "74"}}], "other"),
        ([{"type": "dice", "data": {}}], "sticker"),
        ([], "text"),
    ],
)
def test_a_message_without_words_says_what_it_is(segments, unreadable):
    message = said(segments, group_id=None)
    assert (message.text, message.unreadable) == ("", unreadable)


def test_links_and_markdown_are_words():
    share = {"type": "share", "data": {"url": "https://x/", "title": "news"}}
    assert said([share], group_id=None).text == "news (https://x/)"
    assert said([{"type": "markdown", "data": {"content": "**hi**"}}], group_id=None).text == "**hi**"


def test_an_attachment_is_fetched_from_the_web_and_never_from_this_machine():
    data = [
        {"file": "/etc/passwd"},
        {"file": "file:///etc/passwd"},
        {"url": "file:///etc/passwd"},
        {"file": "../../x"},
        {"file": "base64://" + "A" * 50},
        {"file": "a.png", "url": "https://" + "x" * 5000},
        {"url": "https://x/y", "file": "b"},
    ]
    message = said([{"type": "image", "data": d} for d in data], group_id=None)
    assert [a.key for a in message.attachments] == ["", "", "", "", "", "a.png", "https://x/y"]


def test_a_card_and_a_file_have_names():
    assert got(vector("group_json_card")).attachments == (Attachment("card", "", "[QQ小程序]哔哩哔哩"),)
    assert got(vector("private_file")).attachments[0].name == "报告.pdf"


def test_what_is_too_much_of_one_message_is_cut():
    message = said([at("10001"), text("x" * 300_000)])
    assert len(message.text) == 100_000
    crowd = said([at("10001"), *(at(str(n)) for n in range(5000))])
    assert len(crowd.mentions) == 100
    album = said([{"type": "image", "data": {"url": "https://x/"}}] * 5000, group_id=None)
    assert len(album.attachments) == 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted({key for e in VECTORS["events"] for key in e["payload"]}))
PLATFORM = onebot(context=EVERYTHING)


@settings(max_examples=300)
@given(st.sampled_from(VECTORS["events"]), st.dictionaries(FIELDS, JSON, max_size=4))
def test_no_proved_payload_breaks_anything(event, changes):
    try:
        messages = received({**event["payload"], **changes}, PLATFORM).messages
    except Refused:
        return
    for message in messages:
        assert InboundMessage.from_json(message.to_json()).event_key == message.event_key
        assert "\0" not in message.text + message.sender_name + message.sender_id


@given(st.lists(st.dictionaries(st.sampled_from(["type", "data"]), JSON)))
def test_no_segments_break_anything(segments):
    read_message(segments, "10001")


# -------------------------------------------------------------------------------------------------- events


def test_an_events_details_are_there_for_plugins():
    message = got(vector("request_group_add"))
    assert (message.event_type, message.chat_id, message.sender_id) == ("request.group.add", "30003", "20002")
    assert message.extra["flag"] == "1767225622000"
    assert message.extra["comment"] == "问题：x 答案：y"


def test_an_events_details_are_bounded():
    message = got({**vector("request_group_add"), "comment": "x" * 100_000, "more": {"a": 1}})
    assert len(message.to_json()) < 6000
    assert message.extra["more"] == {"a": 1}


def test_a_recall_that_is_told_twice_is_one_event():
    payload = vector("friend_recall")
    assert got(payload).event_key == got({**payload, "time": payload["time"] + 3}).event_key


def test_two_pokes_are_two_events_and_a_request_is_one():
    poke, request = vector("poke_bot_in_group"), vector("request_group_add")
    assert got(poke).event_key != got({**poke, "time": poke["time"] + 1}).event_key
    assert got(request).event_key == got({**request, "time": request["time"] + 1}).event_key


def test_heartbeats_are_not_recorded_but_tell_when_the_bot_is_offline():
    platform = onebot(api_url="http://127.0.0.1:9")
    assert received(heartbeat_event(online=False), platform).messages == ()
    assert platform.problems() == ["onebot: bot 10001 is offline"]
    received(heartbeat_event(), platform)
    assert platform.problems() == []


# ----------------------------------------------------------------------------------------- quoted messages


def test_the_words_of_a_message_that_quotes_another_are_kept_until_the_record_knows_whose_it_is():
    quote = {"type": "reply", "data": {"id": "-5"}}
    message = got(message_event([quote, text("again")], message_id=8, group_id=30003), onebot())
    assert (message.addressed, message.reply_to, message.text) == (False, "-5", "again")


def test_an_answer_is_text_whatever_stands_in_it():
    hostile = "[CQ:at,qq=all][CQ:file,file=file:///etc/passwd]&#91;\ud800"
    segments = outgoing_message(hostile, quote="7")
    assert [s["type"] for s in segments] == ["reply", "text"]
    assert orjson.loads(orjson.dumps(segments))[1]["data"]["text"] == hostile.replace("\ud800", "?")
    assert not any(s["type"] != "text" for s in decode_cq(encode_cq(segments[1:])))
