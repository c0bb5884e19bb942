"""The bot tried out in a terminal, without an account anywhere: fake platforms, a server, and you in their chats."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from feishu_bot.app import App
from feishu_bot.config import BotSettings
from feishu_bot.platforms.base import platform_types
from feishu_bot.testing.chats import Chats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.testing.chats import Chat

ANSWER_S: Final = 30.0  # how long the last answers are waited for
_LOOK_S: Final = 0.02  # between two looks for what the bot has said
_ORDER: Final = ":"  # begins what is for the demonstration and not for the bot

_WORDS: Final = {
    "hello": {
        "en": "You are in {count} chat(s); what you type is said to the bot in the one that is marked.",
        "zh": "你在 {count} 个聊天里；你输入的话会在带标记的聊天里对机器人说。",
    },
    "orders": {
        "en": ":2 goes to another chat, :2 hello says it there, :all hello says it in all, :q or Ctrl-D ends. "
        "/help asks the bot what it can do.",
        "zh": ":2 切换聊天，:2 你好 在那里说，:all 你好 在所有聊天里说，:q 或 Ctrl-D 结束。/帮助 问机器人能做什么。",
    },
    "web": {"en": "The chat page: {url}", "zh": "网页聊天：{url}"},
    "you": {"en": "you", "zh": "你"},
    "bot": {"en": "bot", "zh": "机器人"},
    "unknown": {"en": "there is no chat {name}", "zh": "没有聊天 {name}"},
    "refused": {"en": "the server does not take it: {reason}", "zh": "服务器不接受：{reason}"},
    "silent": {"en": "no answer in {seconds:.0f} s", "zh": "{seconds:.0f} 秒内没有回答"},
    "bye": {"en": "The demonstration ends; nothing of it is kept.", "zh": "演示结束，什么都没有保留。"},
}


@dataclass(slots=True)
class _Place:
    """A chat of the demonstration. ``said``: messages of yours; ``shown``: how many of the bot's were printed."""

    number: int
    chat: Chat
    said: int = 0
    shown: int = 0


class Demo:
    """One demonstration.

    ``platforms`` are the fakes to start, ``model`` a configuration whose model answers; None: it echoes.
    """

    def __init__(
        self,
        platforms: Sequence[str],
        *,
        language: str,
        model: BotSettings | None = None,
        lines: TextIO | None = None,
        out: TextIO | None = None,
    ) -> None:
        self._platforms = platforms
        self._language = language
        self._model = model
        self._in = sys.stdin if lines is None else lines
        self._out = sys.stdout if out is None else out
        self._places: list[_Place] = []
        self._current = 0

    async def run(self) -> bool:
        """Serve until the lines end, ``:q`` or a signal; return whether everything said was answered.

        What was said is waited for when the lines end, not after a signal.
        """
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        with tempfile.TemporaryDirectory(prefix="feishu-bot-demo-") as folder:
            async with Chats(self._platforms) as chats:
                app = App(self._settings(folder, chats))
                try:
                    await app.start()
                    url = f"http://127.0.0.1:{app.port}/"
                    await chats.connect(url)
                    self._places = [_Place(n, chat) for n, chat in enumerate(chats.all.values(), 1)]
                    self._greet(url)
                    done = await self._talk(stopping)
                finally:
                    await app.stop()
        self._print(self._say("bye"))
        return done

    def _settings(self, folder: str, chats: Chats) -> BotSettings:
        types = platform_types()
        accounts = {"web": {"type": "web", "enabled": True}, **chats.accounts}
        kept = BotSettings() if self._model is None else self._model
        scratch = kept.ai.conversation_persistence.model_copy(
            update={"enabled": True, "db_url": f"sqlite:///{folder}/demo.db"}
        )
        return BotSettings.model_validate(
            {
                "ai": kept.ai.model_copy(update={"conversation_persistence": scratch}),
                "network": kept.network,
                "server": {"port": 0, "min_free_mb": 0},
                "chat": {"language": self._language},
                "budgets": [],
                "plugins": {"enabled": []},
                "schedule": {"cleanup": {"enabled": False}, "backup": {"enabled": False}},
                "platforms": {
                    name: types[own["type"]].settings_type(**own) for name, own in accounts.items()
                },
            }
        )

    # --------------------------------------------------------------------------------------------- talking

    async def _talk(self, stopping: asyncio.Event) -> bool:
        lines = self._read()
        showing = asyncio.create_task(self._show_often())
        stop = asyncio.create_task(stopping.wait())
        try:
            while not stopping.is_set():
                line = asyncio.create_task(lines.get())
                await asyncio.wait({line, stop, showing}, return_when=asyncio.FIRST_COMPLETED)
                if showing.done():
                    showing.result()
                if not line.done():
                    line.cancel()
                    break
                words = line.result()
                if words is None or words in {f"{_ORDER}q", f"{_ORDER}quit"}:
                    return await self._answered(stopping)
                await self._take(words)
        finally:
            stop.cancel()
            showing.cancel()
            await asyncio.gather(stop, showing, return_exceptions=True)
        return True

    def _read(self) -> asyncio.Queue[str | None]:
        """Read lines on a thread that nobody waits for at the end: a terminal cannot be told to stop."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def read() -> None:
            with suppress(RuntimeError):  # the demonstration has ended meanwhile
                for line in self._in:
                    loop.call_soon_threadsafe(queue.put_nowait, line.strip())
                loop.call_soon_threadsafe(queue.put_nowait, None)

        threading.Thread(target=read, name="lines", daemon=True).start()
        return queue

    async def _take(self, line: str) -> None:
        """Say a line in a chat, or go to another one."""
        places = [self._places[self._current]]
        if line.startswith(_ORDER):
            name, _, line = line.removeprefix(_ORDER).partition(" ")
            found = self._named(name)
            if not found:
                self._print(self._say("unknown", name=name))
                return
            places = found
            if not line.strip() and len(found) == 1:
                self._current = found[0].number - 1
                self._list()
        if line.strip():
            await asyncio.gather(*(self._tell(place, line.strip()) for place in places))

    def _named(self, name: str) -> list[_Place]:
        if name == "all":
            return self._places
        return [p for p in self._places if name in {str(p.number), p.chat.name}]

    async def _tell(self, place: _Place, text: str) -> None:
        self._print(self._line(place, "you", text))
        try:
            await place.chat.say(text)
        except ConnectionError as error:
            self._print(self._line(place, "bot", self._say("refused", reason=error)))
        else:
            place.said += 1

    async def _show_often(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(_LOOK_S)

    def _show(self) -> None:
        for place in self._places:
            texts = list(place.chat.shown())
            for text in texts[place.shown :]:
                self._print(self._line(place, "bot", text))
            place.shown = len(texts)

    async def _answered(self, stopping: asyncio.Event) -> bool:
        """Wait for the last answers; say which did not come."""
        end = asyncio.get_running_loop().time() + ANSWER_S
        while any(p.shown < p.said for p in self._places) and not stopping.is_set():
            if asyncio.get_running_loop().time() > end:
                break
            await asyncio.sleep(_LOOK_S)
        silent = [p for p in self._places if p.shown < p.said]
        for place in silent:
            self._print(self._line(place, "bot", self._say("silent", seconds=ANSWER_S)))
        return not silent

    # ------------------------------------------------------------------------------------------- printing

    def _greet(self, url: str) -> None:
        self._print(self._say("hello", count=len(self._places)))
        self._list()
        self._print(self._say("orders"))
        self._print(self._say("web", url=url))

    def _list(self) -> None:
        for place in self._places:
            mark = "*" if place.number - 1 == self._current else " "
            self._print(f" {mark} {place.number}  {place.chat.title[self._language]} ({place.chat.name})")

    def _line(self, place: _Place, who: str, text: str) -> str:
        name = f"[{place.chat.title[self._language]}] {self._say(who)}: "
        return name + text.replace("\n", "\n" + " " * len(name))

    def _say(self, key: str, **values: object) -> str:
        return _WORDS[key][self._language].format(**values)

    def _print(self, text: str) -> None:
        # A model's answer may hold what moves the cursor.
        shown = "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        self._out.write(shown + "\n")
        self._out.flush()
