"""Circuit breakers: by themselves, and in an agent that has somebody else to ask."""

from __future__ import annotations

import pytest

from feishu_bot.ai.agent import MAX_WAIT_S, Agent
from feishu_bot.ai.circuit import FAILURES_IN_A_ROW, PAUSE_S, Circuits
from feishu_bot.ai.models import make_model
from feishu_bot.config import AISettings
from feishu_bot.errors import ModelError
from feishu_bot.testing.model import Behaviour, FakeModelServer

MAIN, SPARE = "fake:main", "fake:spare"
DOWN = ModelError("unavailable", "HTTP 503")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def circuits(clock):
    return Circuits(clock)


def fail(circuits, times=FAILURES_IN_A_ROW, error=DOWN):
    for _ in range(times):
        circuits.failed(MAIN, error)


def test_a_circuit_opens_after_failures_in_a_row_and_tells_so(circuits):
    fail(circuits, FAILURES_IN_A_ROW - 1)
    assert circuits.permits(MAIN)
    assert (circuits.states(), circuits.problems()) == ({MAIN: False}, [])
    fail(circuits, 1)
    assert not circuits.permits(MAIN)
    assert circuits.permits(SPARE)
    assert circuits.states() == {MAIN: True}
    assert circuits.problems() == [f"model {MAIN}: 5 failures in a row, the last: unavailable"]


def test_an_answer_in_between_begins_the_count_anew(circuits):
    fail(circuits, FAILURES_IN_A_ROW - 1)
    circuits.succeeded(MAIN)
    fail(circuits, FAILURES_IN_A_ROW - 1)
    assert circuits.permits(MAIN)


def test_after_the_pause_one_call_tries_and_its_end_decides(circuits, clock):
    fail(circuits)
    clock.now += PAUSE_S
    assert [circuits.permits(MAIN), circuits.permits(MAIN)] == [True, False]
    circuits.failed(MAIN, DOWN)
    clock.now += PAUSE_S - 1
    assert not circuits.permits(MAIN)
    clock.now += 1
    assert circuits.permits(MAIN)
    circuits.succeeded(MAIN)
    assert [circuits.permits(MAIN), circuits.permits(MAIN)] == [True, True]
    assert circuits.states() == {}


@pytest.mark.parametrize("kind", ["refused", "filtered", "too_long"])
def test_what_speaks_against_the_question_does_not_count(circuits, kind):
    fail(circuits, error=ModelError(kind, "no"))
    assert circuits.permits(MAIN)


# ---------------------------------------------------------------------------------------------- the agent


@pytest.fixture
async def server():
    async with FakeModelServer() as running:
        yield running


@pytest.fixture
async def agent(server, circuits):
    made = []

    async def no_time(seconds):
        made[0].waits.append(seconds)

    def build(**more):
        settings = AISettings(
            **{"model": MAIN, "base_url": server.base_url, "fallback_models": (SPARE,)} | more
        )
        new = Agent(
            settings, model=make_model(settings), circuits=circuits, sleep=no_time, jitter=lambda: 0.5
        )
        new.waits = []
        made.append(new)
        return new

    yield build
    for each in made:
        await each.close()


async def _grant(**_):
    pass


async def ask(agent):
    return await agent.answer(agent.plan((), "hi", 1), reserve=_grant)


async def test_while_a_circuit_is_open_the_fallback_is_asked_at_once(agent, server, clock):
    made = agent(retries=4)
    server.script(Behaviour("status", status=503), times=5)
    assert (await ask(made)).model == SPARE
    server.requests.clear()
    assert (await ask(made)).model == SPARE
    assert [r.model for r in server.requests] == ["spare"]
    clock.now += PAUSE_S
    assert (await ask(made)).model == MAIN
    assert (await ask(made)).model == MAIN


async def test_without_anybody_else_the_model_is_asked_whatever_its_circuit_says(agent, server, circuits):
    made = agent(fallback_models=())
    fail(circuits)
    assert (await ask(made)).text == "echo: hi"
    assert circuits.states() == {}


async def test_a_fallback_whose_circuit_is_open_is_passed_over(agent, server, circuits):
    made = agent(fallback_models=(SPARE, "fake:last"), retries=0)
    for _ in range(FAILURES_IN_A_ROW):
        circuits.failed(SPARE, DOWN)
    server.script(Behaviour("status", status=503))
    answer = await ask(made)
    assert [call.model for call in answer.calls] == [MAIN, "fake:last"]


async def test_tries_again_wait_longer_each_time(agent, server):
    made = agent(fallback_models=(), retries=3)
    server.script(Behaviour("status", status=503), times=4)
    answer = await ask(made)
    assert answer.failure.kind == "unavailable"
    assert made.waits == [0.75, 1.5, 3.0]


async def test_a_model_that_asks_for_too_long_a_wait_is_left_to_its_fallback(agent, server):
    made = agent()
    server.script(Behaviour("status", status=429, retry_after=str(MAX_WAIT_S + 1)))
    assert (await ask(made)).model == SPARE
    assert made.waits == []


async def test_nothing_but_thoughts_is_told_from_a_broken_server(agent, server, circuits):
    made = agent(fallback_models=(), max_output_tokens=12)
    server.script(Behaviour(text="<think>" + "hmm " * 50), times=FAILURES_IN_A_ROW)
    for _ in range(FAILURES_IN_A_ROW):
        answer = await ask(made)
    assert str(answer.failure) == "nonsense: nothing but thoughts within max_output_tokens"
    assert answer.calls[0].outcome == "ok"
    assert circuits.states() == {}
