"""Those who asked through a door of this process and wait there for the answer."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from feishu_bot.errors import StoreUnavailable
from feishu_bot.live import Live
from feishu_bot.model import End
from feishu_bot.parts import read_part
from feishu_bot.store.answers import Answer, count_calls, find_answer
from feishu_bot.store.work import Change

if TYPE_CHECKING:
    from collections.abc import Iterator

    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Committed, Outcome, Work

_LOOK_S = 0.3  # until the record is asked the first time, in case another process answers
_MAX_LOOK_S = 2.0  # between two questions later on


class Waiter:
    """One who waits. ``texts`` brings the answer piece by piece, and None when it is whole.

    Each piece comes with the number of characters before it; 0: the answer begins, or begins anew. Who comes late gets
    at first all that there is. ``look_now``: the answer may be on record already.
    """

    def __init__(self) -> None:
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.texts: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self.look_now = False


class Waiters:
    """Brings answers to those who wait for them, by account and event key."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[tuple[str, str], list[Waiter]] = {}
        # What is being written; who writes holds it, so it goes with the attempt however that ends.
        self._live: WeakValueDictionary[tuple[str, str], Live] = WeakValueDictionary()

    @contextmanager
    def expect(self, account: str, event_key: str) -> Iterator[Waiter]:
        """Wait for an event's answer within this block; enter it before the event is recorded."""
        waiter, key = Waiter(), (account, event_key)
        self._waiting.setdefault(key, []).append(waiter)
        live = self._live.get(key)
        if live is not None and live.said:
            waiter.texts.put_nowait((0, live.said))
        try:
            yield waiter
        finally:
            self._waiting[key].remove(waiter)
            if not self._waiting[key]:
                del self._waiting[key]

    async def answer(self, account: str, event_key: str, waiter: Waiter, timeout_s: float) -> Answer | None:
        """Return the answer, from this process or from the record; None after ``timeout_s`` seconds.

        While the record cannot be read, the wait goes on: the question is on disk, and will be answered.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause_s = 0.0 if waiter.look_now else _LOOK_S
        while (rest := deadline - loop.time()) > 0:
            done, _ = await asyncio.wait([waiter.done], timeout=min(rest, pause_s))
            if done:
                return waiter.done.result()
            with suppress(StoreUnavailable):
                found = await self._store.read(lambda tx: find_answer(tx, account, event_key))
                if found is not None:
                    return found
            pause_s = min(_MAX_LOOK_S, max(_LOOK_S, pause_s * 2))
        return None

    def on_text(self, work: Work) -> Live | None:
        """Return where pieces of this message's answer go, if anybody may want them: now, or when he comes back."""
        key = (work.message.account, work.message.event_key)
        if work.message.conversation is None and key not in self._waiting:
            return None

        def grown(at: int, text: str) -> None:
            for waiter in self._waiting.get(key, ()):
                waiter.texts.put_nowait((at, text))

        live = self._live[key] = Live(grown, has_listener=lambda: key in self._waiting)
        return live

    def stop(self, event_key: str) -> bool:
        """Have an answer end where it is; False where this process does not write it."""
        found = [live for (_, key), live in list(self._live.items()) if key == event_key]
        for live in found:
            live.stop()
        return bool(found)

    def finished(self, work: Work, outcome: Outcome, committed: Committed) -> None:
        """Hand a committed answer to those who wait for it."""
        waiting = self._waiting.get((work.message.account, work.message.event_key))
        if not waiting:
            return
        tokens_in, tokens_out, model = count_calls(outcome.calls)
        conversation_id = committed.conversation_id
        if outcome.change is Change.ARCHIVE:
            conversation_id = None  # what is said next begins another
        elif conversation_id is None and work.conversation is not None:
            conversation_id = work.conversation.id
        answer = Answer(
            end=committed.end,
            reason=outcome.reason or "",
            text=read_part(outcome.parts[0].payload)[1] if outcome.parts else "",
            conversation_id=conversation_id,
            message_id=committed.message_ids[-1]
            if committed.message_ids and committed.end is End.ANSWERED
            else None,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            model=model,
        )
        for waiter in waiting:
            if not waiter.done.done():
                waiter.done.set_result(answer)
            waiter.texts.put_nowait(None)
