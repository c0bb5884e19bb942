"""QQ's official bot API on loopback, for tests, benchmarks and demonstrations, and events as the platform sends them.

It keeps the limits of the real one: five replies to a message, within its window, each ``msg_seq`` once, where typing,
media and an answer that streams count as well; tokens that end; no message without one to reply to; no address that is
not registered; Markdown and streaming only where granted. It can be
told to fail in every way a network and a platform fail, and remembers what a chat's members would see. Run alone:
``python -m feishu_bot.testing.qq --port 9000``; then ``GET /_visible`` shows the messages and ``POST /_control``
takes ``{"down": true}``, ``{"expire_tokens": true}``, ``{"markdown": true}``, ``{"streaming": true}`` or ``{"fail": {"times": 2, "code": 22009}}``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from feishu_bot.platforms.qq import signing_key
from feishu_bot.testing.serving import FakeApi, read_object, serve_until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

USER_OPENID = "E4F4AEA33253A2797FB897C50B81D7ED"
MEMBER_OPENID = "B0B0AEA33253A2797FB897C50B81D7ED"
GROUP_OPENID = "C9F778FE6ADF9D1D1DBE395BF744A33A"
BOT_OPENID = "AA11AEA33253A2797FB897C50B81D7ED"
GUILD_USER = "1234"
GUILD_BOT = "1234567890"
CHANNEL_ID = "100010"
GUILD_ID = "18700000000001"

_TOKEN_PATH = "/app/getAppAccessToken"  # noqa: S105 - a path, no secret
_MESSAGES = re.compile(r"/(v2/users|v2/groups|channels|dms)/([^/]+)/messages")
_STREAM = re.compile(r"/(v2/users)/([^/]+)/stream_messages")
_FILES = re.compile(r"/(v2/users|v2/groups)/([^/]+)/files")
_INTERACTION = re.compile(r"/interactions/([^/]+)")
_TEXT, _MARKDOWN, _TYPING, _MEDIA = 0, 2, 6, 7
_WRITING, _DONE = 1, 10
_TYPING_S = 60
_STREAMED_WITHIN_S = 300.0  # of the message
_WINDOWS_S = {"v2/users": 3600.0, "v2/groups": 300.0, "channels": 300.0, "dms": 300.0}
_MAX_REPLIES = 5
_NEW_TOKEN_S = 60.0  # with less than this left a new token is given; the old one works on until its end
_LINK = re.compile(r"\w\.[A-Za-z]{2,}|[A-Za-z]://")
_BEIJING = timezone(timedelta(hours=8))


# -------------------------------------------------------------------------------------------------- events


def sign(body: bytes, *, secret: str, timestamp: int | str | None = None) -> dict[str, str]:
    """Return the headers that prove ``body``. ``timestamp``: Unix seconds, now when None."""
    stamp = str(int(time.time()) if timestamp is None else timestamp)
    return {
        "Content-Type": "application/json",
        "User-Agent": "QQBot-Callback",
        "X-Bot-Appid": "102000001",
        "X-Signature-Timestamp": stamp,
        "X-Signature-Ed25519": signing_key(secret).sign(stamp.encode() + body).hex(),
    }


def signed_event(
    event: Mapping[str, Any] | bytes, *, secret: str, timestamp: int | str | None = None
) -> tuple[dict[str, str], bytes]:
    """Return headers and body of ``event`` as QQ posts it."""
    body = event if isinstance(event, bytes) else orjson.dumps(event)
    return sign(body, secret=secret, timestamp=timestamp), body


def validation_event(
    *,
    plain_token: str = "Arq0D5A61EgUu4OxUvOp",  # noqa: S107 - the documentation's own example, no secret
    event_ts: str | None = None,
) -> dict[str, Any]:
    """Return the check of a callback address."""
    return {"d": {"plain_token": plain_token, "event_ts": event_ts or str(int(time.time()))}, "op": 13}


def make_event(data: Mapping[str, Any], *, event_type: str, event_id: str | None = None) -> dict[str, Any]:
    """Return ``data`` in the envelope of a dispatched event."""
    found = event_id or f"{event_type}:{os.urandom(8).hex()}"
    return {"id": found, "op": 0, "s": 1, "t": event_type, "d": dict(data)}


def _said(message_id: str | None, at: float | None, content: str) -> dict[str, Any]:
    instant = datetime.fromtimestamp(time.time() if at is None else at, UTC).astimezone(_BEIJING)
    return {
        "id": message_id or "ROBOT1.0_" + os.urandom(12).hex(),
        "content": content,
        "timestamp": instant.isoformat(timespec="seconds"),
    }


def private_event(
    text: str,
    *,
    user: str = USER_OPENID,
    message_id: str | None = None,
    at: float | None = None,
    event_id: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a message of a private chat. ``at``: Unix seconds; ``more``: further fields of the message."""
    data = {
        **_said(message_id, at, text),
        "author": {"id": user, "user_openid": user, "union_openid": user},
        "message_type": 0,
        **more,
    }
    return make_event(data, event_type="C2C_MESSAGE_CREATE", event_id=event_id)


def group_event(
    text: str,
    *,
    member: str = MEMBER_OPENID,
    group: str = GROUP_OPENID,
    message_id: str | None = None,
    at: float | None = None,
    event_id: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a group message that mentions the bot, whose mention the platform has taken out."""
    data = {
        **_said(message_id, at, " " + text),
        "group_id": group,
        "group_openid": group,
        "author": {"id": member, "member_openid": member, "bot": False, "member_role": "member"},
        **more,
    }
    return make_event(data, event_type="GROUP_AT_MESSAGE_CREATE", event_id=event_id)


def full_group_event(
    text: str,
    *,
    mention_bot: bool = False,
    name: str = "张三",
    mentions: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> dict[str, Any]:
    """Return any group message, as a bot with the full-group permission gets it; ``options``: as ``group_event``."""
    event = group_event(text, **options)
    data = event["d"]
    named = [dict(m) for m in mentions]
    if mention_bot:
        named.insert(0, mention(BOT_OPENID, name="bot", bot=True, is_you=True))
        text = f"<@{BOT_OPENID}> {text}"
    data["content"] = text
    data["author"]["username"] = name
    data["mentions"] = named
    kind = "GROUP_MESSAGE_CREATE"
    return {**event, "id": options.get("event_id") or f"{kind}:{os.urandom(8).hex()}", "t": kind}


def mention(openid: str, *, name: str = "", bot: bool = False, is_you: bool = False) -> dict[str, Any]:
    """Return one entry of a group message's ``mentions``."""
    return {
        "scope": "single",
        "id": openid,
        "member_openid": openid,
        "username": name,
        "bot": bot,
        "is_you": is_you,
    }


def channel_event(
    text: str,
    *,
    direct: bool = False,
    user: str = GUILD_USER,
    channel: str = CHANNEL_ID,
    guild: str = GUILD_ID,
    message_id: str | None = None,
    at: float | None = None,
    event_id: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a guild channel's message that mentions the bot, or one of a guild's ``direct`` chats."""
    content = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    data = {
        **_said(message_id, at, content if direct else f"<@!{GUILD_BOT}> {content}"),
        "channel_id": channel,
        "guild_id": guild,
        "author": {"id": user, "username": "abc", "avatar": "", "bot": False},
        "member": {"joined_at": "2021-04-12T16:34:42+08:00", "nick": "abc", "roles": ["1"]},
    }
    if direct:
        data |= {"direct_message": True, "src_guild_id": "9900"}
    else:
        data["mentions"] = [{"id": GUILD_BOT, "username": "bot", "bot": True}]
    event_type = "DIRECT_MESSAGE_CREATE" if direct else "AT_MESSAGE_CREATE"
    return make_event({**data, **more}, event_type=event_type, event_id=event_id)


def button_event(data: str, *, user: str = USER_OPENID, event_id: str | None = None) -> dict[str, Any]:
    """Return the press of a button in a private chat."""
    pressed = {
        "id": os.urandom(16).hex(),
        "type": 11,
        "version": 1,
        "scene": "c2c",
        "chat_type": 2,
        "user_openid": user,
        "application_id": "102000001",
        "data": {"type": 11, "resolved": {"button_data": data, "button_id": "1"}},
    }
    return make_event(pressed, event_type="INTERACTION_CREATE", event_id=event_id)


# -------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True, slots=True)
class VisibleMessage:
    """A message as the members of a chat see it. ``at``: Unix seconds of its acceptance.

    ``where``: ``v2/users``, ``v2/groups``, ``channels`` or ``dms``; ``chat`` is the id in the path; ``body`` is the
    whole request.
    """

    message_id: str
    where: str
    chat: str
    msg_id: str | None
    msg_seq: int | None
    msg_type: int
    text: str
    at: float
    body: Mapping[str, Any]


class FakeQQ(FakeApi):
    """QQ's bot API on loopback; ``async with FakeQQ() as fake`` runs it at ``fake.url``.

    ``visible`` holds what was sent, in order; ``requests`` the calls as ``(method, path)``; what ``attach`` was
    given can be fetched without a token, as from the platform's own servers. ``down = True`` answers
    503 to everything. ``typing`` holds where it was shown, ``frames`` the states and texts of answers that stream,
    ``confirmed`` the results of pressed buttons by their ids, ``uploaded`` what was uploaded. A message that it was not told of (``know_message``) is taken to have been said when it is
    first replied to, unless ``strict``. Without ``app_secret`` every app is let in. ``keep`` bounds what is
    remembered.
    """

    def __init__(
        self,
        *,
        app_secret: str | None = None,
        token_lifetime_s: float = 7200.0,
        markdown: bool = False,
        filter_links: bool = True,
        proactive: bool = False,
        streaming: bool = False,
        strict: bool = False,
        keep: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(("token", "messages"))
        self.app_secret = app_secret
        self.token_lifetime_s = token_lifetime_s
        self.markdown = markdown
        self.filter_links = filter_links
        self.proactive = proactive
        self.streaming = streaming
        self.strict = strict
        self.visible: deque[VisibleMessage] = deque(maxlen=keep)
        self.requests: deque[tuple[str, str]] = deque(maxlen=keep)
        self._keep = keep
        self._clock = clock
        self._said_at: dict[str, float] = {}
        self._seqs: dict[str, set[int]] = {}
        self._numbers = itertools.count(1)
        self._attached: dict[str, bytes] = {}
        self.typing: deque[tuple[str, str]] = deque(maxlen=keep)  # chat and message
        self.frames: deque[tuple[int, str]] = deque(maxlen=keep)
        self.confirmed: dict[str, int] = {}
        self.uploaded: dict[str, tuple[str, Mapping[str, Any]]] = {}  # by file_info: for whom, and what
        self._streams: dict[
            str, tuple[str, int, int]
        ] = {}  # by id: message, msg_seq, index; while it is written

    @property
    def token_url(self) -> str:
        """Where tokens are given."""
        return self.url + _TOKEN_PATH

    def know_message(self, message_id: str, said_at: float) -> None:
        """Tell when a message was said; its reply window begins then."""
        self._said_at[message_id] = said_at

    def attach(self, data: bytes, content_type: str = "image/png", filename: str = "a.png") -> dict[str, Any]:
        """Return an attachment of a message, for ``private_event(…, attachments=[…])``."""
        path = f"/download/{len(self._attached)}"
        self._attached[path] = data
        return {
            "content_type": content_type,
            "filename": filename,
            "size": len(data),
            "url": self.url + path,
        }

    # -------------------------------------------------------------------------------------------- serving

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path.startswith("/_"):
            return await self._own(request)
        self.requests.append((request.method, path))
        if self.down:
            return web.Response(status=503, text="down")
        if path in self._attached:
            return web.Response(body=self._attached[path])
        body = await request.read()
        return await self._answered("token" if path == _TOKEN_PATH else "messages", request, body)

    def _refusal(self, code: int, words: str) -> bytes:
        return _refusal(code, words)

    def _answer(self, request: web.BaseRequest, body: bytes) -> tuple[int, bytes]:
        if request.path == _TOKEN_PATH:
            return self._give_token(body)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "QQBot" or self._tokens.get(token, 0) <= self._clock():
            return 401, _refusal(11244, "token not exist or expire")
        sent = read_object(body)
        pressed = _INTERACTION.fullmatch(request.path)
        if request.method == "PUT" and pressed is not None:
            self.confirmed[pressed[1]] = sent.get("code", 0)
            return 200, b"{}"
        if request.method == "POST":
            for route, take in ((_MESSAGES, self._take), (_STREAM, self._stream), (_FILES, self._upload)):
                match = route.fullmatch(request.path)
                if match is not None:
                    return take(match[1], match[2], sent)
        return 404, _refusal(10001, "no such interface")

    def _upload(self, where: str, chat: str, sent: dict[str, Any]) -> tuple[int, bytes]:
        if sent.get("file_type") not in {1, 2, 3, 4} or not (sent.get("url") or sent.get("file_data")):
            return 400, _refusal(40093001, "富媒体文件格式不支持")
        info = f"file-{next(self._numbers)}"
        self.uploaded[info] = (f"{where}/{chat}", sent)
        return 200, orjson.dumps({"file_uuid": info, "file_info": info, "ttl": 3600})

    def _stream(self, _where: str, user: str, sent: dict[str, Any]) -> tuple[int, bytes]:
        """Take a frame: the first opens a session and is a message, the last closes it."""
        text, index, stream_id = sent.get("content_raw"), sent.get("index"), sent.get("stream_msg_id")
        if not isinstance(text, str) or not isinstance(index, int):
            return 400, _refusal(40034025, "请求参数无效")
        refusal = self._refused_frame(text, index, sent)
        if refusal is not None:
            return 400, refusal
        if stream_id is None:
            stream_id = self._show("v2/users", user, _MARKDOWN, text, sent)
        for place, message in enumerate(self.visible):
            if message.message_id == stream_id:
                self.visible[place] = replace(message, text=text, body=sent)
        self.frames.append((sent["input_state"], text))
        self._streams[stream_id] = (sent["msg_id"], sent["msg_seq"], index)
        if sent["input_state"] == _DONE:
            del self._streams[stream_id]
        return 200, orjson.dumps({"id": stream_id, "timestamp": int(self._clock())})

    def _refused_frame(self, text: str, index: int, sent: dict[str, Any]) -> bytes | None:
        msg_id, seq, stream_id = sent.get("msg_id"), sent.get("msg_seq"), sent.get("stream_msg_id")
        if not self.streaming:
            return _refusal(40034012, "不允许发送流式消息")
        if not text:
            return _refusal(50006, "message is empty")
        if sent.get("input_mode") != "replace" or sent.get("input_state") not in {_WRITING, _DONE}:
            return _refusal(40034025, "请求参数无效")
        if self.filter_links and _LINK.search(text):
            return _refusal(40054010, "不允许发送url")
        if stream_id is not None:
            of, number, last = self._streams.get(stream_id, ("", 0, 0))
            good = (of, number) == (msg_id, seq) and index > last
            return None if good else _refusal(40034025, "流式消息不存在或已结束")
        refusal = self._refused_reply("v2/users", msg_id, seq)
        if refusal is None and self._clock() - self._said_at[str(msg_id)] > _STREAMED_WITHIN_S:
            return _refusal(304027, "回复消息msg_id已过期")
        return refusal

    def _give_token(self, body: bytes) -> tuple[int, bytes]:
        self.token_calls += 1
        asked = read_object(body)
        if not asked.get("appId") or (
            self.app_secret is not None and asked.get("clientSecret") != self.app_secret
        ):
            return 200, _refusal(100016, "invalid appid or secret")
        now = self._clock()
        if self._tokens.get(self._token, 0) - now < _NEW_TOKEN_S:
            self._token = "fake-" + os.urandom(12).hex()
            self._tokens[self._token] = now + self.token_lifetime_s
        left = int(self._tokens[self._token] - now)
        return 200, orjson.dumps({"access_token": self._token, "expires_in": str(left)})

    def _take(self, where: str, chat: str, sent: dict[str, Any]) -> tuple[int, bytes]:
        msg_type = sent.get("msg_type", 0)
        text = _shown(sent, msg_type)
        msg_id, seq = sent.get("msg_id"), sent.get("msg_seq", 1)
        if not text and msg_type != _TYPING:
            return 400, _refusal(50006, "message is empty")
        refusal = self._refused_content(where, chat, msg_type, text, sent)
        if refusal is None:
            refusal = self._refused_reply(where, msg_id, seq)
        if refusal is not None:
            return 400, refusal
        if msg_type == _TYPING:
            self._seqs.setdefault(str(msg_id), set()).add(seq)
            self.typing.append((chat, str(msg_id)))
            return 200, b"{}"
        message_id = self._show(where, chat, msg_type, text, sent)
        instant = datetime.fromtimestamp(self._clock(), UTC).astimezone(_BEIJING)
        answer: dict[str, Any] = {"id": message_id, "timestamp": instant.isoformat(timespec="seconds")}
        if where.startswith("v2/"):
            answer["ext_info"] = {"ref_idx": f"REFIDX_{message_id}"}
        return 200, orjson.dumps(answer)

    def _show(self, where: str, chat: str, msg_type: int, text: str, sent: dict[str, Any]) -> str:
        """Put a message before the members of a chat; it counts as a reply."""
        message_id = f"ROBOT1.0_fake_{next(self._numbers)}"
        msg_id, seq = sent.get("msg_id"), sent.get("msg_seq", 1)
        if isinstance(msg_id, str):
            self._seqs.setdefault(msg_id, set()).add(seq)
            if self._keep is not None and len(self._seqs) > self._keep:
                del self._seqs[next(iter(self._seqs))]
        said_at = self._clock()
        self.visible.append(
            VisibleMessage(message_id, where, chat, msg_id, seq, msg_type, text, said_at, sent)
        )
        self.accepted += 1
        return message_id

    def _refused_content(
        self, where: str, chat: str, msg_type: int, text: str, sent: dict[str, Any]
    ) -> bytes | None:
        if msg_type == _TYPING:
            notice = sent.get("input_notify")
            shown_s = notice.get("input_second", 0) if isinstance(notice, dict) else 0
            good = where == "v2/users" and 1 <= shown_s <= _TYPING_S
            return None if good else _refusal(40034025, "input_notify")
        if msg_type == _MEDIA:
            media = sent.get("media")
            info = media.get("file_info") if isinstance(media, dict) else None
            known = self.uploaded.get(info or "", ("", {}))[0] == f"{where}/{chat}"
            return None if known else _refusal(40034025, "file_info")
        if msg_type == _MARKDOWN and (not self.markdown or where in {"channels", "dms"}):
            return _refusal(40034012, "不允许发送原生 markdown")
        if self.filter_links and _LINK.search(text):
            return _refusal(40054010, "不允许发送url")
        return None

    def _refused_reply(self, where: str, msg_id: object, seq: object) -> bytes | None:
        if msg_id is None:
            return None if self.proactive else _refusal(40034102, "主动消息失败, 无权限")
        if (
            not isinstance(msg_id, str)
            or not isinstance(seq, int)
            or (self.strict and msg_id not in self._said_at)
        ):
            return _refusal(40034025, "请求参数msg_id无效或越权")
        said_at = self._said_at.setdefault(msg_id, self._clock())
        if self._keep is not None and len(self._said_at) > self._keep:
            del self._said_at[next(iter(self._said_at))]
        if self._clock() - said_at > _WINDOWS_S[where]:
            return _refusal(304027, "回复消息msg_id已过期")
        used = self._seqs.get(msg_id, ())
        if seq in used:
            self.folded += 1
            return _refusal(40054005, "消息被去重，请检查请求msgseq")
        return _refusal(22009, "msg limit exceed") if len(used) >= _MAX_REPLIES else None

    def _obey(self, order: dict[str, Any]) -> None:
        super()._obey(order)
        self.markdown = bool(order.get("markdown", self.markdown))
        self.streaming = bool(order.get("streaming", self.streaming))


def _refusal(code: int, message: str) -> bytes:
    return orjson.dumps({"message": message, "code": code, "err_code": code, "trace_id": "fake"})


def _shown(sent: dict[str, Any], msg_type: object) -> str:
    """Return what a reader sees of a message, ``""`` if QQ would not take it."""
    markdown = sent.get("markdown")
    if msg_type == _MARKDOWN:
        text = markdown.get("content") if isinstance(markdown, dict) else None
    else:
        text = sent.get("content")
    return text if isinstance(text, str) else ""


async def _run(arguments: argparse.Namespace) -> None:
    fake = FakeQQ(
        app_secret=arguments.app_secret,
        markdown=arguments.markdown,
        filter_links=not arguments.any_link,
        keep=arguments.keep,
    )
    await serve_until_stopped(
        fake,
        arguments.host,
        arguments.port,
        say=lambda: f"fake QQ at {fake.url}, tokens at {fake.token_url}",
    )


def main(argv: list[str] | None = None) -> None:
    """Run the fake platform until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="QQ's official bot API on loopback, for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port, which is printed")
    parser.add_argument("--app-secret", default=None, help="refuse other secrets; default: any is good")
    parser.add_argument("--markdown", action="store_true", help="Markdown is granted")
    parser.add_argument("--any-link", action="store_true", help="let every address through")
    parser.add_argument("--keep", type=int, default=None, help="remember only the last N messages")
    asyncio.run(_run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
