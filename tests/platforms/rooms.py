"""One server with an account on each platform, a model that can be read, and rooms in which people speak."""

from __future__ import annotations

import asyncio
import html
import itertools
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from sqlalchemy import select

from feishu_bot.app import App
from feishu_bot.config import BotSettings
from feishu_bot.platforms.feishu import FeishuSettings
from feishu_bot.platforms.onebot import OneBotSettings
from feishu_bot.platforms.qq import QQSettings
from feishu_bot.store.schema import conversations, inbox, messages, metadata, outbox
from feishu_bot.testing import feishu as fake_feishu
from feishu_bot.testing import onebot as fake_onebot
from feishu_bot.testing import qq as fake_qq
from feishu_bot.testing.model import FakeModelServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from sqlalchemy import Table

PATIENCE_S = 30.0  # after which a test gives up what it waits for; nothing is measured with it
KEY, SECRET, TOKEN = "encrypt-key-of-the-tests", "secret-of-the-tests", "token-of-the-tests"
PEOPLE = ("ann", "bob", "carl")


@dataclass
class House:
    """The running server. Its rooms are by platform; ``say`` speaks in one of them."""

    app: App
    model: FakeModelServer
    rooms: dict[str, Room]
    http: aiohttp.ClientSession

    async def say(self, platform: str, text: str, **more: Any) -> str:
        """Say something to everybody in a chat, by default mentioning the bot; return the message's id."""
        room = self.rooms[platform]
        message_id = room.next_id()
        await self.post(platform, room.event(text, message_id, **more))
        return message_id

    async def post(self, platform: str, event: Any) -> None:
        headers, body = self.rooms[platform].prove(event)
        url = f"http://127.0.0.1:{self.app.port}/webhook/{platform}"
        async with self.http.post(url, data=body, headers=headers) as answer:
            assert answer.status // 100 == 2, await answer.text()

    async def rows(self, table: Table) -> list[Any]:
        statement = select(table).order_by(*table.primary_key)
        return await self.app.store.read(lambda tx: list(tx.connection.execute(statement)))

    async def settled(self) -> None:
        """Wait until every message has ended and every part is out."""

        async def open_ones() -> int:
            waiting = [r for r in await self.rows(inbox) if r.state == "open"]
            return len(waiting) + sum(r.state in {"pending", "attempting"} for r in await self.rows(outbox))

        await until(open_ones, "the end of all work", wanted=0)

    async def ask(self, platform: str, text: str, **more: Any) -> str:
        """Say something and wait for the end of it; return the message's id."""
        message_id = await self.say(platform, text, **more)
        await self.settled()
        return message_id

    def asked(self) -> list[list[str]]:
        """Return what the model was told, for each call: the contents without the system prompt."""
        return [
            [m["content"] for m in r.body["messages"] if m["role"] != "system"] for r in self.model.requests
        ]

    async def sent_ids(self) -> list[str]:
        """Return the platform's ids of all that the bot has said, in order."""
        return [r.sent_id for r in await self.rows(outbox)]

    async def ends(self) -> list[tuple[str, str | None]]:
        return [(r.state, r.reason) for r in await self.rows(inbox)]

    async def said(self) -> list[str]:
        """Return the texts of all stored messages."""
        return [r.content for r in await self.rows(messages)]

    async def senders(self) -> list[str]:
        """Return who has said the stored questions."""
        return [r.sender_id for r in await self.rows(messages) if r.role == "user"]

    async def rows_of_all(self) -> list[Any]:
        """Return what every table holds."""
        return [row for table in metadata.sorted_tables for row in await self.rows(table)]

    async def conversations(self) -> list[Any]:
        return await self.rows(conversations)


async def until(condition: Callable[[], Any], what: str, *, wanted: Any = True) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found == wanted or (wanted is True and found):
            return
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


# --------------------------------------------------------------------------------------------------- rooms


@dataclass
class Room:
    """A platform's chats. ``CHATS`` and ``WHO`` name what the platform calls by ids of its own."""

    fake: Any
    numbers: Any = field(default_factory=lambda: itertools.count(int(time.time()) % 10**6 * 1000))

    def next_id(self) -> str:
        return f"m{next(self.numbers)}"

    def event(self, text: str, message_id: str, **more: Any) -> dict[str, Any]:
        raise NotImplementedError

    def recall(self, message_id: str, *, chat: str = "team", who: str = "ann") -> dict[str, Any]:
        raise NotImplementedError

    def prove(self, event: Any) -> tuple[Mapping[str, str], bytes]:
        raise NotImplementedError

    def texts(self) -> list[str]:
        return [m.text for m in self.fake.visible]


class FeishuRoom(Room):
    def event(
        self,
        text: str,
        message_id: str,
        *,
        who: str = "ann",
        chat: str | None = "team",
        at: bool = True,
        everyone: bool = False,
        bot: bool = False,
        reply_to: str | None = None,
        thread: str | None = None,
    ) -> dict[str, Any]:
        self.fake.know_message(message_id, f"oc_{chat or who}")
        event = fake_feishu.text_event(
            "@_all " + text if everyone else text,
            chat_type="p2p" if chat is None else "group",
            chat_id=f"oc_{chat or who}",
            open_id=f"ou_{who}",
            sender_type="bot" if bot else "user",
            mention_bot=at and chat is not None,
            parent_id=reply_to,
            thread_id=thread,
            message_id=message_id,
        )
        if thread and reply_to:
            event["event"]["message"]["root_id"] = "om_root"
        return event

    def recall(self, message_id: str, *, chat: str = "team", who: str = "ann") -> dict[str, Any]:
        gone = {"message_id": message_id, "chat_id": f"oc_{chat}", "recall_type": "message_owner"}
        return fake_feishu.make_event(gone, event_type="im.message.recalled_v1")

    def prove(self, event: Any) -> tuple[Mapping[str, str], bytes]:
        return fake_feishu.sign_and_encrypt(event, encrypt_key=KEY)


class QQRoom(Room):
    """A guild: of QQ's places the one in which replies and recalls name messages by their ids."""

    def texts(self) -> list[str]:
        return [html.unescape(text) for text in super().texts()]

    def event(
        self,
        text: str,
        message_id: str,
        *,
        who: str = "ann",
        chat: str | None = "team",
        at: bool = True,
        everyone: bool = False,
        bot: bool = False,
        reply_to: str | None = None,
        thread: str | None = None,
    ) -> dict[str, Any]:
        user = str(PEOPLE.index(who) + 100)
        more: dict[str, Any] = {"member": {"nick": who.title()}}
        if reply_to:
            more["message_reference"] = {"message_id": reply_to}
        if chat is None:
            return fake_qq.channel_event(
                text, direct=True, user=user, guild=f"g{user}", message_id=message_id, **more
            )
        event = fake_qq.channel_event(text, user=user, channel=f"c-{chat}", message_id=message_id, **more)
        event["d"]["author"]["bot"] = bot
        if not at:
            event["t"], event["d"]["mentions"] = "MESSAGE_CREATE", []
            event["d"]["content"] = f"@everyone {text}" if everyone else text
        return event

    def recall(self, message_id: str, *, chat: str = "team", who: str = "ann") -> dict[str, Any]:
        gone = {"id": message_id, "channel_id": f"c-{chat}", "guild_id": "g", "author": {"id": "100"}}
        return fake_qq.make_event(
            {"message": gone, "op_user": {"id": "100"}}, event_type="PUBLIC_MESSAGE_DELETE"
        )

    def prove(self, event: Any) -> tuple[Mapping[str, str], bytes]:
        return fake_qq.signed_event(event, secret=SECRET)


class OneBotRoom(Room):
    def next_id(self) -> str:
        return str(next(self.numbers))

    def event(
        self,
        text: str,
        message_id: str,
        *,
        who: str = "ann",
        chat: str | None = "team",
        at: bool = True,
        everyone: bool = False,
        bot: bool = False,
        reply_to: str | None = None,
        thread: str | None = None,
    ) -> dict[str, Any]:
        segments: list[dict[str, Any]] = [{"type": "text", "data": {"text": text}}]
        if everyone:
            segments.insert(0, {"type": "at", "data": {"qq": "all"}})
        if reply_to:
            segments.insert(0, {"type": "reply", "data": {"id": reply_to}})
        return fake_onebot.message_event(
            segments,
            message_id=int(message_id),
            group_id=None if chat is None else self._group(chat),
            user_id=fake_onebot.SELF_ID if bot else PEOPLE.index(who) + 20000,
            nickname=who.title(),
            at=at and chat is not None,
        )

    def recall(self, message_id: str, *, chat: str = "team", who: str = "ann") -> dict[str, Any]:
        user = PEOPLE.index(who) + 20000
        return {
            "time": int(time.time()),
            "self_id": fake_onebot.SELF_ID,
            "post_type": "notice",
            "notice_type": "group_recall",
            "group_id": self._group(chat),
            "user_id": user,
            "operator_id": user,
            "message_id": int(message_id),
        }

    def prove(self, event: Any) -> tuple[Mapping[str, str], bytes]:
        body = orjson.dumps(event)
        return fake_onebot.sign(body, SECRET), body

    @staticmethod
    def _group(chat: str) -> int:
        return {"team": 30003, "other": 30004}[chat]


@asynccontextmanager
async def house(
    folder: Any,
    *,
    chat: Mapping[str, Any] | None = None,
    ai: Mapping[str, Any] | None = None,
    **sections: Any,
) -> AsyncIterator[House]:
    """Run a server, its database in ``folder``; ``chat``, ``ai`` and ``sections``: parts of its configuration."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(FakeModelServer(answer="on {}".format))
        rooms: dict[str, Room] = {
            "feishu": FeishuRoom(await stack.enter_async_context(fake_feishu.FakeFeishu())),
            "qq": QQRoom(await stack.enter_async_context(fake_qq.FakeQQ())),
            "onebot": OneBotRoom(await stack.enter_async_context(fake_onebot.FakeOneBot(access_token=TOKEN))),
        }
        http = await stack.enter_async_context(aiohttp.ClientSession())
        asked = {
            "model": "openai:gpt-4o",
            "base_url": model.base_url,
            "api_key": "sk-fake",
            "conversation_persistence": {"db_url": f"sqlite:///{folder}/house.db"},
        }
        settings = BotSettings.model_validate(
            {
                "server": {"port": 0, "min_free_mb": 0},
                "ai": {**asked, **(ai or {})},
                "budgets": [],
                "chat": {"language": "en", **(chat or {})},
                "plugins": {"enabled": []},
                "schedule": {"cleanup": {"enabled": False}, "backup": {"enabled": False}},
                "platforms": accounts(rooms),
                **sections,
            }
        )
        app = App(settings)
        await app.start()
        stack.push_async_callback(app.stop)
        yield House(app, model, rooms, http)


def accounts(rooms: Mapping[str, Room]) -> dict[str, Any]:
    return {
        "feishu": FeishuSettings(
            type="feishu",
            enabled=True,
            app_id="cli_fake",
            app_secret="app-secret",
            encrypt_key=KEY,
            base_url=rooms["feishu"].fake.url,
            bot_open_id=fake_feishu.BOT_OPEN_ID,
        ),
        "qq": QQSettings(
            type="qq",
            enabled=True,
            app_id="1",
            app_secret=SECRET,
            base_url=rooms["qq"].fake.url,
            token_url=rooms["qq"].fake.token_url,
        ),
        "onebot": OneBotSettings(
            type="onebot",
            enabled=True,
            secret=SECRET,
            access_token=TOKEN,
            api_url=rooms["onebot"].fake.url,
        ),
    }
