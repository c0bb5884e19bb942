"""A OneBot 11 implementation on loopback, for tests and demonstrations: what NapCat is to a real bot.

It opens reverse WebSockets, posts signed events, serves the HTTP API, can be told to fail in every way a network
and an implementation fail, and remembers what a chat's members would see. Run alone:
``python -m feishu_bot.testing.onebot --connect ws://127.0.0.1:8080/ws/onebot --token TOKEN --port 3000``; then
``POST /_say`` takes ``{"text": "hello", "user_id": 20002, "group_id": 30003, "at": true}`` and ``GET /_visible``
shows what the bot sent.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hmac
import itertools
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import aiohttp
import orjson
from aiohttp import web

from feishu_bot.platforms.onebot_content import encode_cq, quoted_id, segments_of
from feishu_bot.testing.serving import FakeServer, serve_until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SELF_ID: Final = 10001
USER_ID: Final = 20002
GROUP_ID: Final = 30003

_SENDS: Final = ("send_group_msg", "send_private_msg", "send_msg")
_GROUP: Final = {"group_name": "team", "member_count": 3, "max_member_count": 200}
_SAME_ANSWER: Final[dict[str, dict[str, Any] | None]] = {
    "get_status": {"online": True, "good": True},
    "get_version_info": {"app_name": "FakeOneBot", "protocol_version": "v11", "app_version": "1"},
    **dict.fromkeys(("set_group_ban", "set_group_kick", "group_poke", "friend_poke")),
}
_RECONNECT_S: Final = 5.0  # NapCat's own pause
_MAX_PAYLOAD: Final = 50 * 1024 * 1024  # NapCat's

Message = str | list[dict[str, Any]]


# -------------------------------------------------------------------------------------------------- events


def message_event(
    message: Message,
    *,
    message_id: int,
    group_id: int | None = None,
    user_id: int = USER_ID,
    self_id: int = SELF_ID,
    at: bool = False,
    card: str = "",
    nickname: str = "Ann",
    form: Literal["array", "string"] = "array",
    at_time: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return a message as NapCat tells it; ``at`` puts a mention of the bot before it. ``fields`` are laid over."""
    segments = [{"type": "text", "data": {"text": message}}] if isinstance(message, str) else list(message)
    if at:
        segments.insert(0, {"type": "at", "data": {"qq": str(self_id)}})
    event: dict[str, Any] = {
        "self_id": self_id,
        "user_id": user_id,
        "time": int(time.time()) if at_time is None else at_time,
        "message_id": message_id,
        "message_seq": message_id,
        "real_id": message_id,
        "message_type": "private" if group_id is None else "group",
        "sender": {"user_id": user_id, "nickname": nickname, "card": card},
        "raw_message": encode_cq(segments),
        "font": 14,
        "sub_type": "friend" if group_id is None else "normal",
        "message": segments if form == "array" else encode_cq(segments),
        "message_format": form,
        "post_type": "message",
    }
    if group_id is not None:
        event["group_id"] = group_id
    return event | fields


def heartbeat_event(*, self_id: int = SELF_ID, online: bool = True) -> dict[str, Any]:
    """Return what NapCat sends every 30 s."""
    status = {"online": online, "good": online}
    return _meta(self_id, "heartbeat", interval=30000, status=status)


def _meta(self_id: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "time": int(time.time()),
        "self_id": self_id,
        "post_type": "meta_event",
        "meta_event_type": kind,
        **fields,
    }


def request_event(
    flag: str,
    *,
    kind: Literal["friend", "group"] = "friend",
    user_id: int = USER_ID,
    group_id: int = GROUP_ID,
    self_id: int = SELF_ID,
    comment: str = "",
) -> dict[str, Any]:
    """Return somebody's request to become a friend, or to join a group; its ``flag`` answers it."""
    event = {
        "time": int(time.time()),
        "self_id": self_id,
        "post_type": "request",
        "request_type": kind,
        "user_id": user_id,
        "comment": comment,
        "flag": flag,
    }
    return event | ({"sub_type": "add", "group_id": group_id} if kind == "group" else {})


def sign(body: bytes, secret: str, *, self_id: int = SELF_ID) -> dict[str, str]:
    """Return the headers that prove an event posted over HTTP."""
    headers = {"content-type": "application/json", "x-self-id": str(self_id)}
    if secret:
        headers["x-signature"] = "sha1=" + hmac.digest(secret.encode(), body, "sha1").hex()
    return headers


# ------------------------------------------------------------------------------------------- implementation


@dataclass(frozen=True, slots=True)
class VisibleMessage:
    """A message of the bot's as the members of a chat see it. ``chat`` is ``group:ID`` or ``private:ID``."""

    message_id: int
    chat: str
    text: str
    quotes: str
    segments: Sequence[Mapping[str, Any]]
    at: float
    by: Literal["ws", "http"]


@dataclass(frozen=True, slots=True)
class Failure:
    """How one call ends that does not simply succeed.

    ``sent``: the message is sent all the same. ``drop`` cuts the connection in the middle of the call; ``silent``
    never answers; ``delay_s`` alone makes the call slow. ``raw`` answers bytes with ``http_status``, over HTTP.
    """

    retcode: int = 1200
    words: str = ""
    sent: bool = False
    drop: bool = False
    silent: bool = False
    delay_s: float = 0.0
    http_status: int = 200
    raw: bytes | None = None


@dataclass(eq=False)
class Link:
    """One reverse WebSocket, open until ``closed`` is set; ``close_code`` is the server's."""

    socket: aiohttp.ClientWebSocketResponse
    self_id: int
    role: str
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    answers: list[dict[str, Any]] = field(default_factory=list)  # what was answered on it
    frozen: bool = False

    @property
    def close_code(self) -> int | None:
        return self.socket.close_code

    async def push(self, event: Mapping[str, Any] | bytes) -> None:
        """Send an event, or any bytes, as a text frame."""
        await self.socket.send_str((event if isinstance(event, bytes) else orjson.dumps(event)).decode())

    def drop(self) -> None:
        """Cut the connection without a word."""
        response = self.socket._response  # noqa: SLF001  # there is no public way to cut it
        if response.connection is not None and response.connection.transport is not None:
            response.connection.transport.abort()
        response.close()

    def freeze(self) -> None:
        """Leave the connection half open: nothing is read any more, no ping answered, and nobody is told."""
        self.frozen = True


class FakeOneBot(FakeServer):
    """One QQ account behind an implementation; ``async with FakeOneBot() as fake`` serves its API at ``fake.url``.

    ``visible`` holds what the bot sent, ``calls`` every call as ``(transport, action, params)``, ``requests`` what
    people have asked for by its flag, and whether it was approved (None: not answered yet). With ``report_self``
    the bot's own messages come back as events. ``no_history`` takes those actions away. ``files`` holds what the
    people have sent, by its id, or whatever else the client shall say of it.
    """

    def __init__(
        self,
        *,
        self_id: int = SELF_ID,
        access_token: str = "",
        secret: str = "",
        report_self: bool = False,
        no_history: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.self_id = self_id
        self.access_token = access_token
        self.secret = secret
        self.report_self = report_self
        self.no_history = no_history
        self.visible: list[VisibleMessage] = []
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.requests: dict[str, bool | None] = {}
        self.files: dict[str, bytes | dict[str, Any]] = {}
        self.links: list[Link] = []
        self.sent = asyncio.Event()  # set by every message that becomes visible
        self._clock = clock
        self._failures: dict[str, deque[Failure]] = {}
        self._told: list[dict[str, Any]] = []  # every message of every chat, as get_msg tells it
        self._numbers = itertools.count(1_540_837_600)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def stop(self) -> None:
        """Close every connection."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self.links:
            link.drop()
        if self._session is not None:
            await self._session.close()
            self._session = None
        await super().stop()

    # ------------------------------------------------------------------------------------------- controls

    def fail(self, failure: Failure, *, times: int = 1, on: str = "send") -> None:
        """Let the next ``times`` calls of an action (``send``: of any that sends) end in ``failure``."""
        self._failures.setdefault(on, deque()).extend([failure] * times)

    def next_id(self) -> int:
        """Return a message id nobody has yet."""
        return next(self._numbers)

    def make(self, message: Message, **fields: Any) -> dict[str, Any]:
        """Return a message of somebody's, remembered as said in its chat; see ``message_event``."""
        fields = {
            "message_id": self.next_id(),
            "self_id": self.self_id,
            "at_time": int(self._clock()),
            **fields,
        }
        event = message_event(message, **fields)
        self._told.append(event)
        return event

    def attach(
        self, data: bytes | dict[str, Any], kind: str = "image", name: str = "a.png", *, url: str = ""
    ) -> dict[str, Any]:
        """Return the segment of a picture or file that somebody sends; without ``url`` the client alone has it."""
        file_id = f"file-{self.next_id()}"
        self.files[file_id] = data
        return {"type": kind, "data": {"file": name, "file_id": file_id} | ({"url": url} if url else {})}

    async def say(self, message: Message, **fields: Any) -> dict[str, Any]:
        """Say something in a chat: every open event socket is told. Returns the event."""
        event = self.make(message, **fields)
        await self.tell(event)
        return event

    async def tell(self, event: Mapping[str, Any]) -> None:
        """Tell every open event socket of something; requests are remembered by their flag."""
        if event.get("post_type") == "request":
            self.requests.setdefault(str(event["flag"]), None)
        for link in self.links:
            if link.role != "API":
                await link.push(event)

    async def post(
        self, url: str, event: Mapping[str, Any] | bytes, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Post an event over HTTP, signed with ``secret``; return status and body of the answer."""
        body = event if isinstance(event, bytes) else orjson.dumps(event)
        headers = sign(body, self.secret, self_id=self.self_id) if headers is None else headers
        async with self._open().post(url, data=body, headers=headers) as response:
            return response.status, await response.read()

    async def connect(
        self,
        url: str,
        *,
        role: Literal["Universal", "API", "Event"] = "Universal",
        headers: Mapping[str, str] | None = None,
    ) -> Link:
        """Open a reverse WebSocket as NapCat does. Raises aiohttp.WSServerHandshakeError when it is refused."""
        if headers is None:
            headers = {
                "X-Self-ID": str(self.self_id),
                "X-Client-Role": role,
                "User-Agent": "OneBot/11",
                "Authorization": f"Bearer {self.access_token}",
            }
        socket = await self._open().ws_connect(url, headers=headers, max_msg_size=_MAX_PAYLOAD)
        link = Link(socket, self.self_id, role)
        self.links.append(link)
        if role != "API":
            await link.push(_meta(self.self_id, "lifecycle", sub_type="connect"))
        self._run(self._read(link))
        return link

    async def keep_connected(self, url: str, *, pause_s: float = _RECONNECT_S) -> None:
        """Connect again and again, as implementations do, until cancelled."""
        while True:
            with suppress(aiohttp.ClientError, OSError):
                link = await self.connect(url)
                await link.closed.wait()
            await asyncio.sleep(pause_s)

    def _run(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._session

    # ------------------------------------------------------------------------------------------ WebSocket

    async def _read(self, link: Link) -> None:
        try:
            while not link.frozen:
                frame = await link.socket.receive()
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    break
                if not link.frozen:
                    self._run(self._answer_frame(link, orjson.loads(frame.data)))
            if link.frozen:
                await asyncio.Event().wait()
        finally:
            link.drop()
            self.links.remove(link)
            link.closed.set()

    async def _answer_frame(self, link: Link, call: dict[str, Any]) -> None:
        action, params, echo = call.get("action", ""), call.get("params") or {}, call.get("echo")
        failure = self._note("ws", action, params)
        if failure is not None and failure.delay_s:
            await asyncio.sleep(failure.delay_s)
        answer = await self._outcome(action, params, failure, by="ws")
        if failure is not None and failure.drop:
            link.drop()
        elif answer is not None and not link.frozen:
            frame = {**answer, "echo": echo}
            link.answers.append(frame)
            with suppress(ConnectionError):
                await link.push(frame)

    # ----------------------------------------------------------------------------------------------- HTTP

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path.startswith("/_"):
            return await self._own(request)
        given = request.headers.get("Authorization", "").partition(" ")[2] or request.query.get(
            "access_token", ""
        )
        if given != self.access_token:
            return web.json_response({"message": "token verify failed!"}, status=403)
        action, params = path[1:], orjson.loads(await request.read() or b"{}")
        failure = self._note("http", action, params)
        if failure is not None and failure.delay_s:
            await asyncio.sleep(failure.delay_s)
        answer = await self._outcome(action, params, failure, by="http")
        if failure is not None and failure.raw is not None:
            return web.Response(status=failure.http_status, body=failure.raw)
        if failure is not None and (failure.drop or failure.silent):
            if failure.silent:
                await asyncio.Event().wait()
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        return web.json_response(answer)

    async def _own(self, request: web.BaseRequest) -> web.Response:
        if request.method == "GET" and request.path == "/_visible":
            return web.json_response({"messages": [asdict(m) for m in self.visible]})
        if request.method == "POST" and request.path == "/_say":
            order = orjson.loads(await request.read())
            return web.json_response(await self.say(order.pop("text"), **order))
        return web.json_response({}, status=404)

    # -------------------------------------------------------------------------------------------- actions

    def _note(self, by: str, action: str, params: dict[str, Any]) -> Failure | None:
        self.calls.append((by, action, params))
        for name in (action, "send" if action in _SENDS else ""):
            if self._failures.get(name):
                return self._failures[name].popleft()
        return None

    async def _outcome(
        self, action: str, params: dict[str, Any], failure: Failure | None, *, by: Literal["ws", "http"]
    ) -> dict[str, Any] | None:
        """Do what is asked, unless the failure prevents it; return the answer, None for none."""
        slow = failure is not None and failure.delay_s and not (failure.silent or failure.drop)
        if failure is None or failure.sent or slow:
            answer = await self._do(action, params, by)
            if failure is None or slow:
                return answer
        if failure.silent or failure.drop:
            return None
        return _failed(failure.retcode, failure.words)

    async def _do(self, action: str, params: dict[str, Any], by: Literal["ws", "http"]) -> dict[str, Any]:
        if action in _SENDS:
            return await self._take(action, params, by)
        if action in _SAME_ANSWER:
            return _ok(_SAME_ANSWER[action])
        match action:
            case "get_msg":
                wanted = str(params.get("message_id"))
                one = next((m for m in self._told if str(m["message_id"]) == wanted), None)
                return _ok(one) if one else _failed(1200, "消息不存在")
            case "get_group_msg_history" | "get_friend_msg_history" if not self.no_history:
                name = "group_id" if "group" in action else "user_id"
                found = self._of(_chat(**{name: params.get(name)}))
                return _ok({"messages": found[-int(params.get("count", 20)) :]})
            case "set_friend_add_request" | "set_group_add_request":
                flag = str(params.get("flag"))
                if self.requests.get(flag, False) is not None:
                    return _failed(1200, "请求不存在或已处理")
                self.requests[flag] = params.get("approve") is not False
                return _ok(None)
            case "get_image" | "get_file" | "get_group_member_info":
                return self._member(params) if "member" in action else self._file(params)
            case "get_group_info":
                return _ok({**_GROUP, "group_id": params.get("group_id")})
            case "get_login_info":
                return _ok({"user_id": self.self_id, "nickname": "bot"})
        return _failed(1404 if by == "ws" else 200, f"不支持的Api {action}")

    def _file(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return a file as NapCat does: its path there, and what is in it."""
        name = str(params.get("file") or params.get("file_id"))
        data = self.files.get(name)
        if data is None:
            return _failed(1200, "file not found")
        if isinstance(data, dict):
            return _ok(data)
        path = f"/app/.config/QQ/{name}"
        return _ok({"file": path, "url": path, "base64": base64.b64encode(data).decode()})

    def _member(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return a member of a group as his last message there tells him."""
        group, user = str(params.get("group_id")), str(params.get("user_id"))
        for event in reversed(self._told):
            if (str(event.get("group_id")), str(event["user_id"])) == (group, user):
                return _ok({**event["sender"], "group_id": event["group_id"], "role": "member"})
        return _failed(1200, "群成员不存在")

    def _of(self, chat: str) -> list[dict[str, Any]]:
        return [m for m in self._told if _chat(m.get("group_id"), m.get("target_id") or m["user_id"]) == chat]

    async def _take(self, action: str, params: dict[str, Any], by: Literal["ws", "http"]) -> dict[str, Any]:
        group = action == "send_group_msg" or (action == "send_msg" and params.get("group_id"))
        receiver = params.get("group_id" if group else "user_id")
        segments = segments_of(params.get("message"))
        if not receiver or not segments:
            return _failed(1400 if by == "ws" else 400, "Key: message, Message: Required property")
        text = "".join(s.get("data", {}).get("text", "") for s in segments if s.get("type") == "text")
        number = self.next_id()
        own = message_event(
            segments,
            message_id=number,
            group_id=int(receiver) if group else None,
            user_id=self.self_id,
            self_id=self.self_id,
            nickname="bot",
            at_time=int(self._clock()),
            post_type="message_sent",
            target_id=int(receiver),
        )
        self._told.append(own)
        chat = _chat(receiver) if group else _chat(None, receiver)
        quotes = quoted_id(segments)
        self.visible.append(VisibleMessage(number, chat, text, quotes, segments, self._clock(), by))
        self.sent.set()
        if self.report_self:
            for link in self.links:
                await link.push(own)
        return _ok({"message_id": number})


def _chat(group_id: Any = None, user_id: Any = None) -> str:
    return f"group:{group_id}" if group_id else f"private:{user_id}"


def _ok(data: Any) -> dict[str, Any]:
    return {"status": "ok", "retcode": 0, "data": data, "message": "", "wording": ""}


def _failed(retcode: int, words: str) -> dict[str, Any]:
    return {"status": "failed", "retcode": retcode, "data": None, "message": words, "wording": words}


async def _run(arguments: argparse.Namespace) -> None:
    fake = FakeOneBot(self_id=arguments.self_id, access_token=arguments.token)
    connecting = asyncio.ensure_future(_connect(fake, arguments.connect))
    await serve_until_stopped(fake, arguments.host, arguments.port, say=lambda: f"fake OneBot at {fake.url}")
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)


async def _connect(fake: FakeOneBot, url: str | None) -> None:
    if url is not None:
        await fake.keep_connected(url)


def main(argv: list[str] | None = None) -> None:
    """Run the fake implementation until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="A OneBot 11 implementation on loopback, for tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="of the HTTP API; 0 takes a free port")
    parser.add_argument("--connect", default=None, help="ws://HOST:PORT/ws/ACCOUNT; default: HTTP only")
    parser.add_argument("--token", default="", help="access_token of the account")
    parser.add_argument("--self-id", type=int, default=SELF_ID, help="the bot's QQ number")
    asyncio.run(_run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
