from __future__ import annotations

import asyncio
import itertools
import logging
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import text

from feishu_bot.schedule import Job, Schedule, cron_trigger, previous_fire
from feishu_bot.store.schema import job_runs, processes
from tests.stores import DAY, HOUR, NOON, Clock, opened, put, rows

SHANGHAI = ZoneInfo("Asia/Shanghai")
BERLIN = ZoneInfo("Europe/Berlin")
DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def fires(cron, since, number, zone=UTC):
    """Return the next fire times of a crontab line."""
    trigger = cron_trigger(cron, zone)
    found: list[datetime] = []
    now = since
    while len(found) < number:
        found.append(trigger.get_next_fire_time(None, now))
        now = found[-1] + timedelta(seconds=1)
    return found


# ---------------------------------------------------------------------------------------------------- cron


@pytest.mark.parametrize(
    ("weekday", "expected"),
    [
        ("0", "sun"),
        ("7", "sun"),
        ("1", "mon"),
        ("6", "sat"),
        ("sun", "sun"),
        ("MON", "mon"),
        ("Sat", "sat"),
        ("1-5", "mon tue wed thu fri"),
        ("mon-fri", "mon tue wed thu fri"),
        ("5-7", "fri sat sun"),
        ("0-2", "mon tue sun"),
        ("sun-tue", "mon tue sun"),
        ("0-7", "mon tue wed thu fri sat sun"),
        ("6-7", "sat sun"),
        ("0,7", "sun"),
        ("6,0", "sat sun"),
        ("1,3,fri", "mon wed fri"),
        ("1-3,5-7", "mon tue wed fri sat sun"),
        ("*/2", "tue thu sat sun"),
        ("*/3", "wed sat sun"),
        ("*/7", "sun"),
        ("1-5/2", "mon wed fri"),
        ("1-7/3", "mon thu sun"),
        ("mon-sat/2", "mon wed fri"),
        ("*", "mon tue wed thu fri sat sun"),
    ],
)
def test_days_of_the_week_are_those_of_crontab(weekday, expected):
    week = fires(f"0 0 * * {weekday}", datetime(2025, 6, 16, tzinfo=UTC), len(expected.split()))  # a Monday
    assert " ".join(DAYS[day.weekday()] for day in week) == expected
    assert week[-1] < datetime(2025, 6, 23, tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 3 * * *", ["06-18 03:00", "06-19 03:00"]),
        ("*/20 * * * *", ["06-18 00:00", "06-18 00:20", "06-18 00:40", "06-18 01:00"]),
        ("*/59 5 * * *", ["06-18 05:00", "06-18 05:59", "06-19 05:00"]),
        ("5-10/5,30 0 * * *", ["06-18 00:05", "06-18 00:10", "06-18 00:30", "06-19 00:05"]),
        ("0 0 1 jan-dec/6 *", ["07-01 00:00", "01-01 00:00", "07-01 00:00"]),
        ("0 0 1 JUL,9 *", ["07-01 00:00", "09-01 00:00"]),
        ("0 0 31 * *", ["07-31 00:00", "08-31 00:00", "10-31 00:00"]),
        ("0 0 20 * fri", ["06-20 00:00", "06-27 00:00", "07-04 00:00", "07-11 00:00"]),
        ("0 0 19 * fri", ["06-19 00:00", "06-20 00:00", "06-27 00:00"]),
        ("0 0 */10 * fri", ["07-11 00:00", "08-01 00:00"]),
    ],
)
def test_a_crontab_line_fires_as_crontab_says(cron, expected):
    found = fires(cron, datetime(2025, 6, 18, tzinfo=UTC), len(expected))
    assert [fire.strftime("%m-%d %H:%M") for fire in found] == expected


def test_fire_times_are_those_of_the_time_zone():
    (fire,) = fires("0 3 * * *", datetime(2025, 6, 18, tzinfo=UTC), 1, SHANGHAI)
    assert fire.astimezone(UTC) == datetime(2025, 6, 18, 19, tzinfo=UTC)


@pytest.mark.parametrize(
    "cron", ["", "* * * *", "60 * * * *", "* * * * 8", "* * * * fri-mon", "0 3 * * * *", "x * * * *"]
)
def test_what_is_no_crontab_line_is_refused(cron):
    with pytest.raises(ValueError, match="field"):
        cron_trigger(cron, UTC)


@pytest.mark.parametrize("cron", ["* * * * *", "*/7 * * * *", "30 2 * * *", "30 1-3 * * 7", "0 0 1 * mon"])
@pytest.mark.parametrize("month", [3, 10])
def test_the_previous_fire_time_is_the_newest_one_also_when_clocks_change(cron, month):
    trigger = cron_trigger(cron, BERLIN)
    now = datetime(2025, month, 24, tzinfo=UTC)
    all_fires = []
    while now < datetime(2025, month + 1, 8, tzinfo=UTC):
        all_fires.append(trigger.get_next_fire_time(None, now).astimezone(UTC))
        now = all_fires[-1] + timedelta(seconds=1)
    change = datetime(2025, month, {3: 30, 10: 26}[month], 1, tzinfo=UTC)
    for earlier, later in itertools.pairwise(all_fires):
        if abs(earlier - change) < timedelta(hours=3) or later - earlier > timedelta(hours=3):
            assert previous_fire(trigger, earlier) == earlier
            assert previous_fire(trigger, later - timedelta(seconds=1)) == earlier


@pytest.mark.parametrize(
    ("cron", "expected"), [("0 0 29 2 *", datetime(2024, 2, 29, tzinfo=UTC)), ("0 0 30 2 *", None)]
)
def test_the_previous_fire_time_may_be_years_ago_or_never(cron, expected):
    assert previous_fire(cron_trigger(cron, UTC), datetime(2025, 6, 18, tzinfo=UTC)) == expected


# ---------------------------------------------------------------------------------------------------- jobs


class Work:
    """A job's work: counts its runs, waits where the test says so, fails where it says so."""

    def __init__(self) -> None:
        self.runs = 0
        self.error: Exception | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.began = asyncio.Event()

    async def __call__(self) -> None:
        self.runs += 1
        self.began.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error


class Node:
    """A process with its store and its schedule of one job at 3 o'clock."""

    def __init__(self, store, clock, cron="0 3 * * *", name="backup", **options) -> None:
        self.work = Work()
        self.store = store
        self.schedule = Schedule(store, UTC, [Job(name, cron, self.work)], now=clock.utc, **options)

    async def ended(self):
        """Wait until nothing runs."""
        while self.schedule._tasks:
            await asyncio.wait(self.schedule._tasks)

    async def check(self):
        await self.schedule.check()
        await self.ended()
        return self.work.runs


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def store(db_url, clock):
    async with opened(db_url, clock) as store:
        yield store


@pytest.fixture
async def start():
    """Start nodes, and stop them at the end."""
    nodes = []

    async def started(*arguments, **options):
        node = Node(*arguments, **options)
        nodes.append(node)
        await node.schedule.start()
        await node.ended()
        return node

    yield started
    for node in nodes:
        await node.schedule.stop()


async def recorded(store):
    return [row for row in await rows(store, job_runs) if row["node"]]


async def test_a_fresh_database_runs_nothing_at_once_and_everything_at_its_time(store, clock, start):
    node = await start(store, clock)
    assert await node.check() == 0
    assert await node.schedule.last_runs() == {}
    clock.now_ms = NOON + 15 * HOUR - 1
    assert await node.check() == 0
    clock.now_ms += 1
    assert await node.check() == 1
    assert await node.check() == 1
    (run,) = await recorded(store)
    assert (run["job"], run["fire_time"], run["error"]) == ("backup", NOON + 15 * HOUR, None)
    assert run["finished_at"] is not None


async def test_a_run_that_was_missed_by_a_process_not_running_is_made_up_for_once(store, clock, start):
    first = await start(store, clock)
    await first.schedule.stop()
    clock.now_ms += 5 * DAY
    assert (await start(store, clock)).work.runs == 1
    assert (await start(store, clock)).work.runs == 0
    (run,) = await recorded(store)
    assert run["fire_time"] == NOON - 9 * HOUR + 5 * DAY


async def test_two_processes_run_a_job_once(db_url, store, clock, start):
    async with opened(db_url, clock) as other:
        nodes = [await start(s, clock) for s in (store, other)]
        for day in range(1, 4):
            clock.now_ms = NOON + day * DAY
            await asyncio.gather(*(node.check() for node in nodes))
            assert sum(node.work.runs for node in nodes) == day
        for node in nodes:
            await node.schedule.stop()


async def test_checks_at_the_same_moment_run_a_job_once(store, clock, start):
    node = await start(store, clock)
    clock.now_ms += DAY
    await asyncio.gather(*(node.check() for _ in range(5)))
    assert node.work.runs == 1


async def test_a_job_that_fails_is_recorded_and_reported_and_runs_the_next_time(store, clock, start, caplog):
    node = await start(store, clock)
    node.work.error = OSError("no space left")
    clock.now_ms += DAY
    assert await node.check() == 1
    (run,) = await recorded(store)
    assert run["error"] == "OSError: no space left"
    assert run["finished_at"] is not None
    (record,) = (r for r in caplog.records if r.message == "job failed")
    assert record.job == "backup"
    assert record.exc_info
    node.work.error = None
    clock.now_ms += DAY
    assert await node.check() == 2
    assert (await node.schedule.last_runs())["backup"].error is None


async def test_the_end_of_a_job_is_one_line_with_its_time(store, clock, start, caplog):
    caplog.set_level(logging.INFO)
    node = await start(store, clock)
    clock.now_ms += DAY
    await node.check()
    (record,) = (r for r in caplog.records if r.message == "job finished")
    assert (record.job, record.failed) == ("backup", False)
    assert record.seconds >= 0
    assert not [r for r in caplog.records if r.name.startswith("apscheduler")]


async def test_a_job_that_still_runs_is_not_begun_beside_itself_but_made_up_for(store, clock, start):
    node = await start(store, clock)
    node.work.go_on.clear()
    clock.now_ms += DAY
    await node.schedule.check()
    await node.work.began.wait()
    clock.now_ms += DAY
    await node.schedule.check()
    assert len(await recorded(store)) == len(node.schedule._tasks) == 1
    node.work.go_on.set()
    await node.ended()
    assert await node.check() == 2


async def test_a_run_whose_process_died_is_made_up_for_once(store, clock, start):
    node = await start(store, clock)
    clock.now_ms += DAY
    fire_time = NOON + 15 * HOUR
    dead = "another-host/boot/1|7|7#token"
    run = {"job": "backup", "fire_time": fire_time, "node": dead, "started_at": fire_time}
    await put(store, job_runs, run)
    assert await node.check() == 1
    (run,) = await recorded(store)
    assert (run["fire_time"], run["error"]) == (fire_time, None)
    assert run["finished_at"] is not None


async def test_stopping_waits_for_what_runs(store, clock, start):
    node = await start(store, clock)
    node.work.go_on.clear()
    clock.now_ms += DAY
    await node.schedule.check()
    await node.work.began.wait()
    stopping = asyncio.create_task(node.schedule.stop())
    await asyncio.sleep(0)
    node.work.go_on.set()
    await stopping
    assert (await recorded(store))[0]["finished_at"] is not None


async def test_what_stopping_cuts_off_is_begun_anew_by_the_next_start(db_url, store, clock, start, caplog):
    async with opened(db_url, clock) as first:
        node = await start(first, clock, stop_timeout_s=0.0)
        node.work.go_on.clear()
        clock.now_ms += DAY
        await node.schedule.check()
        await node.work.began.wait()
        await node.schedule.stop()
        assert (await recorded(store))[0]["finished_at"] is None
        assert "jobs cut off" in [r.message for r in caplog.records]
        await store.run(lambda tx: tx.connection.execute(processes.delete()) and None)  # it took itself off
    assert (await start(store, clock)).work.runs == 1
    assert (await recorded(store))[0]["finished_at"] is not None
    assert (await start(store, clock)).work.runs == 0


async def test_a_job_without_a_time_runs_at_every_start(store, clock, start):
    for _ in range(2):
        assert (await start(store, clock, cron=None)).work.runs == 1
    assert await rows(store, job_runs) == []


async def test_a_job_can_be_run_out_of_turn(store, clock, start):
    node = await start(store, clock)
    node.work.go_on.clear()
    assert await node.schedule.run_now("backup")
    assert not await node.schedule.run_now("backup")
    node.work.go_on.set()
    await node.ended()
    assert (await node.schedule.last_runs())["backup"].fire_time == NOON
    assert await node.check() == 1
    with pytest.raises(KeyError):
        await node.schedule.run_now("nothing")


async def rename(store, old, new):
    await store.run(lambda tx: tx.connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}")) and None)


async def test_a_schedule_without_its_table_waits_and_makes_up_for_what_it_missed(
    store, clock, start, caplog
):
    await rename(store, "job_runs", "away")
    node = await start(store, clock)
    clock.now_ms += DAY
    assert await node.check() == 0
    assert [r.message for r in caplog.records] == ["schedule waits for the database"] * 2
    await rename(store, "away", "job_runs")
    assert await node.check() == 1


async def test_the_timer_begins_the_jobs(sqlite_url, clock, start):
    async with opened(sqlite_url, clock) as store:
        node = await start(store, clock)
        clock.now_ms += DAY
        node.schedule._timer.modify_job("backup", next_run_time=datetime.now(UTC))
        await node.work.began.wait()
        await node.schedule.stop()
        assert node.work.runs == 1


async def test_the_next_fire_times_are_told_and_a_job_that_never_fires_is_reported(sqlite_url, clock, caplog):
    async with opened(sqlite_url, clock) as store:
        jobs = [
            Job("backup", "30 3 * * *", Work()),
            Job("never", "0 0 30 2 *", Work()),
            Job("start", None, Work()),
        ]
        schedule = Schedule(store, SHANGHAI, jobs, now=clock.utc)
        assert schedule.next_fires() == {"backup": datetime(2025, 6, 19, 3, 30, tzinfo=SHANGHAI)}
        assert [(r.message, r.job) for r in caplog.records] == [("job never fires", "never")]
        await schedule.start()
        await schedule.stop()
        await schedule.stop()
