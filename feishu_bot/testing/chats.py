"""Chats on fake platforms, as the people in them have them: something is said, and what the bot answers is seen."""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp

from feishu_bot.testing import feishu, onebot, qq

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

PLATFORMS: Final = ("feishu", "qq", "onebot")

_KEY: Final = "encrypt-key-of-the-fakes"
_SECRET: Final = "secret-of-the-fakes"  # noqa: S105  # known to everybody, on loopback
_TOKEN: Final = "token-of-the-fakes"  # noqa: S105  # as above
_CHAT: Final = "oc_team"


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat. ``say`` says something in it that is meant for the bot; ``shown`` is what the bot has said there.

    ``say`` returns once the server has taken it, and raises ConnectionError where it has not.
    """

    name: str
    title: Mapping[str, str]  # by language
    say: Callable[[str], Awaitable[None]]
    shown: Callable[[], Sequence[str]]


class Chats:
    """A Feishu group, a group and a private chat of QQ, and a OneBot group, as far as their platforms are asked for.

    ``async with Chats() as chats`` starts the fakes; ``accounts`` is what a server's ``platforms`` needs to hold for
    them, and ``connect`` tells where it listens.
    """

    def __init__(self, platforms: Sequence[str] = PLATFORMS) -> None:
        self.feishu = feishu.FakeFeishu(app_secret=_SECRET)
        self.qq = qq.FakeQQ(app_secret=_SECRET)
        self.onebot = onebot.FakeOneBot(access_token=_TOKEN, secret=_SECRET)
        self._platforms = platforms
        self._url = ""
        self._numbers = itertools.count(1)
        self._stack = AsyncExitStack()
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        fakes: dict[str, AbstractAsyncContextManager[object]] = {
            "feishu": self.feishu,
            "qq": self.qq,
            "onebot": self.onebot,
        }
        for platform in self._platforms:
            await self._stack.enter_async_context(fakes[platform])
        self._http = await self._stack.enter_async_context(aiohttp.ClientSession())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def accounts(self) -> dict[str, dict[str, Any]]:
        """The accounts of a server that serves these chats, as its configuration has them."""
        found: dict[str, dict[str, Any]] = {
            "feishu": {
                "app_id": "cli_fake",
                "app_secret": _SECRET,
                "encrypt_key": _KEY,
                "base_url": self.feishu.url,
            },
            "qq": {
                "app_id": "102000001",
                "app_secret": _SECRET,
                "base_url": self.qq.url,
                "token_url": self.qq.token_url,
            },
            "onebot": {"access_token": _TOKEN, "secret": _SECRET, "api_url": None},
        }
        return {name: {"type": name, "enabled": True, **found[name]} for name in self._platforms}

    @property
    def all(self) -> dict[str, Chat]:
        """The chats by name, in the order of their platforms."""
        chats = (
            Chat(
                "feishu",
                {"en": "Feishu group", "zh": "飞书群"},
                self._say_on_feishu,
                lambda: self.feishu.texts(_CHAT),
            ),
            Chat(
                "qq",
                {"en": "QQ group", "zh": "QQ 群"},
                self._say_in_group,
                lambda: self.qq.texts(qq.GROUP_OPENID),
            ),
            Chat(
                "qq-private",
                {"en": "QQ private", "zh": "QQ 私聊"},
                self._say_in_private,
                lambda: self.qq.texts(qq.USER_OPENID),
            ),
            Chat(
                "onebot",
                {"en": "OneBot group", "zh": "OneBot 群"},
                self._say_on_onebot,
                lambda: self.onebot.texts(f"group:{onebot.GROUP_ID}"),
            ),
        )
        return {chat.name: chat for chat in chats if chat.name.partition("-")[0] in self._platforms}

    async def connect(self, url: str) -> None:
        """Speak to the server at ``url`` from now on. Raises aiohttp.ClientError where it lets no client in."""
        self._url = url.rstrip("/")
        if "onebot" in self._platforms:
            await self.onebot.connect(f"{self._url}/ws/onebot")

    async def _say_on_feishu(self, text: str) -> None:
        message_id = f"om_{next(self._numbers)}"
        self.feishu.know_message(message_id, _CHAT)
        event = feishu.text_event(
            text,
            chat_type="group",
            chat_id=_CHAT,
            message_id=message_id,
            mention_bot=True,
        )
        await self._post("feishu", *feishu.sign_and_encrypt(event, encrypt_key=_KEY))

    async def _say_in_group(self, text: str) -> None:
        await self._post("qq", *qq.signed_event(qq.group_event(text), secret=_SECRET))

    async def _say_in_private(self, text: str) -> None:
        await self._post("qq", *qq.signed_event(qq.private_event(text), secret=_SECRET))

    async def _say_on_onebot(self, text: str) -> None:
        if not self.onebot.links:
            raise ConnectionError("no socket is open")
        await self.onebot.say(text, group_id=onebot.GROUP_ID, at=True)

    async def _post(self, account: str, headers: Mapping[str, str], body: bytes) -> None:
        if self._http is None:
            raise AssertionError("the fakes are started before anybody speaks")
        try:
            async with self._http.post(
                f"{self._url}/webhook/{account}", data=body, headers=headers
            ) as response:
                words = await response.read()
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error
        if response.status != 200:  # noqa: PLR2004  # OK
            raise ConnectionError(f"HTTP {response.status}: {words.decode(errors='replace')}")
