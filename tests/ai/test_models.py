"""The client for OpenAI-compatible servers against a real server, and the choice of a model by its name."""

import asyncio
import contextlib
import socket
from datetime import UTC, datetime
from email.utils import format_datetime

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, Finished, ReportedUsage, TextDelta
from feishu_bot.ai.completion import Completion, http_error
from feishu_bot.ai.models import EchoModel, check_models, context_window, make_model
from feishu_bot.ai.openai_compatible import OpenAICompatible
from feishu_bot.ai.sse import EventSplitter, EventTooLarge
from feishu_bot.ai.tokens import count_tokens, prompt_tokens
from feishu_bot.config import PROVIDERS, AISettings, NetworkSettings, Secrets
from feishu_bot.errors import ConfigError, ModelError
from feishu_bot.network import is_loopback, proxy_for, ssl_context
from feishu_bot.testing.model import Behaviour, FakeModelServer

KEY = "sk-secret-0123456789"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
async def server():
    async with FakeModelServer() as running:
        yield running


@contextlib.asynccontextmanager
async def client_of(url, **more):
    client = OpenAICompatible(url, more.pop("api_key", KEY), clock=NOW.timestamp, **more)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
async def client(server):
    async with client_of(server.base_url) as made:
        yield made


def ask(text="hi", model="m", limit=1000, system="Be kind."):
    return ChatRequest(model, (ChatMessage("system", system), ChatMessage("user", text)), limit)


async def collect(model, request=None):
    events = [event async for event in model.stream(request or ask())]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    usage = [event for event in events if isinstance(event, ReportedUsage)]
    assert len(usage) <= 1
    assert isinstance(events[-1], Finished)
    return text, usage[0] if usage else None, events[-1].reason


async def failure_of(model, request=None):
    with pytest.raises(ModelError) as caught:
        await collect(model, request)
    return caught.value


@contextlib.asynccontextmanager
async def raw_server(*pieces, head=b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", close=True):
    """Serve these bytes to every request, exactly as they are cut here."""

    tasks = set()

    async def handle(reader, writer):
        tasks.add(asyncio.current_task())
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if not close:
                await reader.read()

    served = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{served.sockets[0].getsockname()[1]}/v1"
    finally:
        served.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def event(**more):
    return b"data: " + orjson.dumps(more) + b"\n\n"


def delta(text, **more):
    return event(choices=[{"index": 0, "delta": {"content": text}, **more}])


STOP = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
DONE = b"data: [DONE]\n\n"


# ----------------------------------------------------------------------------------------------- answers


async def test_the_answer_is_streamed_with_the_providers_usage(server, client):
    server.script(Behaviour(text="你好, world! " * 20))
    text, usage, finish = await collect(client)
    assert text == "你好, world! " * 20
    assert usage == ReportedUsage(server.prompt_tokens, server.output_tokens)
    assert finish == "stop"


async def test_the_request_carries_key_model_messages_bound_and_the_wish_for_usage(server, client):
    await collect(client, ask("what?", model="gpt-x", limit=77))
    recorded = server.requests[0]
    assert recorded.authorized == f"Bearer {KEY}"
    assert recorded.body == {
        "model": "gpt-x",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "what?"}],
        "max_tokens": 77,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_text_comes_while_the_answer_is_still_being_made(server, client):
    server.script(Behaviour(text="abcdef", chunks=3, chunk_delay_s=0.02))
    pieces = [e.text async for e in client.stream(ask()) if isinstance(e, TextDelta)]
    assert "".join(pieces) == "abcdef"
    assert len(pieces) > 1


async def test_a_connection_is_used_again(server, client):
    for _ in range(3):
        await collect(client)
    assert len(client._session.connector._conns) == 1


async def test_an_answer_cut_at_the_bound_says_so(server, client):
    server.script(Behaviour(text="one two three four five six"))
    text, usage, finish = await collect(client, ask(limit=3))
    assert text == "one two three"
    assert usage.output_tokens == 3
    assert finish == "length"


async def test_a_json_document_is_taken_for_a_stream(server, client):
    server.script(Behaviour(kind="document", text="whole"))
    assert await collect(client) == ("whole", ReportedUsage(*_sums(server)), "stop")


async def test_an_answer_without_usage_is_an_answer(server, client):
    server.script(Behaviour(usage=False))
    assert await collect(client) == ("echo: hi", None, "stop")


async def test_a_filtered_answer_without_text_finishes_as_filtered(server, client):
    server.script(Behaviour(kind="filtered"))
    text, _, finish = await collect(client)
    assert (text, finish) == ("", "filtered")


async def test_a_server_that_knows_no_stream_options_is_asked_without_them_from_then_on(server, client):
    server.rejects = frozenset({"stream_options"})
    assert (await collect(client))[:2] == ("echo: hi", None)
    assert (await collect(client))[0] == "echo: hi"
    assert server.count == 2
    assert "stream_options" not in server.requests[0].body


async def test_a_server_that_wants_the_newer_bound_is_given_it(server, client):
    server.rejects = frozenset({"max_tokens", "stream_options"})
    assert (await collect(client, ask(limit=9)))[0] == "echo: hi"
    assert server.requests[0].body["max_completion_tokens"] == 9


async def test_a_server_that_rejects_everything_is_not_asked_for_ever(server, client):
    server.rejects = frozenset({"max_tokens", "max_completion_tokens", "stream_options"})
    assert (await failure_of(client)).kind == "refused"


async def test_half_surrogate_pairs_in_a_question_are_replaced(server, client):
    assert (await collect(client, ask("a\ud83d")))[0] == "echo: a\ufffd"


async def test_a_tool_result_is_sent_as_something_said_to_the_model(server, client):
    messages = (ChatMessage("user", "q"), ChatMessage("assistant", "calls"), ChatMessage("tool", "42"))
    await collect(client, ChatRequest("m", messages, 10))
    assert server.requests[0].body["messages"][2] == {"role": "user", "content": "[tool result]\n42"}


async def test_the_first_of_several_keys_is_used(server):
    for keys in (["new", "old"], Secrets("new", "old"), "new\n"):
        async with client_of(server.base_url, api_key=keys) as client:
            await collect(client)
        assert server.requests[-1].authorized == "Bearer new"


async def test_without_a_key_none_is_sent(server):
    for keys in (None, "", [], Secrets()):
        async with client_of(server.base_url, api_key=keys) as client:
            await collect(client)
        assert server.requests[-1].authorized == ""


# ------------------------------------------------------------------------------- what servers really send


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([delta("a"), delta("b"), STOP, DONE], ("ab", None, "stop")),
        ([delta("a"), STOP], ("a", None, "stop")),  # no [DONE]
        ([delta("a"), b"data: [DONE]"], ("a", None, "stop")),  # no last line end, no reason
        ([b": ping\n\n", b"event: x\nid: 1\n" + delta("a").replace(b"\n", b"\r\n"), STOP, DONE], ("a", None, "stop")),
        ([b"data:\n\n", delta("a").replace(b"data: ", b"data:"), DONE], ("a", None, "stop")),
        ([b'data: {"choices": [{"delta":\ndata: {"content": "a"}}]}\n\n', DONE], ("a", None, "stop")),
        (
            [event(choices=[{"delta": {"reasoning_content": "hm"}}]), delta("a"), STOP, DONE],
            ("a", None, "stop"),
        ),
        ([event(choices=[{"delta": {"refusal": "I will not."}}]), STOP, DONE], ("I will not.", None, "refusal")),
        (
            [event(choices=[{"delta": {"content": [{"type": "text", "text": "a"}, {"type": "x"}]}}]), STOP, DONE],
            ("a", None, "stop"),
        ),
        (
            [delta("a", usage=None), event(choices=[{"delta": {}, "finish_reason": "stop",
             "usage": {"prompt_tokens": 19, "completion_tokens": 13}}]), DONE],
            ("a", ReportedUsage(19, 13), "stop"),
        ),
        (
            [event(choices=[{"delta": {"content": t}}], usage={"prompt_tokens": 5, "completion_tokens": n})
             for n, t in enumerate("abc", 1)] + [STOP, DONE],
            ("abc", ReportedUsage(5, 3), "stop"),
        ),
        ([delta("a"), event(choices=[], usage={"prompt_tokens": 0, "completion_tokens": 0}), DONE], ("a", None, "stop")),
        ([delta("a"), event(usage={"prompt_tokens": -1, "completion_tokens": True}), DONE], ("a", None, "stop")),
        ([delta("a", finish_reason="max_tokens"), DONE], ("a", None, "length")),
        ([delta("a", finish_reason="sensitive"), DONE], ("a", None, "filtered")),
        ([delta("a", finish_reason="tool_calls"), DONE], ("a", None, "tool_calls")),
        (
            [b'data: {"choices":[{"delta":{"content":"a\\ud83d"}}]}\n\n', b'data: {"choices":[{"delta":{"content":"\\ude00b"}}]}\n\n', DONE],
            ("a😀b", None, "stop"),
        ),
    ],
)  # fmt: skip
async def test_what_the_known_servers_send_is_read(pieces, expected):
    async with raw_server(*pieces) as url, client_of(url) as client:
        assert await collect(client) == expected
    async with raw_server(*(bytes([b]) for b in b"".join(pieces))) as url, client_of(url) as client:
        assert await collect(client) == expected


@pytest.mark.parametrize("content_type", [b"text/plain", b"application/octet-stream", b"application/json"])
async def test_a_stream_is_known_by_its_first_byte_where_the_content_type_is_wrong(content_type):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type + b"\r\n\r\n"
    async with raw_server(b"\n", delta("a"), STOP, DONE, head=head) as url, client_of(url) as client:
        assert (await collect(client))[0] == "a"


async def test_a_server_that_keeps_the_connection_after_its_end_of_stream_delays_nothing():
    async with raw_server(delta("a"), DONE, close=False) as url, client_of(url) as client:
        assert (await collect(client))[0] == "a"


# -------------------------------------------------------------------------------------------- HTTP errors


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (429, ("rate_limited", True, False)),
        (503, ("unavailable", True, False)),
        (500, ("unavailable", True, False)),
        (502, ("unavailable", True, False)),
        (529, ("unavailable", True, False)),
        (504, ("timeout", True, True)),
        (401, ("refused", False, False)),
        (403, ("refused", False, False)),
        (402, ("refused", False, False)),
        (404, ("refused", False, False)),
        (400, ("refused", False, False)),
        (307, ("refused", False, False)),
    ],
)
async def test_a_status_says_whether_to_retry_and_whether_it_may_be_billed(server, client, status, expected):
    server.script(Behaviour(kind="status", status=status))
    error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == expected
    assert server.count == 1
    assert str(status) in error.reason


@pytest.mark.parametrize(
    ("value", "after"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        (format_datetime(NOW.replace(second=35), usegmt=True), 30.0),
        ("soon", None),
        ("nan", None),
        (None, None),
    ],
)
async def test_the_time_to_wait_is_read_as_seconds_or_as_a_date(server, client, value, after):
    server.script(Behaviour(kind="status", status=429, retry_after=value))
    assert (await failure_of(client)).after_s == after


async def test_a_prompt_that_is_too_long_is_told_apart(server, client):
    server.script(Behaviour(kind="too_long"))
    error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("too_long", False, False)


@pytest.mark.parametrize(
    ("status", "code", "message", "kind"),
    [
        (
            400,
            "",
            "This model's maximum context length is 65536 tokens. However, you requested …",
            "too_long",
        ),
        (400, "invalid_request_error", "Your request exceeded model token limit: 8192", "too_long"),
        (400, "InvalidParameter", "Range of input length should be [1, 30720]", "too_long"),
        (400, "1261", "Prompt 超长", "too_long"),
        (400, "", "input token count (99) exceeds the maximum number of tokens allowed (9)", "too_long"),
        (413, "", "Request too large for model", "too_long"),
        (400, "", "max_tokens is too large: 100000. This model supports at most 16384", "refused"),
        (400, "content_filter", "The response was filtered", "filtered"),
        (400, "data_inspection_failed", "Input data may contain inappropriate content.", "filtered"),
        (429, "insufficient_quota", "You exceeded your current quota", "refused"),
        (402, "", "Insufficient Balance", "refused"),
        (429, "", "Rate limit reached: input tokens per minute exceeded", "rate_limited"),
    ],
)
def test_the_words_of_the_known_providers_are_understood(status, code, message, kind):
    body = orjson.dumps({"error": {"message": message, "code": code}})
    assert http_error(status, {}, body, now=0).kind == kind


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b'"x"', b'{"error": 3}', b'{"detail": [{"a": 1}]}', b"\xff"]
)
def test_an_error_of_any_shape_is_a_model_error(body):
    assert http_error(500, {}, body, now=0).kind == "unavailable"


@pytest.mark.parametrize("status", [401, 403, 400, 500])
async def test_the_key_is_in_no_error_text(server, client, status):
    server.script(Behaviour(kind="status", status=status, message=f"Incorrect API key provided: {KEY}"))
    assert KEY not in str(await failure_of(client))
    server.script(Behaviour(kind="error_event", message=f"key {KEY}"))
    assert KEY not in str(await failure_of(client))


# ---------------------------------------------------------------------------------------- broken exchanges


async def test_a_refused_connection_was_certainly_not_billed():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        async with client_of(url) as client:
            error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("unavailable", True, False)


async def test_a_connection_that_does_not_come_about_in_time_was_not_billed():
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # fill the queue, so that no further connection is taken
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        async with client_of(f"http://127.0.0.1:{full.getsockname()[1]}/v1", timeout_s=0.3) as client:
            error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("unavailable", True, False)


@pytest.mark.parametrize(
    "behaviour", [Behaviour(kind="hang"), Behaviour(text="slow " * 99, chunk_delay_s=0.05)]
)
async def test_a_time_out_after_sending_may_be_billed(server, behaviour):
    server.script(behaviour)
    async with client_of(server.base_url, timeout_s=0.3) as client:
        error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("timeout", True, True)


@pytest.mark.parametrize("kind", ["broken", "drop"])
async def test_a_broken_stream_may_be_billed(server, client, kind):
    server.script(Behaviour(kind=kind, text="a long answer that breaks off"))
    error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("unavailable", True, True)


async def test_a_stream_that_ends_in_order_but_without_its_end_is_broken():
    async with raw_server(delta("a"), delta("b")) as url, client_of(url) as client:
        error = await failure_of(client)
    assert (error.kind, error.outcome_unknown) == ("unavailable", True)


async def test_an_error_object_in_the_stream_may_be_billed(server, client):
    server.script(Behaviour(kind="error_event", code="server_error", message="overloaded"))
    error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("unavailable", True, True)
    assert "overloaded" in error.reason


@pytest.mark.parametrize("kind", ["not_json", "no_choices", "empty", "html", "nothing"])
async def test_nonsense_may_be_billed_and_is_not_retried(server, client, kind):
    server.script(Behaviour(kind=kind, usage=False))
    error = await failure_of(client)
    assert (error.kind, error.retry, error.outcome_unknown) == ("nonsense", False, True)


@pytest.mark.parametrize(
    "data", [b"3", b"[]", b'{"choices": 3}', b'{"choices": {"a": 1}}', b'{"choices": ["x"]}',
             b'{"choices": [{"delta": 3}]}', b'{"choices": [{"delta": {"content": 3}}]}', b'{"usage": 3}',
             b'{"choices": [{"delta": {}, "finish_reason": []}]}', b"[" * 100_000, b"\xff\xfe"],
)  # fmt: skip
async def test_json_of_another_shape_is_nonsense(data):
    async with raw_server(b"data: " + data + b"\n\n", DONE) as url, client_of(url) as client:
        assert (await failure_of(client)).kind == "nonsense"


async def test_a_line_without_end_is_given_up():
    async with raw_server(*[b"data: " + b"x" * 65_536] * 80) as url, client_of(url) as client:
        assert (await failure_of(client)).kind == "nonsense"


async def test_what_is_no_http_at_all_is_a_model_error():
    async with raw_server(head=b"SSH-2.0-OpenSSH_9.2\r\n") as url, client_of(url) as client:
        error = await failure_of(client)
    assert error.outcome_unknown


async def test_a_cancelled_call_lets_go_of_the_connection(server, client):
    server.script(Behaviour(kind="hang"))
    call = asyncio.create_task(collect(client))
    await server.asked.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await collect(client))[0] == "echo: hi"


async def test_a_client_can_be_closed_twice_and_used_again(server, client):
    await client.close()
    await collect(client)
    await client.close()
    await client.close()
    assert (await collect(client))[0] == "echo: hi"


# -------------------------------------------------------------------------------------------- the splitter


@given(
    st.lists(st.text("ab \u2028é", max_size=5), min_size=1, max_size=6),
    st.lists(st.integers(1, 9), max_size=40),
)
def test_events_are_the_same_however_the_bytes_are_cut(texts, sizes):
    stream = b"".join(b"data:" + text.encode() + b"\r\n: c\n\n" for text in texts)
    splitter = EventSplitter()
    found = []
    for size in [*sizes, len(stream)]:
        piece, stream = stream[:size], stream[size:]
        found += splitter.feed(piece)
    assert [data.decode() for data in found] == texts


def test_the_bytes_of_one_event_are_bounded():
    for piece in (b"data: x", b"data: x\n"):
        splitter = EventSplitter(max_event_bytes=8 * len(piece))
        for _ in range(8):
            splitter.feed(piece)
        with pytest.raises(EventTooLarge):
            splitter.feed(b"data: " + bytes(8 * len(piece)))


@given(st.binary(max_size=60), st.sampled_from(["text/event-stream", "application/json"]))
def test_no_bytes_from_a_server_raise_anything_but_a_model_error(data, content_type):
    for body in (data, b"data: " + data + b"\n\n", b'data: {"choices":[' + data + b"]}\n\n"):
        completion = Completion(content_type)
        with contextlib.suppress(ModelError):
            completion.feed(body)
            completion.finish()
            list(completion.closing())


# ------------------------------------------------------------------------------------- choosing the model


def settings_of(**more):
    return AISettings(**more)


async def test_the_echo_answers_with_the_question_and_counts_it():
    request = ask("今天天气怎么样？")
    expected = prompt_tokens([count_tokens(m.content, "echo") for m in request.messages])
    assert await collect(EchoModel(), request) == ("今天天气怎么样？", ReportedUsage(expected, 5), "stop")


async def test_base_url_reaches_any_server_by_any_name(server):
    for name, sent in (("openai:gpt-4o", "gpt-4o"), ("local:qwen2:7b", "qwen2:7b"), ("plain", "plain")):
        model = make_model(settings_of(model=name, base_url=server.base_url, api_key=KEY))
        await collect(model, ask(model=name))
        await model.close()
        assert server.requests[-1].model == sent


async def test_the_echo_is_never_asked_over_the_network(server):
    model = make_model(settings_of(model="x:y", base_url=server.base_url, fallback_models=("echo",)))
    assert (await collect(model, ask("hi", model="echo")))[0] == "hi"
    assert server.count == 0
    await model.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "acme:large"}, "ai.base_url is required"),
        ({"model": "gpt-4o"}, "ai.base_url is required"),
        ({"model": "openai:"}, "expected PROVIDER:MODEL"),
        ({"model": "openai:gpt-4o"}, "needs a key"),
        (
            {"model": "deepseek:chat", "api_key": KEY, "fallback_models": ("openai:gpt-4o",)},
            "ai.providers.openai.api_key: openai:gpt-4o needs a key: here, or in the variable OPENAI_API_KEY",
        ),
        ({"model": "openai:gpt-4o", "api_key": "sk-\u201cquoted\u201d"}, "printable ASCII"),
    ],
)
def test_a_model_that_cannot_be_asked_is_a_mistake_of_the_configuration(settings, words):
    with pytest.raises(ConfigError) as caught:
        make_model(settings_of(**settings))
    assert words in caught.value.mistakes[0]
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/v1", "nonsense", "http://", "http://user:pw@host/v1"])
def test_an_unusable_base_url_is_a_mistake_of_the_configuration(url):
    with pytest.raises(ConfigError, match="base_url"):
        OpenAICompatible(url)


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("openai:gpt-4o", "https://api.openai.com/v1/chat/completions"),
        ("deepseek:deepseek-chat", "https://api.deepseek.com/v1/chat/completions"),
        ("ollama:qwen2:7b", "http://127.0.0.1:11434/v1/chat/completions"),
    ],
)
def test_the_known_providers_have_their_addresses(model, url):
    server, _ = make_model(settings_of(model=model, api_key=KEY))._route(model)
    assert str(server._url) == url


def test_a_local_server_is_not_given_the_key_of_another_provider():
    router = make_model(settings_of(model="openai:gpt-4o", api_key=KEY, fallback_models=("ollama:x",)))
    assert "Authorization" not in router._route("ollama:x")[0]._headers


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_known_provider_that_needs_a_key_says_in_which_variable_it_is_looked_for(provider):
    model = f"{provider}:some-model"
    if not PROVIDERS[provider].variable:
        assert check_models(settings_of(model=model)) == []
        return
    (mistake,) = check_models(settings_of(model=model))
    assert PROVIDERS[provider].variable in mistake
    assert check_models(settings_of(model=model, api_key=KEY)) == []
    with_own = settings_of(model=model, providers={provider: {"api_key": KEY}})
    assert check_models(with_own) == []


async def test_each_provider_is_asked_at_its_own_address_with_its_own_key(server):
    async with FakeModelServer() as other:
        model = make_model(
            settings_of(
                model="acme:a", base_url=server.base_url, api_key="sk-main", fallback_models=("zeta:b", "acme:c"),
                providers={"zeta": {"base_url": other.base_url, "api_key": "sk-zeta"}},
            )
        )  # fmt: skip
        for name in ("acme:a", "zeta:b", "acme:c"):
            await collect(model, ask(model=name))
        await model.close()
        assert [(r.model, r.authorized) for r in other.requests] == [("b", "Bearer sk-zeta")]
        assert [(r.model, r.authorized) for r in server.requests] == [
            ("a", "Bearer sk-main"), ("c", "Bearer sk-main"),
        ]  # fmt: skip


def test_the_key_of_one_provider_is_never_sent_to_another():
    settings = settings_of(
        model="openai:gpt-4o", api_key=KEY, fallback_models=("zeta:b", "deepseek:c", "ollama:d"),
        providers={"zeta": {"base_url": "http://127.0.0.1:9"}, "deepseek": {"api_key": "sk-d"}},
    )  # fmt: skip
    router = make_model(settings)
    sent = {name: router._route(name)[0]._headers.get("Authorization") for name in settings.fallback_models}
    assert sent == {"zeta:b": None, "deepseek:c": "Bearer sk-d", "ollama:d": None}


async def test_a_name_that_was_never_configured_is_refused_when_it_is_asked():
    router = make_model(settings_of())
    error = await failure_of(router, ask(model="acme:large"))
    assert (error.kind, error.outcome_unknown) == ("refused", False)


def test_the_longest_known_beginning_gives_the_window():
    assert context_window("openai:gpt-4-0613") == 8_192
    assert context_window("openai:gpt-4o-mini") == 128_000
    assert context_window("moonshot:moonshot-v1-8k") == 8_192
    assert context_window("echo") is None


# ------------------------------------------------------------------------------------------------ network


def test_loopback_is_never_reached_through_a_proxy():
    network = NetworkSettings(proxy="http://proxy.example:3128")
    for url in ("http://127.0.0.1:1/v1", "http://127.9.9.9/v1", "http://[::1]:1/v1", "http://localhost:1/v1"):
        assert proxy_for(url, network) is None
    assert proxy_for("https://api.example/v1", network) == "http://proxy.example:3128"
    assert not is_loopback("localhost.example")


def test_the_environments_proxy_is_used_where_none_is_configured(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    assert proxy_for("https://api.example/v1", NetworkSettings()) == "http://proxy.example:3128"
    assert proxy_for("https://internal.example/v1", None) is None
    assert proxy_for("https://127.0.0.1/v1", None) is None


def test_a_proxy_that_does_not_speak_http_is_a_mistake(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.example:1080")
    with pytest.raises(ConfigError, match="HTTPS_PROXY"):
        proxy_for("https://api.example/v1", None)


async def test_a_call_to_the_outside_goes_through_the_proxy(server):
    network = NetworkSettings(proxy=f"http://127.0.0.1:{server.port}")
    async with client_of("http://model.example/v1", network=network) as client:
        assert (await collect(client))[0] == "echo: hi"


def test_a_file_of_certificates_that_cannot_be_read_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match="ca_file"):
        ssl_context(NetworkSettings(ca_file=str(tmp_path / "none.pem")))
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="ca_file"):
        ssl_context(NetworkSettings(ca_file=str(tmp_path / "bad.pem")))
    assert ssl_context(None) is True


def _sums(server):
    return server.prompt_tokens, server.output_tokens
