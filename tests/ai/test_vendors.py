"""Anthropic and Google, asked by their own protocols on small fakes of their servers."""

from __future__ import annotations

import sys

import orjson
import pytest
from aiohttp import web

from feishu_bot.ai.agent import Agent
from feishu_bot.ai.chat_model import (
    ChatMessage,
    ChatRequest,
    Finished,
    Image,
    ReportedUsage,
    TextDelta,
    ToolCall,
    ToolCalls,
    ToolSpec,
)
from feishu_bot.ai.models import check_models, make_model
from feishu_bot.config import AISettings
from feishu_bot.errors import ModelError

WEATHER = ToolSpec(
    "weather", "Tells the weather.", {"type": "object", "properties": {"city": {"type": "string"}}}
)
USED = ReportedUsage(11, 7)


class FakeVendor:
    """Answers both protocols: with text and thoughts, with a call of a tool, or with a status."""

    def __init__(self):
        self.bodies = []
        self.headers = []
        self.call = False
        self.status = 200
        self.broken = False

    async def handle(self, request):
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        if self.status != 200:
            body = {
                "error": {
                    "type": "error",
                    "message": f"no, not with {KEY}",
                    "status": "UNAVAILABLE",
                    "code": self.status,
                }
            }
            return web.json_response(body, status=self.status, headers={"Retry-After": "3"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = self._anthropic() if request.path.endswith("/messages") else self._google()
        for event in events[: 4 if self.broken else None]:
            name = f"event: {event['type']}\n".encode() if "type" in event else b""
            await response.write(name + b"data: " + orjson.dumps(event) + b"\n\n")
        if self.broken:
            request.transport.abort()
        return response

    def _anthropic(self):
        message = {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "model": "c",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 11, "output_tokens": 1},
        }
        if self.call:
            block = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
            deltas = [
                {"type": "input_json_delta", "partial_json": piece} for piece in ('{"city": ', '"Rome"}')
            ]
            blocks = [(block, deltas)]
        else:
            thinking = {"type": "thinking", "thinking": "", "signature": ""}
            blocks = [
                (thinking, [{"type": "thinking_delta", "thinking": "hmm"}]),
                ({"type": "text", "text": ""}, [{"type": "text_delta", "text": t} for t in ("Sun", "ny.")]),
            ]
        events = [{"type": "message_start", "message": message}]
        for index, (block, deltas) in enumerate(blocks):
            events.append({"type": "content_block_start", "index": index, "content_block": block})
            events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
            events.append({"type": "content_block_stop", "index": index})
        reason = "tool_use" if self.call else "end_turn"
        events.append(
            {
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": None},
                "usage": {"output_tokens": 7},
            }
        )
        return [*events, {"type": "message_stop"}]

    def _google(self):
        if self.call:
            parts = [[{"functionCall": {"name": "weather", "args": {"city": "Rome"}}}]]
        else:
            parts = [[{"text": "hmm", "thought": True}], [{"text": "Sun"}], [{"text": "ny."}]]
        events = [{"candidates": [{"content": {"role": "model", "parts": p}, "index": 0}]} for p in parts]
        events[-1]["candidates"][0]["finishReason"] = "STOP"
        events[-1]["usageMetadata"] = {
            "promptTokenCount": 11,
            "candidatesTokenCount": 7,
            "totalTokenCount": 18,
        }
        return events


KEY = "sk-vendor-key"


@pytest.fixture
async def vendor():
    fake = FakeVendor()
    app = web.Application()
    app.router.add_post("/{path:.*}", fake.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{site.port}"
    yield fake
    await runner.cleanup()


@pytest.fixture(params=["anthropic:claude-test", "google:gemini-2.5-flash"])
def model_name(request):
    return request.param


@pytest.fixture
async def model(vendor, model_name):
    provider = model_name.partition(":")[0]
    own = {provider: {"api_key": KEY, "base_url": vendor.url}}
    made = make_model(AISettings(model=model_name, providers=own, timeout_s=20))
    yield made
    await made.close()


async def collect(model, name, *messages, **more):
    messages = messages or (ChatMessage("system", "Be kind."), ChatMessage("user", "hi"))
    return [event async for event in model.stream(ChatRequest(name, messages, 50, **more))]


async def test_an_answer_is_streamed_without_thoughts_and_with_its_usage(vendor, model, model_name):
    events = await collect(model, model_name, temperature=0.5)
    assert events == [TextDelta("Sun"), TextDelta("ny."), USED, Finished("stop")]
    (body,) = vendor.bodies
    text = orjson.dumps(body).decode()
    assert all(word in text for word in ("Be kind.", "hi", "50", "0.5"))
    assert any(KEY in value for value in vendor.headers[0].values())


async def test_a_tool_is_called_and_its_result_sent_back(vendor, model, model_name):
    vendor.call = True
    (called, used, finished) = await collect(model, model_name, tools=(WEATHER,))
    (call,) = called.calls
    assert isinstance(called, ToolCalls)
    assert (call.name, orjson.loads(call.arguments)) == ("weather", {"city": "Rome"})
    assert used == USED
    assert isinstance(finished, Finished)
    vendor.call = False
    said = (
        ChatMessage("user", "and Rome?"),
        ChatMessage("assistant", "", tool_calls=(call, ToolCall("c2", "weather", "not JSON"))),
        ChatMessage("tool", "mild", tool_call_id=call.id),
        ChatMessage("tool", "odd", tool_call_id="c2"),
    )
    events = await collect(model, model_name, *said, tools=(WEATHER,), may_call=False)
    assert events[0] == TextDelta("Sun")
    text = orjson.dumps(vendor.bodies[-1]).decode()
    assert all(word in text for word in ("and Rome?", "mild", "odd", "Tells the weather."))
    assert "none" in text.lower()


async def test_a_picture_goes_along(vendor, model, model_name):
    image = Image(b"\x89PNG-data", "image/png", 1, 1)
    await collect(model, model_name, ChatMessage("user", "what is this?", images=(image,)))
    assert "image/png" in orjson.dumps(vendor.bodies[0]).decode()


@pytest.mark.parametrize(
    ("status", "kind", "retry"),
    [
        (429, "rate_limited", True),
        (503, "unavailable", True),
        (401, "refused", False),
        (400, "refused", False),
    ],
)
async def test_a_status_means_what_it_means_elsewhere(vendor, model, model_name, status, kind, retry):
    vendor.status = status
    with pytest.raises(ModelError) as caught:
        await collect(model, model_name)
    error = caught.value
    assert (error.kind, error.retry, error.outcome_unknown) == (kind, retry, False)
    assert KEY not in str(error)
    assert len(vendor.bodies) == 1


async def test_a_stream_that_breaks_off_may_be_billed(vendor, model, model_name):
    if model_name.startswith("google"):
        vendor.call = False
    vendor.broken = True
    with pytest.raises(ModelError) as caught:
        await collect(model, model_name)
    assert caught.value.outcome_unknown


async def test_a_server_that_is_not_there_was_not_billed(model_name):
    provider = model_name.partition(":")[0]
    own = {provider: {"api_key": KEY, "base_url": "http://127.0.0.1:9"}}
    model = make_model(AISettings(model=model_name, providers=own))
    with pytest.raises(ModelError) as caught:
        await collect(model, model_name)
    assert (caught.value.kind, caught.value.retry, caught.value.outcome_unknown) == (
        "unavailable",
        True,
        False,
    )
    await model.close()


async def test_an_agent_answers_with_it(vendor, model_name):
    provider = model_name.partition(":")[0]
    settings = AISettings(model=model_name, base_url=vendor.url, api_key=KEY)
    agent = Agent(settings, model=make_model(settings))

    async def grant(**_):
        pass

    answer = await agent.answer(agent.plan((), "hi", 1), reserve=grant)
    assert (answer.text, answer.calls[0].input_tokens) == ("Sunny.", 11)
    assert provider in answer.model
    await agent.close()


@pytest.mark.parametrize("missing", ["pydantic_ai", "anthropic"])
def test_without_its_library_the_configuration_says_what_to_install(monkeypatch, missing):
    settings = AISettings(model="anthropic:claude-test", api_key=KEY)
    assert check_models(settings) == []
    monkeypatch.setitem(sys.modules, missing, None)
    (line,) = check_models(settings)
    assert "pip install 'feishu-bot[agents]'" in line
