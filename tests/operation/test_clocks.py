"""Machines whose clocks are wrong by minutes: nothing changes but the times in their logs."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import Bot, configuration, until

WRONG_S = 600


@pytest.fixture
def shifted(bots):
    """Start servers whose clocks are wrong."""

    async def start(config, seconds: int) -> Bot:
        return await bots.launch_program("shifted_server", [str(seconds)], config).listening()

    return start


async def test_processes_whose_clocks_are_twenty_minutes_apart_share_lanes_as_if_they_were_right(
    shifted, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model, chat={"answer_within": "5m"})
    early, late = await shifted(config, -WRONG_S), await shifted(config, WRONG_S)
    assert abs(_seconds_of(late.lines("ready")[0]) - _seconds_of(early.lines("ready")[0])) > WRONG_S, (
        "logs differ"
    )
    for n in range(6):
        for user in ("ann", "bob"):
            await people.say(early if n % 2 else late, f"{user} {n}", user=user)
    await people.replies(12)
    for user in ("ann", "bob"):
        assert feishu.texts(f"oc_{user}") == [f"echo: {user} {n}" for n in range(6)]
    # A lane that the late one works on is not taken for abandoned, nor one of the early one's for taken for ever.
    model.script(*[Behaviour("slow", delay_s=1.5)] * 2)
    await people.say(late, "slow late", user="cyd")
    await people.say(early, "slow early", user="dan")
    await people.replies(14)
    await record.settled()
    assert [row.state for row in record.inbox()] == ["answered"] * 14
    assert [row.attempts for row in record.inbox()] == [1] * 14
    assert len(model.requests) == 14, "nothing was asked twice"
    now = datetime.now(UTC).timestamp()
    assert all(abs(row.received_at / 1000 - now) < 300 for row in record.inbox())
    assert all(abs(row.timestamp.timestamp() - now) < 300 for row in record.messages())
    assert record.rows(schema.reservations) == []


async def test_work_of_a_process_with_a_wrong_clock_is_taken_over_when_it_is_killed(
    shifted, bots, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model)
    wrong = await shifted(config, WRONG_S)
    model.script(Behaviour("hang"))
    await people.say(wrong, "asked before")
    await until(lambda: model.requests, "the model to be asked")
    wrong.signal(9)
    await asyncio.sleep(0)
    await bots.start(config)
    assert await people.replies(1) == ["echo: asked before"]
    await record.settled()


def _seconds_of(line) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()
