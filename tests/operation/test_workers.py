"""Several workers on one port: they share the work, count together, and are replaced when they die."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
import pytest

from feishu_bot.store import schema
from feishu_bot.supervisor import reserve, shared_folder
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, free_port, until
from tests.operation.operator import pids

UNLIMITED = {"platforms": {"feishu": {"messages_per_s": None, "messages_per_chat_per_s": None}}}


async def scraped(url: str) -> dict[str, float]:
    """Return the metrics, as whichever worker is asked tells them."""
    async with aiohttp.ClientSession() as fresh, fresh.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


async def gauge(url: str, name: str, expected: float) -> None:
    for _ in range(2000):
        if (await scraped(url)).get(name) == expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{name} never became {expected}: {(await scraped(url)).get(name)}")


RECEIVED = 'feishu_bot_received_total{account="feishu"}'
ENDED = 'feishu_bot_ended_total{account="feishu",end="answered"}'


async def test_workers_share_a_port_and_whichever_is_asked_counts_for_all(
    operator, people, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu, **UNLIMITED), 3)
    assert len(pids(bot)) == 3
    for n in range(30):
        async with (
            aiohttp.ClientSession() as people.http
        ):  # a connection of its own: another worker may get it
            await people.say(bot, f"message {n}", user=f"user{n % 10}")
    await people.replies(30)
    await gauge(bot.url, ENDED, 30)
    for _ in range(6):
        found = await scraped(bot.url)
        assert (found[RECEIVED], found[ENDED]) == (30, 30)
        assert [found[f'feishu_bot_worker{{worker="{n}"}}'] for n in range(3)] == [1, 1, 1]
    working = {line["worker"] for line in bot.lines("message ended")}
    assert len(working) > 1, "one worker did everything"
    for user in range(10):
        assert feishu.texts(f"oc_user{user}") == [f"message {n}" for n in range(user, 30, 10)]
    assert await bot.stop() == 0
    assert len(bot.lines("stopped")) == 3
    assert bot.complaints() == []
    record.check_ends()


async def test_a_worker_that_dies_is_replaced_its_work_is_done_by_others_and_no_count_is_lost(
    operator, people, model, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu, model=model), 2)
    await people.say(bot, "before")
    await people.replies(1)
    await gauge(bot.url, ENDED, 1)
    model.script(Behaviour("hang"))
    await people.say(bot, "asked when it died")
    await until(lambda: len(model.requests) == 2, "the model to be asked")
    slow = next(row for row in record.rows(schema.lanes) if row.lease_owner)
    dead = int(slow.lease_owner.rsplit("|", 2)[1])
    os.kill(dead, signal.SIGKILL)
    assert (await people.replies(2))[-1] == "echo: asked when it died"
    await until(lambda: bot.lines("worker died"), "the supervisor to notice")
    assert bot.lines("worker died")[0]["reason"] == "ended by SIGKILL"
    await until(lambda: len(bot.lines("ready")) == 3, "another worker")
    assert dead not in pids(bot).values()
    await gauge(bot.url, ENDED, 2)
    await record.settled()
    assert [row.state for row in record.inbox()] == ["answered", "answered"]
    assert feishu.texts() == ["echo: before", "echo: asked when it died"]
    async with people.http.get(f"{bot.url}/readyz") as response:
        assert response.status == 200


async def test_what_is_being_answered_at_sigterm_is_finished_by_every_worker(
    operator, people, model, feishu, db_url, record
):
    bot = await operator.workers(configuration(db_url, feishu=feishu, model=model), 2)
    model.script(*[Behaviour("slow", delay_s=0.5)] * 4)
    for user in ("ann", "bob", "cyd", "dan"):
        await people.say(bot, f"I am {user}", user=user)
    await until(lambda: len(model.requests) == 4, "all to be asked")
    assert await bot.stop() == 0
    assert sorted(feishu.texts()) == [f"echo: I am {user}" for user in ("ann", "bob", "cyd", "dan")]
    assert {row.state for row in record.inbox()} == {"answered"}
    assert record.rows(schema.processes) == []


async def test_a_second_signal_kills_the_workers(operator, people, model, feishu, sqlite_url, sqlite_record):
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu, model=model), 2)
    model.script(Behaviour("hang"))
    await people.say(bot, "hello")
    await until(lambda: model.requests, "the model to be asked")
    bot.signal(signal.SIGTERM)
    await until(lambda: bot.lines("workers stopping"), "the first signal")
    bot.signal(signal.SIGTERM)
    assert await bot.ended() == 1
    assert [row.state for row in sqlite_record.inbox()] == ["open"], "it is answered after the next start"


async def test_workers_whose_parent_is_killed_stop_by_themselves(operator, people, feishu, sqlite_url):
    port = free_port()
    config = configuration(sqlite_url, feishu=feishu, server={"port": port})
    bot = await operator.workers(config, 2)
    children = pids(bot)
    await bot.kill()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children.values()), "their end")
    again = await operator.workers(config, 2)
    assert again.url.endswith(f":{port}")


SUPERVISOR = """
import os, sys
from feishu_bot.supervisor import shared_folder
with shared_folder() as folder:
    worker = os.fork()
    if worker == 0:
        sys.stdin.read()
        os._exit(0)
    print(folder, flush=True)
    os.waitpid(worker, 0)
"""


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """A process with a folder below the test's own, and a worker that ends with the standard input."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


async def test_what_a_killed_supervisor_has_left_is_removed_once_its_workers_have_ended_too(
    supervisor, tmp_path
):
    other = tmp_path / "feishu-bot-workers-of-somebody"
    other.mkdir()

    def found_beside_a_new_one() -> set[Path]:
        with shared_folder() as own:
            return set(tmp_path.iterdir()) - {own}

    folder = Path(supervisor.stdout.readline().strip())
    assert found_beside_a_new_one() == {folder, other}
    supervisor.kill()
    supervisor.wait()
    assert found_beside_a_new_one() == {folder, other}, "its worker lives"
    supervisor.stdin.close()
    await until(lambda: found_beside_a_new_one() == {other}, "the worker to end")
    assert list(tmp_path.iterdir()) == [other]


async def test_workers_that_die_at_once_again_and_again_are_given_up_with_the_reason(
    operator, bots, sqlite_url
):
    (bots.folder / "plugins").mkdir()
    (bots.folder / "plugins" / "crash.py").write_text(
        "import os\n\nasync def startup(bot):\n    os._exit(7)\n"
    )
    plugins = {"directory": str(bots.folder / "plugins"), "enabled": ["crash"]}
    bot = bots.launch(configuration(sqlite_url, plugins=plugins, server={"workers": 2}))
    assert await bot.ended() == 1
    assert bot.lines()[-1]["text"].startswith("error: worker ")
    assert bot.lines()[-1]["text"].endswith("died 5 times at once: exit code 7")
    assert [line["replaced_in_s"] for line in bot.lines("worker died") if line["worker"] == 0][:3] == [
        0.25,
        0.5,
        1.0,
    ]


async def test_workers_that_cannot_start_for_a_reason_that_stays_end_the_server_at_once(bots, tmp_path):
    (tmp_path / "no.db").write_bytes(b"this is no database" * 100)
    bot = bots.launch(configuration(f"sqlite:///{tmp_path}/no.db", server={"workers": 3}))
    assert await bot.ended() == 1
    assert "could not start: " in bot.lines()[-1]["text"]
    assert "no.db" in bot.lines()[-1]["text"]


async def test_a_port_in_use_is_not_shared_with_strangers(bots, operator, sqlite_url):
    first = await operator.workers(configuration(sqlite_url), 2)
    port = int(first.url.rsplit(":", 1)[1])
    second = bots.launch(configuration(sqlite_url, server={"workers": 2, "port": port}))
    assert await second.ended() == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in second.lines()[-1]["text"]
    assert first.exit_code is None


def test_addresses_of_a_name_share_one_free_port():
    addresses = list(reserve("localhost", 0))
    assert len({address.port for address in addresses}) == 1
    for address in addresses:
        address.close()


@pytest.mark.parametrize("shared", [True, False], ids=["SO_REUSEPORT", "inherited"])
def test_workers_listen_on_a_reserved_port_also_where_ports_cannot_be_shared(monkeypatch, shared):
    if not shared:
        monkeypatch.delattr(socket, "SO_REUSEPORT")
    (address,) = reserve("127.0.0.1", 0)
    listening = [address.listening(), address.listening()]
    assert (listening[0] is listening[1]) == (not shared)
    for made in listening:
        made.listen()
    with socket.create_connection(("127.0.0.1", address.port)):
        pass
    for made in listening:
        made.close()
    address.close()
