"""Feishu and Lark: events over a webhook, answers over the open platform's message API.

Sources: open.feishu.cn, "Configure Encrypt Key", "Receive message", "Send message", "Reply to message".
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn
from urllib.parse import quote

import orjson
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from pydantic import Field

from feishu_bot.config import HttpUrl, PlatformSettings, Rate, Secrets
from feishu_bot.errors import BadPayload, BadSignature, BadToken, DeliveryError, Undeliverable
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
from feishu_bot.platforms.feishu_card import EVERY_S, Cards
from feishu_bot.platforms.feishu_client import (
    NO_THREADS,
    POST_REFUSED,
    REACTIONS_REFUSED,
    REPLY_GONE,
    Answer,
    FeishuClient,
)
from feishu_bot.platforms.feishu_content import (
    SILENT_TYPES,
    escape_mentions,
    mentioned,
    outgoing_content,
    read_content,
    read_mentions,
    resolve_mentions,
    text_content,
)
from feishu_bot.platforms.feishu_seal import decrypted, header_bytes, instant_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from feishu_bot.model import Attachment, Mention, Outgoing, Target

logger = logging.getLogger(__name__)

_SIGNATURE = "X-Lark-Signature"
_TIMESTAMP = "X-Lark-Request-Timestamp"
_NONCE = "X-Lark-Request-Nonce"

_SHA1_LENGTH = 40  # hex digits: the scheme of legacy message cards
_MAX_ID = 200  # characters of an event key; longer ones are hashed
_LATEST_MS = 10**14  # a later instant must be microseconds (card callbacks)
_MAX_DIGITS = 17
_LONGEST_PAUSE_S = 60.0

_MAX_PRESSED = 4000  # bytes of what a card's button says
_TYPING = b'{"reaction_type":{"emoji_type":"Typing"}}'
_MARKS = {"zh": "(可能重复) ", "en": "(possibly repeated) "}
_WELCOME = {
    "im.chat.member.bot.added_v1": True,
    "im.chat.member.bot.deleted_v1": False,
    "im.chat.disbanded_v1": False,
}
_NO_LEGACY_CARD = ("encrypt", "schema", "header", "event", "uuid", "type", "challenge")


class FeishuSettings(PlatformSettings):
    """One Feishu or Lark app."""

    builtin: ClassVar[Mapping[str, Any]] = {
        "app_id": "${FEISHU_APP_ID:-}",
        "app_secret": "${FEISHU_APP_SECRET:-}",
        "encrypt_key": "${FEISHU_ENCRYPT_KEY:-}",
        "verification_token": "${FEISHU_VERIFICATION_TOKEN:-}",
    }

    app_id: str = Field("", description="the app's id, cli_…")
    app_secret: Secrets = Field(Secrets(), description="the app's secret")
    encrypt_key: Secrets = Field(
        Secrets(), description="Encrypt Key: events are encrypted and signed with it"
    )
    verification_token: Secrets = Field(
        Secrets(),
        description="Verification Token: stands in every event; alone it is weaker than encrypt_key",
    )
    base_url: HttpUrl = Field(
        "https://open.feishu.cn", description="the open platform; Lark: https://open.larksuite.com"
    )
    bot_open_id: str | None = Field(
        None, min_length=1, description="the bot's own id, ou_…; null: asked from the platform"
    )
    max_event_age_s: float | None = Field(
        None,
        gt=0,
        description="a signed timestamp older or later than this is refused (401); null: no check, the inbox"
        " holds repeats off",
    )

    streaming: bool = Field(
        True, description="show answers while they are written, as cards (scope cardkit:card:write)"
    )

    # "Send message": 50 a second by an app, 5 of them to one person or group.
    messages_per_s: Rate = Field(50, description="sent by all processes together; null: no limit of ours")
    messages_per_chat_per_s: Rate = Field(5, description="the same, to one chat")

    def missing(self) -> list[str]:
        """Return the keys without which this account cannot prove who sent an event, or answer."""
        keys = [] if self.app_id else ["app_id"]
        if not self.app_secret:
            keys.append("app_secret")
        if not self.encrypt_key and not self.verification_token and not self.insecure:
            keys.append("encrypt_key")
        return keys

    def warnings(self) -> list[str]:
        """Return what the operator should know about an enabled account, one sentence each."""
        found = super().warnings()
        if self.verification_token and not self.encrypt_key:
            found.append(
                "no encrypt_key: events are neither encrypted nor signed; only verification_token proves them"
            )
        return found


class Feishu(Platform):
    """A Feishu or Lark app that receives events over a webhook."""

    name = "feishu"
    settings_type = FeishuSettings
    # A text may be 150 KB of JSON inside JSON, where one byte can become seven.
    max_part_bytes = 20_000
    idempotent_for_s = 3600.0
    shows_typing = shows_both = True
    takes_calls = True
    fetches = frozenset({"image", "file"})

    settings: FeishuSettings

    def __init__(
        self,
        account: str,
        settings: FeishuSettings,
        context: PlatformContext,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(account, settings, context)
        self._ciphers = tuple(
            (key.encode(), AES(hashlib.sha256(key.encode()).digest()))
            for key in settings.encrypt_key.values()
        )
        self._tokens = tuple(token.encode() for token in settings.verification_token.values())
        self._own_id = settings.bot_open_id
        self._keep_unaddressed = not context.require_at_in_groups
        self._sleep = sleep
        self._client = FeishuClient(
            base_url=settings.base_url,
            app_id=settings.app_id,
            app_secrets=settings.app_secret.values(),
            network=settings.network or context.network,
            clock=clock,
            hidden=(*settings.encrypt_key.values(), *settings.verification_token.values()),
        )
        self._cards = Cards(self._client, self._reply_once, granted=settings.streaming, clock=clock)
        self._may_react = True  # until the platform says that a permission is missing
        self._problem: str | None = None
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------ receiving

    def receive(self, request: WebhookRequest) -> Received:
        """Verify, decrypt and normalise one request. Raises BadSignature, BadToken or BadPayload."""
        signature = request.headers.get(_SIGNATURE)
        if self._ciphers:
            if signature is not None and len(signature) == _SHA1_LENGTH:
                return self._legacy_card(request, _json_object(self._proven_card(request, signature)))
            payload, plain = self._opened(request, signature)
        else:
            plain = request.body
            payload = _json_object(plain)
            if _is_legacy_card(payload):
                if self._tokens or not self.settings.insecure:
                    self._proven_card(request, signature or "")
                return self._legacy_card(request, payload)
            if not self._tokens and not self.settings.insecure:
                raise BadSignature("no secret is configured that could prove an event")
            if "encrypt" in payload:
                _refuse_unreadable(proven_by_token=bool(self._tokens))
        header = payload.get("header")
        self._check_token(header if isinstance(header, dict) else payload)
        if payload.get("type") == "url_verification":
            return _challenge(payload)
        return Received((self._normalised(payload, plain),))

    def _opened(self, request: WebhookRequest, signature: str | None) -> tuple[dict[str, Any], bytes]:
        """Return the decrypted event and its bytes, once the signature over the raw body is right."""
        timestamp, nonce = request.headers.get(_TIMESTAMP), request.headers.get(_NONCE)
        if signature is None or timestamp is None or nonce is None:
            return self._unsigned_challenge(request.body)
        given, prefix = header_bytes(signature), header_bytes(timestamp + nonce)
        for key, cipher in self._ciphers:
            digest = hashlib.sha256(prefix + key)
            digest.update(request.body)
            if hmac.compare_digest(digest.hexdigest().encode(), given):
                self._check_age(timestamp, request.now)
                plain = decrypted(_json_object(request.body), cipher)
                return _json_object(plain), plain
        raise BadSignature("the signature does not match")

    def _unsigned_challenge(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        """Return the one thing that Feishu sends unsigned: the check of the request URL.

        Everything else gets the same answer, whether it can be decrypted or not: whoever cannot sign must
        not learn what a ciphertext holds.
        """
        for _, cipher in self._ciphers:
            try:
                plain = decrypted(_json_object(body), cipher)
                payload = _json_object(plain)
            except BadPayload:
                continue
            if payload.get("type") == "url_verification" and "header" not in payload:
                return payload, plain
        raise BadSignature("the request is not signed")

    def _check_token(self, holder: dict[str, Any]) -> None:
        if not self._tokens:
            return
        token = holder.get("token")
        given = token.encode() if isinstance(token, str) else b""
        if not any(hmac.compare_digest(given, known) for known in self._tokens):
            raise BadToken("the verification token does not match")

    def _check_age(self, timestamp: str, now: float) -> None:
        limit = self.settings.max_event_age_s
        if limit is None:
            return
        sent_at = instant_of(timestamp)
        if sent_at is not None and abs(now - sent_at) > limit:
            raise BadSignature("the signed timestamp is too far from now")

    def _proven_card(self, request: WebhookRequest, signature: str) -> bytes:
        """Return the body of a legacy card callback, proven by SHA-1 over the verification token."""
        timestamp, nonce = request.headers.get(_TIMESTAMP, ""), request.headers.get(_NONCE, "")
        given, prefix = header_bytes(signature), header_bytes(timestamp + nonce)
        for token in self._tokens:
            digest = hashlib.sha1(prefix + token, usedforsecurity=False)  # the platform's own scheme
            digest.update(request.body)
            if hmac.compare_digest(digest.hexdigest().encode(), given):
                self._check_age(timestamp, request.now)
                return request.body
        raise BadSignature("the card's signature does not match")

    def _legacy_card(self, request: WebhookRequest, payload: dict[str, Any]) -> Received:
        if not _is_legacy_card(payload):
            raise BadSignature("the scheme of cards does not prove an event")
        event = InboundMessage(
            account=self.account,
            event_key=_digest_key("card", request.body),
            event_type="card.action.trigger_v1",
            kind="event",
            chat_id=text_of(payload.get("open_chat_id")),
            sender_id=text_of(payload.get("open_id")),
            message_id=text_of(payload.get("open_message_id")) or None,
            extra=_pressed(_dict(payload.get("action")), text_of(payload.get("token"))),
        )
        return Received((event,))

    # ---------------------------------------------------------------------------------------- normalising

    def _normalised(self, payload: dict[str, Any], plain: bytes) -> InboundMessage:
        header = payload.get("header")
        body = payload.get("event")
        event: dict[str, Any] = body if isinstance(body, dict) else {}
        if isinstance(header, dict):
            kind, event_id, event_type = "ev", header.get("event_id"), header.get("event_type")
            tenant = text_of(header.get("tenant_key"))
        else:
            kind, event_id, event_type = "uuid", payload.get("uuid"), event.get("type")
            tenant = ""
        event_id, event_type = text_of(event_id), text_of(event_type) or "unknown"
        key = _key(kind, event_id) if event_id else _digest_key("body", plain)
        message = event.get("message")
        if event_type == "im.message.receive_v1" and isinstance(header, dict):
            if not isinstance(message, dict):
                raise BadPayload("a message event without a message")
            message_id = text_of(message.get("message_id"))
            return self._message(event, message, tenant, _key("om", message_id) if message_id else key)
        said_at = header.get("create_time") if isinstance(header, dict) else None
        return self._event(event, event_type[:_MAX_ID], key, _milliseconds(said_at))

    def _event(
        self, event: dict[str, Any], event_type: str, key: str, said_at_ms: int | None
    ) -> InboundMessage:
        """Return an event that nobody said: its ids and nothing else."""
        context = _dict(event.get("context"))
        actor = _dict(event.get("operator") or event.get("operator_id") or event.get("user_id"))
        message_id = text_of(event.get("message_id") or context.get("open_message_id"))
        recalled = event_type == "im.message.recalled_v1" and message_id
        action = event.get("action")
        return InboundMessage(
            account=self.account,
            event_key=key,
            event_type=event_type,
            kind="event",
            chat_id=text_of(event.get("chat_id") or context.get("open_chat_id")),
            sender_id=text_of(actor.get("open_id")),
            message_id=message_id or None,
            sent_at_ms=said_at_ms,
            change="recalled" if recalled else None,
            welcome=_WELCOME.get(event_type) if event.get("chat_id") else None,
            target_key=_key("om", message_id) if recalled else None,
            extra=_pressed(action, text_of(event.get("token"))) if isinstance(action, dict) else {},
        )

    def _message(
        self, event: dict[str, Any], message: dict[str, Any], tenant: str, key: str
    ) -> InboundMessage:
        sender = _dict(event.get("sender"))
        sender_id = text_of(_dict(sender.get("sender_id")).get("open_id"))
        sender_tenant = text_of(sender.get("tenant_key"))
        message_type = text_of(message.get("message_type"))
        message_id = text_of(message.get("message_id")) or None
        chat_id = text_of(message.get("chat_id"))
        private = message.get("chat_type") == "p2p"
        silent = message_type in SILENT_TYPES or not sender_id
        reply_to = text_of(message.get("parent_id")) or None
        thread_id = text_of(message.get("thread_id")) or None
        # In a topic every message names the first one so, whomever it is meant for.
        chosen = reply_to is not None and not (thread_id and reply_to == message.get("root_id"))
        text, unreadable = "", None
        attachments: tuple[Attachment, ...] = ()
        mentions: tuple[Mention, ...] = ()
        addressed: bool | None = private
        if not silent:
            content = read_content(message_type, message.get("content"))
            text, attachments, unreadable = content.text, content.attachments, content.unreadable
            mentions = content.mentions + read_mentions(message.get("mentions"))
            if not private:
                addressed = self._is_addressed(mentions)
            if addressed is False and not self._keep_unaddressed:
                if (
                    not chosen
                ):  # the words of a reply are kept: it may be to the bot, then ``judge`` reads them
                    text, attachments, mentions, unreadable = "", (), (), None
            elif addressed is not None:
                text, unreadable = self._readable(text, mentions, attachments, unreadable)
        return InboundMessage(
            account=self.account,
            event_key=key,
            event_type="im.message.receive_v1",
            kind="event" if silent else "message",
            chat_type=ChatType.PRIVATE if private else ChatType.GROUP,
            chat_id=chat_id,
            sender_id=sender_id,
            sender_is_bot=text_of(sender.get("sender_type")) != "user",
            outsider=bool(tenant and sender_tenant and tenant != sender_tenant),
            text=text,
            addressed=addressed,
            mentions=mentions,
            message_id=message_id,
            reply_to=reply_to,
            platform_thread_id=thread_id,
            attachments=attachments,
            unreadable=unreadable,
            sent_at_ms=_milliseconds(message.get("create_time")),
        )

    def _is_addressed(self, mentions: tuple[Mention, ...]) -> bool | None:
        if self._own_id is not None:
            return mentioned(mentions, self._own_id)
        return None if any(mention.id for mention in mentions) else False

    def _readable(
        self,
        text: str,
        mentions: tuple[Mention, ...],
        attachments: tuple[Attachment, ...],
        unreadable: str | None,
    ) -> tuple[str, str | None]:
        """Return the text as the model reads it, and what stands in its place if there is none."""
        if mentions:
            text = resolve_mentions(text, mentions, self._own_id)
        if unreadable is not None or (text and not text.isspace()):
            return text, unreadable
        if attachments:
            return "", attachments[0].kind
        return "", "mention" if self._own_id and mentioned(mentions, self._own_id) else "text"

    def judge(self, message: InboundMessage) -> InboundMessage | None:
        """Decide a message that came while the bot's own id was unknown; None while it still is."""
        if message.addressed is not None:
            return message
        if self._own_id is None:
            return None
        addressed = message.quotes_bot or mentioned(message.mentions, self._own_id)
        if not addressed and not self._keep_unaddressed:
            return replace(
                message, addressed=False, text="", mentions=(), attachments=(), unreadable=None, tokens=None
            )
        text, unreadable = self._readable(
            message.text, message.mentions, message.attachments, message.unreadable
        )
        return replace(message, addressed=addressed, text=text, unreadable=unreadable, tokens=None)

    # ------------------------------------------------------------------------------------------- identity

    async def start(self) -> None:
        """Begin to ask for the bot's own id, unless the settings name it. Does not wait for the platform."""
        if self._own_id is not None:
            self.context.identified()
        elif self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._identify())

    async def stop(self) -> None:
        """Close the connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._client.close()

    def problems(self) -> list[str]:
        """Return why the bot's own id is not known yet; mentions in groups wait for it."""
        return [] if self._problem is None else [self._problem]

    async def check(self) -> str:
        """Return the bot's own id. Raises RetryLater or Undeliverable."""
        answer = await self._client.call("GET", "/open-apis/bot/v3/info")
        if answer.code != 0:
            raise answer.error()
        return f"bot {text_of(_dict(answer.body.get('bot')).get('open_id'))}"

    async def _identify(self) -> None:
        pause_s = 1.0
        while self._own_id is None:
            try:
                answer = await self._client.call("GET", "/open-apis/bot/v3/info")
            except DeliveryError as error:
                reason = error.reason
            else:
                own_id = _dict(answer.body.get("bot")).get("open_id")
                if answer.code == 0 and isinstance(own_id, str) and own_id:
                    self._own_id = own_id
                    break
                reason = answer.reason if answer.code else "the answer names no bot"
            problem = f"the bot's own id is unknown: {reason}"
            if problem != self._problem:
                logger.warning("bot id unknown", extra={"account": self.account, "reason": reason})
                self._problem = problem
            await self._sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        self._problem = None
        logger.info("bot identified", extra={"account": self.account, "bot_open_id": self._own_id})
        self.context.identified()

    # -------------------------------------------------------------------------------------------- sending

    async def send(self, outgoing: Outgoing) -> str | None:
        """Send one part as a reply and return its message id.

        Where the platform definitely refuses one form (the message to reply to was recalled, the group has no
        topics, the post cannot be shown), the next one is tried under a key of its own, the same in every
        retry. Raises RetryLater or Undeliverable.
        """
        target = outgoing.target
        # JSON cannot hold a lone surrogate.
        text = escape_mentions(outgoing.text.encode("utf-8", "replace").decode())
        if outgoing.possibly_repeated:
            text = _MARKS.get(self.context.language, _MARKS["en"]) + text
        if outgoing.stream is not None:
            finished = await self._cards.finish(target, outgoing.stream, text)
            if finished is not None:
                return finished
        msg_type, content = outgoing_content(text)
        reply_to, threaded = target.reply_to, bool(target.thread_id)
        key = outgoing.idempotency_key
        while True:
            body: dict[str, Any] = {"msg_type": msg_type, "content": content, "uuid": key}
            if reply_to:
                answer = await self._reply(reply_to, body, threaded=threaded)
            else:
                answer = await self._create(target.chat_id, target.sender_id, body)
            if answer.code == 0:
                return text_of(_dict(answer.body.get("data")).get("message_id")) or None
            if reply_to and threaded and answer.code == NO_THREADS:
                threaded, key = False, key + "-f"
            elif reply_to and answer.code in REPLY_GONE:
                reply_to, key = None, key + "-c"
            elif msg_type == "post" and answer.code in POST_REFUSED:
                msg_type, content, key = "text", text_content(text), key + "-t"
            else:
                raise answer.error()

    async def show_typing(self, target: Target) -> str | None:
        """Put the reaction ``Typing`` on the question; return the reaction's id.

        An app without the permission is not asked to again. Raises RetryLater or Undeliverable.
        """
        if not target.reply_to or not self._may_react:
            return None
        answer = await self._client.call("POST", _reactions(target.reply_to), _TYPING)
        if answer.code in REACTIONS_REFUSED:
            self._may_react = False
            logger.info("typing switched off", extra={"account": self.account, "reason": answer.reason})
        if answer.code:
            raise answer.error()
        return text_of(_dict(answer.body.get("data")).get("reaction_id")) or None

    async def hide_typing(self, target: Target, shown: str) -> None:
        """Take the reaction back. Raises RetryLater or Undeliverable."""
        path = f"{_reactions(target.reply_to or '')}/{quote(shown, safe='')}"
        answer = await self._client.call("DELETE", path)
        if answer.code:
            raise answer.error()

    def shows_text(self, target: Target) -> float | None:
        """Return the pause between two updates of a card; None where the app may have none."""
        return EVERY_S if target.reply_to and self._cards.granted else None

    async def show_text(self, target: Target, text: str) -> str | None:
        """Show how far an answer is, as a card. Raises RetryLater or Undeliverable."""
        return await self._cards.show(target, escape_mentions(text.encode("utf-8", "replace").decode()))

    async def drop_text(self, target: Target, stream: str) -> None:
        """Recall a card that nobody finishes. Raises RetryLater or Undeliverable."""
        await self._cards.drop(target, stream)

    async def _reply_once(self, target: Target, body: dict[str, Any]) -> Answer:
        return await self._reply(target.reply_to or "", body, threaded=bool(target.thread_id))

    async def call(self, action: str, params: Mapping[str, Any], *, self_id: str = "") -> Any:  # noqa: ARG002  # one bot
        """Make a call of the open platform, ``METHOD /path``, with ``params`` as its JSON body; return its data."""
        method, path = split_action(action)
        answer = await self._client.call(method, path, orjson.dumps(params) if params else None)
        if answer.code:
            raise answer.error()
        return answer.body.get("data")

    async def fetch(self, message: InboundMessage, attachment: Attachment, *, max_bytes: int) -> bytes:
        """Return a picture or a file of a message. Raises RetryLater or Undeliverable."""
        kind = "image" if attachment.kind == "image" else "file"
        path = f"/open-apis/im/v1/messages/{quote(message.message_id or '', safe='')}/resources"
        return await self._client.download(
            f"{path}/{quote(attachment.key, safe='')}?type={kind}", max_bytes=max_bytes
        )

    async def _reply(self, message_id: str, body: dict[str, Any], *, threaded: bool) -> Answer:
        path = f"/open-apis/im/v1/messages/{quote(message_id, safe='')}/reply"
        return await self._client.call("POST", path, orjson.dumps({**body, "reply_in_thread": threaded}))

    async def _create(self, chat_id: str, open_id: str, body: dict[str, Any]) -> Answer:
        if not chat_id and not open_id:
            raise Undeliverable("neither a chat nor a person to send to")
        id_type = "chat_id" if chat_id else "open_id"
        path = f"/open-apis/im/v1/messages?receive_id_type={id_type}"
        return await self._client.call("POST", path, orjson.dumps({**body, "receive_id": chat_id or open_id}))


# --------------------------------------------------------------------------------------------------- parts


def _reactions(message_id: str) -> str:
    return f"/open-apis/im/v1/messages/{quote(message_id, safe='')}/reactions"


def _pressed(action: dict[str, Any], token: str) -> dict[str, Any]:
    """Return what a button or form of a card says: ``value``, ``form_value``, …, and the token to update it by."""
    found: dict[str, Any] = {"token": token} if token else {}
    room = _MAX_PRESSED
    for name, value in action.items():
        size = len(orjson.dumps(value)) + len(name)
        if size <= room:
            found[name] = value
            room -= size
    return found


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json_object(body: bytes) -> dict[str, Any]:
    value = parse_json(body)
    if not isinstance(value, dict):
        raise BadPayload("not a JSON object")
    return value


def _refuse_unreadable(*, proven_by_token: bool) -> NoReturn:
    reason = "the event is encrypted, but no encrypt_key is configured"
    raise BadToken(reason) if proven_by_token else BadPayload(reason)


def _challenge(payload: dict[str, Any]) -> Received:
    challenge = payload.get("challenge")
    if not isinstance(challenge, str):
        raise BadPayload("a challenge without text")
    return Received(body=orjson.dumps({"challenge": challenge}))


def _is_legacy_card(payload: dict[str, Any]) -> bool:
    return (
        isinstance(payload.get("action"), dict)
        and isinstance(payload.get("open_message_id"), str)
        and not any(name in payload for name in _NO_LEGACY_CARD)
    )


def _key(kind: str, value: str) -> str:
    if len(value) <= _MAX_ID:
        return f"{kind}:{value}"
    return _digest_key(kind, value.encode())


def _digest_key(kind: str, content: bytes) -> str:
    return f"{kind}:sha256-{hashlib.sha256(content).hexdigest()[:40]}"


def _milliseconds(value: object) -> int | None:
    """Read an instant in milliseconds (or microseconds) from a text or number; None if it is none."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
        return None
    number = int(text)
    return number // 1000 if number > _LATEST_MS else number
