from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from feishu_bot.store import jobs, leases
from feishu_bot.store.leases import Owner
from feishu_bot.store.schema import job_runs, processes
from tests.stores import DAY, HOUR, NOON, opened, rows

FIRE = NOON - 9 * HOUR
ELSEWHERE = Owner("other-host/boot/1", 7, "77")


def name(owner, token="t"):
    return jobs.claim_name(owner, token)


async def claim(store, node, *, job="backup", fire_time=FIRE):
    return await store.run(lambda tx: jobs.claim(tx, job, fire_time, node, host=store.owner.host))


async def finish(store, node, error=None, *, fire_time=FIRE):
    return await store.run(lambda tx: jobs.finish(tx, "backup", fire_time, node, error))


async def last_run(store):
    return (await store.read(jobs.last_runs))["backup"]


async def live(store, owner):
    await store.run(
        lambda tx: tx.connection.execute(processes.insert(), _process(owner, store.now_ms())) and None
    )


def _process(owner, at):
    return {
        "owner": str(owner),
        "host": owner.host,
        "pid": owner.pid,
        "version": "test",
        "started_at": at,
        "heartbeat_at": at,
    }


async def test_one_claim_of_a_fire_time_wins(store):
    await live(store, ELSEWHERE)
    assert await claim(store, name(ELSEWHERE))
    assert not await claim(store, name(store.owner))
    assert (await last_run(store)).node == name(ELSEWHERE)


async def test_a_process_does_not_claim_twice_what_it_runs(store):
    assert await claim(store, name(store.owner, "one"))
    assert not await claim(store, name(store.owner, "two"))


async def test_a_claim_whose_commit_was_not_heard_of_says_the_same_again(store):
    assert await claim(store, name(store.owner))
    assert await claim(store, name(store.owner))
    assert len(await rows(store, job_runs)) == 1


async def test_jobs_and_fire_times_are_claimed_apart(store):
    node = name(store.owner)
    assert await claim(store, node)
    assert await claim(store, node, job="cleanup")
    assert await claim(store, node, fire_time=FIRE + DAY)


async def test_a_fire_time_before_one_that_was_claimed_is_past(store):
    await claim(store, name(store.owner))
    assert not await claim(store, name(store.owner), fire_time=FIRE - 1)
    assert len(await rows(store, job_runs)) == 1


@pytest.mark.parametrize("error", [None, "OSError: no space left"])
async def test_the_end_of_a_run_is_recorded(store, clock, error):
    node = name(store.owner)
    await claim(store, node)
    clock.now_ms += 5000
    assert await finish(store, node, error)
    assert await finish(store, node, error)
    assert await last_run(store) == jobs.JobRun("backup", FIRE, node, NOON, NOON + 5000, error)
    assert not await claim(store, name(store.owner, "again"))


async def test_an_error_of_any_length_is_recorded(store):
    node = name(store.owner)
    await claim(store, node)
    await finish(store, node, "x" * 5000)
    assert (await last_run(store)).error == "x" * 500


async def test_a_run_whose_process_has_ended_on_this_host_is_claimed_again_once(store):
    dead = replace(store.owner, started="0-long-gone")
    await live(store, dead)
    await claim(store, name(dead))
    second, third = name(replace(dead, pid=1, started="also gone")), name(store.owner)
    assert await claim(store, second)
    assert (await last_run(store)).node == second
    assert not await claim(store, third)


async def test_a_run_whose_process_took_itself_off_the_list_is_claimed_again(store):
    await live(store, ELSEWHERE)
    await claim(store, name(ELSEWHERE))
    assert not await claim(store, name(store.owner))
    await store.run(lambda tx: leases.unregister(tx, ELSEWHERE))
    assert await claim(store, name(store.owner))


async def test_a_run_on_a_silent_machine_is_given_an_hour(store, clock):
    await live(store, ELSEWHERE)
    await claim(store, name(ELSEWHERE))
    clock.now_ms += jobs.GIVEN_UP_MS
    assert not await claim(store, name(store.owner))
    clock.now_ms += 1
    assert await claim(store, name(store.owner))


async def test_a_run_on_a_machine_that_is_heard_of_is_left_to_it_however_long(store, clock):
    await live(store, ELSEWHERE)
    await claim(store, name(ELSEWHERE))
    clock.now_ms += 10 * jobs.GIVEN_UP_MS
    await store.run(lambda tx: leases.renew(tx, str(ELSEWHERE), [], []))
    assert not await claim(store, name(store.owner))


async def test_a_process_that_lost_its_run_to_another_ends_nothing(store):
    await live(store, ELSEWHERE)
    await claim(store, name(ELSEWHERE))
    await store.run(lambda tx: leases.unregister(tx, ELSEWHERE))
    await claim(store, name(store.owner))
    assert not await finish(store, name(ELSEWHERE), "late")
    run = await last_run(store)
    assert run.finished_at is None
    assert await finish(store, name(store.owner))
    assert (await last_run(store)).error is None


async def test_a_job_that_is_introduced_has_not_run_and_missed_nothing(store):
    for fires in ({"backup": FIRE}, {"backup": FIRE + DAY, "cleanup": FIRE}):
        await store.run(partial(jobs.introduce, first_fires=fires))
    assert await store.read(jobs.last_runs) == {}
    newest = await store.read(jobs.newest)
    assert {job: run.fire_time for job, run in newest.items()} == {"backup": FIRE, "cleanup": FIRE}
    assert not await claim(store, name(store.owner))
    assert await claim(store, name(store.owner), fire_time=FIRE + DAY)


async def test_the_last_run_is_the_newest_of_each_job(store):
    node = name(store.owner)
    for n in range(3):
        await claim(store, node, fire_time=FIRE + n * DAY)
        await claim(store, node, job="cleanup", fire_time=FIRE + n)
    found = await store.read(jobs.last_runs)
    assert {job: run.fire_time for job, run in found.items()} == {
        "backup": FIRE + 2 * DAY,
        "cleanup": FIRE + 2,
    }


async def test_old_runs_go_and_the_newest_of_each_job_stays(store, clock):
    node = name(store.owner)
    for n in range(3):
        await claim(store, node, fire_time=FIRE + n * DAY)
    await claim(store, node, job="yearly")
    clock.now_ms = FIRE + DAY + jobs.KEPT_MS + 1
    assert await store.run(jobs.prune) == 2
    assert [(r["job"], r["fire_time"]) for r in await rows(store, job_runs)] == [
        ("backup", FIRE + 2 * DAY),
        ("yearly", FIRE),
    ]
    clock.now_ms += 365 * DAY
    assert await store.run(jobs.prune) == 0


async def test_only_one_of_two_processes_that_claim_at_once_wins(db_url, store):
    async with opened(db_url) as other:
        nodes = [name(replace(ELSEWHERE, pid=n)) for n in (1, 2)]
        for node in nodes:
            await live(store, jobs.owner_of(node))
        for n in range(20):
            won = await asyncio.gather(
                store.run(partial(_claim, n=n, node=nodes[0])), other.run(partial(_claim, n=n, node=nodes[1]))
            )
            assert sorted(won) == [False, True]


def _claim(tx, n, node):
    return jobs.claim(tx, "backup", FIRE + n, node, host="here")
