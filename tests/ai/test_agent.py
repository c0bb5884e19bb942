"""The agent over a real server: what it sends, reserves, retries and books."""

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.agent import MAX_WAIT_S, Agent
from feishu_bot.ai.chat_model import Finished, ReportedUsage, TextDelta
from feishu_bot.ai.models import make_model
from feishu_bot.ai.tokens import count_tokens, prompt_tokens
from feishu_bot.config import AISettings
from feishu_bot.errors import BudgetExceeded, ModelError
from feishu_bot.model import BudgetRefusal, CallUsage
from feishu_bot.testing.model import Behaviour, FakeModelServer

MAIN, SPARE, LAST = "fake:main", "fake:spare", "openai:gpt-4"
SYSTEM = "Be kind."
REFUSAL = BudgetRefusal("daily-user", used=9, reserved=0, limit=10, wanted=99, ends_ms=None)


class Budget:
    """Grants the first ``calls`` further calls and remembers what was asked for."""

    def __init__(self, calls=99):
        self.left = calls
        self.asked = []

    async def __call__(self, *, call, model, tokens, cost):
        self.asked.append((call, model, tokens))
        if not self.left:
            raise BudgetExceeded(REFUSAL)
        self.left -= 1


class Clock:
    """Lets no time pass, and remembers how long it should have been."""

    def __init__(self):
        self.waits = []

    async def sleep(self, seconds):
        self.waits.append(seconds)


class Scripted:
    """A model in process: each call takes the next list of events, an error among them is raised."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)

    async def stream(self, request):
        for event in self.scripts.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event

    async def close(self):
        pass


@pytest.fixture
async def server():
    async with FakeModelServer() as running:
        yield running


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def make(server, clock):
    made = []

    def build(chat_model=None, **more):
        margin = more.pop("budget_margin", 1.15)
        wanted = {
            "model": MAIN,
            "base_url": server.base_url,
            "system_prompt": SYSTEM,
            "max_output_tokens": 50,
        }
        settings = AISettings(**wanted | more)
        agent = Agent(
            settings,
            model=chat_model or make_model(settings),
            budget_margin=margin,
            sleep=clock.sleep,
            jitter=lambda: 0.5,
        )
        made.append(agent)
        return agent

    yield build
    for agent in made:
        await agent.close()


def plan_of(agent, text="hi", rows=(), **more):
    return agent.plan(rows, text, count_tokens(text, "echo"), **more)


def outcomes(answer):
    return [(usage.call, usage.model, usage.outcome) for usage in answer.calls]


def history(turns, words=10):
    text = "word " * words
    return [row for _ in range(turns) for row in (("user", text, words), ("assistant", text, words))]


# ------------------------------------------------------------------------------------------------ planning


def test_a_plan_is_the_system_prompt_the_history_and_the_question(make):
    plan = plan_of(make(), "now", [("user", "then", 1), ("assistant", "so", 1)])
    assert [(m.role, m.content) for m in plan.messages] == [
        ("system", SYSTEM), ("user", "then"), ("assistant", "so"), ("user", "now"),
    ]  # fmt: skip
    assert [m.content for m in plan.history] == ["then", "so"]
    assert plan.prompt_tokens == prompt_tokens([count_tokens(SYSTEM, MAIN), 1, 1, 1])


def test_the_reservation_is_the_prompt_with_its_margin_and_all_the_output(make):
    inexact = plan_of(make(budget_margin=1.5))
    assert inexact.reserve_tokens == math.ceil(inexact.prompt_tokens * 1.5) + 50
    exact = plan_of(make(model="openai:gpt-4o", budget_margin=1.5))
    assert exact.reserve_tokens == exact.prompt_tokens + 50


def test_the_history_is_bounded_by_turns_and_by_tokens(make):
    rows = history(30)
    assert len(plan_of(make(), "q", rows).history) == 40
    narrow = make(conversation_persistence={"max_history_turns": 3})
    assert len(plan_of(narrow, "q", rows).history) == 6
    tight = make(conversation_persistence={"max_history_tokens": 50})
    assert len(plan_of(tight, "q", rows).history) == 4


def test_the_history_leaves_room_for_the_answer_in_the_models_window(make):
    limits = {"max_history_turns": 10_000, "max_history_tokens": 10**6}
    agent = make(model="openai:gpt-4", max_output_tokens=1000, conversation_persistence=limits)
    plan = plan_of(agent, "q", history(2000))
    assert 8_192 - 60 < plan.prompt_tokens + plan.max_output_tokens <= 8_192


def test_rows_that_were_stored_without_a_count_are_counted(make):
    plan = plan_of(make(), "q", [("user", "one two three", 0), ("assistant", "", 0)])
    assert plan.counts[1:3] == (3, 0)


def test_without_a_system_prompt_none_is_sent(make):
    plan = plan_of(make(system_prompt=" "))
    assert [m.role for m in plan.messages] == ["user"]


def test_a_plan_for_another_model_is_reserved_by_that_models_rule(make):
    plan = plan_of(make(), model="openai:gpt-4o")
    assert plan.model == "openai:gpt-4o"
    assert plan.reserve_tokens == plan.prompt_tokens + 50


def test_the_echo_reserves_the_whole_of_a_long_question(make):
    text = "word " * 200
    plan = plan_of(make(model="echo"), text)
    assert plan.reserve_tokens == plan.prompt_tokens + count_tokens(text, "echo")


# ----------------------------------------------------------------------------------------------- answering


async def test_one_good_call_is_the_answer_with_the_providers_usage(make, server):
    budget = Budget()
    agent = make()
    answer = await agent.answer(plan_of(agent, "hello"), reserve=budget)
    assert (answer.text, answer.model, answer.finish) == ("echo: hello", MAIN, "stop")
    assert answer.calls == (CallUsage(0, MAIN, server.prompt_tokens, server.output_tokens),)
    assert answer.failure is answer.refusal is None
    assert budget.asked == []


async def test_the_echo_settles_to_its_own_count(make):
    agent = make(model="echo")
    plan = plan_of(agent, "hello world")
    answer = await agent.answer(plan, reserve=Budget())
    assert answer.text == "hello world"
    assert answer.calls == (CallUsage(0, "echo", plan.prompt_tokens, 2, cost_micro_usd=0),)


async def test_without_reported_usage_our_own_count_is_booked(make, server):
    server.script(Behaviour(usage=False, text="one two"))
    agent = make()
    plan = plan_of(agent)
    answer = await agent.answer(plan, reserve=Budget())
    assert answer.calls == (CallUsage(0, MAIN, plan.prompt_tokens, 2),)


async def test_the_text_is_handed_on_as_it_comes(make, server):
    server.script(Behaviour(text="a b c d", chunks=4, chunk_delay_s=0.01))
    pieces = []
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget(), on_text=pieces.append)
    assert "".join(pieces) == answer.text == "a b c d"


async def test_an_error_that_may_pass_is_tried_once_more_after_its_own_reservation(make, server, clock):
    server.script(Behaviour(kind="status", status=500))
    budget = Budget()
    agent = make()
    plan = plan_of(agent)
    answer = await agent.answer(plan, reserve=budget)
    assert answer.text == "echo: hi"
    assert outcomes(answer) == [(0, MAIN, "failed"), (1, MAIN, "ok")]
    assert budget.asked == [(1, MAIN, plan.reserve_tokens)]
    assert clock.waits == [0.75]


async def test_an_error_that_will_not_pass_is_not_tried_again(make, server, clock):
    server.script(Behaviour(kind="status", status=401))
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget())
    assert (answer.text, answer.failure.kind, server.count) == (None, "refused", 1)
    assert clock.waits == []


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.25), ("3600", MAX_WAIT_S)])
async def test_the_wait_is_what_the_provider_asks_for_within_bounds(make, server, clock, asked, waited):
    server.script(Behaviour(kind="status", status=429, retry_after=asked))
    agent = make()
    await agent.answer(plan_of(agent), reserve=Budget())
    assert clock.waits == [waited]


async def test_after_two_tries_each_fallback_is_asked_once_and_at_once(make, server, clock):
    server.script(Behaviour(kind="status", status=503), times=3)
    budget = Budget()
    agent = make(fallback_models=(SPARE, MAIN, SPARE, LAST))
    answer = await agent.answer(plan_of(agent), reserve=budget)
    assert (answer.text, answer.model) == ("echo: hi", LAST)
    assert outcomes(answer) == [
        (0, MAIN, "failed"), (1, MAIN, "failed"), (2, SPARE, "failed"), (3, LAST, "ok"),
    ]  # fmt: skip
    assert [record.model for record in server.requests] == ["main", "main", "spare", "gpt-4"]
    assert [call for call, _, _ in budget.asked] == [1, 2, 3]
    assert len(clock.waits) == 1


async def test_when_everything_fails_the_last_error_is_the_result(make, server):
    server.default = Behaviour(kind="status", status=500)
    agent = make(fallback_models=(SPARE,))
    answer = await agent.answer(plan_of(agent), reserve=Budget())
    assert answer.text is None
    assert answer.failure.kind == "unavailable"
    assert answer.model == SPARE
    assert [usage.outcome for usage in answer.calls] == ["failed"] * 3


async def test_a_fallback_with_another_encoding_is_reserved_by_its_own_count(make, server):
    server.script(Behaviour(kind="status", status=401))
    budget = Budget()
    agent = make(fallback_models=(LAST,))
    text = "今天天气怎么样？我们去公园散步吧。"
    plan = plan_of(agent, text)
    await agent.answer(plan, reserve=budget)
    expected = prompt_tokens([count_tokens(SYSTEM, LAST), count_tokens(text, LAST)]) + 50
    assert budget.asked == [(1, LAST, expected)]
    assert expected - 50 > plan.prompt_tokens


async def test_a_call_that_no_budget_holds_is_not_made(make, server):
    server.script(Behaviour(kind="status", status=500))
    agent = make(fallback_models=(SPARE,))
    answer = await agent.answer(plan_of(agent), reserve=Budget(calls=0))
    assert server.count == 1
    assert answer.text is None
    assert answer.refusal == REFUSAL
    assert answer.failure.kind == "unavailable"
    assert outcomes(answer) == [(0, MAIN, "failed")]


@pytest.mark.parametrize("kind", ["broken", "drop", "error_event", "not_json", "hang"])
async def test_a_call_with_unknown_outcome_is_booked_whole_and_the_next_reserved_anew(make, server, kind):
    server.script(Behaviour(kind=kind, text="some words that break off"), times=2)
    budget = Budget()
    agent = make(fallback_models=(SPARE,), timeout_s=0.3)
    plan = plan_of(agent)
    answer = await agent.answer(plan, reserve=budget)
    assert answer.text == "echo: hi" or kind == "not_json"
    first = answer.calls[0]
    assert first.outcome == "unknown"
    assert first.input_tokens + first.output_tokens == plan.reserve_tokens
    assert len(budget.asked) == len(answer.calls) - 1


async def test_text_of_a_broken_call_is_not_mixed_with_the_next_ones(make, server):
    server.script(Behaviour(kind="broken", text="first words, then nothing more"))
    shown = []
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget(), on_text=shown.append)
    assert answer.text == "echo: hi"
    assert "echo" not in "".join(shown)


async def test_text_is_handed_on_by_a_second_call_if_the_first_gave_none(make, server):
    server.script(Behaviour(kind="status", status=500))
    shown = []
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget(), on_text=shown.append)
    assert "".join(shown) == answer.text


async def test_a_prompt_that_is_too_long_is_shortened_once(make, server):
    server.script(Behaviour(kind="too_long"))
    budget = Budget()
    agent = make()
    plan = plan_of(agent, "the question", history(8))
    answer = await agent.answer(plan, reserve=budget)
    assert answer.text == "echo: the question"
    sent = server.requests[-1].body["messages"]
    assert [m["role"] for m in sent] == ["system", *["user", "assistant"] * 4, "user"]
    ((_, model, tokens),) = budget.asked
    assert (model, tokens < plan.reserve_tokens) == (MAIN, True)


async def test_a_prompt_that_stays_too_long_goes_to_the_fallback(make, server):
    server.script(Behaviour(kind="too_long"), times=2)
    agent = make(fallback_models=(SPARE,))
    answer = await agent.answer(plan_of(agent, "q", history(8)), reserve=Budget())
    assert outcomes(answer) == [(0, MAIN, "failed"), (1, MAIN, "failed"), (2, SPARE, "ok")]


async def test_a_question_that_alone_is_too_long_is_not_asked_again(make, server):
    server.default = Behaviour(kind="too_long")
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget())
    assert (server.count, answer.failure.kind) == (1, "too_long")


async def test_an_answer_cut_at_the_bound_is_kept(make, server):
    server.script(Behaviour(text="word " * 200))
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget())
    assert answer.finish == "length"
    assert answer.text.startswith("word word")
    assert answer.calls[0].output_tokens == 50


async def test_an_answer_that_the_filter_emptied_is_a_failure_at_its_real_cost(make, server):
    server.script(Behaviour(kind="filtered"))
    agent = make()
    answer = await agent.answer(plan_of(agent), reserve=Budget())
    assert (answer.text, answer.failure.kind) == (None, "filtered")
    assert answer.calls == (CallUsage(0, MAIN, server.prompt_tokens, 0),)


async def test_an_empty_answer_is_a_failure(make):
    agent = make(Scripted([TextDelta(" \n"), Finished("stop")]))
    plan = plan_of(agent)
    answer = await agent.answer(plan, reserve=Budget())
    assert (answer.text, answer.failure.kind) == (None, "nonsense")
    assert answer.calls[0].outcome == "unknown"


async def test_a_call_that_gave_text_before_it_failed_may_be_billed_whatever_its_error_says(make):
    agent = make(Scripted([TextDelta("some"), ModelError("rate_limited", "later")]))
    answer = await agent.answer(plan_of(agent), reserve=Budget())
    assert answer.calls[0].outcome == "unknown"


async def test_a_cancelled_answer_ends_at_once(make, server):
    server.script(Behaviour(kind="hang"))
    agent = make()
    task = asyncio.create_task(agent.answer(plan_of(agent), reserve=Budget()))
    await server.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_log_line_holds_what_was_said(make, server, caplog):
    server.script(Behaviour(kind="status", status=500, message="about the secret question"))
    caplog.set_level("DEBUG")
    agent = make()
    await agent.answer(plan_of(agent, "the secret question"), reserve=Budget())
    assert [record.message for record in caplog.records if record.name.startswith("feishu_bot")] == [
        "model call failed"
    ]
    assert "secret" not in "".join(str(vars(record)) for record in caplog.records)


EVENTS = st.one_of(
    st.sampled_from(["", "a", " ", "words"]).map(TextDelta),
    st.builds(ReportedUsage, st.integers(0, 99), st.integers(0, 99)),
    st.builds(ModelError, st.sampled_from(["timeout", "too_long", "refused"]), st.just("x"),
              retry=st.booleans(), outcome_unknown=st.booleans(), after_s=st.none() | st.floats(0, 99)),
)  # fmt: skip


@given(st.lists(st.lists(EVENTS, max_size=4), min_size=5, max_size=5), st.integers(0, 4), st.booleans())
def test_whatever_a_model_does_every_call_was_reserved_and_is_booked(scripts, granted, with_history):
    clock, budget = Clock(), Budget(granted)
    settings = AISettings(model=MAIN, base_url="http://127.0.0.1:9/v1", fallback_models=(SPARE, "echo"))
    agent = Agent(settings, model=Scripted(*scripts), sleep=clock.sleep)
    plan = plan_of(agent, "q", history(2) if with_history else ())
    answer = asyncio.run(agent.answer(plan, reserve=budget))
    assert [usage.call for usage in answer.calls] == list(range(len(answer.calls)))
    assert len(answer.calls) <= 5  # two tries, one shortened, two fallbacks
    assert len(budget.asked) == len(answer.calls) - 1 + (answer.refusal is not None)
    assert (answer.text is None) == (answer.failure is not None)
    assert all(0 <= seconds <= MAX_WAIT_S for seconds in clock.waits)
    reserved = [plan.reserve_tokens, *(tokens for _, _, tokens in budget.asked)]
    for usage, tokens in zip(answer.calls, reserved, strict=False):
        if usage.outcome == "unknown":
            assert usage.input_tokens + usage.output_tokens == tokens
