"""Those who asked through a door of this process and wait there for the answer."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from feishu_bot.model import End
from feishu_bot.pipeline import read_part
from feishu_bot.store.answers import Answer, count_calls, find_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Committed, Outcome, Work

_LOOK_S = 0.3  # how often the record is asked, in case another process answers


class Waiter:
    """One who waits. ``texts`` brings the answer piece by piece, and None when it is whole."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.texts: asyncio.Queue[str | None] = asyncio.Queue()


class Waiters:
    """Brings answers to those who wait for them, by account and event key."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[tuple[str, str], list[Waiter]] = {}

    @contextmanager
    def expect(self, account: str, event_key: str) -> Iterator[Waiter]:
        """Wait for an event's answer within this block; enter it before the event is recorded."""
        waiter, key = Waiter(), (account, event_key)
        self._waiting.setdefault(key, []).append(waiter)
        try:
            yield waiter
        finally:
            self._waiting[key].remove(waiter)
            if not self._waiting[key]:
                del self._waiting[key]

    async def answer(self, account: str, event_key: str, waiter: Waiter, timeout_s: float) -> Answer | None:
        """Return the answer, from this process or from the record; None after ``timeout_s`` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while (rest := deadline - loop.time()) > 0:
            done, _ = await asyncio.wait([waiter.done], timeout=min(rest, _LOOK_S))
            if done:
                return waiter.done.result()
            found = await self._store.read(lambda tx: find_answer(tx, account, event_key))
            if found is not None:
                return found
        return None

    def on_text(self, work: Work) -> Callable[[str], None] | None:
        """Return where pieces of this message's answer go, if anybody wants them."""
        waiting = self._waiting.get((work.message.account, work.message.event_key))
        if not waiting:
            return None

        def hand_on(text: str) -> None:
            for waiter in waiting:
                waiter.texts.put_nowait(text)

        return hand_on

    def finished(self, work: Work, outcome: Outcome, committed: Committed) -> None:
        """Hand a committed answer to those who wait for it."""
        waiting = self._waiting.get((work.message.account, work.message.event_key))
        if not waiting:
            return
        tokens_in, tokens_out, model = count_calls(outcome.calls)
        state = work.conversation
        answer = Answer(
            end=committed.end,
            reason=outcome.reason or "",
            text=read_part(outcome.parts[0].payload)[1] if outcome.parts else "",
            conversation_id=committed.conversation_id or (state.id if state is not None else None),
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
