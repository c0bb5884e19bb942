"""What an OpenAI-compatible server sends back, read into text, usage and errors. No I/O."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

import orjson

from feishu_bot.ai.chat_model import Finished, ReportedUsage, TextDelta, ToolCall, ToolCalls
from feishu_bot.ai.sse import MAX_EVENT_BYTES, EventSplitter, EventTooLarge
from feishu_bot.ai.thoughts import Thoughts
from feishu_bot.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from feishu_bot.ai.chat_model import ModelEvent

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024  # of one answer with all its framing
MAX_CALLS: Final = 128  # of tools, in one answer
_MAX_REASON_CHARS: Final = 200

_TOO_LONG: Final = re.compile(
    r"context.{0,3}(length|window|size)|maximum (context|prompt|input)|(prompt|input) is too long"
    r"|too many (input |prompt )?tokens|(prompt|input|messages?)\b.{0,60}\bexceed|model token limit"
    r"|range of input length|reduce the length|超长|上下文",
    re.IGNORECASE,
)
_FILTERED: Final = re.compile(
    r"content.?(filter|policy|management)|data.?inspection|inappropriate content|sensitive content|敏感",
    re.IGNORECASE,
)
_NO_CREDIT: Final = re.compile(
    r"insufficient.?(quota|balance|funds)|exceeded_current_quota|余额", re.IGNORECASE
)
_GATEWAY_GAVE_UP: Final = frozenset({504, 524})
_REASONS: Final = {
    "stop": "stop",
    "eos": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "filtered",
    "sensitive": "filtered",
}


class Completion:
    """An answer on its way: fed with bytes, it gives text.

    A stream of events and one JSON document are told apart by the content type, or by the first byte where
    that says nothing. Every method raises ModelError for what cannot be an answer.
    """

    def __init__(self, content_type: str, *, secret: str = "") -> None:
        self.done = False  # the stream said so, or the document is complete
        self._secret = secret
        self._splitter: EventSplitter | None = (
            EventSplitter() if content_type == "text/event-stream" else None
        )
        self._document: list[bytes] = []
        self._received = 0
        self._texts: list[str] = []
        self._any_text = False
        self._calls = _Calls()
        self._thoughts = Thoughts()
        self._any_choice = False
        self._any_event = False
        self._reason: str | None = None
        self._refused = False  # in the model's own words
        self._usage: ReportedUsage | None = None
        self._half: str | None = None  # first half of a surrogate pair that waits; None: never seen one

    def feed(self, piece: bytes) -> str:
        """Return the text that ``piece`` brings, ``""`` if none."""
        self._received += len(piece)
        if self._received > MAX_ANSWER_BYTES:
            raise _nonsense("the answer has no end")
        if self._splitter is None:
            if self._document or not self._is_stream(piece):
                if piece.strip() or self._document:
                    self._document.append(piece)
                if self._received > MAX_EVENT_BYTES:
                    raise _nonsense("the answer is too large")
                return ""
            self._splitter = EventSplitter()
        try:
            events = self._splitter.feed(piece)
        except EventTooLarge as error:
            raise _nonsense(str(error)) from None
        return self._take_all(events)

    def finish(self) -> str:
        """Return what is left when the connection has ended; the broken end of a stream is an error."""
        if self._splitter is None:
            return self._take_document()
        text = self._take_all(self._splitter.finish())
        if self.done or self._reason is not None:
            self.done = True
            return text
        if not self._any_event:
            raise _nonsense("an empty body")
        raise ModelError("unavailable", "the stream broke off", retry=True, outcome_unknown=True)

    def closing(self) -> Iterator[ModelEvent]:
        """Give what follows the text, and its end if that had to wait: the tools that are called, the usage if it was reported, why the answer ended."""
        rest = self._thoughts.finish()
        if rest:
            self._any_text = True
            yield TextDelta(rest)
        calls = self._calls.whole()
        if calls:
            yield ToolCalls(calls)
        if self._usage is not None:
            yield self._usage
        elif not (self._any_text or calls or self._reason == "filtered"):
            raise _nonsense("an empty answer" if self._any_choice else "no choices")
        yield Finished("refusal" if self._refused else self._reason or "stop")

    @staticmethod
    def _is_stream(piece: bytes) -> bool:
        head = piece.lstrip()
        return bool(head) and head[:1] not in b"{[<"

    def _take_all(self, events: list[bytes]) -> str:
        for data in events:
            self._take(data)
        if not self._texts:
            return ""
        text = self._texts[0] if len(self._texts) == 1 else "".join(self._texts)
        self._texts.clear()
        if self._half is not None:
            text = self._mend(text)
        text = self._thoughts.feed(text)
        if text:
            self._any_text = True
        return text

    def _take(self, data: bytes) -> None:
        if len(data) < 16 and (not (word := data.strip()) or word == b"[DONE]"):  # noqa: PLR2004 - " [DONE]" and blanks
            self.done = self.done or bool(word)
            return
        self._any_event = True
        event = self._parse(data)
        try:
            if event.get("error"):
                raise self._error(event["error"])
            if choices := event.get("choices"):
                self._any_choice = True
                self._take_choice(choices[0])
            if usage := event.get("usage"):
                self._take_usage(usage)
        except (AttributeError, TypeError, KeyError, IndexError):
            raise _nonsense("JSON of another shape") from None

    def _take_choice(self, choice: dict[str, Any]) -> None:
        message = choice.get("delta") or choice.get("message") or {}
        text = message.get("content")
        if not text and (text := message.get("refusal")):
            self._refused = True
        if text:
            if not isinstance(text, str):  # a list of parts, as Mistral sends it
                text = "".join(part["text"] for part in text if part.get("type") == "text")
            self._texts.append(text)
        if calls := message.get("tool_calls"):
            for call in calls:
                self._calls.take(call)
        if reason := choice.get("finish_reason"):
            if reason == "error":
                raise self._error(choice.get("error") or {})
            self._reason = _REASONS.get(reason, str(reason))
        if usage := choice.get("usage"):  # where Moonshot puts it
            self._take_usage(usage)

    def _take_usage(self, usage: dict[str, Any]) -> None:
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        # Some servers count up from chunk to chunk, so the last one holds; zeros stand for "not counted".
        if type(prompt) is int and type(output) is int and min(prompt, output) >= 0 and prompt + output > 0:
            cached = _detail(usage, "prompt_tokens_details", "cached_tokens")
            for name in ("prompt_cache_hit_tokens", "cached_tokens"):  # DeepSeek's and Moonshot's own places
                cached = cached or _count(usage.get(name))
            reasoning = _detail(usage, "completion_tokens_details", "reasoning_tokens")
            self._usage = ReportedUsage(prompt, output, min(cached, prompt), min(reasoning, output))

    def _take_document(self) -> str:
        body = b"".join(self._document)
        if not body.strip():
            raise _nonsense("an empty body")
        self._take(body)
        self.done = True
        return self._take_all([])

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            event = orjson.loads(data)
        except ValueError:
            # orjson refuses half surrogate pairs; a server that cuts text by UTF-16 units sends them.
            try:
                event = json.loads(data)
            except (ValueError, RecursionError):
                raise _nonsense("not JSON") from None
            self._half = self._half or ""
        if not isinstance(event, dict):
            raise _nonsense("JSON of another shape")
        return event

    def _mend(self, text: str) -> str:
        """Join the halves of surrogate pairs, also over the seam between two pieces."""
        text = (self._half or "") + text
        self._half = ""
        if "\ud800" <= text[-1:] <= "\udbff":
            self._half = text[-1]
            text = text[:-1]
        return _whole(text)

    def _error(self, error: object) -> ModelError:
        """Return the error that the stream carries: the call was taken, so it may have been billed."""
        code, message = _error_words(error)
        status = int(code) if code.isascii() and code.isdigit() and len(code) == 3 else 500  # noqa: PLR2004 - an HTTP status
        kind, retry = _classify(status, code, message)
        return ModelError(
            kind,
            clean_reason(f"in the stream: {message or code}", self._secret),
            retry=retry,
            outcome_unknown=self._any_text or bool(self._texts) or kind != "too_long",
        )


class _Calls:
    """The tools that an answer calls, put together from their pieces."""

    def __init__(self) -> None:
        self._found: list[list[str]] = []  # id, name, arguments
        self._by_index: dict[object, list[str]] = {}

    def take(self, piece: dict[str, Any]) -> None:
        """Take a call or the next piece of one. Some servers number all of them 0, or none."""
        function = piece.get("function") or {}
        call_id, name, arguments = (
            piece.get("id") or "",
            function.get("name") or "",
            function.get("arguments"),
        )
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):  # the object itself, as Ollama's own face gives it
            arguments = orjson.dumps(arguments).decode()
        if not (isinstance(call_id, str) and isinstance(name, str)):
            raise TypeError("a call without a name")
        index = piece.get("index")
        known = self._by_index.get(index) if index is not None else None if call_id else self._last()
        if known is None or (call_id and known[0] and call_id != known[0]):
            if len(self._found) >= MAX_CALLS:
                raise _nonsense("an answer that calls too many tools")
            known = ["", "", ""]
            self._found.append(known)
            if index is not None:
                self._by_index[index] = known
        known[0] = known[0] or call_id
        known[1] = known[1] or name
        known[2] += arguments

    def _last(self) -> list[str] | None:
        return self._found[-1] if self._found else None

    def whole(self) -> tuple[ToolCall, ...]:
        """Return the calls in their order, each with an id of its own."""
        return tuple(
            ToolCall(_whole(call_id) or f"call_{n}", _whole(name), _whole(arguments))
            for n, (call_id, name, arguments) in enumerate(self._found)
        )


def _whole(text: str) -> str:
    """Return ``text`` without halves of surrogate pairs, which nothing can store or send."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _detail(usage: dict[str, Any], place: str, name: str) -> int:
    details = usage.get(place)
    return _count(details.get(name)) if isinstance(details, dict) else 0


def _count(value: object) -> int:
    """Return a count that a server may leave out, or null."""
    return value if type(value) is int and value > 0 else 0


def http_error(
    status: int, headers: Mapping[str, str], body: bytes, *, now: float, secret: str = ""
) -> ModelError:
    """Return what an HTTP status other than 2xx means; ``now`` is Unix seconds, ``secret`` is kept out of it."""
    try:
        data = orjson.loads(body)
    except ValueError:
        data = None
    if isinstance(data, list) and data:  # Google's OpenAI face wraps the object
        data = data[0]
    code, message = _error_words(data.get("error") or data) if isinstance(data, dict) else ("", "")
    kind, retry = _classify(status, code, message)
    if status in {401, 403}:  # the server may quote the key
        message = ""
    return ModelError(
        kind,
        clean_reason(f"HTTP {status}" + (f": {message or code}" if message or code else ""), secret),
        retry=retry,
        # A gateway that gave up waiting does not know what the server behind it did.
        outcome_unknown=status in _GATEWAY_GAVE_UP,
        after_s=retry_after(headers, now=now) if retry else None,
    )


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), or None."""
    for name, unit in (("retry-after-ms", 1000.0), ("Retry-After", 1.0)):
        value = headers.get(name, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = (
                    parsedate_to_datetime(value).replace(tzinfo=UTC).timestamp() - now
                )  # HTTP knows GMT only
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def clean_reason(text: str, secret: str) -> str:
    """Return ``text`` as one bounded line without the secret."""
    if secret:
        text = text.replace(secret, "***")
    return " ".join(text.split())[:_MAX_REASON_CHARS]


def _error_words(error: object) -> tuple[str, str]:
    """Return code and message of an error object, in whichever of the usual shapes it comes."""
    if isinstance(error, str):
        return "", error
    if not isinstance(error, dict):
        return "", ""
    code = error.get("code") or error.get("type") or ""
    message = error.get("message") or error.get("msg") or error.get("detail") or ""
    return str(code), message if isinstance(message, str) else orjson.dumps(message).decode()


def _classify(status: int, code: str, message: str) -> tuple[str, bool]:
    """Return the kind of an error and whether the same call may succeed later."""
    words = f"{code} {message}"
    kind, retry = "refused", False
    if _NO_CREDIT.search(words):
        pass
    elif status == 429 or code in {"rate_limit_exceeded", "rate_limit_error"}:  # noqa: PLR2004 - Too Many Requests
        kind, retry = "rate_limited", True
    elif status in {401, 403, 404}:
        pass
    elif status == 413 or _TOO_LONG.search(words):  # noqa: PLR2004 - Content Too Large
        kind = "too_long"
    elif _FILTERED.search(words):
        kind = "filtered"
    elif status >= 500 or status in {408, 409, 425}:  # noqa: PLR2004 - the server's own failures
        kind, retry = ("timeout" if status in _GATEWAY_GAVE_UP else "unavailable"), True
    return kind, retry


def _nonsense(reason: str) -> ModelError:
    return ModelError("nonsense", reason, outcome_unknown=True)
