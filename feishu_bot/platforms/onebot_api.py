"""Calls to a OneBot implementation, over its WebSocket or its HTTP API, and what each answer means for a retry.

Sources: the OneBot 11 standard, "communication" and "api"; the answers of NapCat, go-cqhttp and Lagrange.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import orjson

from feishu_bot.errors import DeliveryError, RetryLater, Undeliverable
from feishu_bot.platforms.connection import MAX_ANSWER_BYTES, Connection, unreadable, wait_of, words_of
from feishu_bot.platforms.onebot_content import id_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    from feishu_bot.config import NetworkSettings, Secrets
    from feishu_bot.platforms.base import Socket

CALL_S: Final = 30.0  # NapCat itself gives up a send after 10 s and a little more for its size

_DENIED: Final = frozenset({401, 403, 1401, 1403})
_TOO_MANY: Final = frozenset({429, 1429})
# Implementations tell causes apart by their words only.
_TIMED_OUT: Final = ("timeout", "timed out", "超时")
_BUSY: Final = ("rate limit", "too many", "too fast", "频繁", "过快")
_AWAY: Final = ("not online", "offline", "not login", "not logged", "离线", "未登录", "不在线", "掉线")
_NO_API: Final = frozenset({404, 405, 426})

Key = TypeVar("Key", bound="Hashable")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The last ``most`` values that were set, by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        return self._values.get(key)

    def set(self, key: Key, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._most:
            self._values.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an implementation answered. ``ok`` goes by ``status``: some report failures with retcode 0."""

    ok: bool
    retcode: int
    data: Any = None
    words: str = ""

    @classmethod
    def read(cls, frame: Mapping[str, Any], hidden: Iterable[str] = ()) -> Answer:
        """Read an answer of either transport; ``hidden`` are secrets that its words must not show."""
        status, retcode = frame.get("status"), frame.get("retcode")
        words = frame.get("wording") or frame.get("message") or frame.get("msg")
        return cls(
            ok=status in ("ok", "async"),  # a set cannot be asked for a list
            retcode=retcode if isinstance(retcode, int) else -1,
            data=frame.get("data"),
            words=words_of(words, without=hidden),
        )

    def field(self, name: str) -> Any:
        """Return one field of the data, None if there is none."""
        return self.data.get(name) if isinstance(self.data, dict) else None

    def error(self) -> DeliveryError:
        """Return what a failure means for the message that was sent."""
        reason = f"{self.retcode} {self.words}".rstrip()
        if _holds(self.words, _TIMED_OUT):
            # NapCat reports a time-out of its own, and often the message was sent all the same.
            return RetryLater(reason, outcome_unknown=True)
        if self.retcode in _DENIED or _holds(self.words, _AWAY):
            return RetryLater(reason)
        if self.retcode in _TOO_MANY or _holds(self.words, _BUSY):
            return RetryLater(reason, chat_only=True)
        return Undeliverable(reason)


def _holds(words: str, any_of: Iterable[str]) -> bool:
    words = words.lower()
    return any(word in words for word in any_of)


# -------------------------------------------------------------------------------------------------- WebSocket


class Role(StrEnum):
    """What a client uses its socket for."""

    API = "api"
    EVENT = "event"
    UNIVERSAL = "universal"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who has opened a socket, proved by the access token."""

    self_id: str
    role: Role
    agent: str = ""


class Peer:
    """A connected implementation: events come in, calls go out and are answered by their ``echo``."""

    def __init__(self, socket: Socket, caller: Caller, *, timeout_s: float, hidden: Sequence[str]) -> None:
        self.socket = socket
        self.caller = caller
        self._timeout_s = timeout_s
        self._hidden = hidden
        self._prefix = secrets.token_hex(6)
        self._count = 0
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._lost: str | None = None

    @property
    def takes_calls(self) -> bool:
        return self.caller.role is not Role.EVENT and self._lost is None

    @property
    def sends_events(self) -> bool:
        return self.caller.role is not Role.API

    async def call(self, action: str, params: Mapping[str, Any]) -> Answer:
        """Make a call. Raises RetryLater where there is no answer, and says whether it may have arrived."""
        if self._lost is not None:
            raise RetryLater(self._lost)
        self._count += 1
        echo = f"{self._prefix}:{self._count}"
        frame = orjson.dumps({"action": action, "params": params, "echo": echo}).decode()
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[echo] = answered
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.socket.send(frame)
                return await answered
        except TimeoutError:
            raise RetryLater("no answer in time", outcome_unknown=True) from None
        except ConnectionError:
            raise RetryLater("the connection broke", outcome_unknown=True) from None
        finally:
            del self._waiting[echo]
            answered.cancel()
            if not answered.cancelled():
                answered.exception()  # looked at, also where it came while the frame was being sent

    def take_answer(self, frame: Mapping[str, Any]) -> None:
        """Hand an answer to the call it belongs to; answers nobody waits for on this socket are dropped."""
        echo = frame.get("echo")
        waiting = self._waiting.get(echo) if isinstance(echo, str) else None
        if waiting is not None and not waiting.done():
            waiting.set_result(Answer.read(frame, self._hidden))

    def lose(self, reason: str) -> None:
        """Take no more calls; those under way end with an unknown outcome."""
        self._lost = self._lost or reason
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionResetError(reason))


class Peers:
    """The connected implementations: one for each bot and role, the newest wins."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, Role], Peer] = {}

    def __iter__(self) -> Any:
        return iter(list(self._peers.values()))

    def add(self, peer: Peer) -> Peer | None:
        """Take a new one and return the one it replaces."""
        key = (peer.caller.self_id, peer.caller.role)
        replaced = self._peers.pop(key, None)
        self._peers[key] = peer
        if replaced is not None:
            replaced.lose("replaced by a newer connection")
        return replaced

    def remove(self, peer: Peer) -> None:
        """Forget a peer, unless a newer one has taken its place."""
        key = (peer.caller.self_id, peer.caller.role)
        if self._peers.get(key) is peer:
            del self._peers[key]

    def for_calls(self, self_id: str) -> list[Peer]:
        """Return those that take calls for a bot (``""``: for any), the newest first."""
        return [
            p
            for p in reversed(list(self._peers.values()))
            if p.takes_calls and self_id in {"", p.caller.self_id}
        ]


# ------------------------------------------------------------------------------------------------------- HTTP


class HttpApi:
    """The HTTP API of one implementation."""

    def __init__(
        self,
        base_url: str,
        token: Secrets,
        network: NetworkSettings | None,
        *,
        timeout_s: float,
        hidden: Sequence[str],
    ) -> None:
        self._connection = Connection(base_url.rstrip("/"), network, total_s=timeout_s)
        self._token = token
        self._hidden = hidden
        self._owner = ""
        self.problem: str | None = None  # why the last call had no answer

    async def call(
        self, action: str, params: Mapping[str, Any], *, max_bytes: int = MAX_ANSWER_BYTES
    ) -> Answer:
        """Make a call. Raises RetryLater or Undeliverable where there is no answer to judge."""
        try:
            answer = await self._call(action, params, max_bytes)
        except DeliveryError as error:
            self.problem, self._owner = error.reason, ""
            raise
        self.problem = None
        return answer

    async def owner(self) -> str:
        """Return the id of the bot that this API speaks for. Raises RetryLater or Undeliverable."""
        if not self._owner:
            self._owner = id_of((await self.call("get_login_info", {})).field("user_id"))
        return self._owner

    async def close(self) -> None:
        """End the session."""
        await self._connection.close()

    async def _call(self, action: str, params: Mapping[str, Any], max_bytes: int) -> Answer:
        token = self._token.current
        response = await self._connection.call(
            "POST",
            f"/{action}",
            orjson.dumps(params),
            authorization=f"Bearer {token}" if token else None,
            max_bytes=max_bytes,
        )
        status = response.status
        try:
            body = orjson.loads(response.body)
        except ValueError:
            body = None
        if isinstance(body, dict) and isinstance(body.get("status"), str):
            return Answer.read(body, self._hidden)
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise RetryLater(f"HTTP {status}: the API refuses access_token")
        if status in _NO_API:
            raise RetryLater(f"HTTP {status}: there is no OneBot API at api_url")
        if status == HTTPStatus.BAD_REQUEST:
            raise Undeliverable(f"HTTP {status}: the API cannot read the call")
        raise unreadable(status, wait_of(response.headers.get("Retry-After")))
