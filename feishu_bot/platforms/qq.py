"""QQ's official bot platform: signed events over a webhook, answers as replies to the message they answer.

Sources: bot.q.qq.com/wiki, "事件订阅与通知" (webhook), "签名校验" (Ed25519), "发送与接收", "唯一身份机制".
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import zlib
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from feishu_bot.config import HttpUrl, PlatformSettings, Secrets
from feishu_bot.errors import (
    BadPayload,
    BadSignature,
    BadToken,
    DeliveryError,
    RetryLater,
    Undeliverable,
)
from feishu_bot.model import ChatType, InboundMessage
from feishu_bot.platforms.base import (
    Platform,
    PlatformContext,
    Received,
    WebhookRequest,
    parse_json,
    split_action,
    text_of,
)
from feishu_bot.platforms.download import download
from feishu_bot.platforms.markdown import holds_markdown
from feishu_bot.platforms.qq_client import (
    LINK_REFUSED,
    MARKDOWN_NOT_GRANTED,
    MARKDOWN_REFUSED,
    REPEATED,
    QQClient,
)
from feishu_bot.platforms.qq_content import inert, read_content, without_links
from feishu_bot.platforms.qq_stream import EVERY_S, Streams

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from feishu_bot.model import Attachment, Outgoing, Target
    from feishu_bot.platforms.qq_content import Content

logger = logging.getLogger(__name__)

_SIGNATURE = "X-Signature-Ed25519"
_TIMESTAMP = "X-Signature-Timestamp"
_ACCEPTED = b'{"op":12,"d":0}'

_DISPATCH, _HEARTBEAT, _HEARTBEAT_ACCEPTED, _VALIDATION = 0, 1, 11, 13

_SEED = 32  # bytes of an Ed25519 seed
_SIGNATURE_HEX = 128
_HIGH_BITS = 0xE0  # of the last byte: the number there is below 2^253
_STAMP = re.compile(r"[0-9]{1,20}")
_EVENT_TS = re.compile(r"[0-9]{9,11}")
_PLAIN_TOKEN = re.compile(r"[A-Za-z0-9]{1,64}")

_MINUTE_MS = 60_000
_MAX_TYPE = 200
_LONGEST_PAUSE_S = 60.0
_TYPING_S = 60  # the longest that the platform shows it
_MAX_CONFIRMING = 200
_CONFIRMED_WITHIN = 4  # tries, a second apart: the client waits for about five
_LATEST_S = 10**11  # a later instant is written in milliseconds
_STAMP_DIGITS = 15

# Each kind of reply has msg_seq numbers of its own, each form of a part one besides: the same at every attempt.
_SEQ_OF_KIND = {"answer": 0, "note": 100, "error": 200, "card": 300, "wait": 400}
_SEQ_OTHER = 500
_SEQ_TYPING = 490
_SEQ_STREAM = 491
_ENDS_STREAM = frozenset({"answer", "error", "note"})
_SEQ_WITHOUT_LINKS = 20
_SEQ_MARKDOWN = 50


@dataclass(frozen=True, slots=True)
class _Scene:
    """Where a kind of message is said. ``to_bot``: the event is only sent when the bot is meant."""

    chat_type: ChatType
    to_bot: bool
    guild: bool
    window_ms: int  # how long it may be replied to; "发送消息", passive messages


_SCENES = {
    "C2C_MESSAGE_CREATE": _Scene(ChatType.PRIVATE, to_bot=True, guild=False, window_ms=60 * _MINUTE_MS),
    "GROUP_AT_MESSAGE_CREATE": _Scene(ChatType.GROUP, to_bot=True, guild=False, window_ms=5 * _MINUTE_MS),
    "GROUP_MESSAGE_CREATE": _Scene(ChatType.GROUP, to_bot=False, guild=False, window_ms=5 * _MINUTE_MS),
    "AT_MESSAGE_CREATE": _Scene(ChatType.CHANNEL, to_bot=True, guild=True, window_ms=5 * _MINUTE_MS),
    "MESSAGE_CREATE": _Scene(ChatType.CHANNEL, to_bot=False, guild=True, window_ms=5 * _MINUTE_MS),
    "DIRECT_MESSAGE_CREATE": _Scene(ChatType.PRIVATE, to_bot=True, guild=True, window_ms=5 * _MINUTE_MS),
}
_RECALLS = {
    "MESSAGE_DELETE": ChatType.CHANNEL,
    "PUBLIC_MESSAGE_DELETE": ChatType.CHANNEL,
    "DIRECT_MESSAGE_DELETE": ChatType.PRIVATE,
}
_WELCOME = {
    "FRIEND_ADD": True,
    "FRIEND_DEL": False,
    "C2C_MSG_RECEIVE": True,
    "C2C_MSG_REJECT": False,
    "GROUP_ADD_ROBOT": True,
    "GROUP_DEL_ROBOT": False,
    "GROUP_MSG_RECEIVE": True,
    "GROUP_MSG_REJECT": False,
}
_BUTTON_PLACES = {0: ChatType.CHANNEL, 1: ChatType.GROUP, 2: ChatType.PRIVATE}


class QQSettings(PlatformSettings):
    """One app of QQ's official bot platform."""

    builtin: ClassVar[Mapping[str, Any]] = {
        "app_id": "${QQ_APP_ID:-}",
        "app_secret": "${QQ_APP_SECRET:-}",
    }

    app_id: str = Field("", description="AppID, a number")
    app_secret: Secrets = Field(
        Secrets(), description="AppSecret: signs events, and is what tokens are got by"
    )
    base_url: HttpUrl = Field(
        "https://api.sgroup.qq.com", description="the API; sandbox: https://sandbox.api.sgroup.qq.com"
    )
    token_url: HttpUrl = Field(
        "https://bots.qq.com/app/getAppAccessToken", description="where access tokens are given"
    )

    streaming: bool = Field(
        True, description="answers in private chats appear while they are written, where QQ lets the bot"
    )

    def missing(self) -> list[str]:
        """Return the keys without which this account cannot prove who sent an event, or answer."""
        keys = [] if self.app_id else ["app_id"]
        if not self.app_secret:
            keys.append("app_secret")
        return keys


class QQ(Platform):
    """An app of QQ's official bot platform that receives events over a webhook."""

    name = "qq"
    settings_type = QQSettings
    max_part_chars = 4500  # undocumented; the platform's own bots cut there
    max_parts = 4  # five replies per message, one of them for the note before the window closes
    has_reply_window = True
    shows_typing = True
    takes_calls = True
    fetches = frozenset({"image", "file"})

    settings: QQSettings

    def __init__(
        self,
        account: str,
        settings: QQSettings,
        context: PlatformContext,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(account, settings, context)
        private = [signing_key(secret) for secret in settings.app_secret.values()]
        self._keys = tuple((key, key.public_key()) for key in private)
        self._keep_unaddressed = not context.require_at_in_groups
        self._sleep = sleep
        self._client = QQClient(
            base_url=settings.base_url,
            token_url=settings.token_url,
            app_id=settings.app_id,
            app_secrets=settings.app_secret.values(),
            network=settings.network or context.network,
            clock=clock,
        )
        self._streams = Streams(self._client, seq=_SEQ_STREAM, granted=settings.streaming)
        self._may_type = True  # until the platform says otherwise
        self._confirming: set[asyncio.Task[None]] = set()
        self._markdown = True  # until the platform says that it is not granted
        self._problem: str | None = None
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------ receiving

    def receive(self, request: WebhookRequest) -> Received:
        """Verify and normalise one request. Raises BadSignature, BadToken or BadPayload."""
        key = self._proven_by(request)
        payload = parse_json(request.body)
        op = payload.get("op") if isinstance(payload, dict) else None
        if not isinstance(op, int) or isinstance(op, bool):
            raise BadPayload("not a JSON object with an op")
        if op == _DISPATCH:
            return Received((self._normalised(payload, request),), _ACCEPTED)
        if op == _VALIDATION:
            return _validated(payload.get("d"), key)
        if op == _HEARTBEAT:
            return Received(body=orjson.dumps({"op": _HEARTBEAT_ACCEPTED, "d": payload.get("d")}))
        return Received(body=_ACCEPTED)

    def _proven_by(self, request: WebhookRequest) -> Ed25519PrivateKey | None:
        """Return the key whose signature the request carries, None where an insecure account takes it unsigned.

        The timestamp is digits only: otherwise the border between it and the body could be shifted.
        """
        signature, timestamp = request.headers.get(_SIGNATURE), request.headers.get(_TIMESTAMP)
        if signature is None and timestamp is None and self.settings.insecure:
            return None
        if signature is None and b'"plain_token"' in request.body:
            raise BadToken("a check of the address that is not signed")
        raw = _signature(signature)
        if timestamp is None or not _STAMP.fullmatch(timestamp):
            raise BadSignature("no readable timestamp")
        signed = timestamp.encode() + request.body
        for private, public in self._keys:
            try:
                public.verify(raw, signed)
            except InvalidSignature:
                continue
            return private
        raise BadSignature("the signature does not match")

    # ---------------------------------------------------------------------------------------- normalising

    def _normalised(self, payload: dict[str, Any], request: WebhookRequest) -> InboundMessage:
        event_type = text_of(payload.get("t"))[:_MAX_TYPE] or "unknown"
        event_id = text_of(payload.get("id"))
        key = f"ev:{event_id}" if event_id else f"body:{hashlib.sha256(request.body).hexdigest()[:40]}"
        data = payload.get("d")
        scene = _SCENES.get(event_type)
        if scene is not None:
            if not isinstance(data, dict):
                raise BadPayload("a message event without a message")
            message = self._message(data, event_type, scene, request.now)
            if message is not None:
                return message
        return self._event(data if isinstance(data, dict) else {}, event_type, event_id, key)

    def _message(
        self, data: dict[str, Any], event_type: str, scene: _Scene, now: float
    ) -> InboundMessage | None:
        """Return what somebody said, None where nobody can be answered.

        The key is made from the message alone: it comes as an addressed and as a plain group message.
        """
        author, member = _dict(data.get("author")), _dict(data.get("member"))
        message_id = text_of(data.get("id"))
        sender_id, chat_id = _identities(data, author, scene)
        if not (message_id and sender_id and chat_id):
            return None
        content = read_content(data, guild=scene.guild, to_bot=scene.to_bot)
        addressed = scene.to_bot or content.names_bot
        text, unreadable = "", None
        # The words of a reply are kept: it may be to the bot.
        if addressed or self._keep_unaddressed or content.quoted_id:
            text, unreadable = _readable(content, scene)
        else:
            content = _NOTHING
        now_ms = int(now * 1000)
        sent_at_ms = _milliseconds(data.get("timestamp"))
        return InboundMessage(
            account=self.account,
            event_key=f"m:{message_id}",
            event_type=event_type,
            chat_type=scene.chat_type,
            chat_id=chat_id,
            sender_id=sender_id,
            sender_name=text_of(member.get("nick")) or text_of(author.get("username")),
            sender_is_bot=author.get("bot") is True,
            text=text,
            addressed=addressed,
            mentions=content.mentions,
            message_id=message_id,
            reply_to=content.quoted_id,
            quoted=content.quoted if content.text else "",
            attachments=content.attachments,
            unreadable=unreadable,
            sent_at_ms=sent_at_ms,
            reply_before_ms=min(now_ms, now_ms if sent_at_ms is None else sent_at_ms) + scene.window_ms,
            extra={"dms": True} if scene.guild and scene.chat_type is ChatType.PRIVATE else {},
        )

    def _event(self, data: dict[str, Any], event_type: str, event_id: str, key: str) -> InboundMessage:
        """Return an event that nobody said: its ids, and what a button says when it is pressed."""
        group = text_of(data.get("group_openid"))
        chat_type = ChatType.GROUP if group else ChatType.PRIVATE
        if not group and (data.get("guild_id") or data.get("channel_id")):
            chat_type = ChatType.CHANNEL
        message = _dict(data.get("message"))
        extra: dict[str, Any] = {}
        if event_type == "INTERACTION_CREATE":
            place = data.get("chat_type")
            chat_type = _BUTTON_PLACES.get(place, chat_type) if isinstance(place, int) else chat_type
            pressed = _dict(_dict(data.get("data")).get("resolved"))
            extra = {
                "event_id": event_id,
                "interaction_id": text_of(data.get("id")),
                "button_id": text_of(pressed.get("button_id")),
                "button_data": text_of(pressed.get("button_data")),
            }
        sender = next(filter(None, (text_of(data.get(name)) for name in _WHO)), "")
        if event_type in _RECALLS and text_of(message.get("id")):
            return self._recall(message, event_type, key)
        return InboundMessage(
            account=self.account,
            event_key=key,
            event_type=event_type,
            kind="event",
            chat_type=chat_type,
            chat_id=group
            or text_of(data.get("channel_id"))
            or text_of(data.get("guild_id"))
            or (sender if chat_type is ChatType.PRIVATE else ""),
            sender_id=sender,
            message_id=text_of(message.get("id")) or text_of(data.get("message_id")) or None,
            sent_at_ms=_milliseconds(data.get("timestamp")),
            welcome=_WELCOME.get(event_type) if group or sender else None,
            extra=extra,
        )

    def _recall(self, message: dict[str, Any], event_type: str, key: str) -> InboundMessage:
        """Return that a message was taken back; only guilds tell it."""
        direct = _RECALLS[event_type] is ChatType.PRIVATE
        message_id = text_of(message.get("id"))
        return InboundMessage(
            account=self.account,
            event_key=key,
            event_type=event_type,
            kind="event",
            chat_type=_RECALLS[event_type],
            chat_id=text_of(message.get("guild_id" if direct else "channel_id")),
            sender_id=text_of(_dict(message.get("author")).get("id")),
            message_id=message_id,
            change="recalled",
            target_key=f"m:{message_id}",
        )

    # -------------------------------------------------------------------------------------------- signing in

    async def start(self) -> None:
        """Begin to ask for a token, so that a wrong secret is seen before the first answer."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._sign_in())

    async def stop(self) -> None:
        """Close the connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for task in self._confirming:
            task.cancel()
        await asyncio.gather(*self._confirming, return_exceptions=True)
        await self._client.close()

    async def check(self) -> str:
        """Return once a token was given. Raises RetryLater with the reason there is none."""
        await self._client.sign_in()
        return f"app {self.settings.app_id}"

    def problems(self) -> list[str]:
        """Return why the platform gives no token."""
        return [] if self._problem is None else [self._problem]

    async def _sign_in(self) -> None:
        pause_s = 1.0
        while True:
            try:
                await self._client.sign_in()
            except RetryLater as error:
                if error.reason != self._problem:
                    logger.warning("sign-in failed", extra={"account": self.account, "reason": error.reason})
                    self._problem = error.reason
            else:
                break
            await self._sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        self._problem = None
        logger.info("signed in", extra={"account": self.account})

    async def fetch(self, message: InboundMessage, attachment: Attachment, *, max_bytes: int) -> bytes:  # noqa: ARG002  # the address is enough
        """Return a picture or a file from the address that came with it. Raises RetryLater or Undeliverable."""
        network = self.settings.network or self.context.network
        return await download(
            attachment.key, max_bytes=max_bytes, network=network, own=self.settings.base_url
        )

    # -------------------------------------------------------------------------------------------- sending

    async def send(self, outgoing: Outgoing) -> str | None:
        """Send one part as a reply and return what it is quoted as.

        Where the platform definitely refuses one form (Markdown that is not granted, an address that is not
        registered), the next one is tried under a number of its own, the same in every attempt. Raises RetryLater
        or Undeliverable; without a message to reply to only what an operator pushes is sent.
        """
        target = outgoing.target
        guild = target.chat_type is ChatType.CHANNEL or bool(target.extra.get("dms"))
        reply_to = target.reply_to
        if not reply_to and outgoing.kind != "push":
            raise Undeliverable("no message to reply to, and the platform takes nothing else")
        # JSON cannot hold a lone surrogate.
        text = inert(outgoing.text.encode("utf-8", "replace").decode(), guild=guild)
        if _is_c2c(target) and reply_to and outgoing.part == 0 and outgoing.kind in _ENDS_STREAM:
            streamed = await self._streams.finish(reply_to, text)
            if streamed is not None:
                return streamed
        return await self._send(outgoing, text, guild=guild)

    async def _send(self, outgoing: Outgoing, text: str, *, guild: bool) -> str | None:
        target, reply_to = outgoing.target, outgoing.target.reply_to
        path = _path(target)
        seq = _SEQ_OF_KIND.get(outgoing.kind, _other_seq(outgoing.kind)) + outgoing.part + 1
        markdown = self._markdown and not guild and holds_markdown(text)
        linkless = False
        while True:
            number = seq + _SEQ_MARKDOWN * markdown + _SEQ_WITHOUT_LINKS * linkless
            body = _body(text, markdown=markdown, guild=guild)
            if reply_to:
                body |= {"msg_id": reply_to, "msg_seq": number}
                if target.chat_type is ChatType.CHANNEL:  # elsewhere the platform quotes by itself
                    quoted = {"message_id": reply_to, "ignore_get_message_error": True}
                    body["message_reference"] = quoted
            answer = await self._client.call("POST", path, orjson.dumps(body))
            if answer.ok:
                return answer.quoted_as
            if answer.code == REPEATED and outgoing.attempts > 1:
                return None  # an earlier attempt of this very part has arrived
            if markdown and answer.code in MARKDOWN_REFUSED:
                self._markdown = self._markdown and answer.code not in MARKDOWN_NOT_GRANTED
                markdown = False
            elif not linkless and answer.code in LINK_REFUSED:
                text, linkless = without_links(text), True
            else:
                raise answer.error(is_reply=bool(reply_to))

    def parts_to(self, target: Target) -> int | None:
        """Return how many of the five replies an answer may take.

        One is for the note before the window closes, in private chats another for showing that it is being made.
        """
        return self.max_parts - 1 if _is_c2c(target) else self.max_parts

    async def show_typing(self, target: Target) -> str | None:
        """Show ``typing…`` in a private chat, once for each message: it is one of its five replies."""
        if not _is_c2c(target) or not target.reply_to or not self._may_type:
            return None
        body = {
            "msg_type": 6,
            "input_notify": {"input_type": 1, "input_second": _TYPING_S},
            "msg_id": target.reply_to,
            "msg_seq": _SEQ_TYPING,
        }
        answer = await self._client.call("POST", _path(target), orjson.dumps(body), sends=False)
        if not answer.ok and answer.code != REPEATED:
            error = answer.error(is_reply=True)
            self._may_type = isinstance(error, RetryLater) or answer.window_closed
            raise error
        return None  # it ends by itself, or with the answer

    def shows_text(self, target: Target) -> float | None:
        """Return how often an answer may be shown while it is written: in private chats, where QQ lets us."""
        return EVERY_S if _is_c2c(target) and target.reply_to and self._streams.granted else None

    async def show_text(self, target: Target, text: str) -> None:
        """Show how far an answer is. Raises RetryLater or Undeliverable."""
        shown = inert(text[: self.max_part_chars].encode("utf-8", "replace").decode(), guild=False)
        await self._streams.show(target.sender_id or target.chat_id, target.reply_to or "", shown)

    def recorded(self, messages: Sequence[InboundMessage]) -> None:
        """Confirm buttons that were pressed: whoever pressed one sees it spin until then."""
        for message in messages:
            pressed = str(message.extra.get("interaction_id") or "")
            if pressed and len(pressed) <= _MAX_TYPE and len(self._confirming) < _MAX_CONFIRMING:
                task = asyncio.get_running_loop().create_task(self._confirm(pressed))
                self._confirming.add(task)
                task.add_done_callback(self._confirming.discard)

    async def _confirm(self, pressed: str) -> None:
        path = f"/interactions/{quote(pressed, safe='')}"
        for _ in range(_CONFIRMED_WITHIN):
            try:
                answer = await self._client.call("PUT", path, b'{"code":0}', sends=False)
            except DeliveryError as error:
                reason = error.reason
            else:
                if answer.ok:
                    return
                reason = answer.reason
            await self._sleep(1.0)
        logger.warning("button not confirmed", extra={"account": self.account, "reason": reason})

    async def call(self, action: str, params: Mapping[str, Any], *, self_id: str = "") -> Any:  # noqa: ARG002  # one bot
        """Make a call of the bot API, ``METHOD /path``, with ``params`` as its JSON body; return the answer."""
        method, path = split_action(action)
        body = orjson.dumps(params) if params else None
        answer = await self._client.call(method, path, body, sends=False)
        if not answer.ok:
            raise answer.error(is_reply="msg_id" in params)
        return answer.body


# --------------------------------------------------------------------------------------------------- parts

_NOTHING = read_content({}, guild=False, to_bot=False)
_WHO = ("openid", "user_openid", "group_member_openid", "member_openid", "op_member_openid", "user_id")


def signing_key(secret: str) -> Ed25519PrivateKey:
    """Return the key of an AppSecret: its bytes, repeated until there are 32."""
    raw = secret.encode()
    return Ed25519PrivateKey.from_private_bytes((raw * (_SEED // len(raw) + 1))[:_SEED])


def _signature(header: str | None) -> bytes:
    """Return a signature's 64 bytes; raise BadSignature for anything else."""
    if header is None or len(header) != _SIGNATURE_HEX:
        raise BadSignature("no signature of the right length")
    try:
        raw = bytes.fromhex(header)
    except ValueError:
        raise BadSignature("the signature is no hex") from None
    if len(raw) * 2 != _SIGNATURE_HEX or raw[-1] & _HIGH_BITS:
        raise BadSignature("the signature is not in its only form")
    return raw


def _validated(data: object, key: Ed25519PrivateKey | None) -> Received:
    """Answer the check of the address: a signature, given only to whoever could make it himself.

    Events are proven by a signature over timestamp and body. Whoever could have any text signed here could have
    an event signed; so what is signed is a number and a word, too.
    """
    if key is None:
        raise BadToken("a check of the address that is not signed")
    fields = _dict(data)
    token, stamp = fields.get("plain_token"), fields.get("event_ts")
    if not isinstance(token, str) or not isinstance(stamp, str):
        raise BadPayload("a check of the address without its fields")
    if not _PLAIN_TOKEN.fullmatch(token) or not _EVENT_TS.fullmatch(stamp):
        raise BadPayload("a check of the address that asks for another signature")
    signature = key.sign((stamp + token).encode()).hex()
    return Received(body=orjson.dumps({"plain_token": token, "signature": signature}))


def _identities(data: dict[str, Any], author: dict[str, Any], scene: _Scene) -> tuple[str, str]:
    """Return who speaks and where: ids of this bot alone, and in groups of this group alone."""
    own = text_of(author.get("id"))
    if scene.guild:
        return own, text_of(data.get("guild_id" if scene.chat_type is ChatType.PRIVATE else "channel_id"))
    if scene.chat_type is ChatType.GROUP:
        group = text_of(data.get("group_openid")) or text_of(data.get("group_id"))
        return text_of(author.get("member_openid")) or own, group
    user = text_of(author.get("user_openid")) or own
    return user, user


def _readable(content: Content, scene: _Scene) -> tuple[str, str | None]:
    """Return the text as the model reads it, and what stands in its place if there is none."""
    if content.text or content.quoted:  # whoever quotes without a word asks about that
        return content.text or content.quoted, None
    if content.attachments:
        return "", content.attachments[0].kind
    return "", "text" if scene.chat_type is ChatType.PRIVATE else "mention"


def _is_c2c(target: Target) -> bool:
    """Say whether a target is a private chat proper, and not one of a guild's."""
    return target.chat_type is ChatType.PRIVATE and not target.extra.get("dms")


def _path(target: Target) -> str:
    if target.chat_type is ChatType.PRIVATE and not target.extra.get("dms"):
        kind, receiver, end = "/v2/users/", target.sender_id or target.chat_id, "/messages"
    elif target.chat_type is ChatType.PRIVATE:
        kind, receiver, end = "/dms/", target.chat_id, "/messages"
    elif target.chat_type is ChatType.GROUP:
        kind, receiver, end = "/v2/groups/", target.chat_id, "/messages"
    else:
        kind, receiver, end = "/channels/", target.chat_id, "/messages"
    if not receiver:
        raise Undeliverable("neither a chat nor a person to send to")
    if len(receiver) > _MAX_TYPE or receiver in {".", ".."}:
        raise Undeliverable("no id that the platform has given")
    return kind + quote(receiver, safe="") + end


def _body(text: str, *, markdown: bool, guild: bool) -> dict[str, Any]:
    if guild:
        return {"content": text}
    if markdown:
        return {"msg_type": 2, "markdown": {"content": text}}
    return {"msg_type": 0, "content": text}


def _other_seq(kind: str) -> int:
    return _SEQ_OTHER + 100 * (zlib.crc32(kind.encode()) % 500)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _milliseconds(value: object) -> int | None:
    """Read an instant: ISO 8601 with its zone, or a number of seconds (or milliseconds)."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _STAMP_DIGITS:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        found = value if value >= _LATEST_S else value * 1000
    else:
        try:
            instant = datetime.fromisoformat(value) if isinstance(value, str) else None
            found = int(instant.timestamp() * 1000) if instant is not None and instant.tzinfo else 0
        except (ValueError, OverflowError):
            return None
    return found if 0 < found < _LATEST_S * 1000 else None
