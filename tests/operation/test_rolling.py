"""Workers, servers and versions are replaced while people go on writing: nothing lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import pytest

from feishu_bot.store.migrations import upgrade
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until
from tests.operation.operator import pids
from tests.versions import ADDS, NEXT, released, write_next

UNLIMITED = {"platforms": {"feishu": {"messages_per_s": None, "messages_per_chat_per_s": None}}}
BUDGETS = [{"name": "ever", "window": "total", "limit_tokens": 10_000_000}]
USERS = [f"u{n}" for n in range(4)]


class Traffic:
    """People who write one message after the other, each posted again and again until a server takes it."""

    def __init__(self, people, servers) -> None:
        self._people = people
        self.servers = servers
        self.said: Counter[str] = Counter()
        self._going_on = True
        self._tasks = [asyncio.create_task(self._talk(user)) for user in USERS]

    async def _talk(self, user: str) -> None:
        while self._going_on:
            event = self._people.event(f"{user} {self.said[user]}", user=user)
            for n in range(1200):
                if await self._people.post(self.servers[n % len(self.servers)], event) == 200:
                    break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError(f"nobody took a message of {user}")
            self.said[user] += 1
            await asyncio.sleep(0.01)

    async def more(self, count: int = 8) -> None:
        """Return when that many more messages have been taken."""
        before = self.said.total()
        await until(lambda: self.said.total() >= before + count, "more messages to be taken")

    async def end(self) -> None:
        """Say no more."""
        self._going_on = False
        await asyncio.gather(*self._tasks)


def check(traffic: Traffic, feishu, record) -> None:
    for user in USERS:
        assert feishu.texts(f"oc_{user}") == [f"echo: {user} {n}" for n in range(traffic.said[user])]
    assert Counter(row.state for row in record.inbox()) == {"answered": traffic.said.total()}
    assert {row.attempts for row in record.inbox()} == {1}, "what was at work has been finished"
    record.check_accounts()
    record.check_ends()


async def test_four_workers_restarted_one_by_one_under_traffic_finish_what_they_have(
    operator, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model, budgets=BUDGETS, **UNLIMITED)
    bot = await operator.workers(config, 4)
    model.default = Behaviour("slow", delay_s=0.05)
    traffic = Traffic(people, [bot])
    await traffic.more()
    for number, old in pids(bot).items():
        os.kill(old, signal.SIGTERM)
        await until(lambda n=number: len(bot.lines("ready")) == 5 + n, "the worker that replaces it")
        await traffic.more()
    await traffic.end()
    await people.replies(traffic.said.total())
    await record.settled()
    check(traffic, feishu, record)
    assert {line["reason"] for line in bot.lines("worker died")} == {"exit code 0"}
    assert await bot.stop() == 0


async def test_servers_replaced_one_after_the_other_under_traffic_answer_all_that_was_taken(
    operator, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model, budgets=BUDGETS, **UNLIMITED)
    old = [await operator.workers(config, 2) for _ in range(2)]
    model.default = Behaviour("slow", delay_s=0.05)
    traffic = Traffic(people, list(old))
    await traffic.more()
    for number, server in enumerate(old):
        assert await server.stop() == 0
        traffic.servers[number] = await operator.workers(config, 2)
        await traffic.more()
    await traffic.end()
    await people.replies(traffic.said.total())
    await record.settled()
    check(traffic, feishu, record)
    assert [line for server in (*old, *traffic.servers) for line in server.complaints()] == []


@pytest.fixture
def newer(tmp_path):
    """The migrations of a program one version newer than this one."""
    scripts = released(tmp_path / "newer")
    write_next(scripts, ADDS)
    return scripts


async def test_a_server_goes_on_while_a_newer_version_upgrades_its_database_and_is_not_started_on_it_again(
    bots, people, model, feishu, db_url, record, newer
):
    config = configuration(db_url, feishu=feishu, model=model, budgets=BUDGETS, **UNLIMITED)
    bot = await bots.start(config)
    traffic = Traffic(people, [bot])
    await traffic.more()
    assert await asyncio.to_thread(upgrade, db_url, head=NEXT, scripts=newer) == "upgraded"
    await traffic.more()
    await traffic.end()
    await people.replies(traffic.said.total())
    await record.settled()
    check(traffic, feishu, record)
    assert bot.complaints() == []
    assert await bot.stop() == 0
    again = bots.launch(config)
    assert await again.ended() == 1
    assert "use the newer program" in again.lines()[-1]["text"]
