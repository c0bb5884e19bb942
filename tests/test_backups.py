"""The scheduled backup, and what is told of the backups there are."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import insert

from feishu_bot.backups import _PROGRAM, JOB, Backups
from feishu_bot.config.settings import BackupJobSettings
from feishu_bot.errors import StoreUnavailable
from feishu_bot.schedule import Schedule
from feishu_bot.store.backup import backup, list_backups
from feishu_bot.store.engine import open_engine
from feishu_bot.store.jobs import claim_name
from feishu_bot.store.leases import Owner
from feishu_bot.store.restore import restore
from feishu_bot.store.schema import job_runs, messages
from feishu_bot.store.store import Store
from tests.filled import SAID, contents, fill
from tests.stores import Clock, opened

HALF_PAST_THREE = datetime(2025, 6, 19, 3, 30, tzinfo=UTC)
DAY = timedelta(days=1)


def backups_of(store, folder, now=HALF_PAST_THREE, **settings) -> Backups:
    own = BackupJobSettings(directory=str(folder), **settings)
    return Backups(own, store, ZoneInfo("UTC"), now=lambda: now)


async def test_the_job_makes_a_backup_that_was_tried_out_and_keeps_the_newest(db_url, tmp_path):
    fill(db_url)
    before = contents(db_url)
    folder = tmp_path / "backups"
    for days in (3, 2, 1):
        backup(db_url, folder, now=HALF_PAST_THREE - days * DAY, program="test")
    async with opened(db_url) as store:
        await backups_of(store, folder, keep=2).run()
    newest, older = list_backups(folder)
    assert (newest.created_at, older.created_at) == (HALF_PAST_THREE, HALF_PAST_THREE - DAY)
    assert len(list(folder.iterdir())) == 2
    restore(newest.path, f"sqlite:///{tmp_path}/restored.db", now=HALF_PAST_THREE)
    assert contents(f"sqlite:///{tmp_path}/restored.db") == before


async def test_a_backup_that_cannot_be_made_is_an_error_with_its_reason(sqlite_url, tmp_path):
    (tmp_path / "file").write_text("")
    async with opened(sqlite_url) as store:
        with pytest.raises(StoreUnavailable, match=r"no good backup was made: .*file"):
            await backups_of(store, tmp_path / "file").run()


async def test_the_schedule_runs_it_and_records_how_it_ended(sqlite_url, tmp_path):
    async with opened(sqlite_url, Clock(int(HALF_PAST_THREE.timestamp() * 1000) + 1)) as store:
        backups = backups_of(store, tmp_path)
        schedule = Schedule(store, ZoneInfo("UTC"), backups.jobs(), now=lambda: HALF_PAST_THREE)
        await schedule.start()
        assert await schedule.run_now(JOB)
        while (await schedule.last_runs())[JOB].finished_at is None:  # noqa: ASYNC110  # it is a row
            await asyncio.sleep(0.01)
        assert (await schedule.last_runs())[JOB].error is None
        await schedule.stop()
    assert len(list_backups(tmp_path)) == 1


@pytest.fixture
def slow_url(sqlite_url) -> str:
    """A database that takes some seconds to back up: nothing in it can be packed."""
    fill(sqlite_url)
    engine = open_engine(sqlite_url)
    with engine.begin() as connection:
        rows = [
            {
                "conversation_id": 5,
                "seq": n,
                "role": "user",
                "content": os.urandom(500_000).hex(),
                "timestamp": SAID,
            }
            for n in range(100, 180)
        ]
        connection.execute(insert(messages), rows)
    engine.dispose()
    return sqlite_url


def is_writing(folder: Path) -> bool:
    return any(path.name.endswith(".partial") for path in folder.iterdir())


async def until_it_writes(folder: Path) -> None:
    while not is_writing(folder):  # noqa: ASYNC110  # another process
        await asyncio.sleep(0.01)


async def test_a_server_that_stops_takes_its_backup_with_it(slow_url, tmp_path):
    async with opened(slow_url) as store:
        running = asyncio.create_task(backups_of(store, tmp_path).run())
        await until_it_writes(tmp_path)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_is_killed_takes_its_backup_with_it(slow_url, tmp_path):
    request = {"path": sys.path, "db_url": slow_url, "folder": str(tmp_path), "keep": 1, "now": 1e9}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _PROGRAM, stdin=pipe, stdout=pipe)
    process.stdin.write(json.dumps(request).encode() + b"\n")
    await until_it_writes(tmp_path)
    process.stdin.close()  # as the end of this process would
    assert await process.wait() == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- problems


async def told(store, folder, now) -> list[str]:
    backups = backups_of(store, folder, now)
    await backups.look()
    found = backups.problems()
    await backups.stop()
    return found


async def test_a_backup_older_than_two_of_its_intervals_is_a_problem(sqlite_url, tmp_path):
    backup(sqlite_url, tmp_path, now=HALF_PAST_THREE, program="test")
    async with opened(sqlite_url) as store:
        assert await told(store, tmp_path, HALF_PAST_THREE + 2 * DAY) == []
        (problem,) = await told(store, tmp_path, HALF_PAST_THREE + 2 * DAY + timedelta(seconds=1))
        assert problem == f"the last good backup is 2 days old ({tmp_path})"


async def ran(store, started_at: datetime, node: str, error: str | None = None) -> None:
    ms = int(started_at.timestamp() * 1000)
    row = {"job": JOB, "fire_time": ms, "node": node, "started_at": ms, "finished_at": ms, "error": error}
    await store.run(lambda tx: tx.connection.execute(insert(job_runs), row) and None)


async def test_where_there_never_was_a_backup_the_schedule_gets_two_intervals_of_time(db_url, tmp_path):
    async with opened(db_url) as store:
        await ran(store, HALF_PAST_THREE, "")  # the schedule heard of the job
        assert await told(store, tmp_path, HALF_PAST_THREE + 2 * DAY) == []
        (problem,) = await told(store, tmp_path, HALF_PAST_THREE + 3 * DAY)
        assert problem == f"there is no good backup in {tmp_path}"


async def test_a_backup_that_another_machine_made_counts_and_a_failed_or_removed_one_does_not(
    db_url, tmp_path
):
    now = HALF_PAST_THREE + 10 * DAY
    other, here = claim_name(Owner("other/1/1", 1, "1"), "t"), claim_name(Owner.current(), "t")
    async with opened(db_url) as store:
        await ran(store, HALF_PAST_THREE, "")
        await ran(store, now - timedelta(hours=2), other, error="failed")
        assert await told(store, tmp_path, now) != []
        await ran(store, now - timedelta(hours=1), other)
        assert await told(store, tmp_path, now) == []
        await ran(store, now, here)  # whose file is not there
        assert await told(store, tmp_path, now) != []


async def test_backups_that_are_switched_off_or_of_a_database_in_memory_are_no_problem(sqlite_url, tmp_path):
    async with opened(sqlite_url) as store:
        off = backups_of(store, tmp_path, enabled=False)
        await off.look()
        assert (off.jobs(), off.problems()) == ([], [])
    in_memory = backups_of(Store("sqlite://"), tmp_path)
    assert (in_memory.jobs(), in_memory.problems()) == ([], [])
    await in_memory.refuse_damaged()


def damage(url: str) -> None:
    Path(url.removeprefix("sqlite:///")).write_bytes(b"damaged" * 1000)


async def test_a_damaged_file_is_refused_with_the_name_of_the_newest_backup_that_can_be_read(
    sqlite_url, tmp_path
):
    store = Store(sqlite_url)
    await backups_of(store, tmp_path).refuse_damaged()
    first, _ = backup(sqlite_url, tmp_path, now=HALF_PAST_THREE, program="test")
    second, _ = backup(sqlite_url, tmp_path, now=HALF_PAST_THREE + DAY, program="test")
    damage(f"sqlite:///{second.path}")
    damage(sqlite_url)
    with pytest.raises(StoreUnavailable, match=r"is damaged \(file is not a database\)") as refused:
        await backups_of(store, tmp_path).refuse_damaged()
    assert f"`bot.py restore {first.path} --force`" in str(refused.value)
    with pytest.raises(StoreUnavailable, match="there is no good backup"):
        await backups_of(store, tmp_path / "none").refuse_damaged()
