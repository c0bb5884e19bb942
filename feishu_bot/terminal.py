"""``bot.py chat``: somebody at a terminal talks to the bot, with or without a server beside."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Final, TextIO
from uuid import uuid4

from feishu_bot.app import App
from feishu_bot.errors import ConfigError, StoreUnavailable
from feishu_bot.model import End, InboundMessage
from feishu_bot.texts import say

if TYPE_CHECKING:
    from feishu_bot.config import BotSettings
    from feishu_bot.waiters import Waiter

PLATFORM: Final = "terminal"
_PATIENCE_S: Final = 3600.0  # Ctrl-C ends the wait sooner; the answer goes on into the record


class TerminalChat:
    """A conversation of ``user`` at this terminal, through the pipeline and the record that all platforms share.

    Raises ConfigError where no account of type ``terminal`` is enabled.
    """

    def __init__(self, settings: BotSettings, user: str) -> None:
        accounts = [n for n, own in settings.platforms.items() if own.enabled and own.type == PLATFORM]
        if not accounts:
            raise ConfigError(
                ["platforms: the terminal is switched off; set platforms.terminal.enabled: true"]
            )
        self._account = accounts[0]
        self._user = user
        self._language = settings.chat.language
        self._prefix = settings.chat.command_prefix
        self._app = App(settings)

    async def run(self, lines: TextIO, out: TextIO) -> None:
        """Answer line after line until there is none. Raises StoreUnavailable or SchemaMismatch."""
        asks = lines.isatty()
        try:
            await self._app.start_alone()
            if asks:
                who = f"{self._account}:private:{self._user}"
                self._write(out, say(self._language, "terminal_hello", who=who, prefix=self._prefix) + "\n")
            while True:
                if asks:
                    self._write(out, "> ")
                line = await asyncio.to_thread(lines.readline)
                if not line:
                    break
                if line.strip():
                    await self._ask(line.strip(), out)
            if asks:
                self._write(out, "\n")
        finally:
            await self._app.stop()

    async def _ask(self, text: str, out: TextIO) -> None:
        message = InboundMessage(
            account=self._account,
            event_key=str(uuid4()),
            sender_id=self._user,
            sender_name=self._user,
            text=text,
        )
        with self._app.waiters.expect(self._account, message.event_key) as waiter:
            try:
                await self._app.intake.record([message])
            except StoreUnavailable as error:
                self._write(sys.stderr, f"error: {error}\n")  # nothing is kept: say it again
                return
            pause = self._app.operation.controls.pause_of(message)
            if pause is not None:
                self._write(out, (pause.say or say(self._language, "terminal_paused")) + "\n")
                return
            await self._answer(message, waiter, out)

    async def _answer(self, message: InboundMessage, waiter: Waiter, out: TextIO) -> None:
        shown: list[str] = []
        pieces = asyncio.create_task(self._pieces(waiter, shown, out))
        try:
            answer = await self._app.waiters.answer(self._account, message.event_key, waiter, _PATIENCE_S)
            waiter.texts.put_nowait(None)
            await pieces
        finally:
            pieces.cancel()
        text = "" if answer is None else answer.text or answer.reason
        if "".join(shown) == text:
            self._write(out, "\n")
        elif answer is not None:  # what a plugin or the record made of it, or nothing came in pieces
            self._write(out, ("\n" if shown else "") + text + "\n")
        if answer is not None and answer.end is End.DEAD:
            self._write(sys.stderr, f"error: {answer.reason}\n")

    async def _pieces(self, waiter: Waiter, shown: list[str], out: TextIO) -> None:
        while (piece := await waiter.texts.get()) is not None:
            _, text = piece
            shown.append(text)
            self._write(out, text)

    @staticmethod
    def _write(out: TextIO, text: str) -> None:
        out.write(text)
        out.flush()
