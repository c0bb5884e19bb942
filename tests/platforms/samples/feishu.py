"""What Feishu posts to an app with an Encrypt Key."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from feishu_bot.model import Attachment, ChatType, Target
from feishu_bot.testing.feishu import (
    BOT_OPEN_ID,
    USER_OPEN_ID,
    FakeFeishu,
    challenge_event,
    make_event,
    mention,
    message_event,
    sign_and_encrypt,
    text_event,
)
from feishu_bot.testing.serving import Failure
from tests.platforms.contract import Case, Post, Samples

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

APP_SECRET, KEY, TOKEN = "app-secret-of-samples", "encrypt-key-of-samples", "token-of-samples"


def samples(now: float) -> Samples:
    def prove(event: Any) -> Post:
        return Post(*sign_and_encrypt(event, encrypt_key=KEY, timestamp=int(now)))

    said: dict[str, Any] = {"token": TOKEN, "create_time_ms": int(now * 1000)}
    post = {
        "title": "周报",
        "content": [
            [{"tag": "at", "user_id": "@_user_1"}, {"tag": "text", "text": " 看看 "}],
            [{"tag": "code_block", "language": "PYTHON", "text": "print(1)\n"}],
        ],
    }
    bot = mention(BOT_OPEN_ID, name="bot", bot=True)
    challenge = challenge_event(token=TOKEN, challenge='a"b')
    return Samples(
        settings={
            "app_id": "cli_samples",
            "app_secret": APP_SECRET,
            "encrypt_key": KEY,
            "verification_token": TOKEN,
            "bot_open_id": BOT_OPEN_ID,
        },
        secrets=(APP_SECRET, KEY, TOKEN),
        prove=prove,
        proof=("X-Lark-Signature", "X-Lark-Request-Timestamp", "X-Lark-Request-Nonce"),
        challenge=(prove(challenge), {"challenge": 'a"b'}),
        refused=(
            Post(*sign_and_encrypt(challenge, encrypt_key="another")),
            prove(text_event("hi", token="another")),
        ),
        cases={
            "private": Case(
                text_event("你好，世界", message_id="om_p", **said),
                {
                    "text": "你好，世界",
                    "sender_id": USER_OPEN_ID,
                    "chat_id": "oc_fake_p2p",
                    "message_id": "om_p",
                    "event_key": "om:om_p",
                    "sent_at_ms": int(now * 1000),
                },
            ),
            "group": Case(text_event("nobody", chat_type="group", **said), {"chat_id": "oc_fake_group"}),
            "mention": Case(
                text_event("what is this?", chat_type="group", mention_bot=True, **said),
                {"text": "what is this?", "chat_type": ChatType.GROUP, "chat_id": "oc_fake_group"},
            ),
            "quoted": Case(text_event("and this?", parent_id="om_before", **said), {"reply_to": "om_before"}),
            "rich_text": Case(
                message_event(post, message_type="post", chat_type="group", mentions=[bot], **said),
                {"text": "周报\n看看 \n```python\nprint(1)\n```", "addressed": True},
            ),
            "image": Case(
                message_event({"image_key": "img_1"}, message_type="image", **said),
                {"attachments": (Attachment("image", "img_1"),), "unreadable": "image"},
            ),
        },
        unknown=make_event({"anything": 1}, event_type="novelty.created_v1", token=TOKEN),
        target=Target(ChatType.GROUP, chat_id="oc_fake_group", sender_id=USER_OPEN_ID, reply_to="om_q"),
        peer=peer,
    )


class Peer:
    def __init__(self, fake: FakeFeishu) -> None:
        self._fake = fake
        self.settings = {"base_url": fake.url}

    def texts(self) -> list[str]:
        return self._fake.texts()

    def later(self, words: str) -> None:
        self._fake.fail(Failure(status=500, code=1, msg=words))

    def never(self, words: str) -> None:
        self._fake.fail(Failure(status=400, code=424242, msg=words))


@asynccontextmanager
async def peer() -> AsyncIterator[Peer]:
    async with FakeFeishu(app_secret=APP_SECRET) as fake:
        yield Peer(fake)
