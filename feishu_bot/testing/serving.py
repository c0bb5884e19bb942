"""What the fake platforms have in common: they listen on loopback, fail as they are told, and can be run alone."""

from __future__ import annotations

import asyncio
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, Self

import orjson
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Failure:
    """One answer that is not a success.

    ``code`` None with ``raw`` answers those bytes; ``drop`` closes the connection ``before`` or ``after`` the
    call was accepted; ``delay_s`` alone makes the call slow and lets it pass.
    """

    status: int = 200
    code: int | None = None
    msg: str = "scripted failure"
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay_s: float = 0.0
    drop: Literal["before", "after"] | None = None


class FakeServer(ABC):
    """A server on loopback, reached at ``url`` within ``async with``. ``visible`` holds what was sent, in order."""

    url = ""
    visible: Collection[Any]
    _runner: web.ServerRunner | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen and return the base URL."""
        self._runner = web.ServerRunner(web.Server(self._handle), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.url = f"http://{host}:{site.port}"
        return self.url

    async def stop(self) -> None:
        """Close every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def texts(self, chat: str | None = None) -> list[str]:
        """Return the visible texts, of one chat or of all."""
        return [m.text for m in self.visible if chat is None or m.chat == chat]

    @abstractmethod
    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse: ...


class FakeApi(FakeServer):
    """A platform's API with tokens. ``down = True`` answers 503 to everything.

    Run alone it shows what is visible at ``/_visible`` and takes orders at ``/_control``. ``kinds`` are those of the
    calls that can be told to fail.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self.down = False
        self.accepted = 0
        self.folded = 0
        self.token_calls = 0
        self._failures: dict[str, deque[Failure]] = {kind: deque() for kind in kinds}
        self._tokens: dict[str, float] = {}
        self._token = ""

    # ------------------------------------------------------------------------------------------- controls

    def fail(self, failure: Failure, *, times: int = 1, on: str = "messages") -> None:
        """Let the next ``times`` calls of one kind end in ``failure``, after those already scripted."""
        self._failures[on].extend([failure] * times)

    def recover(self) -> None:
        """Forget the failures that are still to come."""
        self.down = False
        for waiting in self._failures.values():
            waiting.clear()

    def expire_tokens(self) -> None:
        """Refuse every token given out so far."""
        self._tokens.clear()
        self._token = ""

    # -------------------------------------------------------------------------------------------- serving

    @abstractmethod
    def _answer(self, request: web.BaseRequest, body: bytes) -> tuple[int, bytes]:
        """Take a call and return status and body of the answer."""

    @abstractmethod
    def _refusal(self, code: int, words: str) -> bytes:
        """Return the body of a refusal as the platform writes it."""

    def _response(self, status: int, body: bytes) -> web.Response:
        return json_response(status, body)

    async def _answered(self, kind: str, request: web.BaseRequest, body: bytes) -> web.Response:
        """Answer a call of a kind, or let it fail as scripted."""
        failures = self._failures[kind]
        if not failures:
            return self._response(*self._answer(request, body))
        failure = failures.popleft()
        if failure.delay_s:
            await asyncio.sleep(failure.delay_s)
        if failure.drop:
            if failure.drop == "after":
                self._answer(request, body)
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if failure.raw is not None:
            return web.Response(status=failure.status, body=failure.raw, headers=failure.headers)
        if failure.code is None and failure.status == HTTPStatus.OK:
            return self._response(*self._answer(request, body))
        answer = self._refusal(failure.code or 1, failure.msg)
        return web.Response(
            status=failure.status, body=answer, headers=failure.headers, content_type="application/json"
        )

    async def _own(self, request: web.BaseRequest) -> web.Response:
        if request.method == "GET" and request.path == "/_visible":
            state = {
                "messages": [asdict(m) for m in self.visible],
                "accepted": self.accepted,
                "folded": self.folded,
                "token_calls": self.token_calls,
            }
            return json_response(200, orjson.dumps(state))
        if request.method == "POST" and request.path == "/_control":
            self._obey(read_object(await request.read()))
            return json_response(200, b"{}")
        return json_response(404, b"{}")

    def _obey(self, order: dict[str, Any]) -> None:
        self.down = bool(order.get("down", self.down))
        if order.get("expire_tokens"):
            self.expire_tokens()
        if isinstance(order.get("fail"), dict):
            scripted = dict(order["fail"])
            times, on = scripted.pop("times", 1), scripted.pop("on", "messages")
            self.fail(Failure(**scripted), times=times, on=on)


def json_response(status: int, body: bytes) -> web.Response:
    """Return a response of JSON that is written already."""
    return web.Response(status=status, body=body, content_type="application/json")


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``; an empty one for anything else."""
    try:
        value = orjson.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def serve_until_stopped(fake: FakeServer, host: str, port: int, *, say: Callable[[], str]) -> None:
    """Run a fake until SIGINT or SIGTERM; what ``say`` returns is printed once it listens."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await fake.start(host, port)
    sys.stdout.write(f"{say()}\n")
    sys.stdout.flush()
    await stopped.wait()
    await fake.stop()
