from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from feishu_bot.errors import BadPayload, BadSignature, BadToken, Refused
from feishu_bot.model import Attachment, ChatType, InboundMessage, Mention
from feishu_bot.platforms.base import PlatformContext, Received, WebhookRequest, platform_types
from feishu_bot.platforms.qq import QQ, QQSettings, signing_key
from feishu_bot.testing.qq import (
    GROUP_OPENID,
    GUILD_ID,
    MEMBER_OPENID,
    USER_OPENID,
    button_event,
    channel_event,
    full_group_event,
    group_event,
    make_event,
    mention,
    private_event,
    sign,
    signed_event,
    validation_event,
)

VECTORS = orjson.loads(Path(__file__).with_name("vectors").joinpath("qq.json").read_bytes())
NOW = 1767225600.0
SECRET = "secret-of-the-tests"
FACE = '<faceType=1,faceId="13",ext="eyJ0ZXh0Ijoi5ZGy54mZIn0=">'


def qq(*, secret: Any = SECRET, require_at: bool = True, **keys: Any) -> QQ:
    chosen = QQSettings(type="qq", enabled=True, app_id="102000001", app_secret=secret, **keys)
    return QQ("qq", chosen, PlatformContext(require_at_in_groups=require_at))


def post(headers: dict[str, str], body: bytes, *, now: float = NOW) -> WebhookRequest:
    return WebhookRequest("POST", CIMultiDict(headers), {}, body, now)


def signed(event: Any, *, secret: str = SECRET, timestamp: int | str = int(NOW)) -> WebhookRequest:
    return post(*signed_event(event, secret=secret, timestamp=timestamp))


def got(event: Any, platform: QQ | None = None) -> InboundMessage:
    (message,) = (platform or qq()).receive(signed(event)).messages
    return message


def received_vector(case: dict[str, Any]) -> Received:
    request = case["request"]
    return qq(secret=case["config"]["secret"]).receive(post(request["headers"], request["body"].encode()))


def message_of(name: str) -> InboundMessage:
    case = next(case for case in VECTORS["event_cases"] if case["name"] == name)
    (message,) = received_vector(case).messages
    return message


# ------------------------------------------------------------------------------------------- authenticity


@pytest.mark.parametrize("case", VECTORS["seeds"], ids=lambda case: case["secret"])
def test_the_key_of_a_secret_is_its_bytes_repeated(case):
    key = signing_key(case["secret"])
    assert key.private_bytes_raw().hex() == case["seed_hex"]
    assert key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex() == case["public_key_hex"]


def test_the_documented_signature_of_an_event_is_reproduced():
    case = next(c for c in VECTORS["official"] if c["kind"] == "event")
    headers = sign(case["body"].encode(), secret=case["secret"], timestamp=case["timestamp"])
    assert headers["X-Signature-Ed25519"] == case["signature"]
    assert next(c for c in VECTORS["official"] if c["kind"] == "seed+public key")["reproduced"]


def test_the_documented_answer_to_the_check_of_the_address_is_reproduced():
    case = next(c for c in VECTORS["official"] if c["kind"] == "op13")
    body = case["request"]["body"].encode()
    received = qq(secret=case["secret"]).receive(post(sign(body, secret=case["secret"]), body))
    assert orjson.loads(received.body) == case["response"]
    assert received.messages == ()


@pytest.mark.parametrize("case", VECTORS["event_cases"], ids=lambda case: case["name"])
def test_every_recorded_request_ends_in_the_status_that_is_right_for_it(case):
    expected = case["expect"]
    try:
        received, status = received_vector(case), 200
    except Refused as refused:
        received, status = None, refused.status
    assert status == expected["status"]
    if received is None:
        return
    assert orjson.loads(received.body) == expected["json"]
    if "dedupe_key" in expected:
        (message,) = received.messages
        assert message.event_type == expected["event_type"]
        assert message.event_key.partition(":")[2] == expected["dedupe_key"]
    else:
        assert received.messages == ()


def test_nobody_gets_a_forged_event_signed_by_the_check_of_the_address():
    attack = VECTORS["signing_oracle"]
    body = orjson.dumps(attack["attacker_request"])
    for platform in (qq(), qq(insecure=True)):
        with pytest.raises(BadToken):
            platform.receive(post({"X-Bot-Appid": "102000001"}, body))
        with pytest.raises(BadPayload):
            platform.receive(post(sign(body, secret=SECRET), body))


@pytest.mark.parametrize(
    ("token", "stamp"),
    [
        ("", "1767225600"),
        ("abc", "1767225600{"),
        ("abc", ""),
        ("a" * 65, "1767225600"),
        ("a-b", "1767225600"),
        ("abc\n", "1767225600"),
        ("é", "1767225600"),
        (None, "1767225600"),
        ("abc", 1767225600),
        ("abc", "１７６７２２５６００"),
        (["abc"], "1767225600"),
    ],
)
def test_only_a_word_and_a_number_are_ever_signed(token, stamp):
    with pytest.raises(BadPayload):
        qq().receive(signed({"op": 13, "d": {"plain_token": token, "event_ts": stamp}}))


@pytest.mark.parametrize("data", [None, [], "x", 5, {}])
def test_a_check_of_the_address_without_its_fields_is_400(data):
    with pytest.raises(BadPayload):
        qq().receive(signed({"op": 13, "d": data}))


def test_the_check_of_the_address_is_answered_by_the_key_that_proved_it():
    platform = qq(secret=["new", "old"])
    answers = set()
    for secret in ("new", "old"):
        event = validation_event(event_ts="1767225600")
        answers.add(
            orjson.loads(platform.receive(signed(event, secret=secret)).body)["signature"]
            == signing_key(secret).sign(b"1767225600Arq0D5A61EgUu4OxUvOp").hex()
        )
    assert answers == {True}


def test_an_insecure_account_takes_what_is_unsigned_but_never_what_is_wrongly_signed():
    body = orjson.dumps(private_event("hi"))
    assert qq(insecure=True).receive(post({}, body)).messages
    with pytest.raises(BadSignature):
        qq().receive(post({}, body))
    with pytest.raises(BadSignature):
        qq(insecure=True).receive(post(sign(body, secret="other"), body))
    with pytest.raises(BadSignature):
        qq(insecure=True).receive(post({"X-Signature-Timestamp": "1767225600"}, body))


def test_a_timestamp_that_shifts_the_border_to_the_body_is_refused():
    inner = orjson.dumps(private_event("hi"))
    whole = b'{"a":' + inner
    headers = sign(whole, secret=SECRET, timestamp=int(NOW))
    shifted = {**headers, "X-Signature-Timestamp": headers["X-Signature-Timestamp"] + '{"a":'}
    with pytest.raises(BadSignature):
        qq().receive(post(shifted, inner))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b"5", b'"x"', b"{}", b'{"op":"0"}', b'{"op":true}']
)
def test_a_signed_body_that_is_no_envelope_is_400(body):
    with pytest.raises(BadPayload):
        qq().receive(signed(body))


@pytest.mark.parametrize("name", ["C2C_MESSAGE_CREATE", "GROUP_AT_MESSAGE_CREATE", "AT_MESSAGE_CREATE"])
@pytest.mark.parametrize("data", [None, [], "x", 7])
def test_a_message_event_without_a_message_is_400(name, data):
    with pytest.raises(BadPayload):
        qq().receive(signed({"op": 0, "id": "x", "t": name, "d": data}))


@pytest.mark.parametrize("op", [2, 7, 10, 99, -1])
def test_an_operation_of_another_kind_is_accepted_and_means_nothing(op):
    received = qq().receive(signed({"op": op, "d": {}}))
    assert (received.messages, orjson.loads(received.body)) == ((), {"op": 12, "d": 0})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "id",
        "content",
        "timestamp",
        "author",
        "member",
        "mentions",
        "attachments",
        "group_openid",
        "channel_id",
        "guild_id",
        "message_reference",
        "message_type",
        "message_scene",
        "msg_elements",
        "openid",
        "data",
    ]
)
TYPES = st.sampled_from(
    [
        "C2C_MESSAGE_CREATE",
        "GROUP_AT_MESSAGE_CREATE",
        "GROUP_MESSAGE_CREATE",
        "AT_MESSAGE_CREATE",
        "DIRECT_MESSAGE_CREATE",
        "INTERACTION_CREATE",
        "FRIEND_ADD",
        "NOVELTY",
    ]
)


@settings(max_examples=100, deadline=None)
@given(event_type=TYPES, data=st.dictionaries(FIELDS, JSON), event_id=JSON)
def test_no_signed_event_whatever_it_holds_is_an_accident(event_type, data, event_id):
    body = orjson.dumps({"op": 0, "t": event_type, "d": data, "id": event_id})
    message = got(body, qq(require_at=False))
    assert InboundMessage.from_json(message.to_json()) == message


# ------------------------------------------------------------------------------------------------- messages


def test_a_private_text_is_addressed_and_may_be_answered_for_an_hour():
    event = private_event("你好", message_id="ROBOT1.0_x", at=NOW - 10)
    assert got(event) == InboundMessage(
        account="qq",
        event_key="m:ROBOT1.0_x",
        event_type="C2C_MESSAGE_CREATE",
        chat_type=ChatType.PRIVATE,
        chat_id=USER_OPENID,
        sender_id=USER_OPENID,
        text="你好",
        addressed=True,
        message_id="ROBOT1.0_x",
        sent_at_ms=1767225590000,
        reply_before_ms=1767225590000 + 3_600_000,
    )


def test_a_group_message_that_mentions_the_bot_may_be_answered_for_five_minutes():
    message = message_of("event_group_at_text")
    assert message.text == "/help 你好"
    assert (message.chat_type, message.addressed) == (ChatType.GROUP, True)
    assert (message.chat_id, message.sender_id) == ("C9F778FE6ADF9D1D1DBE395BF744A33A", "B0B0")
    assert message.reply_before_ms == int(NOW) * 1000 + 300_000


def test_a_window_never_begins_later_than_the_event_came():
    late = got(group_event("x", at=NOW + 1000))
    old = got(group_event("x", at=NOW - 1000))
    timeless = got(group_event("x", timestamp=None))
    assert late.reply_before_ms == timeless.reply_before_ms == int(NOW) * 1000 + 300_000
    assert old.reply_before_ms == int(NOW - 1000) * 1000 + 300_000


def test_any_group_message_is_addressed_when_it_names_the_bot_and_loses_that_mention():
    message = message_of("event_group_message_full")
    assert (message.text, message.addressed, message.sender_name) == ("早 [呲牙]", True, "张三")
    assert message.mentions == (Mention("AA11", "小助手", is_bot=True),)


def test_a_group_message_for_nobody_is_not_addressed_and_its_text_is_not_kept():
    message = got(full_group_event("secret talk", attachments=[{"content_type": "image/png", "url": "u"}]))
    assert (message.addressed, message.text, message.attachments) == (False, "", ())


def test_a_group_message_for_nobody_is_kept_where_everything_is_answered():
    message = got(full_group_event("talk"), qq(require_at=False))
    assert (message.addressed, message.text) == (False, "talk")


def test_a_message_to_everybody_or_somebody_else_is_not_for_the_bot():
    everybody = {"scope": "all", "id": "all", "is_you": True}
    assert not got(full_group_event("all", mentions=[everybody])).addressed
    assert not got(full_group_event("<@CC> hi", mentions=[mention("CC", name="Bob")])).addressed


def test_both_copies_of_a_group_message_have_one_key():
    plain = got(full_group_event("hi", message_id="ROBOT1.0_twice"))
    addressed = got(group_event("hi", message_id="ROBOT1.0_twice"))
    assert plain.event_key == addressed.event_key
    assert (plain.addressed, addressed.addressed) == (False, True)


def test_other_people_that_are_named_keep_their_names():
    event = full_group_event("ask <@CC> and <@DD>", mention_bot=True, mentions=[mention("CC", name="Bob")])
    assert got(event).text == "ask @Bob and <@DD>"


def test_a_guild_message_loses_the_mention_and_its_escapes():
    message = message_of("event_guild_at")
    assert (message.text, message.chat_type) == ("<tag> hi", ChatType.CHANNEL)
    assert (message.chat_id, message.sender_id, message.sender_name) == ("100010", "1234", "abc")
    assert message.reply_before_ms == int(NOW) * 1000 + 300_000


def test_what_somebody_typed_in_a_guild_never_becomes_a_mention():
    assert got(channel_event("&lt; <@!1234567890> &amp;")).text == "&lt; <@!1234567890> &amp;"


def test_a_mention_in_the_middle_leaves_one_blank():
    event = channel_event("x")
    event["d"]["content"] = "hello <@!1234567890> world"
    assert got(event).text == "hello world"


def test_a_guild_message_without_a_list_of_mentions_loses_the_first_one():
    event = channel_event("hi")
    del event["d"]["mentions"]
    assert got(event).text == "hi"


def test_any_message_of_a_private_guild_is_not_for_the_bot():
    event = {**channel_event("hi"), "t": "MESSAGE_CREATE"}
    assert not got(event).addressed


def test_a_guild_direct_message_is_private_and_its_way_back_is_remembered():
    message = got(channel_event("hi", direct=True))
    assert (message.chat_type, message.chat_id, message.text) == (ChatType.PRIVATE, GUILD_ID, "hi")
    assert message.extra == {"dms": True}
    assert message.reply_before_ms == int(NOW) * 1000 + 300_000


def test_an_image_alone_cannot_be_read_and_is_named():
    message = message_of("event_c2c_image")
    url = "https://multimedia.nt.qq.com.cn/download?appid=1406&fileid=abc&rkey=xyz"
    assert message.attachments == (Attachment("image", url, "a.png"),)
    assert (message.text, message.unreadable) == ("", "image")


def test_an_image_beside_text_leaves_the_text_readable():
    message = got(private_event("what is this", attachments=[{"content_type": "image/png", "url": "h/x"}]))
    assert (message.text, message.unreadable) == ("what is this", None)
    assert message.attachments[0].key == "https://h/x"


def test_a_voice_is_read_as_what_the_platform_has_heard():
    voice = {"content_type": "voice", "filename": "a.amr", "url": "//g/x.amr", "asr_refer_text": "今天天气"}
    message = got(private_event("", attachments=[voice]))
    assert (message.text, message.unreadable) == ("今天天气", None)
    assert message.attachments == (Attachment("audio", "https://g/x.amr", "a.amr"),)
    del voice["asr_refer_text"]
    assert got(private_event("", attachments=[voice])).unreadable == "audio"


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [("image/gif", "image"), ("video/mp4", "video"), ("voice", "audio"), ("file", "file"), ("", "file")],
)
def test_every_attachment_has_its_kind(content_type, kind):
    event = private_event(" ", attachments=[{"content_type": content_type, "url": "https://x"}])
    assert got(event).unreadable == kind


def test_a_bare_mention_is_one_in_a_group_and_nothing_in_private():
    assert got(group_event("")).unreadable == "mention"
    assert got(private_event("  ")).unreadable == "text"


def test_a_quoted_message_gives_its_words_and_its_id():
    message = message_of("event_c2c_quote")
    assert (message.text, message.quoted, message.reply_to) == ("这是什么", "被引用的文本", "REFIDX_abc")


@pytest.mark.parametrize("words", ["what is it?", " "])
def test_what_is_attached_to_a_quoted_message_comes_with_the_question(words):
    beside = {"content_type": "image/png", "url": "//qq.example/b.png", "filename": "b.png"}
    voice = {"content_type": "voice", "url": "https://qq.example/v", "asr_refer_text": "said"}
    own = {"content_type": "image/png", "url": "https://qq.example/a.png", "filename": "a.png"}
    element = {"content": "", "msg_idx": "REFIDX_1", "attachments": [beside, voice, own, 7]}
    found = got(private_event(words, message_type=103, msg_elements=[element], attachments=[own]))
    assert [a.key.rpartition("/")[2] for a in found.attachments] == ["a.png", "b.png", "v"]
    assert found.text == (words.strip() or "said")
    assert found.unreadable is None


def test_a_command_that_quotes_something_stays_a_command():
    quote = {"message_type": 103, "msg_elements": [{"content": "x", "msg_idx": "REFIDX_1"}]}
    message = got(private_event("/new", **quote))
    assert (message.text, message.reply_to) == ("/new", "REFIDX_1")


def test_a_reply_in_a_guild_names_the_message():
    message = got(channel_event("hi", message_reference={"message_id": "08ff"}))
    assert (message.reply_to, message.text) == ("08ff", "hi")


@pytest.mark.parametrize("ext", ["eyJ0ZXh0IjoiL+WRsueJmSJ9", "eyJ0ZXh0Ijoi5ZGy54mZIn0="])
def test_a_face_is_read_by_its_name(ext):
    assert got(private_event(f'<faceType=1,faceId="13",ext="{ext}">')).text == "[呲牙]"


@pytest.mark.parametrize("ext", ["", "!", "AAAA", "W10=", "eyJ0ZXh0IjogN30="])
def test_a_face_without_a_readable_name_is_read_by_its_number(ext):
    expected = FACE.replace("eyJ0ZXh0Ijoi5ZGy54mZIn0=", ext) if ext == "!" else "[13]"
    assert got(private_event(f'<faceType=1,faceId="13",ext="{ext}">')).text == expected


def test_a_message_of_another_bot_says_so():
    event = full_group_event("hi", mention_bot=True)
    event["d"]["author"]["bot"] = True
    assert got(event).sender_is_bot


def test_a_nul_never_gets_through():
    message = got(full_group_event("a\0b", mention_bot=True, name="n\0m"))
    assert "\0" not in message.text + message.sender_name


# ------------------------------------------------------------------------------------------------ identities


def test_nobody_is_joined_across_chats():
    private = private_event("a", union_openid="UNION")
    one, two = group_event("a"), group_event("a", member="CCCC", group="OTHER")
    for event in (private, one, two):
        event["d"]["author"]["union_openid"] = "UNION"
    people = {got(event).person for event in (private, one, two)}
    assert people == {f"qq:{USER_OPENID}", f"qq:{MEMBER_OPENID}", "qq:CCCC"}


@pytest.mark.parametrize("field", ["id", "author", "group_openid"])
def test_a_message_that_nobody_could_be_answered_for_is_an_event(field):
    event = group_event("hi")
    del event["d"][field]
    event["d"].pop("group_id", None)
    assert got(event).kind == "event"


# ---------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize("name", ["FRIEND_ADD", "FRIEND_DEL", "C2C_MSG_REJECT", "C2C_MSG_RECEIVE"])
def test_a_friends_event_is_kept_with_its_person(name):
    message = got(
        make_event({"openid": USER_OPENID, "timestamp": 1767225600}, event_type=name, event_id="e1")
    )
    assert (message.kind, message.event_type, message.event_key) == ("event", name, "ev:e1")
    assert (message.sender_id, message.chat_type) == (USER_OPENID, ChatType.PRIVATE)
    assert message.sent_at_ms == 1767225600000


@pytest.mark.parametrize(
    "name", ["GROUP_ADD_ROBOT", "GROUP_DEL_ROBOT", "GROUP_MSG_REJECT", "GROUP_MSG_RECEIVE"]
)
def test_a_groups_event_is_kept_with_its_group_and_person(name):
    data = {"group_openid": GROUP_OPENID, "op_member_openid": "M", "timestamp": 1767225600}
    message = got(make_event(data, event_type=name))
    assert (message.kind, message.chat_type, message.chat_id) == ("event", ChatType.GROUP, GROUP_OPENID)
    assert message.sender_id == "M"


def test_a_pressed_button_is_an_event_that_says_what_it_says():
    message = message_of("event_interaction")
    assert (message.kind, message.sender_id, message.chat_id) == ("event", "E4F4", "E4F4")
    assert message.extra == {
        "event_id": "INTERACTION_CREATE:abcd0013",
        "interaction_id": "30540ff7-9d8f-4737-83f1-e116ce6afa8b",
        "button_id": "1",
        "button_data": "approve:42",
    }
    assert got(button_event("x", event_id="e")).event_key == "ev:e"


@pytest.mark.parametrize(
    ("place", "chat_type"), [(0, "channel"), (1, "group"), (2, "private"), ([], "private")]
)
def test_a_button_knows_where_it_was_pressed(place, chat_type):
    event = button_event("x")
    event["d"]["chat_type"] = place
    assert got(event).chat_type == chat_type


def test_a_recalled_guild_message_is_named():
    event = make_event({"message": {"id": "08ff"}, "guild_id": "1"}, event_type="PUBLIC_MESSAGE_DELETE")
    message = got(event)
    assert (message.kind, message.message_id, message.chat_type) == ("event", "08ff", ChatType.CHANNEL)


def test_an_event_without_an_id_is_known_by_its_bytes():
    event = {"op": 0, "t": "NOVELTY", "d": {"x": 1}}
    assert got(event).event_key == got(event).event_key
    assert got(event).event_key != got({**event, "d": {"x": 2}}).event_key


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ("2026-01-01T08:00:00+08:00", 1767225600000),
        ("2026-01-01T00:00:00Z", 1767225600000),
        (1767225600, 1767225600000),
        ("1767225600", 1767225600000),
        (1767225600123, 1767225600123),
        ("2026-01-01T08:00:00", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("soon", None),
        (True, None),
        (-5, None),
        (10**18, None),
        ("9" * 30, None),
    ],
)
def test_an_instant_is_read_where_it_says_its_zone(timestamp, expected):
    assert got(private_event("x", timestamp=timestamp)).sent_at_ms == expected


# -------------------------------------------------------------------------------------------------- settings


def test_an_account_names_what_it_needs():
    assert QQSettings(type="qq").missing() == ["app_id", "app_secret"]
    assert QQSettings(type="qq", app_id="1", app_secret=["a", "b"]).missing() == []


def test_the_platform_is_found_by_its_name():
    assert platform_types()["qq"] is QQ
