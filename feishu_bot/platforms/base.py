"""The seam between the server and a chat platform: one abstract class, one file per platform.

A platform verifies, decrypts and normalises what arrives (``receive``: no I/O, so it can be tested with bytes)
and sends one part at a time (``send``). Everything between is the pipeline's.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from feishu_bot import platforms
from feishu_bot.config import NetworkSettings, PlatformSettings
from feishu_bot.errors import BadPayload, Undeliverable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from feishu_bot.model import Attachment, InboundMessage, Outgoing, Target


@dataclass(frozen=True, slots=True)
class WebhookRequest:
    """What a platform posted. ``headers`` looks names up without regard to case; ``now`` is Unix seconds."""

    method: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    now: float


@dataclass(frozen=True, slots=True)
class Received:
    """What a request means: the messages to record, and the response to give once they are committed."""

    messages: tuple[InboundMessage, ...] = ()
    body: bytes = b"{}"
    status: int = 200
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class SocketRequest:
    """What a client asked for a WebSocket with. ``headers`` looks names up without regard to case."""

    headers: Mapping[str, str]
    query: Mapping[str, str]


class Socket(ABC):
    """A WebSocket that a platform's client has opened to us. Pings and their answers are the door's."""

    @abstractmethod
    async def receive(self) -> str | bytes | None:
        """Return the next frame, None once the socket is closed."""

    @abstractmethod
    async def send(self, text: str) -> None:
        """Send a text frame. Raises ConnectionError when the socket is closed; the frame may be lost then."""

    @abstractmethod
    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close it; whoever waits in ``receive`` gets None. May be called more than once."""


@dataclass(frozen=True, slots=True)
class PlatformContext:
    """What the server hands to a platform.

    ``identified`` is called when the bot's own id has become known, so that waiting mentions are judged.
    ``require_at_in_groups``: True: the text of what is not addressed is dropped on arrival; False: it is
    answered too, so it is kept.
    ``connected`` is called with the account's name when a way to send is open again, so that replies that wait
    for it go out at once.
    """

    network: NetworkSettings = field(default_factory=NetworkSettings)
    language: str = "zh"
    require_at_in_groups: bool = True
    identified: Callable[[], None] = lambda: None
    connected: Callable[[str], None] = lambda _account: None


class Platform(ABC):
    """A platform account: one per entry of ``platforms`` in the configuration."""

    name: ClassVar[str]  # the type, as in the configuration's ``type``
    settings_type: ClassVar[type[PlatformSettings]]
    pull: ClassVar[bool] = False  # answers are fetched from the record by the asker; nothing is sent
    max_part_chars: ClassVar[int | None] = None  # the platform's own limit on one message, in characters
    max_part_bytes: ClassVar[int | None] = None  # the same in UTF-8 bytes
    max_parts: ClassVar[int | None] = None  # how many messages may answer one, see ``parts_to``
    idempotent_for_s: ClassVar[float | None] = None  # how long equal keys are folded; None: for ever
    has_reply_window: ClassVar[bool] = False  # messages have a reply_before_ms; a note warns before it
    shows_typing: ClassVar[bool] = False  # it can be shown that an answer is being made
    shows_both: ClassVar[bool] = False  # that, and the answer while it is written
    takes_calls: ClassVar[bool] = False  # plugins may make calls of the platform's own API
    fetches: ClassVar[frozenset[str]] = frozenset()  # kinds of attachments that ``fetch`` can get

    def __init__(self, account: str, settings: Any, context: PlatformContext) -> None:
        self.account = account
        self.settings = settings
        self.context = context

    @abstractmethod
    def receive(self, request: WebhookRequest) -> Received:
        """Verify, decrypt and normalise one request. No I/O.

        Raises BadSignature, BadToken or BadPayload; nothing else may leave for any input.
        """

    @abstractmethod
    async def send(self, outgoing: Outgoing) -> str | None:
        """Send one part and return the platform's id of it. Raises RetryLater or Undeliverable."""

    def reaches(self, target: Target) -> bool:  # noqa: ARG002  # the signature for those who have a socket
        """Say whether a client connected to this very process can send to a target now.

        Parts that other processes could not send for want of a client are then sent by this one.
        """
        return False

    async def call(self, action: str, params: Mapping[str, Any], *, self_id: str = "") -> Any:  # noqa: ARG002  # as above
        """Make a call of the platform's own API, for a plugin, and return what it answers.

        Only where ``takes_calls``. ``self_id``: by which bot, where the account has several. Raises RetryLater or
        Undeliverable.
        """
        raise Undeliverable("plugins cannot make calls on this platform")

    @property
    def has_webhook(self) -> bool:
        """Whether ``/webhook/{account}`` is open; without it the path does not exist."""
        return not self.pull

    @property
    def has_socket(self) -> bool:
        """Whether ``/ws/{account}`` is open; without it the path does not exist."""
        return False

    def admit(self, request: SocketRequest) -> Any:  # noqa: ARG002  # the signature for those who have one
        """Return who asks for a WebSocket, for ``accept``; nothing is upgraded before. No I/O. Raises Refused."""
        raise BadPayload("this platform has no socket")

    async def accept(
        self, socket: Socket, caller: Any, record: Callable[[Sequence[InboundMessage]], Awaitable[None]]
    ) -> None:
        """Serve a socket until it is closed.

        ``record`` takes over events, in order, to bring them on disk; it waits while too many are not yet.
        """

    def parts_to(self, target: Target) -> int | None:  # noqa: ARG002  # the signature for those who differ
        """Return how many messages an answer to a target may have; a longer one is shortened. None: any number."""
        return self.max_parts

    def recorded(self, messages: Sequence[InboundMessage]) -> None:
        """Take notice that what came by the webhook is on disk, once for each time it came. Must not wait."""

    async def start(self) -> None:
        """Open connections and begin to ask for the bot's own id. Must not wait for the platform."""

    async def stop(self) -> None:
        """Close what ``start`` opened."""

    def judge(self, message: InboundMessage) -> InboundMessage | None:
        """Decide a message whose ``addressed`` is None; return None while the bot's own id is unknown.

        One with ``quotes_bot`` replies to the bot, and is meant for it.
        """
        return message

    async def fetch(self, message: InboundMessage, attachment: Attachment, *, max_bytes: int) -> bytes:  # noqa: ARG002  # as above
        """Return an attachment of a message: an image or a file, of the kinds in ``fetches``.

        Only from the platform's own server or a public HTTPS address, within some seconds. Raises RetryLater or
        Undeliverable, also for one that is larger than ``max_bytes``.
        """
        raise Undeliverable(f"{attachment.kind}: this platform gives none")

    async def show_typing(self, target: Target) -> str | None:  # noqa: ARG002  # the signature for those who have it
        """Show that an answer to ``target.reply_to`` is being made; return what ``hide_typing`` takes it back by.

        Asked only where ``shows_typing``. Raises RetryLater or Undeliverable, which nobody minds.
        """
        return None

    async def hide_typing(self, target: Target, shown: str) -> None:
        """Take back what ``show_typing`` has shown. Raises RetryLater or Undeliverable, which nobody minds."""

    def shows_text(self, target: Target) -> float | None:  # noqa: ARG002  # as above
        """Return how many seconds must lie between two calls of ``show_text``; None where there is none."""
        return None

    async def show_text(self, target: Target, text: str) -> str | None:  # noqa: ARG002  # as above
        """Show how far the answer to ``target.reply_to`` is, in place of what was shown before.

        Returns what any process can finish it by (``Outgoing.stream``), or take it back by (``drop_text``); nothing
        is to be seen before that was returned once, so that it is on record. None: only this process can.

        What ``send`` brings later takes its place; if it does not, the process that has shown it has died, or the
        platform does not want it, and ``send`` brings the whole answer all the same. Raises RetryLater or
        Undeliverable, which nobody minds.
        """
        return None

    async def drop_text(self, target: Target, stream: str) -> None:
        """Take back what ``show_text`` has shown and nobody finishes. Raises RetryLater or Undeliverable."""

    async def check(self) -> str:
        """Ask the platform whether our credentials are good, without ``start``; return in words who we are.

        An empty text: there is nothing to ask. Raises RetryLater or Undeliverable with the reason.
        """
        return ""

    def problems(self) -> list[str]:
        """Return what is wrong with this account now, in words for ``/readyz``; empty if nothing is."""
        return []


class PullSettings(PlatformSettings):
    """Settings of a platform that is a door of the server's own: it needs none, and is on."""

    builtin: ClassVar[dict[str, Any]] = {"enabled": True}


class PullPlatform(Platform):
    """Has no webhook and sends nothing: answers are read from the record by whoever asked."""

    settings_type = PullSettings
    pull = True

    def receive(self, request: WebhookRequest) -> Received:  # noqa: ARG002  # the platform's signature
        raise BadPayload(f"the platform {self.name} has no webhook")

    async def send(self, outgoing: Outgoing) -> str | None:  # noqa: ARG002  # the platform's signature
        return None


def parse_json(body: bytes) -> Any:
    """Parse a request body; raise BadPayload for anything that is not JSON, or nested too deeply."""
    try:
        return orjson.loads(body)
    except ValueError as error:  # orjson limits the depth itself
        raise BadPayload(f"not JSON: {str(error)[:80]}") from None


def text_of(value: object) -> str:
    """Return ``value`` if it is a text, without NUL (which PostgreSQL cannot hold); anything else is ``""``."""
    if not isinstance(value, str):
        return ""
    return value.replace("\0", "") if "\0" in value else value


_ACTION = re.compile(r"(GET|POST|PUT|PATCH|DELETE) (/[!-~]*)")


def split_action(action: str) -> tuple[str, str]:
    """Return method and path of a plugin's call such as ``POST /v2/…``. Raises Undeliverable for anything else."""
    match = _ACTION.fullmatch(action)
    if match is None or match[2].startswith("//"):
        raise Undeliverable("a call is written as METHOD /path, e.g. POST /v2/…")
    return match[1], match[2]


def platform_types() -> dict[str, type[Platform]]:
    """Find every platform of this package by its ``name``: a new platform is one new file."""
    found: dict[str, type[Platform]] = {}
    for info in pkgutil.iter_modules(platforms.__path__, platforms.__name__ + "."):
        if info.name == __name__:  # here is only what they share
            continue
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if not inspect.isclass(value) or value.__module__ != module.__name__ or inspect.isabstract(value):
                continue
            if issubclass(value, Platform):
                found[value.name] = value
    return found
