"""The store fails: 503 before the acknowledgement, nothing half-written, and everything goes on afterwards."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing, suppress

import pytest

from feishu_bot.store import schema
from tests.e2e.bots import Record, configuration, until
from tests.e2e.proxy import Proxy

BUDGETS = [{"name": "ever", "window": "total", "limit_tokens": 10_000_000}]


@pytest.fixture
def server_url(request, databases):
    """The URL of a database on a server."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def postgresql_record(postgresql_url):
    made = Record(postgresql_url)
    yield made
    made.close()


@pytest.fixture
def server_record(server_url):
    made = Record(server_url)
    yield made
    made.close()


on_servers = pytest.mark.parametrize("server_url", ["postgresql_url", "mariadb_url"], indirect=True)


async def test_while_another_writer_holds_the_file_messages_are_put_off_and_taken_afterwards(
    bots, people, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    await people.say(bot, "before")
    await people.replies(1)
    await sqlite_record.settled()
    event = people.event("during")
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        statuses = await asyncio.gather(*(people.post(bot, event) for _ in range(3)))
        assert statuses == [503] * 3
        assert sqlite_record.count(schema.inbox) == 1, "nothing of it is stored"
        other.execute("ROLLBACK")
    assert await people.post(bot, event) == 200
    assert await people.replies(2) == ["before", "during"]
    await sqlite_record.settled()
    assert sqlite_record.count(schema.inbox) == 2
    sqlite_record.check_ends()
    text = await (await people.http.get(f"{bot.url}/metrics")).text()
    assert 'feishu_bot_received_total{account="feishu"} 2.0' in text, "also what was late"
    assert bot.complaints() == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass


async def test_a_full_disk_puts_messages_off_until_there_is_room_again(bots, people, feishu, small_disk):
    url = f"sqlite:///{small_disk}/bot.db"
    bot = await bots.start(configuration(url, feishu=feishu, chat={"max_input_tokens": 100_000}))
    await people.say(bot, "before")
    await people.replies(1)
    filler = small_disk / "filler"
    fill(filler)
    events = [people.event(f"{n} " + "y" * 3_000) for n in range(3)]
    for event in events:
        await until_status(people, bot, event, 503)
    filler.unlink()
    for event in events:
        await until_status(people, bot, event, 200)
    replies = await people.replies(4)
    assert [text[:2] for text in replies[1:]] == ["0 ", "1 ", "2 "]


async def until_status(people, bot, event, status):
    """Post an event as a platform repeats it, until it gets this status."""
    for _ in range(100):
        if await people.post(bot, event) == status:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"never {status}")


@on_servers
async def test_a_database_that_goes_away_puts_messages_off_and_comes_back_to_where_it_was(
    bots, people, model, feishu, server_url, server_record
):
    record = server_record
    async with Proxy(server_url) as proxy:
        bot = await bots.start(configuration(proxy.url, feishu=feishu, model=model, budgets=BUDGETS))
        await people.say(bot, "before")
        await people.replies(1)
        await record.settled()
        proxy.up = False
        proxy.cut()
        event = people.event("during")
        assert await people.post(bot, event) == 503
        await until(lambda: bot.lines("store unavailable"), "the loss to be noticed")
        await until_ready(people, bot, 503)
        assert record.count(schema.inbox) == 1
        proxy.up = True
        await until_ready(people, bot, 200)
        assert await people.post(bot, event) == 200
        assert await people.replies(2) == ["echo: before", "echo: during"]
        await record.settled()
        record.check_accounts()
        record.check_ends()
        assert bot.complaints() == []
        await bot.stop()


async def until_ready(people, bot, status):
    for _ in range(300):
        async with people.http.get(f"{bot.url}/readyz") as response:
            if response.status == status:
                return
        await asyncio.sleep(0.05)
    raise AssertionError(f"never {status}")


@on_servers
async def test_connections_that_break_at_any_moment_lose_nothing_and_double_nothing(
    bots, people, model, feishu, server_url, server_record
):
    record = server_record
    async with Proxy(server_url) as proxy:
        bot = await bots.start(configuration(proxy.url, feishu=feishu, model=model, budgets=BUDGETS))
        chance = random.Random(7)

        async def cut_now_and_then():
            while True:
                await asyncio.sleep(chance.uniform(0.01, 0.15))
                proxy.cut()

        async def talk(user):
            for n in range(6):
                event = people.event(f"{user} {n}", user=user)
                await until_status(people, bot, event, 200)

        cutting = asyncio.create_task(cut_now_and_then())
        await asyncio.gather(*(talk(f"u{n}") for n in range(6)))
        cutting.cancel()
        await people.replies(36)
        await record.settled()
        for user in (f"u{n}" for n in range(6)):
            assert feishu.texts(f"oc_{user}") == [f"echo: {user} {n}" for n in range(6)]
        assert Counter(r.state for r in record.inbox()) == {"answered": 36}
        assert Counter(m.role for m in record.messages()) == {"user": 36, "assistant": 36}
        record.check_accounts()
        record.check_ends()
        assert bot.complaints() == []
        await bot.stop()


async def test_postgresql_that_ends_all_connections_is_connected_to_again(
    bots, people, feishu, postgresql_url, postgresql_record
):
    record = postgresql_record
    bot = await bots.start(configuration(postgresql_url, feishu=feishu))
    for n in range(5):
        record.end_other_connections()
        await until_status(people, bot, people.event(f"{n}"), 200)
    assert await people.replies(5) == [f"{n}" for n in range(5)]
    await record.settled()
