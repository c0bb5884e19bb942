"""A sign in the chat that an answer is being made, where that takes a while. Nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.deadlines import Deadlines
from feishu_bot.errors import DeliveryError, RetryLater, StoreUnavailable
from feishu_bot.model import ChatType, Target
from feishu_bot.store import signs
from feishu_bot.store.signs import Sign

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from types import TracebackType

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
        every_s: float,
        noted: Callable[[str], Awaitable[bool]],
        forgotten: Callable[[str], Awaitable[None]],
    ) -> None:
        self._every_s = every_s
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
        self.text = text

    @property
    def stream(self) -> str | None:
        """What the answer's first part is to finish, if anything."""
        return None if self.text is None else self.text.stream


class _Watch:
    """One answer that is being made: nothing is shown, and hardly anything done, unless that takes a while."""

    __slots__ = ("_indicator", "_message", "_platform", "_seen", "_showing", "_typing")

    def __init__(
        self, indicator: Indicator, platform: Platform | None, message: InboundMessage, seen: Seen
    ) -> None:
        self._indicator = indicator
        self._platform = platform
        self._message = message
        self._seen = seen
        self._showing: asyncio.Task[None] | None = None
        self._typing: asyncio.Task[str | None] | None = None

    def __enter__(self) -> Seen:
        if self._platform is not None:
            self._indicator.waiting.add(self)
        return self._seen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        indicator, platform = self._indicator, self._platform
        if platform is None:
            return
        indicator.waiting.remove(self)
        if self._seen.text is not None:
            self._seen.text.is_over = True
        if kind is not None and self._showing is not None:
            # Its question may be gone: then nobody finishes what is shown.
            indicator.start(indicator.clear(platform, self._showing))
        if self._typing is not None:
            indicator.start(indicator.hide(platform, Target.of(self._message), self._typing))

    def expire(self) -> None:
        """Begin to show it: this takes a while."""
        indicator, platform, text = self._indicator, self._platform, self._seen.text
        assert platform is not None  # noqa: S101  # or nobody would wait
        target = Target.of(self._message)
        if text is not None:
            self._showing = indicator.start(text.show(platform, target))
        if platform.shows_typing and (text is None or platform.shows_both):
            self._typing = indicator.start(indicator.show(platform, target))


class Indicator:
    """Shows that an answer is being made, once it has taken ``after_s`` seconds, and takes that back.

    What a process that died has shown is taken back by ``take_over``.
    """

    def __init__(self, store: Store | None = None, *, after_s: float = AFTER_S) -> None:
        self.waiting = Deadlines(after_s)
        self._store = store  # keeps what is shown, so that another process can take it back
        self._tasks: set[asyncio.Task[Any]] = set()
        self._taking_back: set[Sign] = set()

    def watch(
        self,
        platform: Platform | None,
        message: InboundMessage,
        on_text: Callable[[str], None] | None = None,
        *,
        live: bool = False,
        inbox_id: int = 0,
    ) -> _Watch:
        """Show it while this block lasts. A failure to show it, or to take it back, changes nothing.

        ``on_text`` is told of the answer piece by piece; if it may be seen while it is written (``live``), it is
        shown, where the platform can.
        """
        every_s = platform.shows_text(Target.of(message)) if live and platform is not None else None
        if platform is None or every_s is None:
            return _Watch(self, platform, message, Seen(on_text))
        sign = partial(Sign, platform.account, message.message_id or "", inbox_id=inbox_id)
        text = _Text(
            every_s,
            lambda stream: self._note(sign(stream)),
            lambda stream: self._forget(sign(stream)),
        )
        return _Watch(self, platform, message, Seen(_both(on_text, text.add), text))

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
                self.start(self._take_back(platform, target, sign))

    async def clear(self, platform: Platform, showing: asyncio.Task[None]) -> None:
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

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Do this beside everything else; ``stop`` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def hide(self, platform: Platform, target: Target, showing: asyncio.Task[str | None]) -> None:
        """Take back what ``show`` has shown."""
        await asyncio.wait([showing])
        if showing.cancelled() or showing.exception() is not None:
            return
        shown = showing.result()
        if shown is not None:
            await self._take_back(platform, target, Sign(platform.account, target.reply_to or "", shown))

    async def show(self, platform: Platform, target: Target) -> str | None:
        """Show that an answer is being made; return what is to be taken back."""
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
