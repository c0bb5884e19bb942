"""A PostgreSQL server of the test's own crashes, or is followed by its standby: what was acknowledged is answered once."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import closing

import psycopg
import pytest

from feishu_bot.store import schema
from feishu_bot.testing.clusters import Unavailable, start_postgres, start_standby
from tests.e2e.bots import Record, configuration, until
from tests.e2e.proxy import Proxy

BUDGETS = [{"name": "ever", "window": "total", "limit_tokens": 10_000_000}]
REPLICATED = {"synchronous_standby_names": "standby", "synchronous_commit": "remote_apply"}


@pytest.fixture
def primary():
    """A server whose commits survive the crash of its processes."""
    try:
        made = start_postgres("-c", "synchronous_commit=on")
    except Unavailable as error:
        pytest.skip(f"no PostgreSQL to be started: {error}")
    yield made
    made.stop()


def ask(url, statement):
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone() if cursor.description else None


def crash(url):
    """Kill a process of the server, as its kernel does when memory runs out; all others end, and it recovers."""
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)


async def test_a_server_that_crashes_and_recovers_under_traffic_loses_and_doubles_nothing(
    bots, people, model, feishu, primary
):
    bot = await bots.start(configuration(primary.url, feishu=feishu, model=model, budgets=BUDGETS))
    users = [f"u{n}" for n in range(4)]

    async def talk(user):
        for n in range(8):
            await taken(people, bot, people.event(f"{user} {n}", user=user))

    async def crash_now_and_then():
        for _ in range(3):
            await asyncio.to_thread(crash, primary.url)
            await asyncio.sleep(0.2)
            await until(lambda: _answers(primary.url), "the recovery")

    await asyncio.gather(crash_now_and_then(), *(talk(user) for user in users))
    await people.replies(32)
    record = Record(primary.url)
    await record.settled()
    for user in users:
        assert feishu.texts(f"oc_{user}") == [f"echo: {user} {n}" for n in range(8)]
    record.check_accounts()
    record.check_ends()
    record.close()
    assert bot.complaints() == []
    assert await bot.stop() == 0


def _answers(url):
    try:
        return ask(url, "SELECT 1")
    except psycopg.OperationalError:
        return None


async def taken(people, bot, event):
    """Post an event as a platform repeats it, until it is acknowledged."""
    for _ in range(1200):
        if await people.post(bot, event) == 200:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("never acknowledged")


async def test_while_only_a_read_only_standby_answers_messages_are_put_off_and_taken_once_it_is_promoted(
    bots, people, model, feishu, primary
):
    async with Proxy(primary.url) as proxy:
        bot = await bots.start(configuration(proxy.url, feishu=feishu, model=model, budgets=BUDGETS))
        standby = await asyncio.to_thread(start_standby, primary)
        try:
            for name, value in REPLICATED.items():
                ask(primary.url, f"ALTER SYSTEM SET {name} = {value}")
            ask(primary.url, "SELECT pg_reload_conf()")
            for n in range(3):
                await taken(people, bot, people.event(f"before {n}"))
            await people.replies(3)
            proxy.lead_to(standby.url)
            proxy.cut()
            await asyncio.to_thread(primary.stop)
            during = people.event("during")
            assert await people.post(bot, during) == 503
            reason = "read-only transaction"
            await until(lambda: any(reason in str(line) for line in bot.lines()), "the standby to be noticed")
            other = bots.launch(configuration(proxy.url, feishu=feishu, model=model, budgets=BUDGETS))
            await until(lambda: other.lines("waiting for the database"), "another server to wait")
            ask(standby.url, "SELECT pg_promote()")
            await taken(people, bot, during)
            assert await people.replies(4) == [*(f"echo: before {n}" for n in range(3)), "echo: during"]
            await other.listening()
            record = Record(standby.url)
            await record.settled()
            assert record.count(schema.inbox) == 4
            record.check_accounts()
            record.check_ends()
            record.close()
            assert bot.complaints() == other.complaints() == []
            assert await bot.stop() == 0
        finally:
            standby.stop()


async def test_a_pool_that_leads_to_a_standby_is_given_up_as_a_whole(bots, people, feishu, primary):
    """The old connections would go on working, and go on refusing."""
    bot = await bots.start(configuration(primary.url, feishu=feishu))
    await people.say(bot, "before")
    await people.replies(1)
    read_only = "ALTER DATABASE postgres SET default_transaction_read_only = "
    ask(primary.url, read_only + "on")
    record = Record(primary.url)
    record.end_other_connections()
    record.close()
    during = people.event("during")
    assert await people.post(bot, during) == 503
    with closing(psycopg.connect(primary.url, autocommit=True)) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(read_only + "off")
    await taken(people, bot, during)
    assert await people.replies(2) == ["before", "during"]
    assert bot.complaints() == []
