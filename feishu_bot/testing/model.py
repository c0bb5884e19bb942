"""A fake of an OpenAI-compatible model server, for tests and for ``selftest``; it also runs by itself.

``python -m feishu_bot.testing.model --port N`` answers until it is stopped. What it was asked is at
``GET /_requests``; ``POST /_script`` takes a ``Behaviour`` as JSON, with ``times``.
"""

from __future__ import annotations

import argparse
import asyncio
from base64 import b64decode
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import orjson
from aiohttp import web

from feishu_bot.ai.images import image_tokens, read_image
from feishu_bot.ai.tokens import count_tokens, prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_COUNTED_BY: Final = "echo"
_KEPT: Final = 10_000  # requests remembered; the sums go on for ever
_CREATED: Final = 1_750_000_000

Kind = Literal[
    "answer",  # the answer, whole
    "status",  # ``status`` with an error object, and ``retry_after`` as it stands
    "too_long",  # 400, context_length_exceeded
    "broken",  # half of the answer, then the connection is cut
    "error_event",  # half of the answer, then an error object in the stream
    "not_json",  # events that are no JSON
    "no_choices",  # JSON of another shape
    "empty",  # an answer without text
    "filtered",  # the same, by the content filter
    "html",  # 200 with a page
    "nothing",  # 200 without a body
    "hang",  # takes the request and says nothing
    "drop",  # takes the request and cuts the connection
    "document",  # the answer as one JSON document, though a stream was asked for
]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one request is answered. ``delay_s`` passes before anything is sent, ``chunk_delay_s`` between chunks.

    ``text`` None is the server's own answer; ``chunks`` None cuts it into pieces of eight characters. ``tool_calls``
    are (name, arguments as JSON): the answer is ``text``, if given, and these. ``reasoning`` goes before the answer as
    ``reasoning_content``.
    """

    kind: Kind = "answer"
    text: str | None = None
    delay_s: float = 0.0
    chunk_delay_s: float = 0.0
    chunks: int | None = None
    usage: bool = True
    status: int = 500
    retry_after: str | None = None
    message: str = "scripted failure"
    code: str = "scripted"
    tool_calls: tuple[tuple[str, str], ...] = ()
    reasoning: str = ""
    finish: str | None = None  # why the answer ends, instead of the true reason


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """What was asked, and what was counted for it. ``output_tokens`` is 0 where no answer began."""

    model: str
    body: dict[str, Any]
    authorized: str
    behaviour: str
    prompt_tokens: int
    max_tokens: int
    output_tokens: int


@dataclass(slots=True)
class FakeModelServer:
    """An OpenAI-compatible server on a free port of 127.0.0.1; use it in ``async with``.

    ``answer`` makes the text from the last user text. ``rejects`` names parameters that are refused with 400,
    as older servers do. ``prompt_tokens`` and ``output_tokens`` are sums over all requests that were taken,
    whatever became of them: what a provider would bill.
    """

    answer: Callable[[str], str] = "echo: {}".format
    rejects: frozenset[str] = frozenset()
    port: int = 0
    default: Behaviour = field(default_factory=Behaviour)
    requests: deque[RecordedRequest] = field(default_factory=lambda: deque(maxlen=_KEPT))
    count: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    asked: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # set by every request; clear it to wait for one
    _script: deque[Behaviour] = field(default_factory=deque)
    _closing: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    @property
    def base_url(self) -> str:
        """What goes into ``ai.base_url``."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of all requests that were taken."""
        return self.prompt_tokens + self.output_tokens

    def script(self, *behaviours: Behaviour, times: int = 1) -> None:
        """Answer the next requests so, each behaviour once, the whole list ``times`` over."""
        for _ in range(times):
            self._script.extend(behaviours)

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/_requests", self._show)
        app.router.add_post("/_script", self._take_script)
        self._closing.clear()
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site.port

    async def stop(self) -> None:
        """Stop listening and cut what hangs."""
        self._closing.set()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ------------------------------------------------------------------------------------------ handlers

    async def _show(self, request: web.Request) -> web.Response:
        last = list(self.requests)[-int(request.query.get("limit", "100")) :]
        return _json(200, {
            "count": self.count,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens": self.tokens,
            "requests": [asdict(item) for item in last],
        })  # fmt: skip

    async def _take_script(self, request: web.Request) -> web.Response:
        wanted = orjson.loads(await request.read())
        times = wanted.pop("times", 1)
        if unknown := wanted.keys() - {item.name for item in fields(Behaviour)}:
            return _json(400, {"error": f"unknown: {', '.join(sorted(unknown))}"})
        self.script(Behaviour(**wanted), times=times)
        return _json(200, {"waiting": len(self._script)})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        for name in self.rejects & body.keys():
            hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            return _error(400, "unsupported_parameter", f"Unsupported parameter: '{name}'.{hint}")
        behaviour = self._script.popleft() if self._script else self.default
        text, finish = self._text(body, behaviour)
        finish = behaviour.finish or finish
        record = self._record(request, body, behaviour, text)
        if behaviour.delay_s:
            await asyncio.sleep(behaviour.delay_s)
        if behaviour.kind == "hang":
            await self._closing.wait()
        if behaviour.kind in {"hang", "drop"}:
            _cut(request)
            return web.Response(status=503)
        if (refusal := _refusal(behaviour)) is not None:
            return refusal
        usage = {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.output_tokens,
            "total_tokens": record.prompt_tokens + record.output_tokens,
        }
        if behaviour.kind == "document" or not body.get("stream"):
            return _document(behaviour, body, text, finish, usage if behaviour.usage else None)
        wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        events = _events(behaviour, body, text, finish, usage if behaviour.usage and wants_usage else None)
        return await self._stream(request, behaviour, events)

    async def _stream(
        self, request: web.Request, behaviour: Behaviour, events: list[bytes]
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        if behaviour.kind == "broken":
            await response.write(b"".join(events[: max(1, len(events) // 2)]))
            _cut(request)
            return response
        if behaviour.chunk_delay_s:
            for event in events:
                await response.write(event)
                await asyncio.sleep(behaviour.chunk_delay_s)
        else:
            await response.write(b"".join(events))
        await response.write_eof()
        return response

    def _text(self, body: dict[str, Any], behaviour: Behaviour) -> tuple[str, str]:
        """Return the answer within the bound that was asked for, and why it ends."""
        if behaviour.kind == "empty":
            return "", "stop"
        if behaviour.kind == "filtered":
            return "", "content_filter"
        if behaviour.tool_calls:
            return behaviour.text or "", "tool_calls"
        text = behaviour.text
        if text is None:
            asked = [_words(m["content"]) for m in body["messages"] if m["role"] == "user"]
            text = self.answer(asked[-1] if asked else "")
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit is None or count_tokens(text, _COUNTED_BY) <= limit:
            return text, "stop"
        while (tokens := count_tokens(text, _COUNTED_BY)) > limit:
            text = text[: len(text) * limit // tokens]
        return text, "length"

    def _record(
        self, request: web.Request, body: dict[str, Any], behaviour: Behaviour, text: str
    ) -> RecordedRequest:
        prompt = output = 0
        if behaviour.kind not in {"status", "too_long"}:
            prompt = prompt_tokens([_message_tokens(message) for message in body["messages"]])
            if "tools" in body:
                prompt += count_tokens(orjson.dumps(body["tools"]).decode(), _COUNTED_BY)
            said = "".join([behaviour.reasoning, text, *map("".join, behaviour.tool_calls)])
            output = 0 if behaviour.kind in {"html", "nothing"} else count_tokens(said, _COUNTED_BY)
        record = RecordedRequest(
            model=body.get("model", ""),
            body=body,
            authorized=request.headers.get("Authorization", ""),
            behaviour=behaviour.kind,
            prompt_tokens=prompt,
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or 0,
            output_tokens=output,
        )
        self.requests.append(record)
        self.count += 1
        self.asked.set()
        self.prompt_tokens += prompt
        self.output_tokens += output
        return record


def _words(content: str | list[dict[str, Any]]) -> str:
    """Return the words of a message, whose content may be a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _message_tokens(message: dict[str, Any]) -> int:
    """Count a message's words and calls, and its pictures by OpenAI's rule for gpt-4o."""
    content = message.get("content") or ""
    tokens = count_tokens(_words(content), _COUNTED_BY)
    for part in content if isinstance(content, list) else ():
        if part["type"] == "image_url":
            shown = part["image_url"]
            image = read_image(b64decode(shown["url"].partition(",")[2]), shown.get("detail", "high"))
            tokens += image_tokens(_COUNTED_BY, image.width, image.height, image.detail)
    for call in message.get("tool_calls") or ():
        function = call["function"]
        tokens += count_tokens(function["name"] + function["arguments"], _COUNTED_BY)
    return tokens


def _refusal(behaviour: Behaviour) -> web.Response | None:
    """Return the response of a behaviour that gives no completion at all."""
    match behaviour.kind:
        case "status":
            headers = None if behaviour.retry_after is None else {"Retry-After": behaviour.retry_after}
            return _error(behaviour.status, behaviour.code, behaviour.message, headers)
        case "too_long":
            return _error(
                400, "context_length_exceeded", "This model's maximum context length is 8192 tokens."
            )
        case "html":
            return web.Response(text="<html><body>Welcome</body></html>", content_type="text/html")
        case "nothing":
            return web.Response(content_type="text/event-stream")
        case _:
            return None


def _events(
    behaviour: Behaviour, body: dict[str, Any], text: str, finish: str, usage: dict[str, int] | None
) -> list[bytes]:
    """Return the events of a stream, framed."""
    if behaviour.kind == "not_json":
        return [b"data: {this is not JSON\n\n", b"data: [DONE]\n\n"]
    if behaviour.kind == "no_choices":
        return [b'data: {"result": "fine"}\n\n', b"data: [DONE]\n\n"]
    frame = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": body.get("model"),
    }

    def event(**more: Any) -> bytes:
        return b"data: " + orjson.dumps({**frame, **more}) + b"\n\n"

    def choice(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return event(choices=[{"index": 0, "delta": delta, "finish_reason": reason}])

    events = [choice({"role": "assistant", "content": ""})]
    thoughts = _cut_text(behaviour.reasoning, behaviour.chunks)
    events.extend(choice({"reasoning_content": piece}) for piece in thoughts)
    events.extend(choice({"content": piece}) for piece in _cut_text(text, behaviour.chunks))
    for index, call in enumerate(_tool_calls(behaviour)):
        arguments = call["function"]["arguments"]
        first = {**call, "index": index, "function": {**call["function"], "arguments": ""}}
        events.append(choice({"tool_calls": [first]}))
        events.extend(
            choice({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
            for piece in _cut_text(arguments, behaviour.chunks)
        )
    if behaviour.kind == "error_event":
        del events[max(1, len(events) // 2) :]
        events.append(b"data: " + orjson.dumps(_error_object(behaviour.code, behaviour.message)) + b"\n\n")
        return events
    events.append(choice({}, finish))
    if usage is not None:
        events.append(event(choices=[], usage=usage))
    events.append(b"data: [DONE]\n\n")
    return events


def _tool_calls(behaviour: Behaviour) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(behaviour.tool_calls)
    ]


def _cut_text(text: str, chunks: int | None) -> Iterable[str]:
    size = 8 if chunks is None else max(1, -(-len(text) // chunks))
    return (text[at : at + size] for at in range(0, len(text), size))


def _document(
    behaviour: Behaviour, body: dict[str, Any], text: str, finish: str, usage: dict[str, int] | None
) -> web.Response:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if behaviour.reasoning:
        message["reasoning_content"] = behaviour.reasoning
    if behaviour.tool_calls:
        message |= {"content": text or None, "tool_calls": _tool_calls(behaviour)}
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": _CREATED,
        "model": body.get("model"),
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    return _json(200, document if usage is None else {**document, "usage": usage})


def _error_object(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": code, "param": None}}


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return _json(status, _error_object(code, message), headers)


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=orjson.dumps(value), content_type="application/json", headers=headers
    )


def _cut(request: web.Request) -> None:
    """Cut the connection as a process does that dies."""
    if request.transport is not None:
        request.transport.abort()


async def _serve(port: int) -> None:
    async with FakeModelServer(port=port) as server:
        print(server.base_url, flush=True)  # noqa: T201 - what the caller puts into ai.base_url
        await asyncio.Event().wait()


def main() -> None:
    """Run the fake until it is interrupted."""
    parser = argparse.ArgumentParser(description="A fake OpenAI-compatible model server on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    try:
        asyncio.run(_serve(parser.parse_args().port))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
