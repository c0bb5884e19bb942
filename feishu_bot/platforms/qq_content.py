"""QQ's message contents: what arrives becomes text and attachments, what goes out cannot notify anybody.

Sources: bot.q.qq.com/wiki, "发送与接收 / 事件" (message events), "文本交互" (text-chain), guild "内嵌格式".
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from feishu_bot.model import Attachment, Mention
from feishu_bot.platforms.base import text_of

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

_MAX_QUOTE = 2000  # characters of a quoted message that the model gets to see
_QUOTED = 103  # message_type of a message that quotes another

# ------------------------------------------------------------------------------------------------ arriving

_TOKEN = re.compile(
    r"""
      <@!?(?P<mention>[A-Za-z0-9_-]{1,128})>
    | <qqbot-at-user\ id="(?P<user>[^"<>]{1,128})"\ ?/>
    | <faceType=[0-9]{1,4},faceId="(?P<face>[^"<>]{0,64})",ext="(?P<ext>[A-Za-z0-9+/=_-]{0,4096})">
    """,
    re.VERBOSE,
)
_BLANK = r"[ \t\u00a0\u3000]*"
_OWN_MENTION = re.compile(rf"{_BLANK}\0(?:{_BLANK}\0)*{_BLANK}")


@dataclass(frozen=True, slots=True)
class Content:
    """What a message holds. ``text`` is without the bot's own mention; ``names_bot``: it had one.

    ``quoted``: the text of the message quoted, ``quoted_id`` its id; its attachments come after the message's own.
    """

    text: str = ""
    attachments: tuple[Attachment, ...] = ()
    mentions: tuple[Mention, ...] = ()
    names_bot: bool = False
    quoted: str = ""
    quoted_id: str | None = None


def read_content(data: Mapping[str, Any], *, guild: bool, to_bot: bool) -> Content:
    """Read a message's ``d``. ``guild``: of a guild, where ``& < >`` are escaped; ``to_bot``: the event says so."""
    raw = text_of(data.get("content"))
    mentions, own = _read_mentions(data.get("mentions"))
    names_bot = bool(own)
    if guild and to_bot and not own:
        own = _first_bot(raw, mentions)
    text = _resolved(raw, {m.id: m.name for m in mentions}, own, guild=guild)
    attachments, spoken = _read_attachments(data.get("attachments"))
    quoted, quoted_id, beside = _read_quote(data, guild=guild)
    attachments += tuple(a for a in beside if a not in attachments)
    return Content(text or spoken, attachments, mentions, names_bot, quoted, quoted_id)


def _read_mentions(raw: object) -> tuple[tuple[Mention, ...], frozenset[str]]:
    """Return who is named, and those of the ids that are the bot's own."""
    found: list[Mention] = []
    own: set[str] = set()
    for entry in raw if isinstance(raw, list) else ():
        if not isinstance(entry, dict) or entry.get("scope") == "all":
            continue
        who = text_of(entry.get("id")) or text_of(entry.get("member_openid"))
        if not who:
            continue
        found.append(Mention(who, text_of(entry.get("username")), is_bot=entry.get("bot") is True))
        if entry.get("is_you") is True:
            own.update(filter(None, (who, text_of(entry.get("member_openid")))))
    return tuple(found), frozenset(own)


def _first_bot(raw: str, mentions: tuple[Mention, ...]) -> frozenset[str]:
    """Return the id that must be ours: guilds do not mark it, but only send this event when we are named."""
    bots = {m.id for m in mentions if m.is_bot}
    for match in _TOKEN.finditer(raw):
        who = match["mention"]
        if who and (who in bots or not mentions):
            return frozenset({who})
    return frozenset()


def _resolved(raw: str, names: Mapping[str, str], own: Container[str], *, guild: bool) -> str:
    """Replace mentions and faces by words and take the bot's own mention out with the blanks around it.

    Only the words between them are unescaped: what somebody typed never becomes a mention.
    """
    if "<" not in raw and "&" not in raw:
        return raw.strip()
    pieces: list[str] = []
    end = 0
    for match in _TOKEN.finditer(raw):
        pieces.append(_unescaped(raw[end : match.start()], guild=guild))
        end = match.end()
        who = match["mention"] or match["user"]
        if who is None:
            pieces.append(_face(match["face"], match["ext"]))
        elif who in own:
            pieces.append("\0")
        else:
            name = names.get(who)
            pieces.append(f"@{name}" if name else match[0])
    pieces.append(_unescaped(raw[end:], guild=guild))
    text = "".join(pieces)
    return (_OWN_MENTION.sub(_close_gap, text) if "\0" in text else text).strip()


def _unescaped(text: str, *, guild: bool) -> str:
    if not guild or "&" not in text:
        return text
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _close_gap(match: re.Match[str]) -> str:
    text, start, end = match.string, match.start(), match.end()
    at_edge = start == 0 or end == len(text) or text[start - 1] == "\n" or text[end] == "\n"
    return "" if at_edge or not match[0].strip("\0") else " "


def _face(face_id: str, ext: str) -> str:
    """Return a face's name, which travels as base64 of JSON, or its number."""
    try:
        name = text_of(orjson.loads(base64.b64decode(ext, validate=True)).get("text"))
    except (ValueError, binascii.Error, AttributeError):
        name = ""
    return f"[{name.strip('[]/ ') or face_id or '?'}]"


_Kind = Literal["image", "file", "audio", "video"]


def _read_attachments(raw: object) -> tuple[tuple[Attachment, ...], str]:
    """Return what stands beside the text, and what the platform understood of voices."""
    found: list[Attachment] = []
    spoken: list[str] = []
    for entry in raw if isinstance(raw, list) else ():
        if not isinstance(entry, dict):
            continue
        kind = _kind(text_of(entry.get("content_type")))
        url = text_of(entry.get("url"))
        if url and "://" not in url:
            url = "https://" + url.lstrip("/")
        found.append(Attachment(kind, url, text_of(entry.get("filename"))))
        heard = text_of(entry.get("asr_refer_text")).strip() if kind == "audio" else ""
        if heard:
            spoken.append(heard)
    return tuple(found), "\n".join(spoken)


def _kind(content_type: str) -> _Kind:
    family = content_type.partition("/")[0]
    if family in {"image", "video"}:
        return "image" if family == "image" else "video"
    return "audio" if family in {"voice", "audio"} else "file"


def _read_quote(data: Mapping[str, Any], *, guild: bool) -> tuple[str, str | None, tuple[Attachment, ...]]:
    """Return words, id and attachments of the message quoted; groups and private chats name it by an index."""
    reference = data.get("message_reference")
    if isinstance(reference, dict):
        return "", text_of(reference.get("message_id")) or None, ()
    if data.get("message_type") != _QUOTED:
        return "", None, ()
    scene = data.get("message_scene")
    quoted_id = ""
    marks = scene.get("ext") if isinstance(scene, dict) else None
    for mark in marks if isinstance(marks, list) else ():
        name, _, value = text_of(mark).partition("=")
        if name == "ref_msg_idx":
            quoted_id = value
    elements = data.get("msg_elements")
    first = elements[0] if isinstance(elements, list) and elements else None
    if not isinstance(first, dict):
        return "", quoted_id or None, ()
    text = _resolved(text_of(first.get("content")), {}, (), guild=guild)[:_MAX_QUOTE]
    attachments, spoken = _read_attachments(first.get("attachments"))
    return text or spoken[:_MAX_QUOTE], quoted_id or text_of(first.get("msg_idx")) or None, attachments


# ------------------------------------------------------------------------------------------------ going out

_INVISIBLE = r"[\s\x00-\x1f\u00ad\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]*"
_ACTIVE = re.compile(rf"<(?={_INVISIBLE}/?{_INVISIBLE}(?:@|#|qqbot|emoji:|facetype))", re.IGNORECASE)
_EVERYONE = re.compile(r"@(?=everyone|all\b|全体成员)", re.IGNORECASE)
_DOT = re.compile(r"(?<=\w)\.(?=[^\W\d_]{2,})")
_SCHEME = re.compile(r"(?<=[A-Za-z]):(?=//)")


def inert(text: str, *, guild: bool) -> str:
    """Return ``text`` so that nothing in it mentions anybody, or acts when it is touched.

    The character that begins such a thing becomes its full-width form, which looks alike. In guilds, where the
    platform unescapes, ``& < >`` are escaped besides.
    """
    text = _EVERYONE.sub("\uff20", text) if "@" in text else text
    text = text.replace("mqqapi://", "mqqapi\uff1a//") if "mqqapi://" in text else text
    if guild:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _ACTIVE.sub("\uff1c", text) if "<" in text else text


def without_links(text: str) -> str:
    """Return ``text`` so that the platform's filter finds no address in it, nor a file name like one."""
    return _SCHEME.sub("\uff1a", _DOT.sub("\u3002", text))
