"""A client for every server that speaks OpenAI's ``/chat/completions``, streaming."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
from yarl import URL

from feishu_bot.ai.chat_model import TextDelta
from feishu_bot.ai.completion import Completion, clean_reason, http_error
from feishu_bot.errors import ConfigError, ModelError
from feishu_bot.network import proxy_for, ssl_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, Image, ModelEvent
    from feishu_bot.config import NetworkSettings, Secrets

OPENAI_HOST: Final = "api.openai.com"
_CONNECT_S: Final = 10.0
# Below the five seconds after which uvicorn, and so vLLM, closes an idle connection: a request that is sent
# into a closing connection has an unknown outcome and is booked at its whole reservation.
_KEEPALIVE_S: Final = 4.0
_END_OF_STREAM_S: Final = (
    0.05  # after "[DONE]", for the end of the body that lets the connection be used again
)
_ERROR_BODY_BYTES: Final = 65_536
_ERROR_BODY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What a server understands. All is learnt from its refusals and kept per model."""

    limit: str = "max_tokens"  # OpenAI's newer models take "max_completion_tokens" only
    usage: bool = True  # "stream_options"
    temperature: bool = True  # reasoning models have their own


class OpenAICompatible:
    """A ``ChatModel`` over HTTP. ``ChatRequest.model`` is the provider's own name of the model.

    ``timeout_s`` bounds one call from first to last byte. The first of several keys is used. Loopback is never
    reached through a proxy. Raises ConfigError for a URL, key or certificate file that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | Sequence[str] | Secrets | None = None,
        *,
        timeout_s: float = 60.0,
        network: NetworkSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = _completions_url(base_url)
        self._key = _first_key(api_key)
        self._timeout_s = timeout_s
        self._proxy = proxy_for(str(self._url), network)
        self._ssl = ssl_context(network)
        self._clock = clock
        self._default = _Dialect("max_completion_tokens" if self._url.host == OPENAI_HOST else "max_tokens")
        self._dialects: dict[str, _Dialect] = {}
        self._headers = {
            "Accept": "text/event-stream, application/json",
            "Content-Type": "application/json",
            "User-Agent": "feishu-bot",
        }
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._session: aiohttp.ClientSession | None = None

    async def stream(self, request: ChatRequest) -> AsyncIterator[ModelEvent]:
        """Yield the answer as it comes; every failure is a ModelError.

        A server that refuses an optional parameter by name is asked again without it, within the same time.
        """
        session = self._session or self._open()
        ends = time.monotonic() + self._timeout_s
        dialect = self._dialects.get(request.model, self._default)
        tried = {dialect}
        while True:
            try:
                async with session.post(
                    self._url,
                    data=_body(request, dialect),
                    timeout=_timeout(max(0.001, ends - time.monotonic())),
                    proxy=self._proxy,
                    allow_redirects=False,
                ) as response:
                    if response.status // 100 == 2:  # noqa: PLR2004 - success
                        completion = Completion(response.content_type, secret=self._key)
                        content = response.content
                        while not completion.done:
                            piece = await content.readany()
                            text = completion.feed(piece) if piece else completion.finish()
                            if text:
                                yield TextDelta(text)
                            if not piece:
                                break
                        for event in completion.closing():
                            yield event
                        await _drain(content)
                        return
                    body = await _error_body(response)
            except (aiohttp.ClientError, OSError) as error:
                raise _failure(error, self._key) from None
            other = _other_dialect(response.status, body, dialect)
            if other is None or other in tried:
                raise http_error(response.status, response.headers, body, now=self._clock(), secret=self._key)
            tried.add(other)
            dialect = self._dialects[request.model] = other

    async def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            # How many calls run at once is decided by who asks; a wait for a connection would eat their time.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=self._ssl),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            trust_env=False,
        )
        return self._session


def _completions_url(base_url: str) -> URL:
    path = "/chat/completions"
    try:
        url = URL(base_url.strip().rstrip("/").removesuffix(path) + path)
    except ValueError:
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(["ai.base_url: expected a URL such as https://host/v1"])
    if url.user or url.password:
        raise ConfigError(["ai.base_url: credentials belong into ai.api_key"])
    return url


def _first_key(api_key: str | Sequence[str] | Secrets | None) -> str:
    if api_key is None or isinstance(api_key, str):
        key = api_key or ""
    else:
        values = api_key.values() if hasattr(api_key, "values") else api_key
        key = next((value for value in values if value), "")
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(["ai.api_key: expected printable ASCII characters"])
    return key


def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    # The connection has to stand well before the whole time is over: what ends by ``total`` was sent.
    return aiohttp.ClientTimeout(total=total_s, connect=min(_CONNECT_S, total_s * 0.8))


def _body(request: ChatRequest, dialect: _Dialect) -> bytes:
    body: dict[str, Any] = {
        "model": request.model,
        "messages": list(map(_message, request.messages)),
        dialect.limit: request.max_output_tokens,
        "stream": True,
    }
    if dialect.usage:
        body["stream_options"] = {"include_usage": True}
    if dialect.temperature and request.temperature is not None:
        body["temperature"] = request.temperature
    if request.tools:
        body["tools"] = [{"type": "function", "function": tool._asdict()} for tool in request.tools]
        if not request.may_call:
            body["tool_choice"] = "none"
    try:
        return orjson.dumps(body)
    except TypeError:  # half surrogate pairs, which JSON in UTF-8 cannot hold
        return orjson.dumps(_without_halves(body))


def _message(message: ChatMessage) -> dict[str, Any]:
    """Return a message as it travels. A tool's result that answers no call is said by the user: bare it is refused."""
    if message.role == "tool":
        if message.tool_call_id is None:
            return {"role": "user", "content": f"[tool result]\n{message.content}"}
        return {"role": "tool", "tool_call_id": message.tool_call_id, "content": message.content}
    if message.tool_calls:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        return {"role": message.role, "content": message.content or None, "tool_calls": calls}
    if not message.images:
        return {"role": message.role, "content": message.content}
    words = message.content
    parts: list[dict[str, Any]] = [{"type": "text", "text": words}] if words.strip() else []
    return {"role": message.role, "content": parts + list(map(_picture, message.images))}


def _picture(image: Image) -> dict[str, Any]:
    url = f"data:{image.media_type};base64,{b64encode(image.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": image.detail}}


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return _whole(value)
    if isinstance(value, dict):
        return {_without_halves(key): _without_halves(item) for key, item in value.items()}
    return [_without_halves(item) for item in value] if isinstance(value, list) else value


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _other_dialect(status: int, body: bytes, dialect: _Dialect) -> _Dialect | None:
    """Return what to try instead when the server refuses a parameter by its name."""
    if status not in {400, 422}:
        return None
    if dialect.usage and b"stream_options" in body:
        return replace(dialect, usage=False)
    if dialect.temperature and b"temperature" in body:
        return replace(dialect, temperature=False)
    if dialect.limit == "max_tokens" and b"max_completion_tokens" in body:
        return replace(dialect, limit="max_completion_tokens")
    if dialect.limit == "max_completion_tokens" and b"max_completion_tokens" in body:
        return replace(dialect, limit="max_tokens")
    return None


async def _error_body(response: aiohttp.ClientResponse) -> bytes:
    """Return the beginning of an error's body; what the status says holds even if the body never ends."""
    pieces = b""
    with suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_ERROR_BODY_S):
            while len(pieces) < _ERROR_BODY_BYTES and (piece := await response.content.readany()):
                pieces += piece
    return pieces[:_ERROR_BODY_BYTES]


async def _drain(content: aiohttp.StreamReader) -> None:
    """Wait shortly for the end of the body, without which the connection cannot be used again."""
    if not content.is_eof():
        with suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_END_OF_STREAM_S):
                await content.readany()


def _failure(error: Exception, secret: str) -> ModelError:
    """Return what a failed exchange means, above all whether the request can have reached the server."""
    name = type(error).__name__
    match error:
        case aiohttp.ConnectionTimeoutError():
            return ModelError("unavailable", "no connection in time", retry=True)
        case aiohttp.ClientConnectorError():  # DNS, refused, certificates, the proxy
            reason = getattr(error.os_error, "strerror", None) or name
            return ModelError("unavailable", f"no connection: {clean_reason(reason, secret)}", retry=True)
        case aiohttp.ClientHttpProxyError():
            return ModelError("unavailable", f"the proxy answered {error.status}", retry=True)
        case TimeoutError():
            return ModelError("timeout", "no complete answer in time", retry=True, outcome_unknown=True)
        case aiohttp.ClientResponseError() | ValueError():
            return ModelError("nonsense", f"not HTTP: {name}", outcome_unknown=True)
        case _:
            return ModelError("unavailable", f"broken connection: {name}", retry=True, outcome_unknown=True)
