"""OneBot 11: NapCat and other QQ clients, by HTTP events and reverse WebSocket, answered by either way.

Sources: the OneBot 11 standard, "communication", "event" and "api"; what NapCat, go-cqhttp and Lagrange do.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson
from pydantic import Field

from feishu_bot.config import HttpUrl, PlatformSettings, Secrets
from feishu_bot.errors import (
    BadPayload,
    BadSignature,
    BadToken,
    DeliveryError,
    NotConnected,
    RetryLater,
    Undeliverable,
)
from feishu_bot.log import Seldom
from feishu_bot.model import ChatType, InboundMessage
from feishu_bot.platforms import onebot_file
from feishu_bot.platforms.base import Platform, PlatformContext, Received, WebhookRequest, parse_json
from feishu_bot.platforms.connection import MAX_ANSWER_BYTES
from feishu_bot.platforms.onebot_api import CALL_S, Answer, Caller, HttpApi, Peer, Peers, Recent, Role
from feishu_bot.platforms.onebot_content import (
    id_of,
    number_or_text,
    outgoing_message,
    read_message,
    text_of,
)
from feishu_bot.platforms.onebot_event import (
    History,
    digest_key,
    event_of,
    group_id_of,
    message_key,
    milliseconds,
    self_id_of,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from feishu_bot.model import Attachment, Outgoing, Target
    from feishu_bot.platforms.base import Socket, SocketRequest

logger = logging.getLogger(__name__)

ASK_AFTER_S: Final = 5.0  # a message whose outcome is unknown needs time to show up before it is asked about
AWAY_S: Final = 5.0  # between two looks for a way out; a new connection is told at once
MAX_REPEATS: Final = 2  # of one part whose outcome stays unknown, each after asking
_HISTORY: Final = 100  # messages asked for
_REMEMBERED: Final = 5000  # as many ids as NapCat remembers
_MAX_NAME: Final = 200
_TEMPORARY: Final = frozenset({"group", "group_self", "other"})


class OneBotSettings(PlatformSettings):
    """One OneBot 11 implementation (NapCat and others), or several that share secrets."""

    builtin: ClassVar[Mapping[str, Any]] = {
        "secret": "${ONEBOT_SECRET:-}",
        "access_token": "${ONEBOT_TOKEN:-}",
    }

    secret: Secrets = Field(
        Secrets(), description="signs HTTP events; without it /webhook/{account} is 404. NapCat: Token of the"
        " HTTP client"
    )  # fmt: skip
    access_token: Secrets = Field(
        Secrets(), description="of the reverse WebSocket and of API calls; without it /ws/{account} is 404"
    )
    self_ids: tuple[str, ...] = Field(
        (), description="QQ numbers of the bots that are let in; none: the first one seen alone"
    )
    api_url: HttpUrl | None = Field(
        "http://127.0.0.1:3000",
        description="the HTTP API, for answers while no WebSocket is open; null: there is none",
    )
    max_event_age_s: float | None = Field(
        None, gt=0, description="an event whose time is further from now is refused (401); null: no check"
    )

    def missing(self) -> list[str]:
        """Return the keys without which this account cannot prove who sent an event."""
        return [] if self.secret or self.access_token or self.insecure else ["secret or access_token"]


class OneBot(Platform):
    """QQ accounts behind a OneBot 11 implementation.

    There is no idempotency key. A message whose outcome is unknown is looked for in the chat's history; it is
    repeated only where it is certainly not there.
    """

    name = "onebot"
    settings_type = OneBotSettings
    max_part_chars = 4500
    takes_calls = True
    idempotent_for_s = 0.0
    fetches = frozenset({"image", "file"})

    settings: OneBotSettings

    def __init__(
        self,
        account: str,
        settings: OneBotSettings,
        context: PlatformContext,
        *,
        call_timeout_s: float = CALL_S,
        ask_after_s: float = ASK_AFTER_S,
        away_s: float = AWAY_S,
    ) -> None:
        super().__init__(account, settings, context)
        self._secrets = tuple(secret.encode() for secret in settings.secret.values())
        self._tokens = tuple(token.encode() for token in settings.access_token.values())
        self._self_ids = frozenset(settings.self_ids)
        self._keep_unaddressed = not context.require_at_in_groups
        self._call_timeout_s = call_timeout_s
        self._ask_after_s = ask_after_s
        self._away_s = away_s
        self._hidden = (*settings.secret.values(), *settings.access_token.values())
        self._unreadable = Seldom(logger)
        self._peers = Peers()
        self._http: HttpApi | None = None
        if settings.api_url is not None:
            self._http = HttpApi(
                settings.api_url,
                settings.access_token,
                settings.network or context.network,
                timeout_s=call_timeout_s,
                hidden=self._hidden,
            )
        self._sent: Recent[tuple[str, str], bool] = Recent(_REMEMBERED)  # what parts are known to have become
        self._repeats: Recent[str, int] = Recent(_REMEMBERED)
        self._offline: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def has_webhook(self) -> bool:
        """Whether HTTP events can be proved, or need no proof."""
        return bool(self._secrets) or self.settings.insecure

    @property
    def has_socket(self) -> bool:
        """Whether a WebSocket's client can be proved, or needs no proof."""
        return bool(self._tokens) or self.settings.insecure

    # ------------------------------------------------------------------------------------------ receiving

    def receive(self, request: WebhookRequest) -> Received:
        """Verify and normalise one HTTP event. Raises BadSignature, BadToken or BadPayload."""
        self._prove(request)
        payload = parse_json(request.body)
        if not isinstance(payload, dict) or not isinstance(payload.get("post_type"), str):
            # Answers to API calls are read from the socket that made the call, and nowhere else.
            raise BadPayload("not an event")
        self_id = self_id_of(payload.get("self_id"))
        if self_id_of(request.headers.get("X-Self-ID")) != self_id:
            raise BadPayload("X-Self-ID, which nobody signs, differs from the event's self_id")
        self._check_age(payload, request.now)
        self._let_in(self_id)
        # NapCat reads a body as a quick operation; an empty one means nothing to every implementation.
        return Received(self._normalised(payload, self_id), b"", 204)

    def _prove(self, request: WebhookRequest) -> None:
        if not self._secrets:
            if not self.settings.insecure:
                raise BadSignature("no secret is configured that could prove an event")
            _refuse_pages(request.headers)
            return
        signature = request.headers.get("X-Signature")
        if signature is None:
            raise BadSignature("the request is not signed")
        given = signature.lower().encode("utf-8", "surrogatepass")
        for secret in self._secrets:
            digest = hmac.digest(secret, request.body, "sha1")
            if hmac.compare_digest(b"sha1=" + digest.hex().encode(), given):
                return
        raise BadToken("the signature does not match")

    def _check_age(self, payload: Mapping[str, Any], now: float) -> None:
        limit = self.settings.max_event_age_s
        if limit is None:
            return
        sent_at = milliseconds(payload.get("time"))
        if sent_at is None or abs(now - sent_at / 1000) > limit:
            raise BadSignature("the event's time is too far from now")

    def _let_in(self, self_id: str) -> None:
        """Refuse bots that are not ours. Whoever asks has proved itself."""
        if not self._self_ids:
            self._self_ids = frozenset({self_id})
        elif self_id not in self._self_ids:
            raise BadToken(f"{self_id} is none of self_ids ({', '.join(sorted(self._self_ids))})")

    # ---------------------------------------------------------------------------------------- normalising

    def _normalised(self, payload: dict[str, Any], self_id: str) -> tuple[InboundMessage, ...]:
        """Return what is to be recorded of an event; heartbeats and the bot's own words are not."""
        match payload.get("post_type"):
            case "message":
                return (self._message(payload, self_id),)
            case "message_sent":  # the bot's own words
                return ()
            case "meta_event":
                self._note_status(payload, self_id)
                return ()
            case "notice":
                if payload.get("sub_type") == "input_status":
                    return ()
                if payload.get("notice_type") == "bot_offline":
                    self._offline.add(self_id)
        return (event_of(payload, self.account, self_id),)

    def _note_status(self, payload: dict[str, Any], self_id: str) -> None:
        status = payload.get("status")
        online = status.get("online") if isinstance(status, dict) else True
        if online is False:
            self._offline.add(self_id)
        else:
            self._offline.discard(self_id)

    def _message(self, payload: dict[str, Any], self_id: str) -> InboundMessage:
        group = payload.get("message_type") == "group"
        group_id, user_id = group_id_of(payload.get("group_id")), id_of(payload.get("user_id"))
        if not user_id or (group and not group_id) or payload.get("sub_type") == "notice":
            return event_of(payload, self.account, self_id)
        sender = payload.get("sender")
        sender = sender if isinstance(sender, dict) else {}
        name = text_of(sender.get("card") or sender.get("nickname"))
        sender_id = user_id
        anonymous = payload.get("anonymous")
        if group and isinstance(anonymous, dict):
            # All anonymous members share one number, and what stands under sender may be the real person.
            sender_id = f"anonymous-{group_id}-{id_of(anonymous.get('id'))}"
            name = text_of(anonymous.get("name"))
        extra = {"self_id": self_id}
        if not group and text_of(payload.get("sub_type")) in _TEMPORARY:
            temporary = group_id or group_id_of(sender.get("group_id"))
            if temporary:
                extra["group_id"] = temporary
        content = read_message(payload.get("message"), self_id)
        message_id = id_of(payload.get("message_id"))
        key = message_key(self_id, group_id if group else "", user_id, message_id)
        message = InboundMessage(
            account=self.account,
            event_key=key if message_id else digest_key("m", payload),
            chat_type=ChatType.GROUP if group else ChatType.PRIVATE,
            chat_id=group_id if group else "",
            sender_id=sender_id,
            sender_name=name[:_MAX_NAME],
            sender_is_bot=user_id == self_id or user_id in self._self_ids,
            text=content.text,
            addressed=content.to_bot or not group,
            mentions=content.mentions,
            message_id=message_id or None,
            reply_to=content.reply_to,
            attachments=content.attachments,
            unreadable=content.unreadable,
            sent_at_ms=milliseconds(payload.get("time")),
            extra=extra,
        )
        # The words of a reply are kept: it may be to the bot.
        return self._bare(message) if message.addressed is False and not message.reply_to else message

    def _bare(self, message: InboundMessage) -> InboundMessage:
        """Return a message that does not mention the bot: without its words, unless it is answered all the same."""
        if self._keep_unaddressed:
            return message
        return replace(
            message, text="", mentions=(), attachments=(), unreadable=None, tokens=None, sender_name=""
        )

    # ---------------------------------------------------------------------------------- reverse WebSocket

    def admit(self, request: SocketRequest) -> Caller:
        """Return whose implementation asks. Raises BadSignature, BadToken or BadPayload."""
        self._check_token(request)
        self_id = self_id_of(request.headers.get("X-Self-ID"))
        role = request.headers.get("X-Client-Role", Role.UNIVERSAL.value).strip().lower()
        if role not in {r.value for r in Role}:
            raise BadPayload("X-Client-Role is none of API, Event and Universal")
        self._let_in(self_id)
        agent = request.headers.get("User-Agent", "")[:_MAX_NAME]
        return Caller(self_id, Role(role), agent if agent.isprintable() else "")

    def _check_token(self, request: SocketRequest) -> None:
        if not self._tokens:
            if not self.settings.insecure:
                raise BadSignature("no access_token is configured that could prove a client")
            _refuse_pages(request.headers)
            return
        scheme, _, token = request.headers.get("Authorization", "").strip().partition(" ")
        if scheme and scheme.lower() not in {"bearer", "token"}:
            raise BadSignature("the Authorization header is of another scheme")
        # NapCat sends "Bearer" also without a token; then the one of the URL counts.
        given = token or request.query.get("access_token", "")
        if not given:
            raise BadSignature("there is no access token")
        raw = given.encode("utf-8", "surrogatepass")
        if not any(hmac.compare_digest(raw, known) for known in self._tokens):
            raise BadToken("the access token does not match")

    async def accept(
        self,
        socket: Socket,
        caller: Caller,
        record: Callable[[Sequence[InboundMessage]], Awaitable[None]],
    ) -> None:
        """Serve a socket until it is closed: events are handed on to be recorded, answers to their calls."""
        peer = Peer(socket, caller, timeout_s=self._call_timeout_s, hidden=self._hidden)
        where = {"account": self.account, "self_id": caller.self_id, "role": caller.role.value}
        replaced = self._peers.add(peer)
        if replaced is not None:
            logger.warning("socket replaced", extra=where)
            self._run(replaced.socket.close(1000, "replaced by a newer connection"))
        logger.info("socket opened", extra={**where, "client": caller.agent})
        if peer.takes_calls:
            self.context.connected(self.account)
        try:
            while (frame := await socket.receive()) is not None:
                await self._take_frame(peer, frame, record)
        finally:
            peer.lose("the connection was closed")
            self._peers.remove(peer)
            logger.info("socket closed", extra=where)

    async def _take_frame(
        self,
        peer: Peer,
        frame: str | bytes,
        record: Callable[[Sequence[InboundMessage]], Awaitable[None]],
    ) -> None:
        try:
            payload = orjson.loads(frame)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            self._unreadable.warning("frame unreadable", {"account": self.account, "size": len(frame)})
        elif "post_type" not in payload:
            peer.take_answer(payload)
        elif peer.sends_events:
            self_id = peer.caller.self_id
            if id_of(payload.get("self_id")) != self_id:
                self._unreadable.warning("event of another bot dropped", {"account": self.account})
                return
            messages = self._normalised(payload, self_id)
            if messages:
                await record(messages)

    # -------------------------------------------------------------------------------------------- running

    async def stop(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(p.socket.close(1001, "the server stops") for p in self._peers))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    async def check(self) -> str:
        """Return who answers at ``api_url``; clients that connect to us cannot be asked from outside."""
        if self._http is None:
            return ""
        owner = await self._http.owner()
        if not owner:
            raise RetryLater(self._http.problem or "no answer")
        return f"bot {owner}"

    def problems(self) -> list[str]:
        """Return what keeps answers from going out."""
        found = [f"{self.account}: bot {self_id} is offline" for self_id in sorted(self._offline)]
        if not self._peers.for_calls(""):
            if self._http is None:
                found.append(f"{self.account}: no OneBot client is connected")
            elif self._http.problem is not None:
                found.append(
                    f"{self.account}: no OneBot client is connected, and api_url: {self._http.problem}"
                )
        return found

    def _run(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -------------------------------------------------------------------------------------------- sending

    async def send(self, outgoing: Outgoing) -> str | None:
        """Send one part as text and return its message id; the first part in a group quotes the question.

        Raises RetryLater, or Undeliverable: also where an earlier attempt's outcome is unknown and nobody can
        tell it.
        """
        target = outgoing.target
        self_id = text_of(target.extra.get("self_id")) or self._only_bot()
        action, params = _address(target)
        quote = target.reply_to if target.chat_type is ChatType.GROUP and outgoing.part == 0 else None
        if outgoing.unknown_since_ms is not None:
            sent_id = await self._find(outgoing, self_id, params)
            if sent_id is not None:
                self._sent.set((self_id, sent_id), True)
                return sent_id
        answer = await self._post(action, params, self_id, outgoing.text, quote)
        if quote and not answer.ok and isinstance(answer.error(), Undeliverable):
            # The question may be gone, or the implementation may have forgotten its id.
            answer = await self._post(action, params, self_id, outgoing.text, None)
        if not answer.ok:
            raise self._told(answer.error())
        message_id = id_of(answer.field("message_id")) or None
        if message_id is not None:
            self._sent.set((self_id, message_id), True)
        return message_id

    async def _post(
        self, action: str, params: Mapping[str, Any], self_id: str, text: str, quote: str | None
    ) -> Answer:
        message = outgoing_message(text, quote=quote)
        try:
            return await self._call(action, {**params, "message": message}, self_id=self_id)
        except RetryLater as error:
            raise self._told(error) from None

    def _told(self, error: DeliveryError) -> DeliveryError:
        """Return a failure with our own patience where the platform asks for none."""
        if isinstance(error, RetryLater) and error.outcome_unknown:
            return RetryLater(error.reason, after_s=self._ask_after_s, outcome_unknown=True)
        return error

    def reaches(self, target: Target) -> bool:
        """Say whether the bot that speaks to a target has a socket of this process that takes calls."""
        return bool(self._peers.for_calls(text_of(target.extra.get("self_id")) or self._only_bot()))

    async def call(self, action: str, params: Mapping[str, Any], *, self_id: str = "") -> Any:
        """Make a call for a plugin and return its ``data``. Raises RetryLater or Undeliverable."""
        answer = await self._call(action, params, self_id=self_id or self._only_bot())
        if not answer.ok:
            raise answer.error()
        return answer.data

    async def fetch(self, message: InboundMessage, attachment: Attachment, *, max_bytes: int) -> bytes:
        """Return a picture or a file: from the public address it came with, else from the client that told of it."""
        self_id = text_of(message.extra.get("self_id")) or self._only_bot()
        call = partial(self._call, self_id=self_id)
        network = self.settings.network or self.context.network
        return await onebot_file.fetch(call, message, attachment, max_bytes=max_bytes, network=network)

    async def _call(
        self, action: str, params: Mapping[str, Any], *, self_id: str, max_bytes: int = MAX_ANSWER_BYTES
    ) -> Answer:
        """Make an API call for a bot: by its WebSocket, or by HTTP where that is certain not to have been asked.

        Raises RetryLater or Undeliverable where there is no answer.
        """
        reason = "no OneBot client is connected"
        for peer in self._peers.for_calls(self_id):
            try:
                return await peer.call(action, params)
            except RetryLater as error:
                if error.outcome_unknown:
                    raise
                reason = error.reason
        if self._http is None:
            raise NotConnected(reason, after_s=self._away_s)
        try:
            if len(self._self_ids) > 1 and self_id and await self._http.owner() != self_id:
                reason = f"bot {self_id} is not connected, and api_url is another's"
                raise NotConnected(reason, after_s=self._away_s)
            return await self._http.call(action, params, max_bytes=max_bytes)
        except RetryLater as error:
            if error.outcome_unknown or error.after_s is not None:
                raise
            raise NotConnected(error.reason, after_s=self._away_s) from None

    def _only_bot(self) -> str:
        """Return the bot to speak for where the target names none, ``""`` where there are several."""
        return next(iter(self._self_ids)) if len(self._self_ids) == 1 else ""

    async def _find(self, outgoing: Outgoing, self_id: str, params: Mapping[str, Any]) -> str | None:
        """Look for a part in its chat; return its message id, or None where it is certainly not there.

        Raises RetryLater where nobody can be asked now, Undeliverable where nobody knows.
        """
        group = outgoing.target.chat_type is ChatType.GROUP
        action = "get_group_msg_history" if group else "get_friend_msg_history"
        chat = {name: value for name, value in params.items() if group or name == "user_id"}
        try:
            answer = await self._call(action, {**chat, "count": _HISTORY}, self_id=self_id)
            if not answer.ok:
                raise answer.error()
        except RetryLater as error:
            raise type(error)(error.reason, after_s=error.after_s, outcome_unknown=True) from None
        except Undeliverable as error:
            raise Undeliverable(f"outcome unknown, the history cannot be asked: {error.reason}") from None
        history = History(answer.field("messages"), self_id)
        since_s = (outgoing.unknown_since_ms or 0) / 1000
        sent_id = history.find(
            outgoing.text,
            outgoing.target.reply_to,
            since_s,
            known=lambda i: self._sent.get((self_id, i)) is not None,
        )
        if sent_id is not None:
            return sent_id
        if not history.reaches(outgoing.target.reply_to, since_s):
            raise Undeliverable("outcome unknown, the history does not reach back so far")
        key = outgoing.idempotency_key
        repeats = (self._repeats.get(key) or 0) + 1
        if repeats > MAX_REPEATS:
            raise Undeliverable(f"outcome unknown after {repeats} attempts")
        self._repeats.set(key, repeats)
        return None


def _refuse_pages(headers: Mapping[str, str]) -> None:
    """Refuse a browser: without a secret, any page that somebody has open could speak for the bot."""
    if headers.get("Origin") is not None:
        raise BadToken("a web page asks")


def _address(target: Target) -> tuple[str, dict[str, Any]]:
    """Return the action that sends to a target, and whom it names. Raises Undeliverable for nobody."""
    if target.chat_type is not ChatType.PRIVATE:
        if not target.chat_id:
            raise Undeliverable("no group to send to")
        return "send_group_msg", {"group_id": number_or_text(target.chat_id)}
    if not target.sender_id:
        raise Undeliverable("nobody to send to")
    params: dict[str, Any] = {"user_id": number_or_text(target.sender_id)}
    temporary = text_of(target.extra.get("group_id"))
    if temporary:
        params["group_id"] = number_or_text(temporary)
    return "send_private_msg", params
