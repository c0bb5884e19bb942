"""What QQ's official bot platform posts."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from feishu_bot.model import Attachment, ChatType, Target
from feishu_bot.platforms.qq import signing_key
from feishu_bot.testing.qq import (
    GROUP_OPENID,
    MEMBER_OPENID,
    USER_OPENID,
    FakeQQ,
    channel_event,
    full_group_event,
    group_event,
    make_event,
    private_event,
    signed_event,
    validation_event,
)
from feishu_bot.testing.serving import Failure
from tests.platforms.contract import Case, Post, Samples

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECRET = "app-secret-of-the-samples"
FACE = '<faceType=1,faceId="13",ext="eyJ0ZXh0Ijoi5ZGy54mZIn0=">'


def samples(now: float) -> Samples:
    def prove(event: Any) -> Post:
        return Post(*signed_event(event, secret=SECRET, timestamp=int(now)))

    stamp = str(int(now))
    word = "Arq0D5A61EgUu4OxUvOp"
    validation = validation_event(plain_token=word, event_ts=stamp)
    image = {"content_type": "image/png", "filename": "a.png", "url": "https://multimedia.example.test/a"}
    quote = {
        "message_type": 103,
        "message_scene": {"source": "default", "ext": ["ref_msg_idx=REFIDX_a", "msg_idx=REFIDX_b"]},
        "msg_elements": [{"msg_idx": "REFIDX_a", "message_type": 0, "content": "the words"}],
    }
    return Samples(
        settings={"app_id": "102000001", "app_secret": SECRET},
        secrets=(SECRET,),
        prove=prove,
        proof=("X-Signature-Ed25519", "X-Signature-Timestamp"),
        challenge=(
            prove(validation),
            {"plain_token": word, "signature": signing_key(SECRET).sign((stamp + word).encode()).hex()},
        ),
        refused=(
            Post({}, prove(validation).body),
            Post(*signed_event(validation, secret="another", timestamp=int(now))),
        ),
        cases={
            "private": Case(
                private_event("你好，世界", message_id="ROBOT1.0_p", at=now),
                {
                    "text": "你好，世界",
                    "sender_id": USER_OPENID,
                    "message_id": "ROBOT1.0_p",
                    "event_key": "m:ROBOT1.0_p",
                    "reply_before_ms": int(now) * 1000 + 3_600_000,
                },
            ),
            "group": Case(full_group_event("nobody is meant", at=now), {"chat_id": GROUP_OPENID}),
            "mention": Case(
                group_event("what is this?", at=now),
                {
                    "text": "what is this?",
                    "chat_type": ChatType.GROUP,
                    "chat_id": GROUP_OPENID,
                    "sender_id": MEMBER_OPENID,
                    "reply_before_ms": int(now) * 1000 + 300_000,
                },
            ),
            "channel": Case(channel_event("hi", at=now), {"chat_type": ChatType.CHANNEL}),
            "quoted": Case(
                private_event("what is this?", at=now, **quote),
                {"reply_to": "REFIDX_a", "text": "what is this?", "quoted": "the words"},
            ),
            "rich_text": Case(
                full_group_event(f"早 {FACE}", mention_bot=True, at=now),
                {"text": "早 [呲牙]", "addressed": True},
            ),
            "image": Case(
                private_event(" ", at=now, attachments=[image]),
                {"attachments": (Attachment("image", image["url"], "a.png"),), "unreadable": "image"},
            ),
        },
        unknown=make_event({"anything": 1}, event_type="NOVELTY_CREATE"),
        target=Target(ChatType.GROUP, chat_id=GROUP_OPENID, sender_id=MEMBER_OPENID, reply_to="ROBOT1.0_q"),
        peer=peer,
    )


class Peer:
    def __init__(self, fake: FakeQQ) -> None:
        self.fake = fake
        self.settings = {"base_url": fake.url, "token_url": fake.token_url}

    def texts(self) -> list[str]:
        return self.fake.texts()

    def later(self, words: str) -> None:
        self.fake.fail(Failure(status=500, code=1, msg=words))

    def never(self, words: str) -> None:
        self.fake.fail(Failure(status=400, code=424242, msg=words))


@asynccontextmanager
async def peer() -> AsyncIterator[Peer]:
    async with FakeQQ(app_secret=SECRET) as fake:
        yield Peer(fake)
