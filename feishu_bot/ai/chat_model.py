"""The seam between the server and language models: a request in, a stream of events out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

Role = Literal["system", "user", "assistant", "tool"]
Detail = Literal["low", "high"]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture of a user's: the file, its kind (``image/png``, …), and its size in pixels."""

    data: bytes = field(repr=False)
    media_type: str
    width: int
    height: int
    detail: Detail = "high"


class ToolCall(NamedTuple):
    """A tool that the model wants to be run. ``arguments`` is JSON as the model wrote it, so it may be none."""

    id: str
    name: str
    arguments: str


class ToolSpec(NamedTuple):
    """A tool as the model is told of it; ``parameters`` is the JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


class ChatMessage(NamedTuple):
    """One message of a prompt. ``images`` go along with its words.

    An assistant's message may hold the calls it makes; a tool's message names the call that it answers.
    """

    role: Role
    content: str
    images: tuple[Image, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a model is asked.

    ``max_output_tokens`` is a hard bound that is sent to the provider; ``prompt_tokens`` is our own count of
    the messages, where it was made already. ``may_call`` False: the tools are named, since earlier messages use
    them, but the answer has to be a text. ``temperature`` None is the provider's own.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    max_output_tokens: int
    prompt_tokens: int | None = None
    tools: tuple[ToolSpec, ...] = ()
    may_call: bool = True
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """What the model wants to know before it answers; nothing follows but the usage and the end."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class ReportedUsage:
    """What the provider says the call cost, in tokens; those it had at hand are part of the input."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The stream is complete. ``reason``: stop, length, filtered or refusal (others as the provider says)."""

    reason: str


ModelEvent = TextDelta | ToolCalls | ReportedUsage | Finished


class ChatModel(Protocol):
    """Anything that answers a prompt.

    ``stream`` yields text, at most one list of calls, at most one usage, and one ``Finished`` last; every failure
    is a ``ModelError`` that says if a retry may help and if the provider may have billed.
    """

    def stream(self, request: ChatRequest) -> AsyncIterator[ModelEvent]: ...

    async def close(self) -> None: ...
