"""Pictures and files of users on their way to a model: which of them, fetched when they are needed, never stored."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.ai.images import read_image
from feishu_bot.errors import DeliveryError, RetryLater
from feishu_bot.texts import say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from feishu_bot.ai.chat_model import Detail, Image
    from feishu_bot.model import Attachment, InboundMessage
    from feishu_bot.platforms.base import Platform

log = logging.getLogger(__name__)

MAX_IMAGES: Final = 4  # of one message; further ones are left out
MAX_IMAGE_BYTES: Final = 8 * 1024 * 1024
MAX_FILE_BYTES: Final = 1024 * 1024
MAX_AT_ONCE: Final = 16  # messages of this process whose attachments are in memory
_PAUSES_S: Final = (0.5, 2.0)  # before what failed for the moment is fetched again

_TEXT_FILES: Final = frozenset(
    [
        "txt",
        "text",
        "md",
        "markdown",
        "rst",
        "csv",
        "tsv",
        "json",
        "jsonl",
        "yaml",
        "yml",
        "toml",
        "ini",
        "cfg",
        "conf",
        "log",
        "xml",
        "html",
        "htm",
        "css",
        "js",
        "mjs",
        "ts",
        "tsx",
        "jsx",
        "vue",
        "py",
        "pyi",
        "java",
        "kt",
        "c",
        "h",
        "cc",
        "cpp",
        "hpp",
        "cs",
        "go",
        "rs",
        "rb",
        "php",
        "pl",
        "lua",
        "r",
        "swift",
        "scala",
        "sh",
        "bash",
        "zsh",
        "bat",
        "ps1",
        "sql",
        "tex",
        "srt",
        "vtt",
    ]
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was fetched. ``words`` are those of text files; ``problem``: why there is nothing to show a model."""

    images: tuple[Image, ...] = ()
    words: str = ""
    problem: str = ""


def readable(
    message: InboundMessage, platform: Platform | None, *, images: bool, files: bool
) -> tuple[Attachment, ...]:
    """Return the attachments that a model can be shown: pictures if it takes ``images``, and one text file."""
    if platform is None or not message.attachments:
        return ()
    found: list[Attachment] = []
    if images and "image" in platform.fetches:
        found += [a for a in message.attachments if a.kind == "image" and a.key][:MAX_IMAGES]
    if files and "file" in platform.fetches:
        found += [a for a in message.attachments if a.kind == "file" and a.key and _is_text(a.name)][:1]
    return tuple(found)


def placeholders(attachments: Sequence[Attachment], language: str) -> str:
    """Return what stands for them in the record."""
    return "\n".join(
        say(language, "image") if a.kind == "image" else say(language, "file", name=a.name)
        for a in attachments
    )


def noted(attachments: Sequence[Attachment]) -> list[dict[str, Any]]:
    """Return what is noted of them beside the words of a message; never what they are fetched by."""
    return [{"kind": a.kind, "name": a.name} if a.name else {"kind": a.kind} for a in attachments]


class Attachments:
    """Fetches what a model is to be shown. Only some messages' at once, so that they cannot fill the memory."""

    def __init__(self, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._room = asyncio.Semaphore(MAX_AT_ONCE)
        self._sleep = sleep

    @asynccontextmanager
    async def loaded(
        self,
        platform: Platform | None,
        message: InboundMessage,
        attachments: Sequence[Attachment],
        *,
        detail: Detail,
    ) -> AsyncIterator[Loaded]:
        """Give what was fetched, for as long as this block lasts. Fails by its ``problem`` alone."""
        if platform is None or not attachments:
            yield Loaded()
            return
        async with self._room:
            yield await self._load(platform, message, attachments, detail)

    async def _load(
        self,
        platform: Platform,
        message: InboundMessage,
        attachments: Sequence[Attachment],
        detail: Detail,
    ) -> Loaded:
        images: list[Image] = []
        words = ""
        try:
            for attachment in attachments:
                if attachment.kind == "image":
                    data = await self._fetch(platform, message, attachment, MAX_IMAGE_BYTES)
                    images.append(await asyncio.to_thread(read_image, data, detail))
                else:
                    data = await self._fetch(platform, message, attachment, MAX_FILE_BYTES)
                    words = f"{attachment.name}:\n{_decoded(data)}"
        except (DeliveryError, ValueError) as error:
            reason = error.reason if isinstance(error, DeliveryError) else str(error)
            log.warning("attachment not loaded", extra={"kind": attachment.kind, "reason": reason})
            return Loaded(problem=f"{attachment.kind}: {reason}")
        return Loaded(tuple(images), words)

    async def _fetch(
        self, platform: Platform, message: InboundMessage, attachment: Attachment, most: int
    ) -> bytes:
        for pause_s in _PAUSES_S:
            try:
                return await platform.fetch(message, attachment, max_bytes=most)
            except RetryLater:
                await self._sleep(pause_s)
        return await platform.fetch(message, attachment, max_bytes=most)


def _is_text(name: str) -> bool:
    return name.rpartition(".")[2].lower() in _TEXT_FILES


def _decoded(data: bytes) -> str:
    """Return the text of a file. ValueError for what is none."""
    if b"\0" in data:
        raise ValueError("no text, though its name says so")
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError("no text in a known encoding")
