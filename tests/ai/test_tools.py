"""Tools: how a model calls them over the wire, and what the agent makes of that."""

from __future__ import annotations

import json

import orjson
import pytest

from feishu_bot.ai.agent import Agent
from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, ToolCall, ToolCalls, ToolSpec
from feishu_bot.ai.completion import MAX_CALLS, Completion
from feishu_bot.ai.history import choose_history
from feishu_bot.ai.models import make_model
from feishu_bot.ai.openai_compatible import OpenAICompatible
from feishu_bot.ai.tokens import count_tokens
from feishu_bot.config import AISettings
from feishu_bot.errors import BudgetExceeded, ModelError
from feishu_bot.model import BudgetRefusal
from feishu_bot.testing.model import Behaviour, FakeModelServer

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = ToolSpec("weather", "Tells the weather.", CITY)
CLOCK = ToolSpec("clock", "Tells the time.", {"type": "object", "properties": {}})
TOOLS = (WEATHER, CLOCK)
BERLIN, ROME = ("weather", '{"city": "Berlin"}'), ("weather", '{"city": "Rome"}')
BIG = 10**9


class Budget:
    def __init__(self, calls=99):
        self.left = calls
        self.asked = []

    async def __call__(self, *, call, model, tokens, **_):
        if not self.left:
            raise BudgetExceeded(BudgetRefusal("b", used=9, reserved=0, limit=10, wanted=99, ends_ms=None))
        self.left -= 1
        self.asked.append((call, model, tokens))


class Bench:
    """Runs tools: says what it was asked."""

    def __init__(self):
        self.runs = []

    async def __call__(self, calls):
        self.runs.append([(call.name, call.arguments) for call in calls])
        return [f"{call.name} {call.arguments}" for call in calls]


@pytest.fixture
async def server():
    async with FakeModelServer() as running:
        yield running


@pytest.fixture
async def agent(server):
    made = []

    def build(**more):
        wanted = {"model": "openai:gpt-4o", "base_url": server.base_url, "system_prompt": "Be kind."}
        settings = AISettings(**wanted | more)
        made.append(Agent(settings, model=make_model(settings), jitter=lambda: 0.0))
        return made[-1]

    yield build
    for each in made:
        await each.close()


def plan_of(agent, text="hi", rows=(), **more):
    return agent.plan(rows, text, count_tokens(text, "echo"), tools=TOOLS, **more)


async def ask(agent, *, budget=None, bench=None, **more):
    budget, bench = budget or Budget(), bench or Bench()
    return await agent.answer(plan_of(agent, **more), reserve=budget, run_tools=bench)


# ------------------------------------------------------------------------------------------------ the wire


@pytest.mark.parametrize("kind", ["answer", "document"])
async def test_calls_are_read_from_a_stream_and_from_a_document(server, kind):
    server.script(Behaviour(kind=kind, text="let me see", tool_calls=(BERLIN, ("clock", "{}"))))
    client = OpenAICompatible(server.base_url)
    events = [e async for e in client.stream(ChatRequest("m", (ChatMessage("user", "q"),), 9, tools=TOOLS))]
    await client.close()
    assert [e for e in events if isinstance(e, ToolCalls)] == [
        ToolCalls((ToolCall("call_0", *BERLIN), ToolCall("call_1", "clock", "{}")))
    ]
    assert "".join(e.text for e in events if hasattr(e, "text")) == "let me see"
    assert server.requests[0].body["tools"][0] == {"type": "function", "function": WEATHER._asdict()}
    assert "tool_choice" not in server.requests[0].body


def delta(*calls):
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": list(calls)}}]}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def called(*chunks):
    completion = Completion("text/event-stream")
    for chunk in chunks:
        completion.feed(chunk)
    completion.feed(b"data: [DONE]\n\n")
    return [event.calls for event in completion.closing() if isinstance(event, ToolCalls)]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        (
            [delta({"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x'}}),
             delta({"index": 0, "function": {"arguments": '": 1}'}})],
            [("a", "f", '{"x": 1}')],
        ),
        (
            [delta({"id": "a", "function": {"name": "f", "arguments": "{}"}}),
             delta({"id": "b", "function": {"name": "g", "arguments": "{}"}})],
            [("a", "f", "{}"), ("b", "g", "{}")],
        ),
        (
            [delta({"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}},
                   {"index": 0, "id": "b", "function": {"name": "f", "arguments": "{}"}})],
            [("a", "f", "{}"), ("b", "f", "{}")],
        ),
        ([delta({"index": 0, "function": {"name": "f", "arguments": {"x": 1}}})], [("call_0", "f", '{"x":1}')]),
        ([delta({"index": 0, "id": "a", "function": {"name": "f"}})], [("a", "f", "")]),
    ],
    ids=["pieces", "no numbers", "one number for all", "no id, an object", "no arguments"],
)  # fmt: skip
def test_the_ways_in_which_servers_cut_calls_are_understood(chunks, expected):
    assert called(*chunks) == [tuple(ToolCall(*call) for call in expected)]


@pytest.mark.parametrize(
    "chunk",
    [delta("no call"), delta({"index": [], "function": {"name": "f"}}), delta({"id": 7, "function": {}}),
     delta(*[{"index": n, "id": str(n), "function": {"name": "f"}} for n in range(MAX_CALLS + 1)])],
)  # fmt: skip
def test_calls_of_another_shape_or_without_end_are_nonsense(chunk):
    with pytest.raises(ModelError) as caught:
        called(chunk)
    assert caught.value.kind == "nonsense"


async def test_a_server_that_takes_no_temperature_is_asked_without_it_from_then_on(server):
    server.rejects = frozenset({"temperature"})
    client = OpenAICompatible(server.base_url)
    for _ in range(2):
        request = ChatRequest("m", (ChatMessage("user", "q"),), 9, temperature=0.5)
        assert [e async for e in client.stream(request)]
    await client.close()
    assert ["temperature" in r.body for r in server.requests] == [False, False]


# ---------------------------------------------------------------------------------------------- the agent


async def test_what_tools_say_goes_back_to_the_model_and_its_answer_is_the_answer(agent, server):
    server.script(Behaviour(text="looking", tool_calls=(BERLIN, ROME)), Behaviour(text="mild"))
    budget, bench = Budget(), Bench()
    answer = await ask(agent(), budget=budget, bench=bench)
    assert answer.text == "mild"
    assert bench.runs == [[BERLIN, ROME]]
    assert [(c.call, c.outcome) for c in answer.calls] == [(0, "ok"), (1, "ok")]
    assert [call for call, _, _ in budget.asked] == [1]
    first, second = [r.body["messages"] for r in server.requests]
    assert second[: len(first)] == first
    assert second[len(first) :] == [
        {"role": "assistant", "content": "looking", "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": BERLIN[0], "arguments": BERLIN[1]}},
            {"id": "call_1", "type": "function", "function": {"name": ROME[0], "arguments": ROME[1]}},
        ]},
        {"role": "tool", "tool_call_id": "call_0", "content": f"weather {BERLIN[1]}"},
        {"role": "tool", "tool_call_id": "call_1", "content": f"weather {ROME[1]}"},
    ]  # fmt: skip
    stored = [message for done in answer.rounds for message in done.messages()]
    assert [(role, content) for role, content, _, _ in stored] == [
        ("assistant", "looking"), ("tool", f"weather {BERLIN[1]}"), ("tool", f"weather {ROME[1]}"),
    ]  # fmt: skip
    assert stored[1][3] == {"tool_name": "weather", "tool_call_id": "call_0"}


async def test_every_call_is_within_what_was_reserved_for_it(agent, server):
    server.script(Behaviour(tool_calls=(BERLIN,)), Behaviour(tool_calls=(ROME, BERLIN)))
    budget, made = Budget(), agent()
    plan = plan_of(made, "how is the weather?")
    answer = await made.answer(plan, reserve=budget, run_tools=Bench())
    reserved = [plan.reserve_tokens, *(tokens for _, _, tokens in budget.asked)]
    used = [call.input_tokens + call.output_tokens for call in answer.calls]
    assert len(used) == 3
    assert all(u <= r for u, r in zip(used, reserved, strict=True))


async def test_the_last_round_has_to_be_answered_in_words(agent, server):
    server.script(Behaviour(tool_calls=(("clock", "{}"),)), times=3)
    answer = await ask(agent(max_tool_rounds=2))
    assert [r.body.get("tool_choice") for r in server.requests] == [None, None, "none"]
    assert answer.text is None
    assert answer.failure.kind == "nonsense"
    assert len(server.requests) == 3


async def test_a_model_that_calls_tools_it_was_not_offered_is_taken_by_its_words(agent, server):
    server.script(Behaviour(text="so be it", tool_calls=(BERLIN,)))
    made, bench = agent(), Bench()
    answer = await made.answer(made.plan((), "hi", 1), reserve=Budget(), run_tools=bench)
    assert (answer.text, bench.runs) == ("so be it", [])


async def test_a_call_after_tools_that_no_budget_holds_is_not_made(agent, server):
    server.script(Behaviour(tool_calls=(BERLIN,)))
    answer = await ask(agent(), budget=Budget(0))
    assert answer.text is None
    assert answer.failure is None
    assert answer.refusal.budget == "b"
    assert server.count == 1


async def test_a_call_that_fails_after_tools_is_tried_again_with_what_they_said(agent, server):
    server.script(
        Behaviour(tool_calls=(BERLIN,)), Behaviour(kind="status", retry_after="0"), Behaviour(text="ok")
    )
    bench = Bench()
    answer = await ask(agent(), bench=bench)
    assert answer.text == "ok"
    assert len(bench.runs) == 1
    assert server.requests[1].body["messages"] == server.requests[2].body["messages"]


async def test_old_turns_make_room_in_the_window_for_what_tools_say(agent, server):
    server.script(Behaviour(tool_calls=(BERLIN,)), Behaviour(text="ok"))
    rows = [
        row for n in range(20) for row in (("user", f"q{n} " + "word " * 100, 101), ("assistant", "a", 1))
    ]
    made = agent(model="openai:gpt-4", max_output_tokens=100)

    async def long(_calls):
        return ["word " * 6000]

    await made.answer(plan_of(made, "q", rows), reserve=Budget(), run_tools=long)
    before, after = [r.body["messages"] for r in server.requests]
    assert len(before) == 1 + 40 + 1
    assert 3 < len(after) < len(before)
    assert [m["role"] for m in after[-3:]] == ["user", "assistant", "tool"]
    assert server.requests[1].prompt_tokens + 100 <= 8192


# --------------------------------------------------------------------------------------------- the history


def stored(*calls, results=None):
    """Return the rows of a turn with tools as the store gives them."""
    metadata = json.dumps({"tool_calls": [{"id": i, "name": "f", "arguments": "{}"} for i in calls]})
    answered = [
        ("tool", f"r-{i}", 1, 0, None, json.dumps({"tool_call_id": i}))
        for i in (calls if results is None else results)
    ]
    return [("user", "q", 1, 0, None, None), ("assistant", "", 1, 0, None, metadata), *answered,
            ("assistant", "so", 1, 0, None, None)]  # fmt: skip


def test_calls_and_results_of_earlier_turns_are_sent_as_they_were():
    history = choose_history(stored("a", "b"), max_turns=9, max_tokens=BIG)
    assert history.messages[1].tool_calls == (ToolCall("a", "f", "{}"), ToolCall("b", "f", "{}"))
    assert [(m.role, m.tool_call_id) for m in history.messages[2:4]] == [("tool", "a"), ("tool", "b")]
    assert history.tokens == 5


def test_results_are_sent_in_the_order_of_their_calls():
    history = choose_history(stored("a", "b", results=("b", "a")), max_turns=9, max_tokens=BIG)
    assert [m.tool_call_id for m in history.messages[2:4]] == ["a", "b"]


@pytest.mark.parametrize("results", [("a",), (), ("a", "c")])
def test_calls_without_all_of_their_results_are_left_out_with_what_is_there_of_them(results):
    history = choose_history(stored("a", "b", results=results), max_turns=9, max_tokens=BIG)
    assert [(m.role, m.content) for m in history.messages] == [("user", "q"), ("assistant", "so")]


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"tool_calls": 7}', '{"tool_calls": [{"id": "a"}]}', '{"tool_calls": ["x"]}']
)
def test_calls_that_cannot_be_read_are_left_out(broken):
    rows = [("user", "q", 1, 0, None, None), ("assistant", "text", 1, 0, None, broken)]
    history = choose_history(rows, max_turns=9, max_tokens=BIG)
    assert history.messages == (ChatMessage("user", "q"), ChatMessage("assistant", "text"))
