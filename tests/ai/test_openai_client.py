"""OpenAI's own client talks to the fake model server: what we test against is what the client takes for OpenAI."""

from __future__ import annotations

import openai
import pytest

from feishu_bot.testing.model import Behaviour, FakeModelServer

ASKED = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture
async def server():
    async with FakeModelServer() as running:
        yield running


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-x", max_retries=0) as made:
        yield made


async def test_an_answer_is_read_whole_and_as_a_stream_with_its_usage(server, client):
    whole = await client.chat.completions.create(model="m", messages=ASKED)
    assert whole.choices[0].message.content == "echo: hi"
    assert whole.usage.completion_tokens == server.output_tokens
    stream = await client.chat.completions.create(
        model="m", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "echo: hi"
    assert chunks[-1].usage.total_tokens == server.tokens // 2


@pytest.mark.parametrize("streaming", [True, False])
async def test_calls_of_tools_are_read(server, client, streaming):
    server.script(Behaviour(tool_calls=(("clock", '{"zone": "UTC"}'), ("clock", "{}"))))
    if streaming:
        async with client.chat.completions.stream(model="m", messages=ASKED, tools=[TOOL]) as stream:
            completion = await stream.get_final_completion()
    else:
        completion = await client.chat.completions.create(model="m", messages=ASKED, tools=[TOOL])
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("call_0", "clock", '{"zone": "UTC"}'), ("call_1", "clock", "{}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Behaviour("status", status=429, retry_after="7"), openai.RateLimitError),
        (Behaviour("status", status=401), openai.AuthenticationError),
        (Behaviour("status", status=503), openai.InternalServerError),
        (Behaviour("too_long"), openai.BadRequestError),
        (Behaviour("drop"), openai.APIConnectionError),
    ],
)
async def test_failures_are_the_ones_that_the_client_names(server, client, behaviour, error):
    server.script(behaviour)
    with pytest.raises(error) as caught:
        await client.chat.completions.create(model="m", messages=ASKED)
    if isinstance(caught.value, openai.RateLimitError):
        assert caught.value.response.headers["Retry-After"] == "7"


async def test_a_stream_that_breaks_off_and_an_error_in_it_are_errors_there_too(server, client):
    server.script(Behaviour("error_event", text="x" * 100))
    with pytest.raises(openai.APIError):
        async for _ in await client.chat.completions.create(model="m", messages=ASKED, stream=True):
            pass
