"""OneBot's messages: segments and CQ codes become text and attachments, text becomes segments.

Sources: the OneBot 11 standard, "message/segment", "message/string" and "message/array"; NapCat's additions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from feishu_bot.model import Attachment, Mention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Segment = dict[str, Any]

MAX_TEXT: Final = 100_000  # characters of one message; far more than any question may have
MAX_SEGMENTS: Final = 2000
_MAX_NAMED: Final = 100  # attachments, mentions
_MAX_KEY: Final = 2000  # characters of a URL
_MAX_NAME: Final = 200
_MAX_ID: Final = 100  # characters of an id

ALL: Final = "all"
_EVERYBODY: Final = "@全体成员"
_BLANK: Final = " \t\u00a0\u3000"

_Kind = Literal["image", "file", "audio", "video", "sticker", "card", "location", "contact", "other"]
_KINDS: Final[Mapping[str, _Kind]] = {
    "image": "image",
    "record": "audio",
    "video": "video",
    "file": "file",
    "onlinefile": "file",
    "mface": "sticker",
    "face": "sticker",
    "bface": "sticker",
    "sface": "sticker",
    "dice": "sticker",
    "rps": "sticker",
    "json": "card",
    "xml": "card",
    "location": "location",
    "contact": "contact",
}
_MARKET_FACE: Final = ("emoji_id", "emoji_package_id")  # NapCat sends a sticker as an image with these

# A "[" inside a code is always written &#91;, so that no code reaches over the next one's beginning.
_CODE: Final = re.compile(r"\[CQ:([a-zA-Z0-9_.-]++)((?:,[a-zA-Z0-9_.-]++=[^,\[\]]*+)*+),?\]")


# ----------------------------------------------------------------------------------------------------- values


def text_of(value: object) -> str:
    """Return a text, or a number as its text; anything else is ``""``. NUL is taken out."""
    if isinstance(value, str):
        return value.replace("\0", "") if "\0" in value else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return ""


def id_of(value: object) -> str:
    """Return an id (a number, negative ones too, or a text of printable characters), ``""`` if there is none."""
    text = text_of(value)
    return text if len(text) <= _MAX_ID and text.isprintable() else ""


def number_or_text(identifier: str) -> int | str:
    """Return an id in the form in which implementations take it: a number where it is one."""
    digits = identifier.removeprefix("-")
    return int(identifier) if digits.isascii() and digits.isdigit() else identifier


# --------------------------------------------------------------------------------------------------- CQ codes


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("[", "&#91;").replace("]", "&#93;")


def _unescape(text: str) -> str:
    if "&" not in text:
        return text
    # &amp; comes last, or "&amp;#91;" would become a bracket.
    return text.replace("&#44;", ",").replace("&#91;", "[").replace("&#93;", "]").replace("&amp;", "&")


def decode_cq(text: str) -> list[Segment]:
    """Read a message in string form; whatever is no CQ code is text."""
    segments: list[Segment] = []
    end = 0
    for match in _CODE.finditer(text):
        if match.start() > end:
            segments.append(text_segment(_unescape(text[end : match.start()])))
        end = match.end()
        data = {}
        for pair in match[2].split(",")[1:]:
            name, _, value = pair.partition("=")
            data[name] = _unescape(value)
        segments.append({"type": match[1], "data": data})
        if len(segments) >= MAX_SEGMENTS:
            return segments
    if end < len(text):
        segments.append(text_segment(_unescape(text[end:])))
    return segments


def encode_cq(segments: Iterable[Segment]) -> str:
    """Return segments in string form, escaped so that no text in them is a code."""
    out = []
    for segment in segments:
        data = segment.get("data") or {}
        if segment.get("type") == "text":
            out.append(_escape(text_of(data.get("text"))))
            continue
        pairs = "".join(f",{k}={_escape(text_of(v)).replace(',', '&#44;')}" for k, v in data.items())
        out.append(f"[CQ:{segment.get('type')}{pairs}]")
    return "".join(out)


def text_segment(text: str) -> Segment:
    """Return a segment of plain text: nothing in it is ever read as a CQ code."""
    return {"type": "text", "data": {"text": text}}


def reply_segment(message_id: str) -> Segment:
    """Return the segment that quotes a message; it stands first."""
    return {"type": "reply", "data": {"id": message_id}}


def segments_of(message: object) -> list[Segment]:
    """Return the segments of a message in any of its forms: a string, an array, or one segment alone."""
    if isinstance(message, str):
        return decode_cq(message)
    if isinstance(message, dict):
        return [message]
    if isinstance(message, list):
        return [segment for segment in message[:MAX_SEGMENTS] if isinstance(segment, dict)]
    return []


def plain_text(message: object) -> str:
    """Return a message's text alone, with every run of blanks as one: to compare, not to show."""
    texts = (
        text_of(_data(segment).get("text"))
        for segment in segments_of(message)
        if segment.get("type") == "text"
    )
    return " ".join("".join(texts).split())


def quoted_id(message: object) -> str:
    """Return the id of the message that a message quotes, ``""`` if it quotes none."""
    for segment in segments_of(message):
        if segment.get("type") == "reply":
            return id_of(_data(segment).get("id"))
    return ""


# -------------------------------------------------------------------------------------------------- arriving


@dataclass(slots=True)
class Content:
    """What a message holds. ``text`` is without the bot's own mention.

    ``unreadable`` names the kind of a message without any text. ``to_bot``: the bot is mentioned. ``ids`` are what
    the client knows each attachment by, ``""`` where it says none.
    """

    text: str = ""
    attachments: tuple[Attachment, ...] = ()
    mentions: tuple[Mention, ...] = ()
    reply_to: str | None = None
    to_bot: bool = False
    unreadable: str | None = None
    ids: tuple[str, ...] = ()


def read_message(message: object, self_id: str) -> Content:
    """Read a received message; whatever it is, an answer comes back."""
    reader = _Reader(self_id)
    for segment in segments_of(message):
        kind = segment.get("type")
        if isinstance(kind, str):
            reader.take(kind, _data(segment))
    return reader.content()


def _data(segment: Segment) -> dict[str, Any]:
    data = segment.get("data")
    return data if isinstance(data, dict) else {}


@dataclass(slots=True)
class _Reader:
    """Collects the segments of one message."""

    self_id: str
    pieces: list[str] = field(default_factory=list)
    room: int = MAX_TEXT
    gap: bool = False  # the bot's own mention stood here
    attachments: list[Attachment] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    reply_to: str | None = None
    to_bot: bool = False
    faces: bool = False

    def take(self, kind: str, data: dict[str, Any]) -> None:
        match kind:
            case "text":
                self._text(text_of(data.get("text")))
            case "at":
                self._at(id_of(data.get("qq")), text_of(data.get("name"))[:_MAX_NAME])
            case "reply":
                self.reply_to = self.reply_to or id_of(data.get("id")) or None
            case "markdown":
                self._text(text_of(data.get("content")))
            case "share":
                title, url = text_of(data.get("title")), text_of(data.get("url"))
                self._text(f"{title} ({url})" if title and url else title or url)
            case "face":
                self.faces = True  # beside words it is only an ornament
            case "anonymous" | "shake":
                pass
            case _:
                self._attach(kind, data)

    def _text(self, text: str) -> None:
        text = text[: self.room]
        if not text:
            return
        self.room -= len(text)
        if self.gap:
            text = self._closed(text)
        self.pieces.append(text)

    def _closed(self, text: str) -> str:
        """Take out the blanks around the bot's own mention, all but one between two words."""
        self.gap = False
        text = text.lstrip(_BLANK)
        if not self.pieces:
            return text
        before = self.pieces[-1] = self.pieces[-1].rstrip(_BLANK)
        apart = before and text and not before.endswith("\n") and not text.startswith("\n")
        return " " + text if apart else text

    def _at(self, who: str, name: str) -> None:
        if not who:
            return
        own = who == self.self_id
        if len(self.mentions) < _MAX_NAMED and all(m.id != who for m in self.mentions):
            self.mentions.append(Mention(who, name.removeprefix("@"), is_bot=own))
        if own:
            self.to_bot = self.gap = True
        elif who == ALL:
            self._text(_EVERYBODY)
        else:
            self._text(name if name.startswith("@") else f"@{name or who}")

    def _attach(self, kind: str, data: dict[str, Any]) -> None:
        if len(self.attachments) >= _MAX_NAMED:
            return
        ours = _KINDS.get(kind, "other")
        name = ""
        if kind == "image" and any(data.get(key) for key in _MARKET_FACE):
            ours, name = "sticker", text_of(data.get("summary"))
        elif ours == "file":
            name = text_of(data.get("name") or data.get("file"))
        elif kind == "json":
            name = _prompt(data.get("data"))
        found = _id(data)
        url = text_of(data.get("url"))
        key = url if is_address(url) and len(url) <= _MAX_KEY else found
        self.attachments.append(Attachment(ours, key, name[:_MAX_NAME]))
        self.ids.append(found)

    def content(self) -> Content:
        text = "".join(self.pieces).strip()
        unreadable = None
        if not text:
            unreadable = "text"
            if self.attachments:
                unreadable = self.attachments[0].kind
            elif self.faces:
                unreadable = "sticker"
            elif self.to_bot:
                unreadable = "mention"
        return Content(
            text,
            tuple(self.attachments),
            tuple(self.mentions),
            self.reply_to,
            self.to_bot,
            unreadable,
            tuple(self.ids),
        )


def is_address(key: str) -> bool:
    """Say whether what an attachment is fetched by is a web address."""
    return key.startswith(("https://", "http://"))


def _id(data: Mapping[str, Any]) -> str:
    """Return what the client knows a file by; never a path of its machine, and a group's ids begin with a slash."""
    for name in ("file_id", "id", "file"):
        value = id_of(data.get(name))
        if value and (name == "file_id" or not value.startswith(("/", "."))) and "://" not in value:
            return value
    return ""


def _prompt(card: object) -> str:
    """Return the sentence that stands for a card in a list of chats."""
    try:
        value = orjson.loads(card) if isinstance(card, str) else card
    except ValueError:
        return ""
    return text_of(value.get("prompt")) if isinstance(value, dict) else ""


# ------------------------------------------------------------------------------------------------- going out


def outgoing_message(text: str, *, quote: str | None = None) -> list[Segment]:
    """Return the segments of an answer; JSON can hold them whatever the text is."""
    clean = text.encode("utf-8", "replace").decode()
    answer = text_segment(clean)
    return [reply_segment(quote), answer] if quote else [answer]
