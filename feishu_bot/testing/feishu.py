"""A Feishu open platform on loopback, for tests, benchmarks and demonstrations, and events as it sends them.

It checks what the real one checks (token, sizes, keys), folds equal ``uuid`` values for an hour, can be told
to fail in every way a network and a platform fail, and remembers what a chat's members would see. Run alone:
``python -m feishu_bot.testing.feishu --port 9000``; then ``GET /_visible`` shows the messages and
``POST /_control`` takes ``{"down": true}``, ``{"expire_tokens": true}`` or ``{"fail": {"times": 2, "code": 230020}}``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import itertools
import os
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import orjson
from aiohttp import web
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

from feishu_bot.testing.feishu_cards import CARDS_PATH, FakeCard, FakeCards
from feishu_bot.testing.serving import FakeApi, read_object, serve_until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BOT_OPEN_ID = "ou_fake_bot"
USER_OPEN_ID = "ou_fake_user"
TENANT_KEY = "tenant_fake"

_BLOCK = 16
_TOKEN_PATH = "/open-apis/auth/v3/tenant_access_token/internal"  # noqa: S105 - a path, no secret
_INFO_PATH = "/open-apis/bot/v3/info"
_MESSAGES_PATH = "/open-apis/im/v1/messages"
_REPLY_END = "/reply"
_RESOURCES = re.compile(_MESSAGES_PATH + "/([^/]+)/resources/([^/]+)")
_REACTIONS = re.compile(_MESSAGES_PATH + "/([^/]+)/reactions(?:/([^/]+))?")
_MAX_UUID = 50
_MAX_BYTES = {"text": 150 * 1024, "post": 30 * 1024, "interactive": 30 * 1024}
_SAME_TOKEN_S = 1800.0  # with more than this left, the token asked for again is the same one


# -------------------------------------------------------------------------------------------------- events


def sign_and_encrypt(
    event: Mapping[str, Any] | bytes,
    *,
    encrypt_key: str,
    timestamp: int | str | None = None,
    nonce: str = "1624875321",
    iv: bytes | None = None,
) -> tuple[dict[str, str], bytes]:
    """Return headers and body of ``event`` as Feishu posts it with an Encrypt Key.

    ``timestamp``: Unix seconds, now when None. ``iv``: 16 bytes, random when None.
    """
    plain = event if isinstance(event, bytes) else orjson.dumps(event)
    padding = _BLOCK - len(plain) % _BLOCK
    iv = os.urandom(_BLOCK) if iv is None else iv
    encryptor = Cipher(AES(hashlib.sha256(encrypt_key.encode()).digest()), CBC(iv)).encryptor()
    sealed = iv + encryptor.update(plain + bytes((padding,)) * padding) + encryptor.finalize()
    body = b'{"encrypt":"%b"}' % base64.b64encode(sealed)
    return sign(body, encrypt_key=encrypt_key, timestamp=timestamp, nonce=nonce), body


def sign(
    body: bytes, *, encrypt_key: str, timestamp: int | str | None = None, nonce: str = "1624875321"
) -> dict[str, str]:
    """Return the headers that prove ``body`` (the encrypted bytes, as they travel)."""
    stamp = str(int(time.time()) if timestamp is None else timestamp)
    digest = hashlib.sha256((stamp + nonce + encrypt_key).encode())
    digest.update(body)
    return {
        "Content-Type": "application/json;charset=utf-8",
        "X-Lark-Request-Timestamp": stamp,
        "X-Lark-Request-Nonce": nonce,
        "X-Lark-Signature": digest.hexdigest(),
    }


def challenge_event(*, token: str = "", challenge: str = "ajls384kdjx98XX") -> dict[str, Any]:
    """Return the check of a request URL."""
    return {"challenge": challenge, "token": token, "type": "url_verification"}


def make_event(
    event: Mapping[str, Any],
    *,
    event_type: str,
    event_id: str | None = None,
    token: str = "",
    app_id: str = "cli_fake",
    tenant_key: str = TENANT_KEY,
    create_time_ms: int | None = None,
) -> dict[str, Any]:
    """Return ``event`` in the envelope of schema 2.0."""
    return {
        "schema": "2.0",
        "header": {
            "event_id": event_id or "evt_" + os.urandom(12).hex(),
            "event_type": event_type,
            "create_time": str(int(time.time() * 1000) if create_time_ms is None else create_time_ms),
            "token": token,
            "app_id": app_id,
            "tenant_key": tenant_key,
        },
        "event": dict(event),
    }


def message_event(
    content: Mapping[str, Any] | str,
    *,
    message_type: str = "text",
    chat_type: Literal["p2p", "group"] = "p2p",
    message_id: str | None = None,
    chat_id: str | None = None,
    open_id: str = USER_OPEN_ID,
    sender_type: str = "user",
    sender_tenant_key: str = TENANT_KEY,
    mentions: list[dict[str, Any]] | None = None,
    parent_id: str | None = None,
    thread_id: str | None = None,
    create_time_ms: int | None = None,
    **envelope: Any,
) -> dict[str, Any]:
    """Return a received message; ``envelope``: event_id, token, app_id, tenant_key."""
    sent_at = str(int(time.time() * 1000) if create_time_ms is None else create_time_ms)
    message: dict[str, Any] = {
        "message_id": message_id or "om_" + os.urandom(12).hex(),
        "create_time": sent_at,
        "update_time": sent_at,
        "chat_id": chat_id or ("oc_fake_p2p" if chat_type == "p2p" else "oc_fake_group"),
        "chat_type": chat_type,
        "message_type": message_type,
        "content": content if isinstance(content, str) else orjson.dumps(content).decode(),
    }
    if mentions:
        message["mentions"] = mentions
    if parent_id:
        message["parent_id"] = message["root_id"] = parent_id
    if thread_id:
        message["thread_id"] = thread_id
    sender = {
        "sender_id": {"open_id": open_id, "union_id": "on_" + open_id[3:], "user_id": ""},
        "sender_type": sender_type,
        "tenant_key": sender_tenant_key,
    }
    return make_event(
        {"sender": sender, "message": message},
        event_type="im.message.receive_v1",
        create_time_ms=create_time_ms,
        **envelope,
    )


def mention(open_id: str, *, key: str = "@_user_1", name: str = "", bot: bool = False) -> dict[str, Any]:
    """Return one entry of a message's ``mentions``."""
    return {
        "key": key,
        "id": {"open_id": open_id, "union_id": "", "user_id": ""},
        "mentioned_type": "bot" if bot else "user",
        "name": name,
        "tenant_key": TENANT_KEY,
    }


def text_event(
    text: str,
    *,
    chat_type: Literal["p2p", "group"] = "p2p",
    mention_bot: bool = False,
    bot_open_id: str = BOT_OPEN_ID,
    **options: Any,
) -> dict[str, Any]:
    """Return a text message; ``mention_bot`` puts ``@bot`` before it. ``options``: as ``message_event``."""
    if mention_bot:
        text = f"@_user_1 {text}"
        options["mentions"] = [mention(bot_open_id, name="bot", bot=True), *options.get("mentions", ())]
    return message_event({"text": text}, chat_type=chat_type, **options)


# -------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True, slots=True)
class VisibleMessage:
    """A message as the members of a chat see it. ``at``: Unix seconds of its acceptance.

    ``chat`` is the receiver of a plain message (a chat or a person), and of a reply where the fake knows the
    message replied to.
    """

    message_id: str
    chat: str
    reply_to: str | None
    thread: bool
    msg_type: str
    text: str
    content: str
    uuid: str
    at: float


class FakeFeishu(FakeApi):
    """A Feishu platform on loopback; ``async with FakeFeishu() as fake`` runs it at ``fake.url``.

    ``visible`` holds what was sent, in order; ``requests`` the calls as ``(method, path)``; ``reactions`` what was
    put on messages as ``(message id, emoji)``, ``shown`` those of them that are still there; ``resources`` what
    messages hold, by ``(message id, key)``; to those in ``gone`` nobody can reply. ``down = True``
    answers 503 to everything. Without ``app_secret`` every app is let in. ``keep`` bounds what is remembered.
    """

    def __init__(
        self,
        *,
        app_secret: str | None = None,
        bot_open_id: str = BOT_OPEN_ID,
        token_lifetime_s: float = 7200.0,
        fold_for_s: float = 3600.0,
        keep: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(("token", "info", "messages", "reactions", "resources", "cards"))
        self.app_secret = app_secret
        self.bot_open_id = bot_open_id
        self.token_lifetime_s = token_lifetime_s
        self.fold_for_s = fold_for_s
        self.visible: deque[VisibleMessage] = deque(maxlen=keep)
        self.requests: deque[tuple[str, str]] = deque(maxlen=keep)
        self.info_calls = 0
        self.reactions: deque[tuple[str, str]] = deque(maxlen=keep)
        self.shown: dict[str, tuple[str, str]] = {}  # by the reaction's id
        self.resources: dict[tuple[str, str], bytes] = {}
        self.cards = FakeCards(self._card_changed)
        self.recalled: deque[str] = deque(maxlen=keep)
        self.gone: set[str] = set()  # people's own messages that they have recalled: nobody can reply to them
        self._keep = keep
        self._clock = clock
        self._chats: dict[str, str] = {}
        self._by_uuid: dict[str, tuple[float, bytes]] = {}
        self._numbers = itertools.count(1)

    def know_message(self, message_id: str, chat_id: str) -> None:
        """Tell where a message stands, so that replies to it are shown in that chat."""
        self._chats[message_id] = chat_id

    # -------------------------------------------------------------------------------------------- serving

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path.startswith("/_"):
            return await self._own(request)
        self.requests.append((request.method, path))
        if self.down:
            return web.Response(status=503, text="down")
        body = await request.read()
        kind = "messages" if path.startswith(_MESSAGES_PATH) else "token" if path == _TOKEN_PATH else "info"
        if _REACTIONS.fullmatch(path):
            kind = "reactions"
        elif _RESOURCES.fullmatch(path):
            kind = "resources"
        elif path.startswith(CARDS_PATH):
            kind = "cards"
        return await self._answered(kind, request, body)

    def _response(self, status: int, body: bytes) -> web.Response:
        """Return an answer: JSON, or the bytes of a resource."""
        kind = "application/json" if body[:1] in b"{[" else "application/octet-stream"
        return web.Response(status=status, body=body, content_type=kind)

    def _refusal(self, code: int, words: str) -> bytes:
        return _refusal(code, words)

    def _answer(self, request: web.BaseRequest, body: bytes) -> tuple[int, bytes]:
        path = request.path
        if path == _TOKEN_PATH:
            return self._give_token(body)
        expires = self._tokens.get(request.headers.get("Authorization", "")[7:])
        if expires is None or expires <= self._clock():
            return 400, _refusal(99991663, "Invalid access token for authorization.")
        if path == _INFO_PATH:
            self.info_calls += 1
            bot = {
                "activate_status": 2,
                "app_name": "bot",
                "avatar_url": "https://example.com/bot.png",
                "ip_white_list": [],
                "open_id": self.bot_open_id,
            }
            return 200, orjson.dumps({"code": 0, "msg": "ok", "bot": bot})
        if request.method == "POST" and path == _MESSAGES_PATH:
            return self._take(body, None, request.query.get("receive_id_type", ""))
        if request.method == "POST" and path.startswith(_MESSAGES_PATH) and path.endswith(_REPLY_END):
            return self._take(body, path[len(_MESSAGES_PATH) + 1 : -len(_REPLY_END)], "")
        resource = _RESOURCES.fullmatch(path)
        if resource is not None and request.query.get("type") in {"image", "file"}:
            found = self.resources.get((resource[1], resource[2]))
            return (400, _refusal(234003, "File not in msg.")) if found is None else (200, found)
        carded = self.cards.answer(request.method, path, read_object(body))
        if carded is not None:
            return carded[0], orjson.dumps(carded[1])
        reaction = _REACTIONS.fullmatch(path)
        if reaction is not None:
            return self._react(request.method, reaction[1], reaction[2], body)
        if request.method == "DELETE" and path.startswith(_MESSAGES_PATH + "/"):
            return self._recall(path.removeprefix(_MESSAGES_PATH + "/"))
        return 404, b"404 page not found"

    def _card_changed(self, card: FakeCard) -> None:
        for place, message in enumerate(self.visible):
            if message.message_id == card.message_id:
                self.visible[place] = replace(message, text=card.texts[-1])

    def _recall(self, message_id: str) -> tuple[int, bytes]:
        for message in self.visible:
            if message.message_id == message_id:
                self.visible.remove(message)
                self.recalled.append(message_id)
                return 200, orjson.dumps({"code": 0, "msg": "success", "data": {}})
        return 400, _refusal(230011, "The message is recalled.")

    def _react(self, method: str, message_id: str, reaction_id: str | None, body: bytes) -> tuple[int, bytes]:
        if method == "POST" and reaction_id is None:
            emoji = read_object(orjson.dumps(read_object(body).get("reaction_type"))).get("emoji_type")
            if not isinstance(emoji, str):
                return 400, _refusal(231001, "reaction type is invalid")
            reaction_id = f"reaction_{next(self._numbers)}"
            self.reactions.append((message_id, emoji))
            self.shown[reaction_id] = (message_id, emoji)
            return 200, orjson.dumps({"code": 0, "msg": "success", "data": {"reaction_id": reaction_id}})
        if method == "DELETE" and reaction_id in self.shown:
            del self.shown[reaction_id]
            return 200, orjson.dumps({"code": 0, "msg": "success", "data": {"reaction_id": reaction_id}})
        return 400, _refusal(231003, "The message is not found")

    def _give_token(self, body: bytes) -> tuple[int, bytes]:
        self.token_calls += 1
        asked = read_object(body)
        if self.app_secret is not None and asked.get("app_secret") != self.app_secret:
            return 200, _refusal(10014, "app secret invalid")
        now = self._clock()
        if self._tokens.get(self._token, 0) - now < min(_SAME_TOKEN_S, self.token_lifetime_s / 4):
            self._token = "t-fake-" + os.urandom(12).hex()
            self._tokens[self._token] = now + self.token_lifetime_s
        left = int(self._tokens[self._token] - now)
        return 200, orjson.dumps({"code": 0, "msg": "ok", "tenant_access_token": self._token, "expire": left})

    def _take(self, body: bytes, reply_to: str | None, id_type: str) -> tuple[int, bytes]:
        sent = read_object(body)
        uuid, msg_type, content = sent.get("uuid", ""), sent.get("msg_type"), sent.get("content")
        if not (isinstance(content, str) and isinstance(msg_type, str) and isinstance(uuid, str)):
            return 400, _refusal(230001, "Your request contains an invalid request parameter.")
        text = _shown(msg_type, content)
        chat = self._chats.get(reply_to, "") if reply_to else sent.get("receive_id", "")
        if text is None or len(uuid) > _MAX_UUID or (not reply_to and (not id_type or not chat)):
            return 400, _refusal(230001, "Your request contains an invalid request parameter.")
        if len(body) > _MAX_BYTES.get(msg_type, _MAX_BYTES["text"]):
            return 400, _refusal(230025, "The length of the message content reaches its limit.")
        if reply_to in self.gone:
            return 400, _refusal(230011, "The message is recalled.")
        now = self._clock()
        earlier = self._by_uuid.get(uuid) if uuid else None
        if earlier is not None and now - earlier[0] < self.fold_for_s:
            self.folded += 1
            return 200, earlier[1]
        message_id = f"om_fake_{next(self._numbers)}"
        card = self._card_of(msg_type, content)
        if card is not None:
            if card.message_id:
                return 400, _refusal(230099, "The card has been sent.")
            card.message_id, text = message_id, card.texts[-1]
        thread = sent.get("reply_in_thread") is True
        self.visible.append(
            VisibleMessage(message_id, chat, reply_to, thread, msg_type, text, content, uuid, now)
        )
        self.accepted += 1
        data = {"message_id": message_id, "parent_id": reply_to, "chat_id": chat, "msg_type": msg_type}
        answer = orjson.dumps({"code": 0, "msg": "success", "data": data})
        if uuid:
            self._by_uuid[uuid] = (now, answer)
            if self._keep is not None and len(self._by_uuid) > self._keep:
                del self._by_uuid[next(iter(self._by_uuid))]
        return 200, answer

    def _card_of(self, msg_type: str, content: str) -> FakeCard | None:
        value = read_object(content.encode())
        if msg_type != "interactive" or value.get("type") != "card":
            return None
        return self.cards.all.get(read_object(orjson.dumps(value.get("data"))).get("card_id", ""))


def _refusal(code: int, msg: str) -> bytes:
    return orjson.dumps({"code": code, "msg": msg, "data": {}})


def _shown(msg_type: str, content: str) -> str | None:
    """Return what a reader sees of a content, None if Feishu would not take it."""
    value = read_object(content.encode())
    if msg_type == "text":
        text = value.get("text")
        return text if isinstance(text, str) and text else None
    if msg_type == "post":
        with suppress(AttributeError, TypeError, KeyError):
            paragraphs = next(iter(value.values()))["content"]
            return "\n".join("".join(e.get("text", "") for e in p) for p in paragraphs)
        return None
    return content if value else None


async def _run(arguments: argparse.Namespace) -> None:
    fake = FakeFeishu(app_secret=arguments.app_secret, bot_open_id=arguments.bot_open_id, keep=arguments.keep)
    await serve_until_stopped(fake, arguments.host, arguments.port, say=lambda: f"fake Feishu at {fake.url}")


def main(argv: list[str] | None = None) -> None:
    """Run the fake platform until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="A Feishu open platform on loopback, for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port, which is printed")
    parser.add_argument("--app-secret", default=None, help="refuse other secrets; default: any is good")
    parser.add_argument("--bot-open-id", default=BOT_OPEN_ID)
    parser.add_argument("--keep", type=int, default=None, help="remember only the last N messages")
    asyncio.run(_run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
