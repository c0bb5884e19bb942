"""``/ws/{account}``: the door for platforms whose clients open a WebSocket to us.

Nothing is acknowledged on such a socket and no client sends an event twice. So an event that was read is kept
until it is on disk; while the database cannot take events, no more than a bounded number is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from aiohttp import WSCloseCode, WSMsgType, web

from feishu_bot.errors import Refused, StoreError, StoreUnavailable
from feishu_bot.log import Seldom
from feishu_bot.platforms.base import Socket, SocketRequest
from feishu_bot.web.errors import error_response, unavailable
from feishu_bot.web.webhooks import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from feishu_bot.gate import Gate
    from feishu_bot.intake import Intake
    from feishu_bot.metrics import Metrics
    from feishu_bot.model import InboundMessage
    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.work import Recorded

log = logging.getLogger(__name__)

MAX_FRAME: Final = 64 * 1024 * 1024  # bytes; forwarded messages and media inside of events are large
HEARTBEAT_S: Final = 20.0  # a client that leaves a ping unanswered for half of this is gone
CLOSE_S: Final = 2.0  # for a client's own half of the closing
MAX_UNRECORDED: Final = 2000  # events
MAX_UNRECORDED_CHARS: Final = 8_000_000
PATIENCE_S: Final = 30.0  # how long a socket is not read before it is closed instead
FLUSH_S: Final = 2.0  # for events that are not on disk when the server stops
PAUSE_S: Final = 0.5  # before the store is asked again after it could not be used
MAX_BATCH: Final = 200  # events of one transaction
_TRIES: Final = 3  # refusals of one event, by a store that takes others, until it is given up
_OVERHEAD: Final = 500  # characters an event counts beside its text


class Backlog:
    """Events that were read and are not on disk yet, in the order of their arrival.

    ``closed`` says why the store takes nothing now, or None.
    """

    def __init__(
        self,
        record: Callable[[Sequence[InboundMessage]], Awaitable[list[Recorded]]],
        closed: Callable[[], str | None],
        *,
        max_events: int = MAX_UNRECORDED,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._record = record
        self._closed = closed
        self._max_events = max_events
        self._pause_s = pause_s
        self._events: deque[InboundMessage] = deque()
        self._chars = 0
        self._room = asyncio.Event()
        self._room.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self._refusals: Counter[str] = Counter()
        self._waiting = False

    def __len__(self) -> int:
        return len(self._events)

    def add(self, events: Sequence[InboundMessage]) -> None:
        """Take events over. Whoever adds waits for ``room`` first, or stops reading."""
        for event in events:
            self._events.append(event)
            self._chars += len(event.text) + _OVERHEAD
        if len(self._events) >= self._max_events or self._chars >= MAX_UNRECORDED_CHARS:
            self._room.clear()
        self._empty.clear()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._drain())
            self._task.add_done_callback(self._ended)

    @property
    def is_full(self) -> bool:
        """Whether there is no room."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Wait until there is room."""
        await self._room.wait()

    async def close(self, grace_s: float) -> None:
        """Bring on disk what waits, for at most ``grace_s`` seconds; say what was lost."""
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            log.error("events lost", extra={"events": len(self._events), "reason": self._closed()})  # noqa: TRY400  # no fault of ours
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _drain(self) -> None:
        while self._events:
            if self._closed() is not None:
                await asyncio.sleep(self._pause_s)
                continue
            batch = [self._events[n] for n in range(min(MAX_BATCH, len(self._events)))]
            try:
                await self._record(batch)
            except StoreError as error:
                if isinstance(error, StoreUnavailable) and not self._waiting:
                    log.warning("store unavailable", extra={"step": "receive", "reason": str(error)})
                self._waiting = isinstance(error, StoreUnavailable)
                if not await self._record_each(batch):
                    await asyncio.sleep(self._pause_s)
            else:
                self._waiting = False
                self._forget(batch)

    async def _record_each(self, batch: Sequence[InboundMessage]) -> bool:
        """Record what can be recorded of a batch that failed; return whether anything could.

        One event that the database refuses, though it takes others, must not keep those out for ever.
        """
        recorded: list[InboundMessage] = []
        lost: list[InboundMessage] = []
        refused: dict[tuple[str, str], InboundMessage] = {}
        for event in batch:
            speaker = (event.chat_id, event.sender_id)
            if speaker in refused:
                continue  # one's own words stay in their order
            try:
                await self._record([event])
            except StoreUnavailable:
                refused[speaker] = event
                if not recorded and len(refused) == _TRIES:
                    break  # it takes nothing
            except StoreError as error:  # waiting does not mend it
                lost.append(event)
                log.error("event lost", extra={"key": event.event_key, "reason": str(error)})  # noqa: TRY400  # no fault of ours
            else:
                recorded.append(event)
        if recorded:
            for event in refused.values():
                self._refusals[event.event_key] += 1
                if self._refusals[event.event_key] == _TRIES:
                    log.error("event lost", extra={"key": event.event_key, "reason": "the store refuses it"})
                    lost.append(event)
        self._forget([*recorded, *lost])
        return bool(recorded or lost)

    def _forget(self, events: Sequence[InboundMessage]) -> None:
        done = {id(event) for event in events}
        self._events = deque(event for event in self._events if id(event) not in done)
        self._chars -= sum(len(event.text) + _OVERHEAD for event in events)
        for event in events:
            self._refusals.pop(event.event_key, None)
        if len(self._events) < self._max_events and self._chars < MAX_UNRECORDED_CHARS:
            self._room.set()
        if not self._events:
            self._empty.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            # A fault of the program, which the same events would meet again.
            log.error("events lost", extra={"events": len(self._events)}, exc_info=task.exception())
            self._forget(list(self._events))


class _WebSocket(Socket):
    """A client's socket, as platforms see it."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def receive(self) -> str | bytes | None:
        try:
            message = await self._socket.receive()
        except ConnectionError as error:  # it broke while a ping was being answered
            log.info("socket broke", extra={"reason": str(error)[:200]})
            return None
        if message.type in {WSMsgType.TEXT, WSMsgType.BINARY}:
            frame: str | bytes = message.data
            return frame
        if message.type is WSMsgType.ERROR:
            log.info("socket broke", extra={"reason": str(self._socket.exception())[:200]})
        return None

    async def send(self, text: str) -> None:
        await self._socket.send_str(text)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self._socket.close(code=code, message=reason.encode()[:120])


class Sockets:
    """The door."""

    def __init__(
        self,
        platforms: Mapping[str, Platform],
        intake: Intake,
        gate: Gate,
        metrics: Metrics,
        *,
        reached: Callable[[str], None] | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        patience_s: float = PATIENCE_S,
        max_unrecorded: int = MAX_UNRECORDED,
        max_frame: int = MAX_FRAME,
    ) -> None:
        self._platforms = {name: p for name, p in platforms.items() if p.has_socket}
        self._intake = intake
        self._gate = gate
        self._metrics = metrics
        self._reached = reached  # told of each step; tests stop the process there
        self._heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self._max_unrecorded = max_unrecorded
        self._max_frame = max_frame
        self._refused = Seldom(log)
        self._backlogs: dict[str, Backlog] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Let a client in and serve it until its socket is closed."""
        account = request.match_info["account"]
        platform = self._platforms.get(account)
        if platform is None:
            return error_response(404, "no such account")
        try:
            caller = platform.admit(SocketRequest(request.headers, request.query))
        except Refused as error:
            self._refused.warning(
                "socket refused",
                {
                    "account": account,
                    "status": error.status,
                    "reason": error.reason,
                    "peer": request.remote,
                },
            )
            self._metrics.refused[account, str(error.status)] += 1
            return error_response(error.status, REFUSALS[error.status])
        closed = self._gate.closed()
        if closed is None and self._backlog_of(account).is_full:
            closed = "too many events are not recorded yet"
        if closed is not None:
            log.warning("socket put off", extra={"account": account, "reason": closed})
            return unavailable()
        response = web.WebSocketResponse(
            timeout=CLOSE_S, heartbeat=self._heartbeat_s, max_msg_size=self._max_frame, compress=False
        )
        await response.prepare(request)
        await self._serve(platform, _WebSocket(response), caller)
        return response

    async def _serve(self, platform: Platform, socket: Socket, caller: Any) -> None:
        backlog = self._backlog_of(platform.account)

        async def record(events: Sequence[InboundMessage]) -> None:
            self._step("received")
            backlog.add(events)
            try:
                async with asyncio.timeout(self._patience_s):
                    await backlog.room()
            except TimeoutError:
                log.warning("socket put off", extra={"account": platform.account, "unrecorded": len(backlog)})
                await socket.close(WSCloseCode.TRY_AGAIN_LATER, "the store cannot take it now")

        await platform.accept(socket, caller, record)

    def _backlog_of(self, account: str) -> Backlog:
        backlog = self._backlogs.get(account)
        if backlog is None:
            backlog = self._backlogs[account] = Backlog(
                self._record, self._closed, max_events=self._max_unrecorded
            )
        return backlog

    def _closed(self) -> str | None:
        # While the server stops, what was read is still brought on disk: nobody would send it again.
        return None if self._gate.draining else self._gate.closed()

    async def _record(self, events: Sequence[InboundMessage]) -> list[Recorded]:
        results = await self._intake.record(events)
        self._step("recorded")
        return results

    async def stop(self) -> None:
        """Bring on disk what was read. The sockets are the platforms' to close."""
        await asyncio.gather(*(backlog.close(FLUSH_S) for backlog in self._backlogs.values()))

    def _step(self, step: str) -> None:
        if self._reached is not None:
            self._reached(step)
