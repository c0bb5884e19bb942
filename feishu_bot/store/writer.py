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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feishu_bot.errors import StoreError, StoreUnavailable
from feishu_bot.store import jumps
from feishu_bot.store.engine import (
    capabilities,
    database_now_ms,
    is_conflict,
    is_disconnect,
    is_refusal,
    reason_of,
)
from feishu_bot.store.turn import Turn
from feishu_bot.store.work import LEASE_MS, Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection, Engine

    from feishu_bot.store.engine import Capabilities

log = logging.getLogger(__name__)

MAX_BATCH = 256  # jobs of one transaction
MAX_QUEUED = 50_000  # more than this waiting means that the database cannot follow: refuse at once
CONFLICT_DEADLINE_S = 15.0  # how long a batch is run again after deadlocks and locks
RECONNECTS = 3  # runs of a batch whose connection broke, before its callers are told
STUCK_S = 30.0  # a transaction that runs longer means that the database hangs
CLOCK_SYNC_S = 5.0  # how often the database is asked for its time
QUIET_S = 2.0  # without work for so long, SQLite's log is written back and cut
PROBE_S = 1.0  # how often a database that hung is tried again


@dataclass(slots=True, eq=False)
class _Job:
    function: Callable[[Transaction, Sequence[Any]], Sequence[Any]]
    items: Sequence[Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    merge: bool  # may be run in one call with others of the same function


class DatabaseClock:
    """The database's time, kept by our own monotonic clock between questions.

    A jump of this machine's wall clock changes nothing; two machines agree within a round trip. Where the
    database's time is this machine's (SQLite), what waits for an instant is moved along with a jump.
    ``ask`` tells the database's time.
    """

    def __init__(
        self,
        fixed: Callable[[], int] | None = None,
        *,
        ask: Callable[[Connection], int] = database_now_ms,
    ) -> None:
        self._fixed = fixed
        self._ask = ask
        # One value, so that a thread never sees the new time with the old instant.
        self._known = (int(time.time() * 1000), time.monotonic())
        self._next_sync = 0.0
        self._offset = 0.0  # of the wall clock from the monotonic one, when the database was asked

    def now_ms(self) -> int:
        """Return the database's time in milliseconds since 1970."""
        if self._fixed is not None:
            return self._fixed()
        then_ms, then = self._known
        return then_ms + int((time.monotonic() - then) * 1000)

    def sync(self, connection: Connection) -> None:
        """Ask the database, if the last answer is old."""
        if self._fixed is not None:
            return
        before = time.monotonic()
        # Compared with the wall clock at once: what a jump has moved must not be taken for what it was.
        jumped = abs(time.time() - before - self._offset) > jumps.LEAST_MS / 1000
        if before < self._next_sync and not jumped:
            return
        found = self._ask(connection)
        now = time.monotonic()
        self._offset = time.time() - now
        self._known = (found, (before + now) / 2)
        self._next_sync = before + CLOCK_SYNC_S
        if capabilities(connection).kind == "sqlite":
            jumps.move_along(connection, found, int(self._known[1] * 1000))


@dataclass(frozen=True, slots=True)
class _Run:
    """Jobs to be run in one transaction, and what happened to it so far."""

    jobs: list[_Job]
    rerun: bool = False  # an earlier run was lost, perhaps in its commit
    broken: int = 0  # connections lost
    collided: bool = False  # a unique key was taken


class _Line:
    """The connection of one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None
        self.turn = Turn(engine)
        self._dirty = False  # SQLite's log has grown since it was cut

    def get(self) -> Connection:
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self.drop()
            try:
                self._connection = self._engine.connect()
            except DBAPIError as error:
                error.connection_invalidated = True  # none was made: to its callers the same as a lost one
                raise
        self._dirty = True
        return self._connection

    def drop(self) -> None:
        if self._connection is not None:
            try:
                self._connection.close()
            except DBAPIError:
                log.debug("connection could not be closed", exc_info=True)
            self._connection = None

    def rest(self) -> None:
        """Write SQLite's log back and cut it, unless somebody reads from it: nobody is made to wait."""
        if not self._dirty or self._connection is None:
            return
        self._dirty = False
        driver: Any = (
            self._connection.connection.driver_connection
        )  # not in a transaction, so below SQLAlchemy
        (patience,) = driver.execute("PRAGMA busy_timeout").fetchone()
        driver.execute("PRAGMA busy_timeout=0")
        try:
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except self._engine.dialect.loaded_dbapi.Error as error:  # a full disk: nothing is lost by waiting
            log.debug("log not written back", extra={"reason": str(error)})
        finally:
            driver.execute(f"PRAGMA busy_timeout={patience}")


class Writer:
    """The thread that writes. ``submit`` may be called from any event loop.

    A thread that dies, or whose transaction hangs, is replaced: what waits is told at once, and nothing more is
    taken until the new one has reached the database.
    """

    def __init__(
        self,
        engine: Engine,
        clock: DatabaseClock,
        *,
        name: str = "writer",
        stuck_s: float = STUCK_S,
        conflict_s: float = CONFLICT_DEADLINE_S,
        quiet_s: float = QUIET_S,
        lease_ms: int = LEASE_MS,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._capabilities: Capabilities = capabilities(engine)
        self._name = name
        self._stuck_s = stuck_s
        self._conflict_s = conflict_s
        self._quiet_s = quiet_s
        self._lease_ms = lease_ms
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._taking = threading.Lock()  # who takes a batch is the thread that stands in _thread
        self._thread: threading.Thread | None = None
        self._batch: list[_Job] = []
        self._busy_since: float | None = None
        self._trouble: str | None = None
        self.failing: str | None = None  # why the last transaction could not be written, if it could not
        self._closed = threading.Event()
        self.batches = 0
        self.jobs = 0

    def start(self) -> None:
        """Start the thread, and the one that watches it."""
        self._begin_thread()
        threading.Thread(target=self._watch, name=f"{self._name}-watch", daemon=True).start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish what waits, then end the thread; what could not be finished is told so."""
        self._closed.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._tell_waiting("the store is closed")

    def problem(self) -> str | None:
        """Return why nothing can be written now, or None."""
        if self._closed.is_set():
            return "the store is closed"
        if self._thread is None:
            return "the store is not open"
        if self._trouble is not None:
            return self._trouble
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
        """Hand in and wait, as ``enqueue`` does."""
        return await self.enqueue(function, items, merge=merge)

    def enqueue(
        self,
        function: Callable[[Transaction, Sequence[Any]], Sequence[Any]],
        items: Sequence[Any],
        *,
        merge: bool = True,
    ) -> asyncio.Future[list[Any]]:
        """Run ``function`` on ``items`` in a transaction; the future has its results once they are committed.

        With ``merge``, items of several callers of the same function run in one call. Raises StoreUnavailable
        when the database cannot take it now, StoreError when it never will, and whatever the function raises for
        these items.
        """
        problem = self.problem()
        if problem is not None:
            raise StoreUnavailable(problem)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._queue.put(_Job(function, items, future, loop, merge))
        return future

    # -------------------------------------------------------------------------------------- the watchman

    def _begin_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._stuck_s / 4)):
            since = self._busy_since
            if since is not None and time.monotonic() - since > self._stuck_s:
                self._replace(f"a transaction has been running for more than {self._stuck_s:.0f} s")

    def _replace(self, reason: str) -> None:
        """Tell all that wait, and begin anew; a thread that still hangs ends when it comes back."""
        log.error("writer replaced", extra={"writer": self._name, "reason": reason})
        with self._taking:
            self._trouble = reason
            self._busy_since = None
            self._thread = None
        self._tell_waiting(reason)
        self._begin_thread()

    def _tell_waiting(self, reason: str) -> None:
        jobs, self._batch = self._batch, []
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                jobs.append(job)
        _answer([(job, StoreUnavailable(reason)) for job in jobs])

    # ------------------------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        line = _Line(self._engine)
        ended = False
        try:
            while self._trouble is not None and not self._closed.is_set():
                self._probe(line)
            while self._work(line):
                pass
            ended = True
        finally:
            line.drop()
            line.turn.close()
            if not ended and self._is_current():
                self._replace("the writer thread has ended")

    def _is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def _probe(self, line: _Line) -> None:
        """See if the database can be written to again."""
        try:
            with line.get().begin():
                line.get().execute(select(1))
        except (DBAPIError, PoolTimeout) as error:
            line.drop()
            self._trouble = reason_of(error)
            self._closed.wait(PROBE_S)
        else:
            self._trouble = None
            log.info("writer works again", extra={"writer": self._name})

    def _work(self, line: _Line) -> bool:
        """Take what waits and run it; False when this thread is to end."""
        job = self._next(line)
        last = job is None
        batch = [] if job is None else [job]
        while not last and len(batch) < MAX_BATCH:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is None:
                last = True
            else:
                batch.append(job)
        with self._taking:
            if not self._is_current():
                for job in batch:
                    self._queue.put(job)
                return False
            self._batch, self._busy_since = batch, time.monotonic()
        self._process(line, batch)
        with self._taking:
            if not self._is_current():
                return False
            self._batch, self._busy_since = [], None
        return not last

    def _next(self, line: _Line) -> _Job | None:
        if self._capabilities.single_writer:
            try:
                return self._queue.get(timeout=self._quiet_s)
            except queue.Empty:
                line.rest()
        return self._queue.get()

    def _process(self, line: _Line, batch: list[_Job]) -> None:
        """Run a batch; whatever stands in the way of a whole one is found by halving it.

        Where rows are locked, each function has a transaction of its own: it takes its locks in one sorted
        sweep, and two nodes cannot wait for each other because they do different things first.
        """
        deadline = time.monotonic() + self._conflict_s
        pending = [_Run(batch)] if batch else []
        if not self._capabilities.single_writer:
            pending = [_Run(group) for group in reversed(_groups(batch))]
        while pending and self._is_current():
            run = pending.pop()
            try:
                results, after_commit = self._transact(line, run)
            except Exception as error:  # noqa: BLE001  # decided below: run again, halve, or tell the caller
                if is_disconnect(error):
                    line.drop()
                again = self._again(run, error, deadline)
                told = [] if again else list(run.jobs)
                pending += again
                if not again and (is_disconnect(error) or is_conflict(error)):
                    # The database itself is in the way, of all of them; they have waited long enough.
                    told += [job for run in reversed(pending) for job in run.jobs]
                    pending = []
                answers = [(job, _told(error)) for job in told]
                if any(isinstance(answer, StoreUnavailable) for _, answer in answers):
                    self.failing = reason_of(error)
                _answer(answers)
            else:
                self.failing = None
                for callback in after_commit:
                    callback()
                _answer(list(zip(run.jobs, results, strict=True)))

    def _again(self, run: _Run, error: Exception, deadline: float) -> list[_Run]:
        """Return what to run after this error, the last one first; nothing if it is to be told."""
        if is_disconnect(error):
            if run.broken + 1 >= RECONNECTS:
                return []
            time.sleep(0.05 * (run.broken + 1))
            return [replace(run, rerun=True, broken=run.broken + 1)]
        if is_conflict(error):
            if time.monotonic() >= deadline:
                return []
            time.sleep(random.uniform(0.001, 0.02))  # noqa: S311  # jitter, not a secret
            return [run] if self._capabilities.single_writer else _halves(run)
        if len(run.jobs) > 1:
            return _halves(run)
        if isinstance(error, IntegrityError) and not run.collided:
            return [replace(run, collided=True)]  # another node was first: this time its row is seen
        return []

    def _transact(self, line: _Line, run: _Run) -> tuple[list[Sequence[Any]], list[Callable[[], None]]]:
        connection = line.get()
        results: dict[int, Sequence[Any]] = {}
        with line.turn, connection.begin():
            self._clock.sync(connection)
            tx = Transaction(
                connection,
                self._capabilities.kind,
                self._clock.now_ms(),
                rerun=run.rerun,
                lease_ms=self._lease_ms,
            )
            for group in _groups(run.jobs):
                items = [item for job in group for item in job.items]
                answers = group[0].function(tx, items)
                start = 0
                for job in group:
                    results[id(job)] = answers[start : start + len(job.items)]
                    start += len(job.items)
            if not self._is_current():  # it hung, and its callers were told that nothing was written
                raise StoreUnavailable("the writer was replaced")
        self.batches += 1
        self.jobs += len(run.jobs)
        return [results[id(job)] for job in run.jobs], tx.after_commit


def _groups(jobs: list[_Job]) -> list[list[_Job]]:
    """Group jobs of the same function, in the order in which the functions first appear."""
    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(job.function if job.merge else id(job), []).append(job)
    return list(groups.values())


def _halves(run: _Run) -> list[_Run]:
    middle = len(run.jobs) // 2
    # Popped from the end: the earlier half runs first.
    halves = [run.jobs[middle:], run.jobs[:middle]] if middle else [run.jobs]
    return [replace(run, jobs=jobs) for jobs in halves]


def _told(error: Exception) -> Exception:
    if not isinstance(error, DBAPIError | PoolTimeout):
        return error
    told = (StoreError if is_refusal(error) else StoreUnavailable)(reason_of(error))
    told.__cause__ = error
    return told


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
