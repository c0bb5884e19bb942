"""The store fails: 503 before the acknowledgement, nothing half-written, and everything goes on afterwards."""

from __future__ import annotations

import asyncio
import random
import resource
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing, suppress

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.feishu import sign_and_encrypt
from tests.e2e.bots import KEY, Record, configuration, until
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


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


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
    await put_off_and_taken_afterwards(people, bot, lets_it=filler.unlink, reason="database or disk is full")


async def test_a_quota_on_files_puts_messages_off_until_it_is_raised(bots, people, feishu, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, chat={"max_input_tokens": 100_000}))
    await people.say(bot, "before")
    await people.replies(1)
    room = bot.log.stat().st_size + 50_000  # enough for the log, not for the database
    unlimited = resource.prlimit(bot.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(bot.pid, resource.RLIMIT_FSIZE, (room, unlimited[1]))

    def lift() -> None:
        resource.prlimit(bot.pid, resource.RLIMIT_FSIZE, unlimited)

    await put_off_and_taken_afterwards(people, bot, lets_it=lift, reason="disk I/O error")


async def put_off_and_taken_afterwards(people, bot, *, lets_it, reason):
    """Speak until nothing more can be written, and see that everything is there once it can."""
    taken, refused = ["before"], []
    while len(refused) < 3:
        text = f"{len(taken)} {len(refused)} " + "y" * 3_000
        event = people.event(text)
        status = await people.post(bot, event)
        assert status in {200, 503}
        if status == 200:
            taken.append(text)
        else:
            refused.append((event, text))
    headers, body = sign_and_encrypt(refused[0][0], encrypt_key=KEY)
    async with people.http.post(f"{bot.url}/webhook/feishu", data=body, headers=headers) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
    assert bot.lines("request put off")[-1]["reason"] == reason
    assert await readiness(people, bot) == (200, [f"the database could not be written: {reason}"])
    lets_it()
    for event, _ in refused:
        await until_status(people, bot, event, 200)
    expected = [*taken, *(text for _, text in refused)]
    assert await people.replies(len(expected)) == expected
    await until_ready(people, bot, 200, degraded=[])
    assert bot.complaints() == []
    assert await bot.stop() == 0


async def readiness(people, bot):
    """Return the status of ``/readyz`` and what it says is degraded."""
    async with people.http.get(f"{bot.url}/readyz") as response:
        return response.status, (await response.json()).get("degraded")


async def test_a_file_that_cannot_be_written_ends_a_start_with_the_reason(bots, feishu, small_disk):
    config = configuration(f"sqlite:///{small_disk}/bot.db", feishu=feishu)
    bot = await bots.start(config)
    assert await bot.stop() == 0
    await asyncio.to_thread(remount, small_disk, "ro")
    bot = bots.launch(config)
    assert await bot.ended() == 1
    assert bot.lines()[-1]["text"] == f"error: unable to open database file (sqlite:///{small_disk}/bot.db)"
    await asyncio.to_thread(remount, small_disk, "rw")
    bot = await bots.start(config)
    assert await bot.stop() == 0


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


async def until_ready(people, bot, status, *, degraded=None):
    for _ in range(300):
        found = await readiness(people, bot)
        if found[0] == status and degraded in (None, found[1]):
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
