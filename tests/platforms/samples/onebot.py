"""What a OneBot 11 implementation posts over HTTP, and its HTTP API."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson

from feishu_bot.model import Attachment, ChatType, Target
from feishu_bot.testing.onebot import GROUP_ID, SELF_ID, USER_ID, Failure, FakeOneBot, message_event, sign
from tests.platforms.contract import Case, Post, Samples

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECRET = "secret-of-the-samples"
TOKEN = "token-of-the-samples"


def samples(now: float) -> Samples:
    def prove(event: Any) -> Post:
        body = event if isinstance(event, bytes) else orjson.dumps(event)
        return Post(sign(body, SECRET), body)

    def said(message: Any, number: int, **fields: Any) -> dict[str, Any]:
        return message_event(message, message_id=number, at_time=int(now), **fields)

    def in_group(message: Any, number: int, **fields: Any) -> dict[str, Any]:
        return said(message, number, group_id=GROUP_ID, card="Ann of the group", **fields)

    words = {"type": "text", "data": {"text": "what is this?"}}
    image = {"type": "image", "data": {"file": "A.png", "url": "https://multimedia.example.test/a"}}
    private = said("你好，世界", 1)
    return Samples(
        settings={"secret": SECRET, "access_token": TOKEN},
        secrets=(SECRET, TOKEN),
        prove=prove,
        proof=("x-signature",),
        refused=(
            Post({**prove(private).headers, "x-self-id": "10009"}, prove(private).body),
            prove({"status": "ok", "retcode": 0, "data": {"message_id": 1}, "echo": "1"}),
        ),
        cases={
            "private": Case(
                private,
                {
                    "text": "你好，世界",
                    "sender_id": str(USER_ID),
                    "sender_name": "Ann",
                    "message_id": "1",
                    "event_key": f"m:p{USER_ID}:{SELF_ID}:1",
                    "sent_at_ms": int(now) * 1000,
                },
            ),
            "group": Case(in_group("nobody is meant", 2), {"chat_id": str(GROUP_ID)}),
            "mention": Case(
                in_group([words], 3, at=True),
                {
                    "text": "what is this?",
                    "chat_type": ChatType.GROUP,
                    "chat_id": str(GROUP_ID),
                    "sender_name": "Ann of the group",
                },
            ),
            "quoted": Case(
                in_group(
                    [
                        {"type": "reply", "data": {"id": "-2055178943"}},
                        {"type": "at", "data": {"qq": str(SELF_ID)}},
                        words,
                    ],
                    4,
                ),
                {"reply_to": "-2055178943", "text": "what is this?", "addressed": True},
            ),
            "rich_text": Case(
                said([{"type": "text", "data": {"text": "价格 [A] & B"}}, image], 5, form="string"),
                {"text": "价格 [A] & B", "attachments": (Attachment("image", image["data"]["url"]),)},
            ),
            "image": Case(
                said([image], 6),
                {"attachments": (Attachment("image", image["data"]["url"]),), "unreadable": "image"},
            ),
        },
        unknown={"time": int(now), "self_id": SELF_ID, "post_type": "novelty", "novelty_type": "made"},
        target=Target(ChatType.GROUP, chat_id=str(GROUP_ID), sender_id=str(USER_ID), reply_to="3"),
        peer=peer,
    )


class Peer:
    def __init__(self, fake: FakeOneBot) -> None:
        self.fake = fake
        self.settings = {"api_url": fake.url}

    def texts(self) -> list[str]:
        return self.fake.texts()

    def later(self, words: str) -> None:
        self.fake.fail(Failure(retcode=1200, words="offline " + words))

    def never(self, words: str) -> None:
        self.fake.fail(Failure(retcode=1200, words=words))


@asynccontextmanager
async def peer() -> AsyncIterator[Peer]:
    async with FakeOneBot(access_token=TOKEN) as fake:
        yield Peer(fake)
