"""Everything that can go wrong at once, in short; and builds that break one promise, each of which must be found.

``make chaos`` is the long form.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from feishu_bot.chaos import driver, report
from feishu_bot.chaos.bases import Given, Own, Scratch
from feishu_bot.chaos.scenario import EVERYTHING, KILLS, Scenario
from feishu_bot.chaos.verdict import COUNTERS, DOUBLED, LOST
from feishu_bot.store.engine import capabilities, open_engine
from feishu_bot.testing.clusters import Unavailable

BROKEN = Path(__file__).with_name("broken_server.py")


@pytest.fixture
def base(blank_db_url, tmp_path):
    """A database of each kind: a server of the run's own, so that it may be restarted, where it is installed."""
    engine = open_engine(blank_db_url)
    kind = capabilities(engine).kind
    engine.dispose()
    try:
        made = Scratch(tmp_path) if kind == "sqlite" else Own(kind)
    except Unavailable:
        made = Given(blank_db_url)
    yield made
    made.close()


async def test_under_all_accidents_nothing_is_lost_doubled_or_out_of_order_on_each_database(base, tmp_path):
    scenario = Scenario(
        seed=5, seconds=8, chats=16, workers=3, lease_s=3, faults=EVERYTHING, gap_s=0.7, settle_s=90
    )
    result = await driver.run(scenario, base, tmp_path)
    assert result.verdict.kept, report.page(result)
    assert result.verdict.acknowledged == result.sent > 0
    assert result.done.total() > 5, "hardly anything has happened"


async def test_200_messages_of_20_chats_survive_kills_at_random_moments(tmp_path):
    scenario = Scenario(seed=9, messages=200, chats=20, rate=25, faults=KILLS, gap_s=0.5)
    result = await driver.run(scenario, Scratch(tmp_path), tmp_path)
    assert result.verdict.kept, report.page(result)
    assert (result.sent, result.verdict.acknowledged) == (200, 200)
    assert result.verdict.answered + result.verdict.refused == 200
    assert result.done["kill"] + result.done["machine"] >= 3


def broken(what: str, **more) -> Scenario:
    return Scenario(command=(sys.executable, str(BROKEN), what), settle_s=10, **more)


async def test_a_build_that_does_not_check_its_lease_is_found_to_end_messages_twice(tmp_path):
    faults = ("stop", "stop", "model slow")
    scenario = broken(
        "fence", seed=2, seconds=8, chats=40, rate=30, workers=6, lease_s=1.5, faults=faults, gap_s=0.7
    )
    result = await driver.run(scenario, Scratch(tmp_path), tmp_path)
    assert result.verdict.breaches[COUNTERS], report.page(result)


async def test_a_build_that_acknowledges_before_the_commit_is_found_to_lose_messages(tmp_path):
    scenario = broken("early", seed=1, seconds=8, rate=30, faults=("lock", "machine", "machine"), gap_s=0.6)
    result = await driver.run(scenario, Scratch(tmp_path), tmp_path)
    assert result.verdict.breaches[LOST], report.page(result)


async def test_a_build_whose_attempts_have_each_a_key_of_their_own_is_found_to_show_answers_twice(tmp_path):
    scenario = broken("uuid", seed=1, seconds=4, workers=2, faults=("platform feishu lost",), gap_s=0.5)
    result = await driver.run(scenario, Scratch(tmp_path), tmp_path)
    assert result.verdict.breaches[DOUBLED], report.page(result)
