"""Feishu's message contents: what arrives becomes text and attachments, what goes out becomes a message body.

Sources: open.feishu.cn, "Message content" (im-v1/message) and "Events: receive message".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from feishu_bot.model import Attachment, Mention
from feishu_bot.platforms.base import text_of
from feishu_bot.platforms.markdown import holds_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Message types nobody expects an answer to; they are recorded as events.
SILENT_TYPES = frozenset(
    {
        "system",
        "hongbao",
        "vote",
        "todo",
        "video_chat",
        "calendar",
        "share_calendar_event",
        "general_calendar",
    }
)

_AttachmentKind = Literal[
    "image", "file", "audio", "video", "sticker", "card", "location", "contact", "other"
]
_KINDS: dict[
    str, tuple[_AttachmentKind, str, str]
] = {  # type -> our kind, field of the key, field of the name
    "image": ("image", "image_key", ""),
    "file": ("file", "file_key", "file_name"),
    "folder": ("file", "file_key", "file_name"),
    "audio": ("audio", "file_key", ""),
    "media": ("video", "file_key", "file_name"),
    "sticker": ("sticker", "file_key", ""),
    "interactive": ("card", "", "title"),
    "location": ("location", "", "name"),
    "share_user": ("contact", "user_id", ""),
    "share_chat": ("contact", "chat_id", ""),
}


# ------------------------------------------------------------------------------------------------ arriving


@dataclass(frozen=True, slots=True)
class Content:
    """What a message holds. ``text`` still has the placeholders of its mentions.

    ``unreadable`` names the kind of a message that is no text at all.
    """

    text: str = ""
    attachments: tuple[Attachment, ...] = ()
    unreadable: str | None = None
    mentions: tuple[Mention, ...] = ()  # those that only the content names


def read_content(message_type: str, raw: object) -> Content:
    """Read the ``content`` of a received message (a JSON text); whatever it is, an answer comes back."""
    try:
        content = orjson.loads(raw) if isinstance(raw, str) else raw
    except ValueError:
        content = None
    if not isinstance(content, dict):
        content = {}
    if message_type == "text":
        return Content(text_of(content.get("text")))
    if message_type == "post":
        return _read_post(content)
    kind, key, name = _KINDS.get(message_type, ("other", "", ""))
    attachment = Attachment(kind, text_of(content.get(key)), text_of(content.get(name)))
    return Content("", (attachment,), kind)


def _read_post(content: dict[str, Any]) -> Content:
    body = _post_body(content)
    reader = _PostReader()
    title = text_of(body.get("title"))
    lines = [title] if title else []
    paragraphs = body.get("content")
    for paragraph in paragraphs if isinstance(paragraphs, list) else ():
        elements = paragraph if isinstance(paragraph, list) else [paragraph]
        line = "".join(reader.read(element) for element in elements if isinstance(element, dict))
        if line:
            lines.append(line)
    return Content("\n".join(lines), tuple(reader.attachments), None, tuple(reader.mentions))


def _post_body(content: dict[str, Any]) -> dict[str, Any]:
    """Find title and content: received posts are flat, forwarded or re-sent ones stand under a locale."""
    if isinstance(content.get("post"), dict):
        content = content["post"]
    if isinstance(content.get("content"), list):
        return content
    for locale in ("zh_cn", "en_us", "ja_jp", *content):
        body = content.get(locale)
        if isinstance(body, dict) and isinstance(body.get("content"), list):
            return body
    return content


class _PostReader:
    """Turns the elements of one post into text and collects what is not text."""

    def __init__(self) -> None:
        self.attachments: list[Attachment] = []
        self.mentions: list[Mention] = []

    def read(self, element: dict[str, Any]) -> str:
        """Return the element's text; one that we do not know counts by its ``text``."""
        text = text_of(element.get("text"))
        match element.get("tag"):
            case "a":
                text = link(text, text_of(element.get("href")))
            case "at":
                text = self._mention(text_of(element.get("user_id")), text_of(element.get("user_name")))
            case "img":
                self.attachments.append(Attachment("image", text_of(element.get("image_key"))))
            case "media":
                self.attachments.append(Attachment("video", text_of(element.get("file_key"))))
            case "emotion":
                text = f"[{text_of(element.get('emoji_type'))}]"
            case "hr":
                text = "---"
            case "code_block":
                text = fenced(text, text_of(element.get("language")).lower())
        return text

    def _mention(self, user_id: str, name: str) -> str:
        if user_id in {"all", "@_all"}:
            return "@_all"
        if user_id.startswith("ou_"):  # older clients put the id itself where the placeholder belongs
            self.mentions.append(Mention(user_id, name, user_id))
        return user_id or f"@{name}"


def link(text: str, url: str) -> str:
    """Return a link as words: ``text (url)``, or the URL alone where the text says nothing more."""
    if not url or text == url:
        return text or url
    return f"{text} ({url})" if text else url


def fenced(code: str, language: str) -> str:
    """Return ``code`` between fences that the code itself does not hold."""
    fence = "```"
    while fence in code:
        fence += "`"
    newline = "" if code.endswith("\n") else "\n"
    return f"{fence}{language}\n{code}{newline}{fence}"


def read_mentions(raw: object) -> tuple[Mention, ...]:
    """Read ``message.mentions``; entries that name nobody are passed over."""
    if not isinstance(raw, list):
        return ()
    found = []
    for entry in raw:
        if not isinstance(entry, dict):
            continue
        who = entry.get("id")
        open_id = text_of(who.get("open_id") if isinstance(who, dict) else who)
        mention = Mention(
            open_id,
            text_of(entry.get("name")),
            text_of(entry.get("key")),
            entry.get("mentioned_type") == "bot",
        )
        if mention.id or mention.key:
            found.append(mention)
    return tuple(found)


_BLANK = r"[ \t\u00a0\u3000]*"
_OWN_MENTION = re.compile(rf"{_BLANK}\0(?:{_BLANK}\0)*{_BLANK}")


def resolve_mentions(text: str, mentions: Sequence[Mention], own_id: str | None) -> str:
    """Replace each placeholder by ``@name`` and take the bot's own mention out with the blanks around it.

    The longest placeholders come first (``@_user_1`` begins ``@_user_10``), and in one pass, so that a name
    that looks like a placeholder stays a name.
    """
    values = {
        m.key: "\0" if own_id is not None and m.id == own_id else f"@{m.name}" if m.name else m.key
        for m in mentions
        if m.key
    }
    if not values:
        return text
    pattern = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
    text = re.sub(pattern, lambda match: values[match[0]], text)
    if "\0" not in text:
        return text
    return _OWN_MENTION.sub(_close_gap, text).strip()


def _close_gap(match: re.Match[str]) -> str:
    text, start, end = match.string, match.start(), match.end()
    at_edge = start == 0 or end == len(text) or text[start - 1] == "\n" or text[end] == "\n"
    return "" if at_edge or len(match[0].strip("\0")) == 0 else " "


# ------------------------------------------------------------------------------------------------ going out

MAX_TEXT_BYTES = 150_000  # of the request; im-v1/message/create
MAX_POST_BYTES = 30_000

_INVISIBLE = r"[\s\x00-\x1f\u00ad\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]*"
_AT_TAG = re.compile(rf"<(?={_INVISIBLE}/?{_INVISIBLE}a{_INVISIBLE}t(?![a-z]))", re.IGNORECASE)


def escape_mentions(text: str) -> str:
    """Return ``text`` so that no ``<at …>`` in it, however written, notifies anybody.

    The bracket becomes a full-width one: it looks alike, and no parser takes it for a tag.
    """
    return _AT_TAG.sub("\uff1c", text) if "<" in text else text


def text_content(text: str) -> str:
    """Return the ``content`` of a ``text`` message."""
    return orjson.dumps({"text": text}).decode()


def post_content(text: str) -> str:
    """Return the ``content`` of a ``post`` message of one Markdown element."""
    return orjson.dumps({"zh_cn": {"content": [[{"tag": "md", "text": text}]]}}).decode()


def outgoing_content(text: str) -> tuple[str, str]:
    """Return ``msg_type`` and ``content`` for an answer: a post for Markdown that fits one, else a text."""
    if holds_markdown(text):
        content = post_content(text)
        # Counted as it travels: the content is a JSON text inside JSON.
        if len(orjson.dumps(content)) <= MAX_POST_BYTES - 500:
            return "post", content
    return "text", text_content(text)


def mentioned(mentions: Iterable[Mention], own_id: str) -> bool:
    """Return whether ``own_id`` is among those who are named."""
    return any(m.id == own_id for m in mentions)
