"""A sign in the chat that an answer is being made, where that takes a while. Nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.errors import DeliveryError, RetryLater, StoreUnavailable
from feishu_bot.model import ChatType, Target
from feishu_bot.store import signs
from feishu_bot.store.signs import Sign

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping

    from feishu_bot.model import InboundMessage
    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.store import Store

log = logging.getLogger(__name__)

AFTER_S: Final = 1.0  # an answer that is quicker needs no sign
_GRACE_S: Final = 2.0  # at the end, for signs that are still to be taken back


class _Text:
    """An answer that is shown while it is written.

    ``noted`` brings on record what it is finished by, ``forgotten`` what nobody will ever see.
    """

    def __init__(
        self,
        after_s: float,
        every_s: float,
        noted: Callable[[str], Awaitable[bool]],
        forgotten: Callable[[str], Awaitable[None]],
    ) -> None:
        self._after_s, self._every_s = after_s, every_s
        self._noted = noted
        self._forgotten = forgotten
        self._text = ""
        self.stream: str | None = None
        self.is_over = False

    def add(self, piece: str) -> None:
        self._text += piece

    async def show(self, platform: Platform, target: Target) -> None:
        """Show it again and again until it is over; what is being shown then is still finished."""
        shown = ""
        await asyncio.sleep(self._after_s)
        while not self.is_over:
            if self._text != shown and self._text.strip():
                shown = self._text
                with suppress(DeliveryError):
                    stream = await platform.show_text(target, shown)
                    if stream is not None and self.stream is None:
                        if not await self._noted(stream):
                            return  # nothing was seen yet
                        if self.is_over:  # the answer may be on its way without it
                            await self._forgotten(stream)
                            return
                        self.stream, shown = stream, ""
                        continue
            await asyncio.sleep(self._every_s)


class Seen:
    """What is shown of one answer. ``tell`` takes it piece by piece, None: nobody wants it before it is whole."""

    def __init__(self, tell: Callable[[str], None] | None, text: _Text | None = None) -> None:
        self.tell = tell
        self._text = text

    @property
    def stream(self) -> str | None:
        """What the answer's first part is to finish, if anything."""
        return None if self._text is None else self._text.stream


class Indicator:
    """Shows that an answer is being made, once it has taken ``after_s`` seconds, and takes that back.

    What a process that died has shown is taken back by ``take_over``.
    """

    def __init__(self, store: Store | None = None, *, after_s: float = AFTER_S) -> None:
        self.after_s = after_s
        self._store = store  # keeps what is shown, so that another process can take it back
        self._tasks: set[asyncio.Task[Any]] = set()
        self._taking_back: set[Sign] = set()

    @contextmanager
    def watch(
        self,
        platform: Platform | None,
        message: InboundMessage,
        on_text: Callable[[str], None] | None = None,
        *,
        live: bool = False,
        inbox_id: int = 0,
    ) -> Iterator[Seen]:
        """Show it while this block lasts. A failure to show it, or to take it back, changes nothing.

        ``on_text`` is told of the answer piece by piece; if it may be seen while it is written (``live``), it is
        shown, where the platform can.
        """
        if platform is None:
            yield Seen(on_text)
            return
        target = Target.of(message)
        every_s = platform.shows_text(target) if live else None
        if every_s is not None:
            sign = partial(Sign, platform.account, target.reply_to or "", inbox_id=inbox_id)
            text = _Text(
                self.after_s,
                every_s,
                lambda stream: self._note(sign(stream)),
                lambda stream: self._forget(sign(stream)),
            )
            showing = self._start(text.show(platform, target))
            try:
                with self._sign(platform, target) if platform.shows_both else nullcontext():
                    yield Seen(_both(on_text, text.add), text)
            except BaseException:  # its question may be gone: then nobody finishes what is shown
                self._start(self._clear(platform, showing))
                raise
            finally:
                text.is_over = True
            return
        with self._sign(platform, target):
            yield Seen(on_text)

    @contextmanager
    def _sign(self, platform: Platform, target: Target) -> Iterator[None]:
        if not platform.shows_typing:
            yield
            return
        shown: list[asyncio.Task[str | None]] = []

        def show() -> None:
            shown.append(self._start(self._show(platform, target)))

        timer = asyncio.get_running_loop().call_later(self.after_s, show)
        try:
            yield
        finally:
            timer.cancel()
            if shown:
                self._start(self._hide(platform, target, shown[0]))

    async def take_over(self, platforms: Mapping[str, Platform]) -> None:
        """Begin to take back what ended processes have shown. Raises StoreUnavailable."""
        if self._store is None or not any(platform.shows_typing for platform in platforms.values()):
            return
        orphans, lost = await self._store.read(signs.left_behind)
        if lost:
            await self._store.run(partial(signs.forget, signs=lost))
        for sign in orphans:
            platform = platforms.get(sign.account)
            if platform is not None and platform.shows_typing and sign not in self._taking_back:
                self._taking_back.add(sign)
                target = Target(ChatType.GROUP, reply_to=sign.message_id)
                self._start(self._take_back(platform, target, sign))

    async def _clear(self, platform: Platform, showing: asyncio.Task[None]) -> None:
        """Take back what an answer that has ended without a word has shown; one that begins again goes on with it."""
        await asyncio.wait([showing])
        with suppress(StoreUnavailable):
            await self.take_over({platform.account: platform})

    async def stop(self) -> None:
        """Take back what is shown, for at most a moment."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def _hide(self, platform: Platform, target: Target, showing: asyncio.Task[str | None]) -> None:
        await asyncio.wait([showing])
        if showing.cancelled() or showing.exception() is not None:
            return
        shown = showing.result()
        if shown is not None:
            await self._take_back(platform, target, Sign(platform.account, target.reply_to or "", shown))

    async def _show(self, platform: Platform, target: Target) -> str | None:
        shown = await platform.show_typing(target)
        if shown is not None and target.reply_to and self._store is not None:
            await self._note(Sign(platform.account, target.reply_to, shown))
        return shown

    async def _note(self, sign: Sign) -> bool:
        """Keep a sign on record; a reaction that is not is taken back at the end, if this process sees that."""
        if self._store is None:
            return True
        try:
            await self._store.run(partial(signs.note, sign=sign, owner=str(self._store.owner)))
        except StoreUnavailable:
            return False
        return True

    async def _take_back(self, platform: Platform, target: Target, sign: Sign) -> None:
        try:
            if sign.inbox_id is None:
                await platform.hide_typing(target, sign.shown)
            else:
                await platform.drop_text(target, sign.shown)
        except RetryLater:
            if self._store is not None:
                with suppress(StoreUnavailable):
                    await self._store.run(partial(signs.note, sign=sign, owner=""))  # whoever looks next
            raise
        except DeliveryError:
            await self._forget(sign)
            raise
        else:
            await self._forget(sign)
        finally:
            self._taking_back.discard(sign)

    async def _forget(self, sign: Sign) -> None:
        if self._store is not None:
            with suppress(StoreUnavailable):
                await self._store.run(partial(signs.forget, signs=[sign]))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, DeliveryError):
            log.debug("typing not shown", extra={"reason": error.reason})
        elif error is not None:
            log.error("typing failed", exc_info=error)


def _both(first: Callable[[str], None] | None, second: Callable[[str], None]) -> Callable[[str], None]:
    """Return one that tells both."""
    if first is None:
        return second

    def tell(piece: str) -> None:
        first(piece)
        second(piece)

    return tell
