"""The worker beside a record that fails, hangs or refuses at the wrong moment."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from feishu_bot.errors import StoreError, StoreUnavailable
from feishu_bot.model import End, InboundMessage
from feishu_bot.store.work import Committed, NoWork, Outcome, Planned, Work
from feishu_bot.worker import Worker


class Record:
    """One message in each lane that it is asked for, once."""

    owner = SimpleNamespace(host="here", __str__=lambda _self: "owner")
    shard = 0
    lease_ms = 15_000

    def __init__(self):
        self.again = []
        self.begun = []  # the tokens of each call
        self.answers = []  # what the next calls of begin do: an error, or an event to wait for
        self.refuses = 0
        self.committed = []
        self.ran = []
        self.done = set()

    def now_ms(self):
        return 1_000_000

    async def begin(self, leases, *, again=False):
        self.again.append(again)
        self.begun.append({lease.lane_key: lease.token for lease in leases})
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            await answer.wait()
        return [self._work(lease) for lease in leases]

    def _work(self, lease):
        if lease.lane_key in self.done:
            return NoWork.IDLE
        self.done.add(lease.lane_key)
        message = InboundMessage("web", lease.lane_key, text="hi", sender_id="ann")
        decision = SimpleNamespace(kind="answer", message=message)
        return Work(
            lease=lease,
            inbox_id=len(self.done),
            attempt=1,
            run=1,
            retried=False,
            received_at=0,
            message=message,
            tenant_id="default",
            conversation=None,
            history=(),
            planned=Planned(decision),
            refusal=None,
            more=False,
        )

    async def commit(self, outcome):
        if self.refuses:
            self.refuses -= 1
            raise StoreError("a value is wrong with it")
        self.committed.append(outcome)
        return Committed(outcome.end, None, None, (), None)

    async def run(self, function):
        self.ran.append(function)

    async def read(self, function):
        name = getattr(function, "func", function).__name__
        return ([], []) if name == "ready_lanes" else None


class Answers:
    """The pipeline: answers at once, or when ``go_on`` is set."""

    def __init__(self):
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.asked = []
        self.fails = None

    async def answer(self, work, on_text=None):
        self.asked.append(work.lease.lane_key)
        await self.go_on.wait()
        if self.fails is not None:
            raise self.fails
        return Outcome(work, End.ANSWERED, messages=("words",))

    async def take_over_signs(self):
        """There are none."""

    def unstorable(self, outcome, reason):
        return Outcome(outcome.work, End.DEAD, reason)


async def no_others():
    """There is no other process."""


@asynccontextmanager
async def working():
    record, answers, finished = Record(), Answers(), []
    worker = Worker(
        record,
        answers,
        SimpleNamespace(lanes=[], nudge=lambda _lane: None, take=lambda _part: None, gather=no_others),
        finished=lambda work, outcome, _committed: finished.append((work.lease.lane_key, outcome.end)),
        expired=lambda _ended: None,
        on_text=lambda _work: None,
        answer_within_ms=None,
    )
    await worker.start()
    try:
        yield worker, record, answers, finished
    finally:
        answers.go_on.set()
        await worker.stop(1.0)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


async def test_a_message_is_answered_and_its_end_told():
    async with working() as (worker, record, _, finished):
        worker.nudge("a")
        await until(lambda: finished)
        assert finished == [("a", End.ANSWERED)]
        assert [outcome.end for outcome in record.committed] == [End.ANSWERED]


async def test_lanes_whose_taking_failed_are_taken_again_with_the_same_token():
    async with working() as (worker, record, _, finished):
        record.answers.append(StoreUnavailable("away"))
        worker.nudge("a")
        await until(lambda: finished)
        first, second = record.begun
        assert first == second
        assert record.again == [False, True]


async def test_a_stop_waits_for_lanes_that_are_being_taken_and_answers_them():
    async with working() as (worker, record, _, finished):
        gate = asyncio.Event()
        record.answers.append(gate)
        worker.nudge("a")
        await until(lambda: record.begun)
        stopping = asyncio.create_task(worker.stop(20))
        await asyncio.sleep(0)
        gate.set()
        await stopping
        assert finished == [("a", End.ANSWERED)]


async def test_a_stop_gives_back_what_does_not_finish_in_time():
    async with working() as (worker, record, answers, finished):
        answers.go_on.clear()
        worker.nudge("a")
        await until(lambda: answers.asked)
        await worker.stop(0.01)
        assert finished == []
        assert worker.active == 0
        assert record.ran, "the lane is free again for whoever comes next"


async def test_a_lane_that_cannot_be_begun_holds_up_no_other():
    async with working() as (worker, record, _, finished):
        record.answers += [ValueError("broken"), None, ValueError("broken"), None]
        for lane in ("a", "b", "c"):
            worker.nudge(lane)
        await until(lambda: len(finished) == 2)
        assert [sorted(lanes) for lanes in record.begun[1:]] == [["a"], ["b"], ["c"]]
        assert {lane for lane, _ in finished} == {"a", "c"}
        assert len(record.ran) == 1, "an attempt of the broken one is counted"
        assert worker.problems() == []


@pytest.mark.parametrize("refusals", [1, 2])
async def test_an_answer_that_the_database_refuses_ends_dead_instead_of_being_tried_for_ever(refusals):
    async with working() as (worker, record, _, finished):
        record.refuses = refusals
        worker.nudge("a")
        if refusals == 1:
            await until(lambda: finished)
            assert finished == [("a", End.DEAD)]
        else:  # not even that: the attempt has failed, and the lane is paused
            await until(lambda: record.ran)
            assert finished == []


async def test_an_answer_whose_further_call_cannot_be_reserved_is_put_off_without_a_fault(caplog):
    async with working() as (worker, record, answers, finished):
        answers.fails = StoreUnavailable("away")
        worker.nudge("a")
        await until(lambda: record.ran)
        assert finished == []
        (said,) = [r for r in caplog.records if r.name == "feishu_bot.worker"]
        assert (said.msg, said.step, said.exc_info) == ("store unavailable", "answer", None)


async def test_what_comes_while_its_lane_is_being_begun_is_not_forgotten():
    async with working() as (worker, record, _, finished):
        gate = asyncio.Event()
        record.answers.append(gate)
        worker.nudge("a")
        await until(lambda: record.begun)
        worker.nudge("a")
        gate.set()
        await until(lambda: len(record.begun) == 2)
        assert finished == [("a", End.ANSWERED)]
