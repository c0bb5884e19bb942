"""Jobs by the clock, each once over all processes; and the cleanup.

Every process has the triggers and a timer. Who inserts the row (job, fire time) runs the job, so no process leads.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger

from feishu_bot.config.values import check_cron
from feishu_bot.errors import StoreUnavailable
from feishu_bot.store import cleanup as removing
from feishu_bot.store import jobs as runs
from feishu_bot.store.conversations import remove_cleared
from feishu_bot.store.sums import add_fresh

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Iterator, Sequence
    from zoneinfo import ZoneInfo

    from feishu_bot.retention import Retention
    from feishu_bot.store.jobs import JobRun
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction

log = logging.getLogger(__name__)

CHECK_EVERY_S = 600  # how often a process looks for runs that another began and cannot finish
STOP_TIMEOUT_S = 10.0
_CANCEL_TIMEOUT_S = 1.0

# ---------------------------------------------------------------------------------------------------- cron

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_NUMBERS: Final = {name: n for n, name in enumerate(_MONTHS, 1)} | {name: n for n, name in enumerate(_DAYS)}
# How far back the newest fire time is looked for, in turn: at a span with few fire times the search ends.
_LOOK_BACK: Final = tuple(timedelta(minutes=2 * 8**n) for n in range(8))


def cron_trigger(cron: str, zone: ZoneInfo) -> Any:
    """Return APScheduler's trigger for a standard crontab line. Raises ValueError for what is none.

    As in crontab(5), 0 and 7 are Sunday, and when both days are restricted (neither begins with ``*``) one of them
    is enough. APScheduler counts weekdays from Monday, wants both, and passes over steps of names: it is given the
    numbers themselves.
    """
    minute, hour, day, month, weekday = check_cron(cron).split()
    time_of_day = {
        "minute": _listed(_expand(minute, 0, 59), 0, 59),
        "hour": _listed(_expand(hour, 0, 23), 0, 23),
        "month": _listed(_expand(month, 1, 12), 1, 12),
        "timezone": zone,
    }
    days = {"day": _listed(_expand(day, 1, 31), 1, 31)}
    weekdays = {"day_of_week": _listed({(n - 1) % 7 for n in _expand(weekday, 0, 6)}, 0, 6)}
    if day.startswith("*") or weekday.startswith("*"):
        return CronTrigger(**time_of_day, **days, **weekdays)
    return OrTrigger([CronTrigger(**time_of_day, **days), CronTrigger(**time_of_day, **weekdays)])


def _expand(field: str, low: int, high: int) -> set[int]:
    """Return the numbers that a field of a checked line means."""
    numbers: set[int] = set()
    for item in field.lower().split(","):
        bounds, _, step = item.partition("/")
        first, _, last = bounds.partition("-")
        if first == "*":
            begin, end = low, high
        else:
            begin = _NUMBERS[first] if first in _NUMBERS else int(first)
            end = begin if not last else _NUMBERS[last] if last in _NUMBERS else int(last)
        numbers.update(range(begin, end + 1, int(step or 1)))
    return numbers


def _listed(numbers: set[int], low: int, high: int) -> str:
    return "*" if len(numbers) == high - low + 1 else ",".join(map(str, sorted(numbers)))


def previous_fire(trigger: Any, now: datetime) -> datetime | None:
    """Return the newest fire time up to ``now``, in UTC, or None if there was none for thousands of days."""
    # In UTC throughout: datetimes of one zone compare by the hands of the clock, which turn back in autumn.
    now = now.astimezone(UTC)
    for span in _LOOK_BACK:
        found: datetime | None = None
        fire = _next_fire(trigger, now - span)
        if fire is None:  # such as 30 February: a crontab line fires for ever or never
            return None
        while fire is not None and fire <= now:
            found = fire
            fire = _next_fire(trigger, fire + timedelta(seconds=1))
        if found is not None:
            return found
    return None


def _next_fire(trigger: Any, since: datetime) -> datetime | None:
    fire: datetime | None = trigger.get_next_fire_time(None, since)
    return None if fire is None else fire.astimezone(UTC)


# ---------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True, slots=True)
class Job:
    """What runs by the clock. ``cron`` None: at every start instead, in every process.

    ``run`` should return, or be cancelled, at any ``await`` without harm: a server that stops does not wait long.
    """

    name: str
    cron: str | None
    run: Callable[[], Awaitable[object]]


def _wall_clock() -> datetime:
    return datetime.now(UTC)


class Schedule:
    """The jobs of one process. ``now`` gives the time of the wall clock."""

    def __init__(
        self,
        store: Store,
        timezone: ZoneInfo,
        jobs: Sequence[Job],
        *,
        now: Callable[[], datetime] = _wall_clock,
        stop_timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        self._store = store
        self._zone = timezone
        self._jobs = {job.name: job for job in jobs}
        self._now = now
        self._triggers = dict(self._find_triggers(jobs))
        self._stop_timeout_s = stop_timeout_s
        self._timer: Any = None
        self._first: dict[str, int] = {}  # fire times before this schedule began
        self._running: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, jobs: Iterable[Job]) -> None:
        """Take more jobs, before the start."""
        more = {job.name: job for job in jobs}
        self._jobs |= more
        self._triggers |= dict(self._find_triggers(more.values()))

    def _find_triggers(self, jobs: Iterable[Job]) -> Iterator[tuple[str, Any]]:
        for job in jobs:
            if job.cron is None:
                continue
            trigger = cron_trigger(job.cron, self._zone)
            if _next_fire(trigger, self._now()) is None:
                log.warning("job never fires", extra={"job": job.name, "cron": job.cron})
            else:
                yield job.name, trigger

    async def start(self) -> None:
        """Set the timers, and begin at once what was missed while no process ran."""
        _quieten()
        now = self._now()
        self._first = {name: self._previous_ms(name, now) or 0 for name in self._triggers}
        self._timer = AsyncIOScheduler(timezone=self._zone)
        options = {"coalesce": True, "misfire_grace_time": None, "max_instances": 100}
        for name, trigger in self._triggers.items():
            self._timer.add_job(self.check, trigger, id=name, **options)
        if self._triggers:
            self._timer.add_job(self.check, "interval", seconds=CHECK_EVERY_S, **options)
        self._timer.start()
        for job in self._jobs.values():
            if job.cron is None:
                self._spawn(self._work(job))
        await self.check()

    async def stop(self) -> None:
        """Begin nothing more, and wait a while for what runs; what is cut off is begun anew by the next start."""
        if self._timer is not None:
            self._timer.shutdown(wait=False)
            self._timer = None
            await asyncio.sleep(0)  # it stops by a callback of the loop
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._stop_timeout_s)
        if self._tasks:
            log.warning("jobs cut off", extra={"jobs": sorted(self._running)})
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=_CANCEL_TIMEOUT_S)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs."""
        return tuple(self._jobs.values())

    def next_fires(self) -> dict[str, datetime | None]:
        """Return when each job with a time fires next, in UTC; one that never does is not there."""
        now = self._now()
        return {name: _next_fire(trigger, now) for name, trigger in self._triggers.items()}

    def again(self, name: str) -> None:
        """Begin a job that has no time once more, in this process. Raises KeyError."""
        self._spawn(self._work(self._jobs[name]))

    async def last_runs(self) -> dict[str, JobRun]:
        """Return the last run of each job, in whatever process. Raises StoreUnavailable."""
        return await self._store.read(runs.last_runs)

    async def check(self) -> None:
        """Begin every job whose newest fire time is nobody's yet, or belongs to a process that died over it."""
        now = self._now()
        try:
            known = await self._store.read(runs.newest)
            if not known.keys() >= self._first.keys():
                await self._store.run(partial(runs.introduce, first_fires=self._first))
                known = await self._store.read(runs.newest)
            for name in self._triggers:
                fire_time = self._previous_ms(name, now)
                run = known.get(name)
                if fire_time is None or (run is not None and _is_past(run, fire_time)):
                    continue
                await self._begin(self._jobs[name], fire_time)
        except StoreUnavailable as error:
            log.warning("schedule waits for the database", extra={"reason": str(error)})

    async def run_now(self, name: str) -> bool:
        """Begin a job out of turn; False if it runs in this process already. Raises KeyError, StoreUnavailable."""
        return await self._begin(self._jobs[name], self._store.now_ms())

    def _previous_ms(self, name: str, now: datetime) -> int | None:
        fire = previous_fire(self._triggers[name], now)
        return None if fire is None else int(fire.timestamp() * 1000)

    async def _begin(self, job: Job, fire_time: int) -> bool:
        if job.name in self._running:
            return False
        self._running.add(job.name)
        claimed = False
        try:
            node = runs.claim_name(self._store.owner, secrets.token_hex(4))
            claimed = await self._store.run(
                lambda tx: runs.claim(tx, job.name, fire_time, node, host=self._store.owner.host)
            )
        finally:
            if not claimed:
                self._running.discard(job.name)
        if claimed:
            self._spawn(self._run(job, fire_time, node))
        return claimed

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job, fire_time: int, node: str) -> None:
        try:
            error = await self._work(job)
            await self._store.run(lambda tx: runs.finish(tx, job.name, fire_time, node, error))
        except StoreUnavailable as unavailable:
            log.warning("job result not recorded", extra={"job": job.name, "reason": str(unavailable)})
        finally:
            self._running.discard(job.name)

    async def _work(self, job: Job) -> str | None:
        """Run a job and return its error, if any; the only edge of jobs."""
        clock = asyncio.get_running_loop().time
        began = clock()
        error = None
        try:
            await job.run()
        except Exception as failure:
            log.exception("job failed", extra={"job": job.name})
            error = f"{type(failure).__name__}: {failure}"
        log.info(
            "job finished",
            extra={"job": job.name, "seconds": round(clock() - began, 3), "failed": error is not None},
        )
        return error


def _is_past(run: JobRun, fire_time: int) -> bool:
    return run.fire_time > fire_time or (run.fire_time == fire_time and run.finished_at is not None)


def _quieten() -> None:
    """Keep APScheduler from a line for every timer; an operator who set its level keeps that."""
    logger = logging.getLogger("apscheduler")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


# ------------------------------------------------------------------------------------------------- cleanup


@dataclass(frozen=True, slots=True)
class CleanupResult:
    """What a cleanup did, or would do."""

    conversations: int  # hidden, and then removed
    rows: int = 0  # removed of conversations and their messages, also of those hidden before
    ended: int = 0  # inbox and outbox rows that no platform repeats any more
    lanes: int = 0
    reservations: int = 0  # booked because their message has ended
    job_runs: int = 0


Progress = Callable[[str, int], None]


async def cleanup(
    store: Store, retention: Retention, *, dry_run: bool = False, progress: Progress | None = None
) -> CleanupResult:
    """Remove conversations without activity for longer than they are kept, and what has ended long ago.

    All in pieces, so that no message waits for it; cut off anywhere, the next one goes on. ``progress`` is told
    after each piece what is removed (a field of the result) and how many by then. Raises StoreUnavailable.
    """
    if dry_run:
        return CleanupResult(
            conversations=await store.read(partial(removing.count_idle, retention=retention))
        )
    return CleanupResult(
        conversations=await _hide_idle(store, retention, progress),
        rows=await remove_hidden(store, progress),
        ended=await _repeat(store, "ended", partial(removing.prune, shard=store.shard), progress),
        # Lanes become idle all the time: the last piece is the one that is not full.
        lanes=await _repeat(store, "lanes", removing.prune_lanes, progress, least=removing.PIECE),
        reservations=await _repeat(store, "reservations", removing.settle_orphans, progress),
        job_runs=await store.run(runs.prune),
    )


async def remove_hidden(store: Store, progress: Progress | None = None) -> int:
    """Remove what is hidden or cleared and has not been removed yet; returns the number of rows."""
    hidden = await _repeat(store, "rows", removing.remove_hidden, progress)
    return hidden + await _repeat(store, "rows", remove_cleared, progress)


async def add_usage(store: Store) -> int:
    """Add what the ledger has got since to its sums; returns the number of rows."""
    return await _repeat(store, "usage", add_fresh, None)


async def _hide_idle(store: Store, retention: Retention, progress: Progress | None) -> int:
    hidden = 0
    found: removing.Idle = await store.read(partial(removing.find_idle, retention=retention))
    while True:
        for some in found.bites():
            hidden += await store.run(partial(removing.hide, ids=some, retention=retention))
            if progress is not None:
                progress("conversations", hidden)
        if found.after is None:
            return hidden
        found = await store.read(partial(removing.find_idle, retention=retention, after=found.after))


async def _repeat(
    store: Store,
    what: str,
    piece: Callable[[Transaction], int],
    progress: Progress | None,
    *,
    least: int = 1,
) -> int:
    """Run ``piece`` until it removes fewer than ``least``; returns how many in all."""
    total = 0
    while True:
        done = await store.run(piece)
        total += done
        if done and progress is not None:
            progress(what, total)
        if done < least:
            return total
