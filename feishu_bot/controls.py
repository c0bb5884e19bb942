"""What operators have ordered, in this process: a look at the orders each second, and a report of what it does.

Every process looks by itself; so an order given once holds on every machine within a second, also for processes
that are started later (but for a drain, which means those that run).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, Protocol

from feishu_bot.errors import StoreUnavailable
from feishu_bot.model import ChatType, InboundMessage, Target, make_key
from feishu_bot.push import push_rows
from feishu_bot.store import controls as orders
from feishu_bot.store import leases, outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from feishu_bot.delivery import Delivery
    from feishu_bot.gate import Gate
    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.controls import Orders, Pause
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import PartToSend, Transaction
    from feishu_bot.worker import Worker

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
_ANSWERS: Final = frozenset({"answer", "error"})  # kinds of parts that a pause holds
_MAX_SAID: Final = 50_000  # chats that were told of a pause, remembered to spare the database a question


class Chat(Protocol):
    """What of the settings is asked for each message; another one after a reload."""

    @property
    def command_prefix(self) -> str: ...
    @property
    def max_message_length(self) -> int: ...


class Controls:
    """The orders in force, as this process knows them. What ``plan`` asks of it may be asked on any thread."""

    def __init__(
        self,
        store: Store,
        *,
        worker: Worker,
        delivery: Delivery,
        gate: Gate,
        platforms: Mapping[str, Platform],
        chat: Callable[[], Chat],
        reload: Callable[[], Awaitable[Mapping[str, Any]]],
        is_order: Callable[[InboundMessage], bool],
        words: Callable[[], Mapping[str, Any]] = dict,
        stop: Callable[[str], object] = lambda _event_key: None,
    ) -> None:
        self._store = store
        self._worker = worker
        self._delivery = delivery
        self._gate = gate
        self._platforms = platforms
        self._chat = chat
        self._reload = reload
        self._is_order = is_order
        self._words = words  # more for the report
        self._stop = stop
        self._reload_seen = 0
        self._reloaded: Mapping[str, Any] | None = None
        self._orders = orders.Orders()
        self._draining = False
        self._said: set[str] = set()
        self._saying: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self.servers = 1

    async def start(self, *, replaces: str | None = None) -> None:
        """Learn the orders, and go on looking. Raises StoreUnavailable.

        ``replaces`` names the worker that died in this one's place: if it was drained, so is this one.
        """
        own = str(self._store.owner)
        if replaces is not None:
            await self._store.run(lambda tx: orders.inherit_drain(tx, replaces, own))
        self._orders, self.servers = await self._store.read(_look)
        self._reload_seen = self._orders.reload_at  # what it has read is as new as that
        await self._worker.renew_now()
        await self._drain(own in self._orders.drains)
        self._loop = asyncio.create_task(self._run(), name="controls")

    async def stop(self) -> None:
        """Stop looking."""
        tasks = [*self._saying, *([self._loop] if self._loop is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def problems(self) -> list[str]:
        """Return why this part of the server is dead, if it is."""
        return ["controls loop ended"] if self._loop is not None and self._loop.done() else []

    # ------------------------------------------------------------------------------------------- looking

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                found, servers = await self._store.read(_look)
                self.servers = max(1, servers)
                await self._follow(found)
            except StoreUnavailable as error:
                log.debug("orders not read", extra={"reason": str(error)})

    async def _follow(self, found: Orders) -> None:
        before, self._orders = self._orders, found
        if found.pauses != before.pauses:
            self._said.clear()
            log.info("pauses changed", extra={"pauses": ", ".join(p.target for p in found.pauses) or "none"})
            self._worker.look_now()
            for account in self._platforms:
                if before.pause_of(account) is not None and found.pause_of(account) is None:
                    self._delivery.hasten(account)
        for event_key in found.stops:
            self._stop(event_key)
        await self._drain(str(self._store.owner) in found.drains)
        if found.reload_at > self._reload_seen:
            self._reload_seen = found.reload_at
            self._reloaded = {"order": found.reload_at, **await self._reload()}
            await self._worker.renew_now()

    async def _drain(self, draining: bool) -> None:  # noqa: FBT001  # what the order says
        if not draining and not self._draining:
            return
        if draining != self._draining:
            log.info("draining" if draining else "serving again")
        self._draining = self._gate.draining = draining
        others = await self._store.read(orders.read_servers) if draining else []
        # Where nobody else goes on, what waits is finished here.
        self._worker.leaving = any(
            server.report["state"] == "serving" and server.owner != self._store.owner for server in others
        )
        await self._worker.renew_now()

    # ----------------------------------------------------------------------------------------- reporting

    def _state(self, tx: Transaction) -> str:
        """Return serving, draining or drained; by what waits now, not when it was last looked."""
        if not self._draining:
            return "serving"
        if self._worker.active or self._delivery.lanes:
            return "draining"
        return "drained" if self._worker.leaving or not leases.depth(tx).waiting else "draining"

    def report(self, tx: Transaction) -> None:
        """Put down what this process does, with the heartbeat."""
        words = {
            "state": self._state(tx),
            "lanes": self._worker.active,
            "ready": self._worker.ready,
            "sending": len(self._delivery.lanes),
            "reload": self._reloaded,
            **self._words(),
        }
        orders.report(tx, str(self._store.owner), words)

    def degraded(self) -> list[str]:
        """Return the pauses in force, in words."""
        return [f"paused: {pause.target.removeprefix('account:')}" for pause in self._orders.pauses]

    # ------------------------------------------------------------------------------------------- pausing

    @property
    def pauses(self) -> tuple[Pause, ...]:
        return self._orders.pauses

    def holds(self, account: str, asks_model: bool) -> bool:  # noqa: FBT001  # two words of one question
        """Say whether a message is to be kept for later."""
        if not self._orders.pauses:
            return False
        return self._orders.pause_of(account) is not None or (asks_model and self._orders.models is not None)

    def holds_part(self, part: PartToSend) -> bool:
        """Say whether a part is to stay in the outbox: an answer to somebody of a paused account.

        What the operator says himself, notes and the answers to orders go out.
        """
        if not self._orders.pauses or part.kind not in _ANSWERS or part.lease.lane_key.startswith("order:"):
            return False
        return self._orders.pause_of(part.account) is not None

    def pause_of(self, message: InboundMessage) -> Pause | None:
        """Return the pause that a message runs into, if any; commands pass by a pause of the models."""
        if not self._orders.pauses or message.kind == "event" or self._is_order(message):
            return None
        found = self._orders.pause_of(message.account)
        if found is None and not message.text.startswith(self._chat().command_prefix):
            found = self._orders.models
        return found

    def recorded(self, message: InboundMessage) -> None:
        """Have the chat told why it gets no answer, once for each pause that says so."""
        pause = self.pause_of(message)
        if pause is None or pause.say is None:
            return
        platform = self._platforms.get(message.account)
        addressed = message.addressed is True or message.chat_type is ChatType.PRIVATE
        if platform is None or platform.pull or not addressed:
            return
        chat = message.chat_id or message.sender_id
        source = make_key("pause", str(pause.at), message.account, chat)
        if source in self._said or len(self._said) >= _MAX_SAID:
            return
        self._said.add(source)
        rows = push_rows(
            message.account,
            platform,
            source=source,
            kind="note",
            target=Target.of(message),
            text=pause.say,
            max_chars=self._chat().max_message_length,
            reply_before=message.reply_before_ms,
        )
        task = asyncio.get_running_loop().create_task(self._say(rows))
        self._saying.add(task)
        task.add_done_callback(self._saying.discard)

    async def _say(self, rows: list[dict[str, Any]]) -> None:
        try:
            await self._store.run(lambda tx: outbox.push(tx, rows))
        except StoreUnavailable:
            self._said.discard(rows[0]["source"])
        else:
            self._delivery.nudge(rows[0]["lane_key"])

    # -------------------------------------------------------------------------------- for those who order

    def accounts(self) -> list[str]:
        """Return what can be paused by name."""
        return list(self._platforms)

    async def pause(self, target: str, *, say: str | None, by: str) -> None:
        """Have every process keep messages without answering. Raises StoreUnavailable."""
        await self._store.run(lambda tx: orders.pause(tx, target, say=say, by=by))

    async def resume(self, target: str | None) -> int:
        """End one pause, or all and every drain; return how many orders that were. Raises StoreUnavailable."""
        return await self._store.run(lambda tx: orders.resume(tx, target))


def _look(tx: Transaction) -> tuple[Orders, int]:
    return orders.read_orders(tx), orders.count_servers(tx)
