"""Those who wait at a door, beside a record that answers late, or not at all for a while."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from types import SimpleNamespace

from feishu_bot.errors import StoreUnavailable
from feishu_bot.live import Live
from feishu_bot.model import ChatType, End, InboundMessage, Target
from feishu_bot.parts import part_payload
from feishu_bot.store.answers import Answer
from feishu_bot.store.work import Change, Committed, NewPart
from feishu_bot.waiters import Waiters

ANSWER = Answer(End.ANSWERED, "", "on record", 1, 2, 3, 4, "echo")


class Record:
    """Answers what it is told to; ``away`` cannot be read."""

    def __init__(self, answer=None, *, away=0):
        self.answer = answer
        self.away = away
        self.asked = 0

    async def read(self, _function):
        self.asked += 1
        if self.asked <= self.away:
            raise StoreUnavailable("away")
        return self.answer


def ended(text, *, change=None, state=None):
    message = InboundMessage("web", "request:ann:r1", sender_id="ann")
    work = SimpleNamespace(message=message, conversation=state)
    payload = part_payload(Target(ChatType.PRIVATE), text)
    outcome = SimpleNamespace(parts=(NewPart("answer", 0, payload),), calls=(), reason=None, change=change)
    return work, outcome, Committed(End.ANSWERED, None, None, (), None)


async def test_an_answer_of_this_process_comes_without_asking_the_record():
    record = Record()
    waiters = Waiters(record)
    with waiters.expect("web", "request:ann:r1") as waiter:
        waiters.finished(*ended("here"))
        answer = await waiters.answer("web", "request:ann:r1", waiter, 20)
    assert answer.text == "here"
    assert record.asked == 0


async def test_an_answer_of_another_process_is_found_on_record():
    waiters = Waiters(Record(ANSWER))
    with waiters.expect("web", "r") as waiter:
        assert await waiters.answer("web", "r", waiter, 20) == ANSWER


async def test_a_repeat_looks_at_the_record_at_once_and_waits_on_while_it_cannot_be_read():
    record = Record(ANSWER, away=1)
    waiters = Waiters(record)
    with waiters.expect("web", "r") as waiter:
        waiter.look_now = True
        assert await waiters.answer("web", "r", waiter, 20) == ANSWER
    assert record.asked == 2


async def test_who_waits_in_vain_is_told_so():
    waiters = Waiters(Record())
    with waiters.expect("web", "r") as waiter:
        assert await waiters.answer("web", "r", waiter, 0.01) is None


async def test_everybody_who_waits_for_one_answer_gets_it_and_those_who_left_get_nothing():
    waiters = Waiters(Record())
    with waiters.expect("web", "request:ann:r1") as first, waiters.expect("web", "request:ann:r1") as second:
        with waiters.expect("web", "request:ann:r1") as left:
            pass
        work, outcome, committed = ended("here")
        live = waiters.on_text(work)
        live("he")
        live("re")
        waiters.finished(work, outcome, committed)
    for waiter in (first, second):
        assert [waiter.texts.get_nowait() for _ in range(3)] == [(0, "he"), (2, "re"), None]
        assert (await waiter.done).text == "here"
    assert left.texts.empty()
    assert waiters.on_text(work) is None, "nobody waits any more"
    await asyncio.sleep(0)


async def test_who_comes_late_gets_what_there_is_and_then_what_comes():
    waiters = Waiters(Record())
    work, _, _ = ended("here")
    work.message = replace(work.message, conversation="a-public-id")
    live = waiters.on_text(work)
    assert not live.has_listener()
    live("he")
    with waiters.expect("web", "request:ann:r1") as late:
        assert live.has_listener()
        live("re")
        again = waiters.on_text(work)  # another attempt: it begins anew
        again("there")
    assert [late.texts.get_nowait() for _ in range(3)] == [(0, "he"), (2, "re"), (0, "there")]
    assert waiters.stop("request:ann:r1")
    del live, again
    gc.collect()
    assert not waiters.stop("request:ann:r1"), "it went with the attempt"


async def test_a_stopped_answer_is_none_and_its_call_is_cancelled():
    begun, cancelled = asyncio.Event(), asyncio.Event()
    live = Live(lambda _at, _text: begun.set())

    async def asking():
        live("so far")
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    task = asyncio.create_task(live.until_stopped(asking()))
    await begun.wait()
    live.stop()
    assert await task is None
    assert cancelled.is_set()


async def test_after_a_command_that_archived_the_next_question_begins_another_conversation():
    waiters = Waiters(Record())
    state = SimpleNamespace(id=7)
    for change, expected in ((None, 7), (Change.CLEAR, 7), (Change.ARCHIVE, None)):
        with waiters.expect("web", "request:ann:r1") as waiter:
            waiters.finished(*ended("done", change=change, state=state))
        assert (await waiter.done).conversation_id == expected
