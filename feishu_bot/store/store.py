"""The server's store: the list functions behind one writer (or several), readers beside it."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from feishu_bot.errors import LeaseLost
from feishu_bot.store import commit as ending
from feishu_bot.store import inbox, leases, migrations, outbox
from feishu_bot.store.engine import capabilities, open_engine, store_errors
from feishu_bot.store.history import CACHED_CONVERSATIONS, HistoryCache, load_recent
from feishu_bot.store.leases import Owner
from feishu_bot.store.machines import network_problem
from feishu_bot.store.notices import notify
from feishu_bot.store.snapshot import sqlite_path
from feishu_bot.store.work import LEASE_MS, Committed, Transaction
from feishu_bot.store.writer import DatabaseClock, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.model import BudgetRefusal
    from feishu_bot.store.history import RecentTail
    from feishu_bot.store.work import (
        Arrival,
        Lease,
        NoWork,
        Outcome,
        PartToSend,
        PlannedCall,
        Planner,
        Recorded,
        SendStep,
        Work,
    )

log = logging.getLogger(__name__)

T = TypeVar("T")

READERS = 3  # threads that read pages, counts and answers


def _fill(cache: HistoryCache, _tx: Transaction, found: Sequence[RecentTail]) -> list[None]:
    """Put tails into a cache, on the thread that it belongs to."""
    for recent in found:
        cache.fill(recent.conversation_id, recent.version, recent.tail)
    return [None] * len(found)


class Store:
    """One database, for one event loop or several.

    ``clock`` gives milliseconds since 1970 instead of the database's own time (for tests); ``lease_ms`` is how long
    a lane is held without being renewed.
    """

    def __init__(
        self,
        db_url: str,
        *,
        writers: int | None = None,
        clock: Callable[[], int] | None = None,
        auto_migrate: bool = True,
        lease_ms: int = LEASE_MS,
    ) -> None:
        self.engine = open_engine(db_url)
        self.capabilities = capabilities(self.engine)
        self.clock = DatabaseClock(clock)
        self.owner = Owner.current()
        self.lease_ms = lease_ms
        self._auto_migrate = auto_migrate
        count = 1 if self.capabilities.single_writer else (writers or 2)
        self._writers = [
            Writer(self.engine, self.clock, name=f"writer-{n}", lease_ms=lease_ms) for n in range(count)
        ]
        self._caches = [HistoryCache() for _ in self._writers]
        self._reading = self.engine.execution_options(reader=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        shard = crc32(str(self.owner).encode()) % 64
        # Each writer has its own: rows that two of them change would have one wait for the other.
        self._shards = [(shard + n) % 64 for n in range(count)]
        self._receive = [partial(self._receive_on, shard=n) for n in self._shards]
        # Asked on a writer's thread: whether others had better begin what this process records.
        self.gives_away: Callable[[], bool] = lambda: False
        self._commit: list[Callable[..., Any]] = []
        self._begin: list[Callable[..., Any]] = []
        self._history_turns = 0
        self.shard = shard

    def open(self, planner: Planner, *, version: str) -> None:
        """Bring the schema up, enter this process, start writing. Blocks; call it before serving.

        Raises StoreUnavailable or SchemaMismatch.
        """
        if self._auto_migrate:
            done = migrations.upgrade(self.engine)
            if done != "current":
                log.info("schema ready", extra={"schema": done})
        else:
            migrations.check(self.engine)
        self._history_turns = planner.history_turns
        self._commit = [
            partial(ending.commit, cache=cache, shard=n, keep_turns=planner.history_turns)
            for cache, n in zip(self._caches, self._shards, strict=True)
        ]
        self._begin = [
            partial(inbox.begin, planner=planner, cache=cache, shard=n)
            for cache, n in zip(self._caches, self._shards, strict=True)
        ]
        with store_errors(), self.engine.begin() as connection:
            self.clock.sync(connection)
            tx = Transaction(connection, self.capabilities.kind, self.clock.now_ms())
            leases.register(tx, self.owner, version)
            taken = leases.take_over(tx, self.owner.host)
        if taken:
            log.info("work of ended processes taken over", extra={"processes": len(taken)})
        for writer in self._writers:
            writer.start()

    async def close(self) -> None:
        """Give the leases back, write what waits, and end the threads."""
        try:
            await self.run(lambda tx: leases.unregister(tx, self.owner))
        finally:
            await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        for writer in self._writers:
            writer.stop()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self.engine.dispose()

    @property
    def folder(self) -> Path | None:
        """Where the SQLite file lies; None for a database server."""
        url = self.engine.url
        if self.capabilities.kind != "sqlite" or not url.database or url.database.startswith((":", "file:")):
            return None
        return Path(url.database).parent

    def network_problem(self) -> str | None:
        """Return what is wrong with the place of the SQLite file, if it is a network's."""
        path = sqlite_path(self.engine)
        return None if path is None else network_problem(path)

    @property
    def location(self) -> str:
        """The database's URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def problem(self) -> str | None:
        """Return why nothing can be written now, or None."""
        return next((p for w in self._writers if (p := w.problem()) is not None), None)

    def failing(self) -> str | None:
        """Return why the last change could not be written, or None: a full disk, a lock that stays."""
        return next((reason for w in self._writers if (reason := w.failing) is not None), None)

    def now_ms(self) -> int:
        return self.clock.now_ms()

    def _of(self, lane_key: str) -> int:
        """Return the writer of a lane: a lane stays on one, and so does its cache."""
        return crc32(lane_key.encode("utf-8", "surrogatepass")) % len(self._writers)

    # ------------------------------------------------------------------------------ the way of a message

    def receive(self, arrivals: Sequence[Arrival]) -> asyncio.Future[list[Recorded]]:
        """Record events; the future is done once they are on disk. Raises StoreUnavailable, here or there."""
        n = self._of(arrivals[0].lane_key)
        return self._writers[n].enqueue(self._receive[n], arrivals)

    def _receive_on(self, tx: Transaction, arrivals: Sequence[Arrival], *, shard: int) -> list[Recorded]:
        results = inbox.receive(tx, arrivals, shard=shard)
        if self.gives_away():  # once for all arrivals of this transaction
            notify(tx)
        return results

    async def begin(self, lanes: Sequence[Lease], *, again: bool = False) -> list[Work | NoWork]:
        """Begin the oldest message of each lane. All leases carry one token, used for nothing else.

        After StoreUnavailable the same leases may be asked for ``again``: what was begun unheard is returned then.
        """
        parts: dict[int, list[int]] = {}
        for index, lease in enumerate(lanes):
            parts.setdefault(self._of(lease.lane_key), []).append(index)
        found: list[Any] = [None] * len(lanes)

        async def part(n: int, indexes: list[int]) -> None:
            function = partial(self._begin[n], again=True) if again else self._begin[n]
            results = await self._writers[n].submit(function, [lanes[i] for i in indexes], merge=False)
            for index, result in zip(indexes, results, strict=True):
                found[index] = result

        await asyncio.gather(*(part(n, indexes) for n, indexes in parts.items()))
        return found

    async def commit(self, outcome: Outcome) -> Committed:
        """End a message. Raises LeaseLost when the lane has another owner by now."""
        n = self._of(outcome.work.lease.lane_key)
        result: Committed | LeaseLost
        (result,) = await self._writers[n].submit(self._commit[n], [outcome])
        if isinstance(result, LeaseLost):
            raise result
        return result

    async def reserve(self, work: Work, call: int, planned: PlannedCall) -> BudgetRefusal | None:
        """Reserve a further call of a message being worked on. Raises LeaseLost."""
        n = self._of(work.lease.lane_key)
        result: BudgetRefusal | LeaseLost | None
        (result,) = await self._writers[n].submit(ending.reserve_calls, [(work, call, planned)])
        if isinstance(result, LeaseLost):
            raise result
        return result

    async def send_step(self, step: SendStep) -> PartToSend | NoWork:
        """Record what became of a part, and take the lane's next."""
        n = self._of(step.lease.lane_key)
        result: PartToSend | NoWork
        (result,) = await self._writers[n].submit(outbox.send_step, [step])
        return result

    async def warm(self, most: int) -> int:
        """Read the histories that were used last into memory, as many as fit; return how many. Raises StoreUnavailable."""
        most, turns = min(most, CACHED_CONVERSATIONS), self._history_turns
        if not most or not turns:
            return 0
        found = await self.read(lambda tx: load_recent(tx, most, turns=turns))
        for n, (writer, cache) in enumerate(zip(self._writers, self._caches, strict=True)):
            # The newest last, so that it is the last to make room.
            own = [recent for recent in reversed(found) if self._of(recent.lane_key) == n]
            await writer.submit(partial(_fill, cache), own, merge=False)
        return len(found)

    # ------------------------------------------------------------------------------------ everything else

    async def run(self, function: Callable[[Transaction], T]) -> T:
        """Run a short function in a writing transaction of the group commit."""

        def once(tx: Transaction, _items: Sequence[Any]) -> list[T]:
            return [function(tx)]

        result: T
        (result,) = await self._writers[0].submit(once, [None], merge=False)
        return result

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """Run a reading function on a reader thread; it never stops a writer. Raises StoreUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.read_now, function)

    def read_now(self, function: Callable[[Transaction], T]) -> T:
        """Run a reading function here and now."""
        with store_errors(), self._reading.connect() as connection, connection.begin():
            return function(Transaction(connection, self.capabilities.kind, self.clock.now_ms()))
