"""Models that are asked by their provider's own protocol, through pydantic-ai: Anthropic's and Google's.

The libraries are an extra (``feishu-bot[agents]``) and are imported only where such a model is configured.
"""

from __future__ import annotations

import asyncio
import time
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import orjson

from feishu_bot.ai.chat_model import Finished, ReportedUsage, TextDelta, ToolCall, ToolCalls
from feishu_bot.ai.completion import clean_reason, http_error
from feishu_bot.errors import ConfigError, ModelError
from feishu_bot.network import proxy_for, ssl_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, ModelEvent
    from feishu_bot.config import NetworkSettings

# What has to be there, and the names of model and provider in pydantic-ai.
_LIBRARIES: Final[Mapping[str, tuple[str, str, str]]] = {
    "anthropic": ("anthropic", "AnthropicModel", "AnthropicProvider"),
    "google": ("google.genai", "GoogleModel", "GoogleProvider"),
}
_ADDRESSES: Final = {
    "anthropic": "https://api.anthropic.com",
    "google": "https://generativelanguage.googleapis.com",
}
_REASONS: Final = {"length": "length", "content_filter": "filtered"}
_NOT_SENT: Final = frozenset({"ConnectError", "ConnectTimeout"})  # of httpx: there was no connection


def check_vendor(provider: str, model: str) -> None:
    """Raise ConfigError, which says what to install, where the library of ``provider`` is missing."""
    for library in ("pydantic_ai", _LIBRARIES[provider][0]):
        try:
            found = find_spec(library)
        except ModuleNotFoundError:
            found = None
        if found is None:
            install = "pip install 'feishu-bot[agents]'"
            raise ConfigError(
                [f"ai.model: {model} needs a library that is missing; install it with: {install}"]
            )


class VendorModel:
    """A ``ChatModel`` by pydantic-ai. ``timeout_s`` bounds one call from first to last byte."""

    def __init__(
        self,
        provider: str,
        base_url: str,
        api_key: str,
        *,
        timeout_s: float,
        network: NetworkSettings | None = None,
    ) -> None:
        _, model, maker = _LIBRARIES[provider]
        self._ai = import_module("pydantic_ai.messages")
        self._models = import_module("pydantic_ai.models")
        self._errors = import_module("pydantic_ai.exceptions")
        self._tool_definition: Any = import_module("pydantic_ai.tools").ToolDefinition
        self._make: Any = getattr(import_module(f"pydantic_ai.models.{provider}"), model)
        # A client of our own: pydantic-ai's is shared by the whole process, and nobody closes it.
        self._http: Any = import_module("httpx2").AsyncClient(
            timeout=timeout_s,
            proxy=proxy_for(base_url or _ADDRESSES[provider], network),
            verify=ssl_context(network),
            trust_env=False,
        )
        provider_of: Any = getattr(import_module(f"pydantic_ai.providers.{provider}"), maker)
        self._provider = provider_of(api_key=api_key, http_client=self._http, base_url=base_url or None)
        self._key = api_key
        self._timeout_s = timeout_s

    async def stream(self, request: ChatRequest) -> AsyncIterator[ModelEvent]:
        """Yield the answer as it comes; every failure is a ModelError."""
        ends = asyncio.get_running_loop().time() + self._timeout_s
        settings: dict[str, Any] = {
            "max_tokens": request.max_output_tokens, "timeout": self._timeout_s, "max_retries": 0,
        }  # fmt: skip
        if request.temperature is not None:
            settings["temperature"] = request.temperature
        if request.tools and not request.may_call:
            settings["tool_choice"] = "none"
        tools = [
            self._tool_definition(
                name=t.name, description=t.description, parameters_json_schema=dict(t.parameters)
            )
            for t in request.tools
        ]
        parameters = self._models.ModelRequestParameters(function_tools=tools)
        model = self._make(request.model, provider=self._provider)
        began = False
        opened = model.request_stream(self._messages(request.messages), settings, parameters)
        try:
            async with asyncio.timeout_at(ends):
                response = await opened.__aenter__()
            try:
                events = aiter(response)
                while True:
                    async with asyncio.timeout_at(ends):
                        event = await anext(events, None)
                    if event is None:
                        break
                    began = True
                    text = self._text_of(event)
                    if text:
                        yield TextDelta(text)
            finally:
                await opened.__aexit__(None, None, None)
            for last in self._closing(response):
                yield last
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a library raises is a model's failure
            raise self._failure(error, began=began) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # --------------------------------------------------------------------------------------- what is asked

    def _messages(self, messages: tuple[ChatMessage, ...]) -> list[Any]:
        """Return a prompt as pydantic-ai has it: what is said to the model, and its answers, in turn."""
        out: list[Any] = []
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        for message in messages:
            if message.role == "assistant":
                parts = [self._ai.TextPart(message.content)] if message.content.strip() else []
                parts += [
                    self._ai.ToolCallPart(c.name, _object(c.arguments), tool_call_id=c.id)
                    for c in message.tool_calls
                ]
                out.append(self._ai.ModelResponse(parts=parts))
                continue
            part = self._said(message, names)
            if out and isinstance(out[-1], self._ai.ModelRequest):
                out[-1] = self._ai.ModelRequest(parts=[*out[-1].parts, part])
            else:
                out.append(self._ai.ModelRequest(parts=[part]))
        return out

    def _said(self, message: ChatMessage, names: Mapping[str, str]) -> Any:
        if message.role == "system":
            return self._ai.SystemPromptPart(message.content)
        if message.role == "tool" and message.tool_call_id in names:
            name = names[message.tool_call_id or ""]
            return self._ai.ToolReturnPart(name, message.content, tool_call_id=message.tool_call_id)
        words = f"[tool result]\n{message.content}" if message.role == "tool" else message.content
        if not message.images:
            return self._ai.UserPromptPart(words)
        shown = [self._ai.BinaryContent(image.data, media_type=image.media_type) for image in message.images]
        return self._ai.UserPromptPart([*([words] if words.strip() else []), *shown])

    # -------------------------------------------------------------------------------------- what is answered

    def _text_of(self, event: Any) -> str:
        """Return the text that an event brings; thoughts and calls are not the answer's."""
        part = getattr(event, "part", None)
        if getattr(event, "event_kind", "") == "part_start" and isinstance(part, self._ai.TextPart):
            return str(part.content)
        delta = getattr(event, "delta", None)
        return str(delta.content_delta) if isinstance(delta, self._ai.TextPartDelta) else ""

    def _closing(self, response: Any) -> list[ModelEvent]:
        last: list[ModelEvent] = []
        whole = response.get()
        calls = [
            ToolCall(part.tool_call_id, part.tool_name, part.args_as_json_str())
            for part in whole.parts
            if isinstance(part, self._ai.ToolCallPart)
        ]
        if calls:
            last.append(ToolCalls(tuple(calls)))
        used = response.usage
        used = used() if callable(used) else used
        if used.input_tokens + used.output_tokens > 0:
            cached = min(used.cache_read_tokens, used.input_tokens)
            last.append(ReportedUsage(used.input_tokens, used.output_tokens, cached_tokens=cached))
        reason = response.finish_reason or "stop"
        return [*last, Finished(_REASONS.get(reason, reason))]

    def _failure(self, error: Exception, *, began: bool) -> ModelError:
        """Return what a failure means, above all whether the call may have been billed."""
        errors, name = self._errors, type(error).__name__
        if isinstance(error, errors.ModelHTTPError):
            body = error.body if isinstance(error.body, dict) else {"error": str(error.body or "")}
            found = http_error(
                error.status_code,
                {key.title(): value for key, value in (error.headers or {}).items()},
                orjson.dumps(body, default=str),
                now=time.time(),
                secret=self._key,
            )
            found.outcome_unknown = found.outcome_unknown or began
            return found
        reason = clean_reason(f"{name}: {error}", self._key)
        if isinstance(error, errors.ContentFilterError):
            return ModelError("filtered", "the provider's filter left no answer", outcome_unknown=True)
        if isinstance(error, TimeoutError | errors.ModelTimeoutError):
            return ModelError("timeout", "no complete answer in time", retry=True, outcome_unknown=True)
        causes: list[str] = []
        cause: BaseException | None = error
        while cause is not None and len(causes) < 10:  # noqa: PLR2004  # a chain, not a ring
            causes.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, errors.ModelAPIError | OSError) or not _NOT_SENT.isdisjoint(causes):
            sent = began or _NOT_SENT.isdisjoint(causes)
            return ModelError("unavailable", reason, retry=True, outcome_unknown=sent)
        return ModelError("nonsense", reason, outcome_unknown=True)


def _object(arguments: str) -> dict[str, Any]:
    """Return arguments as these providers want them: an object, whatever the model wrote then."""
    try:
        found = orjson.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
