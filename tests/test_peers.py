"""Workers that count together: nothing twice, nothing lost with the dead, never back."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from feishu_bot.intake import IntakeCounts
from feishu_bot.metrics import Metrics, add_up
from feishu_bot.peers import SILENT_S, Peers


class Seconds:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


def arrived(messages: int) -> IntakeCounts:
    counts = IntakeCounts()
    counts.received["web"] = messages
    return counts


def counted(messages: int, *, active: int = 0, depth: int = 0) -> list[Any]:
    """Return what a worker publishes."""
    gauges = {"messages_active": active, "queue_depth": depth, "delivered_total": messages}
    metrics = Metrics(arrived(messages), lambda: gauges)
    for _ in range(messages):
        metrics.answered.observe(0.2)
    return metrics.counts()


def sample(families: list[Any], name: str, **labels: str) -> float:
    return next(
        value
        for _, _, _, samples in families
        for sample_name, sample_labels, value in samples
        if (sample_name, sample_labels) == (name, labels)
    )


def test_counts_are_added_and_gauges_of_the_database_are_not():
    found = add_up([counted(2, active=1, depth=7), counted(3, active=2, depth=6)])
    assert sample(found, "feishu_bot_received_total", account="web") == 5
    assert sample(found, "feishu_bot_delivered_total") == 5
    assert sample(found, "feishu_bot_answer_seconds_count") == 5
    assert sample(found, "feishu_bot_answer_seconds_bucket", le="0.5") == 5
    assert sample(found, "feishu_bot_answer_seconds_bucket", le="0.1") == 0
    assert sample(found, "feishu_bot_answer_seconds_sum") == pytest.approx(1.0)
    assert sample(found, "feishu_bot_messages_active") == 3
    assert sample(found, "feishu_bot_queue_depth") == 7, "the asked one's word"


def without_gauges(counts: list[list[Any]]) -> list[Any]:
    return [family for family in add_up(counts) if family[1] != "gauge"]


async def test_what_a_dead_worker_had_counted_stays_and_is_not_counted_twice(tmp_path, clock):
    supervisor = Peers(tmp_path, 2, clock=clock)
    asked, other = Peers(tmp_path, 2, 0, clock=clock), Peers(tmp_path, 2, 1, clock=clock)
    for slot in range(2):
        supervisor.expect(slot)
    await other.start(lambda: counted(5, active=4))
    await other.stop()

    def received() -> float:
        return sample(add_up([counted(1), *asked.counts()]), "feishu_bot_received_total", account="web")

    assert received() == 6
    clock.now += 1
    supervisor.bury(1, without_gauges)
    assert received() == 6, "buried, and its file is still there"
    supervisor.expect(1)
    assert received() == 6
    again = Peers(tmp_path, 2, 1, clock=clock)
    clock.now += 1
    await again.start(lambda: counted(2))
    await again.stop()
    assert received() == 8
    supervisor.bury(1, without_gauges)
    supervisor.expect(1)
    assert received() == 8
    assert sample(add_up([counted(1, active=1), *asked.counts()]), "feishu_bot_messages_active") == 1


async def test_whoever_is_asked_has_the_others_count_up_to_now(tmp_path):
    counts = [1, 1]
    workers = [Peers(tmp_path, 2, slot) for slot in range(2)]
    for slot, worker in enumerate(workers):
        await worker.start(lambda slot=slot: counted(counts[slot]))
    counts[1] = 9
    metrics = Metrics(arrived(1), dict, workers[0])
    assert b'feishu_bot_received_total{account="web"} 10.0' in await metrics.render()
    for worker in workers:
        await worker.stop()


async def test_a_worker_that_hangs_holds_up_nobody(tmp_path):
    Peers(tmp_path, 2).expect(1)
    asked = Peers(tmp_path, 2, 0)
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "1.sock"))
    silent.listen()
    metrics = Metrics(arrived(3), dict, asked)
    page = await metrics.render()
    assert b'feishu_bot_received_total{account="web"} 3.0' in page
    silent.close()


async def test_a_worker_that_is_not_heard_of_is_named(tmp_path, clock):
    supervisor, asked = Peers(tmp_path, 3, clock=clock), Peers(tmp_path, 3, 0, clock=clock)
    for slot in range(3):
        supervisor.expect(slot)
    clock.now += SILENT_S + 1
    await Peers(tmp_path, 3, 1, clock=clock).stop()
    assert asked.ages() == {1: 0.0, 2: SILENT_S + 1}
    page = (await Metrics(arrived(0), dict, asked).render()).decode()
    assert 'feishu_bot_worker{worker="0"} 1.0' in page
    assert 'feishu_bot_worker{worker="1"} 1.0' in page
    assert 'feishu_bot_worker{worker="2"} 0.0' in page


async def test_a_file_that_cannot_be_read_is_passed_over(tmp_path):
    (tmp_path / "1.json").write_text('{"at": 1, "cou')
    assert Peers(tmp_path, 2, 0).counts() == []
