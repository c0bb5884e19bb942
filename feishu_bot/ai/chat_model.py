"""The seam between the server and language models: a request in, a stream of events out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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


class ChatMessage(NamedTuple):
    """One message of a prompt. ``images`` go along with its words."""

    role: Role
    content: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a model is asked.

    ``max_output_tokens`` is a hard bound that is sent to the provider; ``prompt_tokens`` is our own count of
    the messages, where it was made already.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    max_output_tokens: int
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReportedUsage:
    """What the provider says the call cost, in tokens."""

    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The stream is complete. ``reason``: stop, length or filtered (others as the provider says)."""

    reason: str


ModelEvent = TextDelta | ReportedUsage | Finished


class ChatModel(Protocol):
    """Anything that answers a prompt.

    ``stream`` yields text, at most one usage, and one ``Finished`` last; every failure is a ``ModelError``
    that says if a retry may help and if the provider may have billed.
    """

    def stream(self, request: ChatRequest) -> AsyncIterator[ModelEvent]: ...

    async def close(self) -> None: ...
