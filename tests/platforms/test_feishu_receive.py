from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from feishu_bot.errors import BadPayload, BadSignature, BadToken, Refused
from feishu_bot.model import Attachment, ChatType, InboundMessage
from feishu_bot.platforms.base import PlatformContext, Received, WebhookRequest, platform_types
from feishu_bot.platforms.feishu import Feishu, FeishuSettings
from feishu_bot.platforms.feishu_seal import decrypted
from feishu_bot.testing.feishu import (
    challenge_event,
    make_event,
    mention,
    message_event,
    sign,
    sign_and_encrypt,
    text_event,
)

VECTORS = orjson.loads(Path(__file__).with_name("vectors").joinpath("feishu.json").read_bytes())
NOW = 1767225600.0
KEY = "encrypt-key-of-the-tests"
TOKEN = "verification-token-of-the-tests"
OWN = "ou_own"
VECTOR_BOT = "ou_e6e14f667cfe239d7b129b521dce0569"


def feishu(
    *, encrypt_key: Any = KEY, token: Any = None, bot: str | None = OWN, require_at: bool = True, **keys: Any
) -> Feishu:
    chosen = FeishuSettings(
        type="feishu",
        enabled=True,
        app_id="cli_x",
        app_secret="s",
        encrypt_key=encrypt_key,
        verification_token=token,
        bot_open_id=bot,
        **keys,
    )
    return Feishu("feishu", chosen, PlatformContext(require_at_in_groups=require_at))


def post(headers: dict[str, str], body: bytes, *, now: float = NOW) -> WebhookRequest:
    return WebhookRequest("POST", CIMultiDict(headers), {}, body, now)


def signed(event: Any, *, key: str = KEY, timestamp: int | str = int(NOW)) -> WebhookRequest:
    return post(*sign_and_encrypt(event, encrypt_key=key, timestamp=timestamp))


def got(platform: Feishu, event: Any) -> InboundMessage:
    (message,) = platform.receive(signed(event)).messages
    return message


def vector(name: str) -> dict[str, Any]:
    return next(case for case in VECTORS["event_cases"] if case["name"] == name)


def received_vector(case: dict[str, Any], **keys: Any) -> Received:
    config, request = case["config"], case["request"]
    platform = feishu(
        encrypt_key=config["encrypt_key"], token=config["verification_token"], bot=VECTOR_BOT, **keys
    )
    return platform.receive(post(request["headers"], request["body"].encode()))


def message_of(name: str) -> InboundMessage:
    (message,) = received_vector(vector(name)).messages
    return message


# ------------------------------------------------------------------------------------------- authenticity


@pytest.mark.parametrize("case", VECTORS["event_cases"], ids=lambda case: case["name"])
def test_every_recorded_request_ends_in_the_status_that_is_right_for_it(case):
    expected = case["expect"]
    age = 3600 if "now" in expected else None
    try:
        received, status = received_vector(case, max_event_age_s=age), 200
    except Refused as refused:
        received, status = None, refused.status
    allowed = [int(s) for s in str(expected["status"]).split(" or ")]
    assert status in allowed
    if received is None:
        return
    if "json" in expected:
        assert orjson.loads(received.body) == expected["json"]
        assert received.messages == ()
        return
    (message,) = received.messages
    assert message.event_type == expected.get("event_type", message.event_type)
    assert message.event_key.endswith(expected.get("dedupe_key", ""))


def test_every_flipped_byte_of_a_signed_body_is_refused():
    headers, body = sign_and_encrypt(text_event("hello"), encrypt_key=KEY, timestamp=int(NOW))
    platform = feishu()
    assert platform.receive(post(headers, body)).messages
    for position in range(len(body)):
        for bit in (0x01, 0x80):
            changed = bytearray(body)
            changed[position] ^= bit
            with pytest.raises(BadSignature):
                platform.receive(post(headers, bytes(changed)))


def test_every_flipped_character_of_the_signed_headers_is_refused():
    headers, body = sign_and_encrypt(text_event("hello"), encrypt_key=KEY, timestamp=int(NOW))
    platform = feishu()
    for name in ("X-Lark-Request-Timestamp", "X-Lark-Request-Nonce", "X-Lark-Signature"):
        for position, character in enumerate(headers[name]):
            changed = headers[name][:position] + chr(ord(character) ^ 1) + headers[name][position + 1 :]
            with pytest.raises(BadSignature):
                platform.receive(post({**headers, name: changed}, body))


@pytest.mark.parametrize("value", ["", "é", "\udcff\ud800", "0" * 40, "0" * 64, "x" * 10_000, "\0"])
@pytest.mark.parametrize("name", ["X-Lark-Request-Timestamp", "X-Lark-Request-Nonce", "X-Lark-Signature"])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_malformed_headers_are_refused_and_never_an_accident(name, value, token):
    headers, body = sign_and_encrypt(text_event("hello"), encrypt_key=KEY, timestamp=int(NOW))
    with pytest.raises(BadSignature):
        feishu(token=token).receive(post({**headers, name: value}, body))


@pytest.mark.parametrize("key", ["old", "new"])
def test_old_and_new_key_and_token_are_accepted_while_they_rotate(key):
    platform = feishu(encrypt_key=["new", "old"], token=["new-token", "old-token"])
    assert platform.receive(signed(text_event("hi", token=f"{key}-token"), key=key)).messages
    with pytest.raises(BadToken):
        platform.receive(signed(text_event("hi", token="third"), key=key))
    with pytest.raises(BadSignature):
        platform.receive(signed(text_event("hi", token="new-token"), key="third"))


def test_the_unsigned_challenge_is_answered_when_it_decrypts_and_its_token_is_right():
    _, body = sign_and_encrypt(challenge_event(token=TOKEN, challenge='a"b\\c'), encrypt_key=KEY)
    received = feishu(token=TOKEN).receive(post({}, body))
    assert orjson.loads(received.body) == {"challenge": 'a"b\\c'}
    assert received.messages == ()


def test_the_unsigned_challenge_with_a_wrong_token_is_403():
    _, body = sign_and_encrypt(challenge_event(token="other"), encrypt_key=KEY)
    with pytest.raises(BadToken):
        feishu(token=TOKEN).receive(post({}, body))


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps(challenge_event(token=TOKEN)),
        sign_and_encrypt(challenge_event(token=TOKEN), encrypt_key="another key")[1],
        sign_and_encrypt(text_event("hi", token=TOKEN), encrypt_key=KEY)[1],
        sign_and_encrypt({**text_event("hi", token=TOKEN), "type": "url_verification"}, encrypt_key=KEY)[1],
        sign_and_encrypt(b"[1]", encrypt_key=KEY)[1],
        sign_and_encrypt(b"{nonsense", encrypt_key=KEY)[1],
        b'{"encrypt": "AAAA"}',
        b'{"encrypt": 5}',
        b"{",
        b"",
        b"[]",
    ],
    ids=[
        "a clear challenge",
        "another key",
        "an event",
        "an event that calls itself a challenge",
        "a list inside",
        "no JSON inside",
        "too short to decrypt",
        "a number",
        "half an object",
        "nothing",
        "a list",
    ],
)
def test_whatever_else_comes_unsigned_gets_one_and_the_same_refusal(body):
    with pytest.raises(BadSignature, match="not signed"):
        feishu(token=TOKEN).receive(post({}, body))


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"null", b'{"encrypt": 5}', b'{"encrypt": "*"}', b'{"encrypt": ""}', b'{"a": 1}', b""],
)
def test_a_signed_body_that_cannot_be_decrypted_is_400(body):
    with pytest.raises(BadPayload):
        feishu().receive(post(sign(body, encrypt_key=KEY), body))


def test_a_signed_plain_body_is_refused_while_a_key_is_configured():
    body = orjson.dumps(text_event("hi"))
    with pytest.raises(BadPayload, match="not encrypted"):
        feishu().receive(post(sign(body, encrypt_key=KEY), body))


@pytest.mark.parametrize("plain", [b"", b"[]", b"7", b"{nonsense", b"\xff\xfe", b'{"a":' * 2000])
def test_a_decrypted_body_that_is_no_json_object_is_400(plain):
    with pytest.raises(BadPayload):
        feishu().receive(signed(plain))


@pytest.mark.parametrize("padding", [b"\x00", b"\x11" * 17, b"\x02\x03\x03", b"\x01\x02", b"\xff"])
def test_a_signed_body_whose_padding_is_wrong_is_400(padding):
    plain = orjson.dumps(text_event("hi"))
    plain += b" " * (-(len(plain) + len(padding)) % 16) + padding
    encryptor = Cipher(AES(hashlib.sha256(KEY.encode()).digest()), CBC(bytes(16))).encryptor()
    body = orjson.dumps({"encrypt": base64.b64encode(bytes(16) + encryptor.update(plain)).decode()})
    with pytest.raises(BadPayload, match="cannot be decrypted"):
        feishu().receive(post(sign(body, encrypt_key=KEY), body))


@pytest.mark.parametrize("case", VECTORS["decrypt"], ids=lambda case: case["plaintext"][:12])
def test_the_documented_ciphertexts_decrypt_to_their_plain_text(case):
    (_, cipher), *_ = feishu(encrypt_key=case["encrypt_key"])._ciphers
    assert decrypted({"encrypt": case["encrypt"]}, cipher).decode() == case["plaintext"]


def test_without_an_encrypt_key_the_token_alone_proves_an_event():
    platform = feishu(encrypt_key=None, token=TOKEN)
    assert platform.receive(post({}, orjson.dumps(text_event("hi", token=TOKEN)))).messages
    for wrong in ("other", "", None, 5, ["x"], {"a": 1}):
        event = text_event("hi")
        event["header"]["token"] = wrong
        with pytest.raises(BadToken):
            platform.receive(post({}, orjson.dumps(event)))


def test_an_encrypted_event_without_a_key_to_read_it_is_refused():
    headers, body = sign_and_encrypt(text_event("hi", token=TOKEN), encrypt_key=KEY)
    with pytest.raises(BadToken):
        feishu(encrypt_key=None, token=TOKEN).receive(post(headers, body))
    with pytest.raises(BadPayload):
        feishu(encrypt_key=None, insecure=True).receive(post(headers, body))


def test_without_any_secret_everything_is_refused_unless_the_account_is_insecure():
    body = orjson.dumps(text_event("hi"))
    with pytest.raises(BadSignature):
        feishu(encrypt_key=None).receive(post({}, body))
    assert feishu(encrypt_key=None, insecure=True).receive(post({}, body)).messages


def test_an_insecure_account_that_has_secrets_still_checks_them():
    body = orjson.dumps(text_event("hi", token="other"))
    with pytest.raises(BadToken):
        feishu(encrypt_key=None, token=TOKEN, insecure=True).receive(post({}, body))
    with pytest.raises(BadSignature):
        feishu(insecure=True).receive(post({}, body))


@pytest.mark.parametrize("offset", [-3601, 3601, -90_000, 10**12])
def test_a_timestamp_older_or_later_than_the_limit_is_401(offset):
    event = signed(text_event("hi"), timestamp=int(NOW) + offset)
    with pytest.raises(BadSignature):
        feishu(max_event_age_s=3600).receive(event)
    assert feishu().receive(event).messages


@pytest.mark.parametrize(
    "timestamp",
    [
        int(NOW) - 3599,
        f"{NOW + 3599}",
        "2026-01-01 08:00:00.052290112 +0800 CST m=+3612.100000001",
        "2026-01-01T00:30:00Z",
        "Monday, 09-Nov-20 23:33:53 CST",
        "2026-13-41 99:00:00 +0800 CST",
        "0000-01-01 00:00:00 +0000 UTC",
        "0001-01-01 00:00:00 +0800 UTC",
        "",
        "nan",
        "soon",
        "١٧٦٧٢٢٥٦٠٠",
    ],
)
def test_a_timestamp_is_not_refused_for_being_no_number(timestamp):
    event = signed(text_event("hi"), timestamp=timestamp)
    assert feishu(max_event_age_s=3600).receive(event).messages


@pytest.mark.parametrize(
    "timestamp",
    ["2025-12-31 08:00:00.05 +0800 CST m=+3612.1", "2026-01-02T00:00:00Z", "9" * 400, "-1767225600", "0"],
)
def test_a_written_time_that_can_be_read_is_held_to_the_limit(timestamp):
    with pytest.raises(BadSignature):
        feishu(max_event_age_s=3600).receive(signed(text_event("hi"), timestamp=timestamp))


# ---------------------------------------------------------------------------------------------- legacy cards


def legacy(name: str) -> tuple[dict[str, str], bytes, str]:
    case = next(case for case in VECTORS["legacy_card_cases"] if case["name"] == name)
    return case["headers"], case["body"].encode(), case["verification_token"]


def card_signature(body: bytes, token: str) -> dict[str, str]:
    return {
        "X-Lark-Request-Timestamp": "1",
        "X-Lark-Request-Nonce": "2",
        "X-Lark-Signature": hashlib.sha1(b"12" + token.encode() + body).hexdigest(),
    }


@pytest.mark.parametrize("key", [KEY, None])
def test_a_legacy_card_callback_is_recorded_as_an_event_and_answered_with_nothing(key):
    headers, body, token = legacy("legacy_card_ok")
    received = feishu(encrypt_key=key, token=[token, "next"]).receive(post(headers, body))
    (event,) = received.messages
    assert received.body == b"{}"
    assert (event.kind, event.event_type) == ("event", "card.action.trigger_v1")
    assert (event.message_id, event.chat_id) == ("om_legacy01", "oc_x")
    assert event.sender_id == "ou_84aad35d084aa403a838cf73ee18467a"
    assert event.event_key.startswith("card:")


@pytest.mark.parametrize("key", [KEY, None])
def test_a_tampered_or_unsigned_legacy_card_is_401(key):
    headers, body, token = legacy("legacy_card_tampered")
    platform = feishu(encrypt_key=key, token=token)
    for sent in (
        headers,
        {},
        {**headers, "X-Lark-Signature": "0" * 40},
        {**headers, "X-Lark-Signature": "é"},
    ):
        with pytest.raises(BadSignature):
            platform.receive(post(sent, body))


def test_a_legacy_card_without_a_verification_token_cannot_be_proven():
    headers, body, _ = legacy("legacy_card_ok")
    with pytest.raises(BadSignature):
        feishu(token=None).receive(post(headers, body))
    with pytest.raises(BadSignature):
        feishu(encrypt_key=None, token=None).receive(post(headers, body))


@pytest.mark.parametrize(
    "extra",
    [{"encrypt": "x"}, {"schema": "2.0"}, {"header": {}}, {"event": {}}, {"type": "url_verification"}],
)
@pytest.mark.parametrize("card", [True, False])
def test_the_scheme_of_legacy_cards_never_proves_anything_else(extra, card):
    base = {"open_message_id": "om_1", "action": {}} if card else {}
    body = orjson.dumps({**base, **extra, "challenge": "c"})
    with pytest.raises(BadSignature):
        feishu(token=TOKEN).receive(post(card_signature(body, TOKEN), body))


def test_an_encrypted_event_signed_by_the_scheme_of_legacy_cards_is_401():
    _, body = sign_and_encrypt(text_event("hi", token=TOKEN), encrypt_key=KEY)
    with pytest.raises(BadSignature):
        feishu(token=TOKEN).receive(post(card_signature(body, TOKEN), body))


# ------------------------------------------------------------------------------------------------- messages


def test_a_private_text_is_addressed_and_carries_every_id():
    message = message_of("event_encrypted_p2p_text")
    assert message == InboundMessage(
        account="feishu",
        event_key="om:om_0001p2ptext",
        event_type="im.message.receive_v1",
        chat_type=ChatType.PRIVATE,
        chat_id="oc_p2p00000000000000000000000000001",
        sender_id="ou_84aad35d084aa403a838cf73ee18467a",
        text="你好，今天天气怎么样？",
        addressed=True,
        message_id="om_0001p2ptext",
        sent_at_ms=1767225599800,
    )


def test_a_group_message_is_for_the_bot_that_it_mentions_and_loses_that_mention():
    message = message_of("event_encrypted_group_text_at_bot")
    assert message.addressed is True
    assert message.chat_type is ChatType.GROUP
    assert message.text == "帮我总结一下 [文档](https://example.com/a?b=1)"
    assert [m.id for m in message.mentions] == [VECTOR_BOT]


def test_a_post_becomes_text_with_its_links_code_and_images():
    message = message_of("event_encrypted_group_post_at_bot")
    assert message.text == "周报\n看看这个 链接 (https://example.com)\n```python\nprint(1)\n```"
    assert message.attachments == (Attachment("image", "img_v3_0001"),)
    assert message.unreadable is None


def test_a_post_under_a_locale_reads_like_a_flat_one():
    flat = {"title": "T", "content": [[{"tag": "text", "text": "a"}, {"tag": "hr"}], [{"tag": "emotion"}]]}
    texts = {
        got(feishu(), message_event(content, message_type="post")).text
        for content in (flat, {"zh_cn": flat}, {"fr_fr": flat}, {"post": {"en_us": flat}})
    }
    assert texts == {"T\na---\n[]"}


def test_code_that_holds_a_fence_is_fenced_by_a_longer_one():
    content = {"content": [[{"tag": "code_block", "language": "MARKDOWN", "text": "```\nx\n```"}]]}
    assert (
        got(feishu(), message_event(content, message_type="post")).text == "````markdown\n```\nx\n```\n````"
    )


def test_a_link_that_says_only_its_address_appears_once():
    content = {
        "content": [[{"tag": "a", "text": "https://a", "href": "https://a"}, {"tag": "a", "href": "u"}]]
    }
    assert got(feishu(), message_event(content, message_type="post")).text == "https://au"


def test_a_mention_inside_a_post_that_stands_by_id_is_understood():
    content = {
        "content": [[{"tag": "at", "user_id": OWN, "user_name": "bot"}, {"tag": "text", "text": " hi"}]]
    }
    message = got(feishu(), message_event(content, message_type="post", chat_type="group"))
    assert (message.addressed, message.text) == (True, "hi")


def test_a_post_that_holds_only_an_image_cannot_be_read():
    content = {"content": [[{"tag": "img", "image_key": "img_1"}]]}
    message = got(feishu(), message_event(content, message_type="post"))
    assert (message.text, message.unreadable) == ("", "image")


@pytest.mark.parametrize(
    ("name", "attachment"),
    [
        (
            "event_encrypted_p2p_image",
            Attachment("image", "img_v3_02ao_9fdce3f7-5ba1-4f86-941f-2e5e7f6fd4eg"),
        ),
        ("event_encrypted_p2p_file", Attachment("file", "file_v3_0001_75235e0c", "报告.pdf")),
        ("event_encrypted_p2p_audio", Attachment("audio", "file_v3_0002_75235e0c")),
        ("event_encrypted_p2p_media_video", Attachment("video", "file_v3_0003", "a.mp4")),
        ("event_encrypted_merge_forward", Attachment("other")),
    ],
)
def test_what_is_no_text_is_an_attachment_that_the_bot_says_it_cannot_read(name, attachment):
    message = message_of(name)
    assert (message.kind, message.text) == ("message", "")
    assert message.attachments == (attachment,)
    assert message.unreadable == attachment.kind


@pytest.mark.parametrize(
    ("message_type", "kind"),
    [("sticker", "sticker"), ("interactive", "card"), ("location", "location"), ("share_user", "contact"),
     ("share_chat", "contact"), ("folder", "file"), ("something_new", "other"), ("", "other")],
)  # fmt: skip
def test_each_type_of_message_has_its_kind(message_type, kind):
    message = got(feishu(), message_event({"x": 1}, message_type=message_type))
    assert (message.unreadable, message.attachments[0].kind) == (kind, kind)


@pytest.mark.parametrize(
    "message_type",
    [
        "system",
        "hongbao",
        "vote",
        "todo",
        "video_chat",
        "calendar",
        "share_calendar_event",
        "general_calendar",
    ],
)
def test_types_that_nobody_expects_an_answer_to_are_events(message_type):
    message = got(feishu(), message_event({"text": "x"}, message_type=message_type))
    assert (message.kind, message.text, message.attachments, message.unreadable) == ("event", "", (), None)


def test_a_reply_and_a_topic_keep_their_ids():
    reply = message_of("event_encrypted_group_reply")
    assert (reply.reply_to, reply.platform_thread_id) == ("om_parent01", None)
    topic = message_of("event_encrypted_group_thread_reply")
    assert (topic.reply_to, topic.platform_thread_id) == ("om_root0001", "omt_16f3c7e1268f1749")


def test_a_topic_group_is_a_group():
    event = text_event("hi", chat_type="topic_group")  # type: ignore[arg-type]
    assert got(feishu(), event).chat_type is ChatType.GROUP


def test_a_message_of_another_bot_is_marked():
    assert message_of("event_encrypted_sender_is_bot").sender_is_bot
    assert not message_of("event_encrypted_p2p_text").sender_is_bot


def test_somebody_of_another_company_is_an_outsider():
    assert got(feishu(), text_event("hi", sender_tenant_key="other")).outsider
    assert not got(feishu(), text_event("hi")).outsider


# ------------------------------------------------------------------------------------------------- mentions


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("@_user_1 你好", "你好"),
        ("你好 @_user_1", "你好"),
        ("你好 @_user_1 再见", "你好 再见"),
        ("你好@_user_1再见", "你好再见"),
        ("第一行\n@_user_1 第二行", "第一行\n第二行"),
        ("第一行 @_user_1\n第二行", "第一行\n第二行"),
        ("@_user_1 @_user_1  /help", "/help"),
        ("@_user_1\u00a0/help", "/help"),
        ("@_user_2 @_user_1 你们看看", "@Bob 你们看看"),
        ("@_user_1 @_user_2 你们看看", "@Bob 你们看看"),
        ("@_user_10 和 @_user_1 还有 @_user_2", "@Ten 和 还有 @Bob"),
        ("@_all @_user_1 开会", "@_all 开会"),
    ],
)
def test_own_mentions_leave_the_text_and_others_become_names(text, seen):
    event = message_event(
        {"text": text},
        chat_type="group",
        mentions=[
            mention(OWN, key="@_user_1", name="bot", bot=True),
            mention("ou_bob", key="@_user_2", name="Bob"),
            mention("ou_ten", key="@_user_10", name="Ten"),
        ],
    )
    message = got(feishu(), event)
    assert (message.addressed, message.text) == (True, seen)


def test_a_name_that_looks_like_a_placeholder_stays_a_name():
    mentions = [mention("ou_a", key="@_user_1", name="@_user_2"), mention(OWN, key="@_user_2", name="bot")]
    event = message_event({"text": "@_user_1 hi @_user_2"}, chat_type="group", mentions=mentions)
    assert got(feishu(), event).text == "@@_user_2 hi"


def test_text_in_a_private_chat_keeps_its_blanks():
    assert got(feishu(), text_event("  indented\n    code ")).text == "  indented\n    code "


@pytest.mark.parametrize("text", ["@_user_1", " @_user_1 ", "@_user_1\n"])
def test_a_message_of_only_the_bots_mention_is_a_bare_mention(text):
    event = message_event({"text": text}, chat_type="group", mentions=[mention(OWN, bot=True)])
    message = got(feishu(), event)
    assert (message.addressed, message.text, message.unreadable) == (True, "", "mention")


@pytest.mark.parametrize(
    "event",
    [
        text_event("secret words", chat_type="group"),
        text_event("@_all secret words", chat_type="group"),
        text_event("@_user_1 secret words", chat_type="group", mentions=[mention("ou_bob", name="Bob")]),
        text_event("@_all secret words", chat_type="group", mentions=[mention("", key="@_all")]),
        message_event({"file_key": "f", "file_name": "secret words"}, message_type="file", chat_type="group"),
    ],
)
def test_a_group_message_for_somebody_else_keeps_no_words(event):
    message = got(feishu(), event)
    assert message.addressed is False
    assert message.kind == "message"
    assert "secret" not in message.to_json()
    assert "Bob" not in message.to_json()


def test_a_group_message_for_somebody_else_keeps_its_words_where_no_mention_is_required():
    event = text_event("@_user_1 look", chat_type="group", mentions=[mention("ou_bob", name="Bob")])
    message = got(feishu(require_at=False), event)
    assert (message.addressed, message.text) == (False, "@Bob look")


def test_a_bot_that_does_not_know_its_id_yet_judges_mentions_later():
    platform = feishu(bot=None)
    waiting = got(platform, text_event("hi", chat_type="group", mention_bot=True, bot_open_id=OWN))
    assert waiting.addressed is None
    assert platform.judge(waiting) is None
    stored = InboundMessage.from_json(waiting.to_json())
    platform._own_id = OWN
    judged = platform.judge(stored)
    assert judged == got(
        feishu(),
        text_event(
            "hi",
            chat_type="group",
            mention_bot=True,
            bot_open_id=OWN,
            message_id=waiting.message_id,
            create_time_ms=waiting.sent_at_ms,
        ),
    )
    assert (judged.addressed, judged.text) == (True, "hi")


def test_a_judged_message_for_somebody_else_loses_its_words():
    waiting = got(
        feishu(bot=None), text_event("@_user_1 secret", chat_type="group", mentions=[mention("ou_b")])
    )
    judged = feishu().judge(waiting)
    assert judged is not None
    assert (judged.addressed, judged.text, judged.mentions) == (False, "", ())


def test_a_group_message_without_mentions_needs_no_own_id():
    message = got(feishu(bot=None), text_event("hi", chat_type="group"))
    assert message.addressed is False
    assert feishu(bot=None).judge(message) is message


# --------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize(
    "name",
    [
        "event_encrypted_recalled",
        "event_encrypted_bot_deleted",
        "event_encrypted_user_entered_p2p",
        "event_encrypted_v1_p2p_chat_create",
        "event_encrypted_card_action_button",
    ],
)
def test_what_nobody_said_is_an_event_with_ids_and_no_text(name):
    received = received_vector(vector(name))
    (event,) = received.messages
    assert received.body == b"{}"
    assert (event.kind, event.text) == ("event", "")
    assert event.chat_id.startswith("oc_")


def test_a_card_click_knows_its_message_and_who_clicked():
    event = message_of("event_encrypted_card_action_button")
    assert (event.message_id, event.sender_id) == ("om_card0001", "ou_84aad35d084aa403a838cf73ee18467a")


def test_an_unknown_event_is_taken_and_does_nothing():
    event = got(feishu(), make_event({"x": 1}, event_type="moon.landed_v3", event_id="e1"))
    assert (event.kind, event.event_type, event.event_key) == ("event", "moon.landed_v3", "ev:e1")


def test_an_event_without_an_id_is_known_by_its_content():
    keys = {got(feishu(), {"event": {"n": n}}).event_key for n in (1, 1, 2)}
    assert len(keys) == 2
    assert all(key.startswith("body:sha256-") for key in keys)


def test_a_message_without_an_id_is_known_by_its_event():
    event = text_event("hi", event_id="evt_1")
    del event["event"]["message"]["message_id"]
    message = got(feishu(), event)
    assert (message.event_key, message.message_id) == ("ev:evt_1", None)


def test_keys_stay_short_whatever_the_ids_are():
    long = got(feishu(), text_event("hi", message_id="x" * 5000)).event_key
    other = got(feishu(), text_event("hi", message_id="x" * 4999 + "y")).event_key
    assert len(long) < 250
    assert long != other


def test_nul_characters_do_not_come_through():
    message = got(feishu(), text_event("a\0b", message_id="om_\0x", open_id="ou_\0y"))
    assert "\0" not in "".join([message.text, message.event_key, message.sender_id, message.message_id or ""])


def test_a_message_that_nobody_sent_is_an_event():
    event = text_event("hi")
    event["event"]["sender"] = None
    assert got(feishu(), event).kind == "event"


@pytest.mark.parametrize(
    ("value", "milliseconds"),
    [("1767225599800", 1767225599800), ("1767225600123456", 1767225600123), (1767225599800, 1767225599800),
     ("", None), (None, None), ("²", None), ("9" * 5000, None), (True, None), (1.5, None), ("-5", None)],
)  # fmt: skip
def test_the_time_of_sending_is_read_in_milliseconds_or_not_at_all(value, milliseconds):
    event = text_event("hi")
    event["event"]["message"]["create_time"] = value
    assert got(feishu(), event).sent_at_ms == milliseconds


# ------------------------------------------------------------------------------------------------------ fuzz

NAMES = st.sampled_from(
    [
        "schema",
        "header",
        "event",
        "event_id",
        "event_type",
        "token",
        "message",
        "sender",
        "sender_id",
        "open_id",
        "message_id",
        "chat_id",
        "type",
        "chat_type",
        "message_type",
        "content",
        "mentions",
        "key",
        "id",
        "name",
        "text",
        "tag",
        "title",
        "zh_cn",
        "uuid",
        "create_time",
        "tenant_key",
        "action",
        "open_message_id",
        "operator",
        "context",
        "encrypt",
        "challenge",
        "parent_id",
        "thread_id",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(
        ["im.message.receive_v1", "p2p", "group", "text", "post", "url_verification", "2.0", "at"]
    )
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(), inner, max_size=6)
)


def is_refused_or_received(platform: Feishu, event: Any) -> None:
    try:
        received = platform.receive(signed(event))
    except Refused:
        return
    for message in received.messages:
        assert InboundMessage.from_json(message.to_json()) == message
        assert len(message.event_key) < 250
        platform.judge(message)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_no_authentic_json_does_anything_but_pass_or_be_refused(event):
    is_refused_or_received(feishu(), event)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=8), st.dictionaries(NAMES, JSON, max_size=5), st.booleans())
def test_no_authentic_message_does_anything_but_pass_or_be_refused(message, sender, known):
    event = make_event({"message": message, "sender": sender}, event_type="im.message.receive_v1")
    is_refused_or_received(feishu(bot=OWN if known else None), event)


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from(["text", "post", "image", "interactive", "merge_forward"]), JSON)
def test_no_content_does_anything_but_pass(content, message_type, mentions):
    event = message_event(
        orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS).decode(), message_type=message_type
    )
    event["event"]["message"]["mentions"] = mentions
    is_refused_or_received(feishu(), event)


# -------------------------------------------------------------------------------------------------- settings


def test_the_platform_is_found_by_its_name():
    assert platform_types()["feishu"] is Feishu


def test_an_account_says_which_keys_it_lacks():
    assert FeishuSettings(type="feishu").missing() == ["app_id", "app_secret", "encrypt_key"]
    ready = {"type": "feishu", "app_id": "a", "app_secret": "s"}
    assert FeishuSettings(**ready, encrypt_key="k").missing() == []
    assert FeishuSettings(**ready, verification_token="t").missing() == []
    assert FeishuSettings(**ready, insecure=True).missing() == []


def test_a_token_alone_and_an_insecure_account_are_warned_about():
    assert FeishuSettings(type="feishu", encrypt_key="k", verification_token="t").warnings() == []
    assert "encrypt_key" in FeishuSettings(type="feishu", verification_token="t").warnings()[0]
    assert "insecure" in FeishuSettings(type="feishu", insecure=True).warnings()[0]


def test_secrets_do_not_show_in_what_is_printed():
    shown = FeishuSettings(
        type="feishu", app_secret="hush1", encrypt_key=["hush2"], verification_token="hush3"
    )
    assert "hush" not in repr(shown) + shown.model_dump_json()
