"""Group commit: one thread that owns a connection and writes for everybody.

It takes what waits, runs it in one transaction, commits once, and only then answers each caller: who is answered
knows that *its* change is on disk. SQLite with one commit per insert manages some thousand a second, in groups
nearly a hundred thousand; PostgreSQL gains as much by fewer round trips.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feishu_bot.errors import StoreUnavailable
from feishu_bot.store.engine import capabilities, database_now_ms, is_conflict, is_disconnect, reason_of
from feishu_bot.store.work import Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection, Engine

log = logging.getLogger(__name__)

MAX_BATCH = 256  # jobs of one transaction
MAX_QUEUED = 50_000  # more than this waiting means that the database cannot follow: refuse at once
CONFLICT_DEADLINE_S = 15.0  # how long a batch is run again after deadlocks and locks
RECONNECTS = 3  # runs of a batch whose connection broke, before its callers are told
STUCK_S = 30.0  # a transaction that runs longer means that the database hangs
CLOCK_SYNC_S = 5.0  # how often the database is asked for its time


@dataclass(slots=True, eq=False)
class _Job:
    function: Callable[[Transaction, Sequence[Any]], Sequence[Any]]
    items: Sequence[Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    merge: bool  # may be run in one call with others of the same function


class DatabaseClock:
    """The database's time, kept by our own monotonic clock between questions.

    A jump of this machine's wall clock changes nothing; two machines agree within a round trip.
    """

    def __init__(self, fixed: Callable[[], int] | None = None) -> None:
        self._fixed = fixed
        self._base_ms = int(time.time() * 1000)
        self._base = time.monotonic()
        self._next_sync = 0.0

    def now_ms(self) -> int:
        """Return the database's time in milliseconds since 1970."""
        if self._fixed is not None:
            return self._fixed()
        return self._base_ms + int((time.monotonic() - self._base) * 1000)

    def sync(self, connection: Connection) -> None:
        """Ask the database, if the last answer is old."""
        if self._fixed is None and time.monotonic() >= self._next_sync:
            before = time.monotonic()
            self._base_ms = database_now_ms(connection)
            self._base = (before + time.monotonic()) / 2
            self._next_sync = self._base + CLOCK_SYNC_S


class Writer:
    """The thread that writes. ``submit`` may be called from any event loop."""

    def __init__(self, engine: Engine, clock: DatabaseClock, *, name: str = "writer") -> None:
        self._engine = engine
        self._clock = clock
        self._kind = capabilities(engine).kind
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._connection: Connection | None = None
        self._busy_since: float | None = None
        self._closed = False
        self.batches = 0
        self.jobs = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish what waits, then end the thread."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout_s)

    def problem(self) -> str | None:
        """Return why nothing can be written now, or None."""
        if not self._thread.is_alive():
            return "the writer thread has ended"
        busy = self._busy_since
        if busy is not None and time.monotonic() - busy > STUCK_S:
            return f"a transaction has been running for {time.monotonic() - busy:.0f} s"
        if self._queue.qsize() > MAX_QUEUED:
            return f"{self._queue.qsize()} changes wait for the database"
        return None

    async def submit(
        self,
        function: Callable[[Transaction, Sequence[Any]], Sequence[Any]],
        items: Sequence[Any],
        *,
        merge: bool = True,
    ) -> list[Any]:
        """Run ``function`` on ``items`` in a transaction; return its results once they are committed.

        With ``merge``, items of several callers of the same function run in one call. Raises StoreUnavailable
        when the database cannot take it, and whatever the function raises for these items.
        """
        problem = "the store is closed" if self._closed else self.problem()
        if problem is not None:
            raise StoreUnavailable(problem)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._queue.put(_Job(function, items, future, loop, merge))
        return await future

    # ----------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        running = True
        while running:
            job = self._queue.get()
            if job is None:
                break
            batch = [job]
            while len(batch) < MAX_BATCH:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    running = False
                    break
                batch.append(more)
            self._busy_since = time.monotonic()
            self._process(batch)
            self._busy_since = None
        self._drop_connection()

    def _process(self, batch: list[_Job]) -> None:
        """Run a batch; whatever stands in the way of a whole one is found by halving it."""
        deadline = time.monotonic() + CONFLICT_DEADLINE_S
        pending: list[tuple[list[_Job], bool, int]] = [(batch, False, 0)]
        while pending:
            jobs, rerun, broken = pending.pop()
            try:
                results = self._transact(jobs, rerun=rerun)
            except Exception as error:  # noqa: BLE001  # decided below: run again, halve, or tell the caller
                self._forget_connection(error)
                if is_disconnect(error) and broken + 1 < RECONNECTS:
                    time.sleep(0.05 * (broken + 1))
                    pending.append((jobs, True, broken + 1))
                elif is_conflict(error) and time.monotonic() < deadline:
                    time.sleep(random.uniform(0.001, 0.02))  # noqa: S311  # jitter, not a secret
                    pending += [(half, rerun, broken) for half in _halves(jobs)]
                elif len(jobs) > 1 and not is_disconnect(error):
                    pending += [(half, rerun, broken) for half in _halves(jobs)]
                else:
                    _answer([(job, _told(error)) for job in jobs])
            else:
                _answer(list(zip(jobs, results, strict=True)))

    def _transact(self, jobs: list[_Job], *, rerun: bool) -> list[Sequence[Any]]:
        connection = self._connected()
        results: dict[int, Sequence[Any]] = {}
        with connection.begin():
            self._clock.sync(connection)
            tx = Transaction(connection, self._kind, self._clock.now_ms(), rerun=rerun)
            for group in _groups(jobs):
                items = [item for job in group for item in job.items]
                answers = group[0].function(tx, items)
                start = 0
                for job in group:
                    results[id(job)] = answers[start : start + len(job.items)]
                    start += len(job.items)
        for callback in tx.after_commit:
            callback()
        self.batches += 1
        self.jobs += len(jobs)
        return [results[id(job)] for job in jobs]

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self._drop_connection()
            self._connection = self._engine.connect()
        return self._connection

    def _forget_connection(self, error: Exception) -> None:
        if isinstance(error, DBAPIError | PoolTimeout):
            self._drop_connection()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except DBAPIError:
                log.debug("connection could not be closed", exc_info=True)
            self._connection = None


def _groups(jobs: list[_Job]) -> list[list[_Job]]:
    """Group jobs of the same function, in the order in which the functions first appear."""
    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(job.function if job.merge else id(job), []).append(job)
    return list(groups.values())


def _halves(jobs: list[_Job]) -> list[list[_Job]]:
    middle = len(jobs) // 2
    # Popped from the end: the earlier half runs first.
    return [jobs[middle:], jobs[:middle]] if middle else [jobs]


def _told(error: Exception) -> Exception:
    if isinstance(error, DBAPIError | PoolTimeout):
        unavailable = StoreUnavailable(reason_of(error))
        unavailable.__cause__ = error
        return unavailable
    return error


def _answer(answers: list[tuple[_Job, Any]]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for job, answer in answers:
        by_loop.setdefault(job.loop, []).append((job.future, answer))
    for loop, futures in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, futures)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("answers for a closed loop", extra={"answers": len(futures)})


def _resolve(futures: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in futures:
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
