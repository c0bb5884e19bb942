"""The limits that a platform publishes, and those on calls of a model, with real servers."""

from __future__ import annotations

import asyncio

from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until


def crowded(instants: list[float], window_s: float) -> int:
    """Return how many of these fell into the fullest window."""
    return max(sum(start <= other < start + window_s for other in instants) for start in instants)


async def test_no_second_sees_more_messages_to_a_chat_than_feishu_takes_and_other_chats_do_not_wait(
    bots, people, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    for n in range(12):
        await people.say(bot, f"noisy {n}", user="ann")
    await people.say(bot, "quiet", user="bob")
    await people.replies(1, "oc_bob")
    assert len(feishu.texts("oc_ann")) < 12, "the quiet chat did not wait for the noisy one"
    await people.replies(12, "oc_ann")
    assert feishu.texts("oc_ann") == [f"noisy {n}" for n in range(12)]
    # The platform's own clock sees them a little closer together than they were sent.
    assert crowded([m.at for m in feishu.visible if m.chat == "oc_ann"], 0.9) <= 5
    await sqlite_record.settled()


async def test_workers_keep_an_accounts_limit_together(operator, people, feishu, sqlite_url, sqlite_record):
    limit = {"platforms": {"feishu": {"messages_per_s": 4, "messages_per_chat_per_s": None}}}
    bot = await operator.workers(configuration(sqlite_url, feishu=feishu, **limit), 2)
    # Each has heard of the other when both have looked once more.
    await operator.types("pause", "web")
    await until(lambda: len(bot.lines("pauses changed")) == 2, "both to look")
    for n in range(12):
        await people.say(bot, f"{n}", user=f"user{n}")
    await people.replies(12)
    assert crowded([m.at for m in feishu.visible], 0.9) <= 4
    await sqlite_record.settled()


async def test_no_more_calls_of_a_model_are_under_way_than_allowed_and_all_are_answered(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu, model=model, ai={"max_calls": 2})
    bot = await bots.start(config)
    model.script(*[Behaviour("slow", delay_s=0.3)] * 6)
    for n in range(6):
        await people.say(bot, f"{n}", user=f"user{n}")
    most = 0
    while len(feishu.texts()) < 6:
        most = max(most, len(model.requests) - len(feishu.texts()))
        await asyncio.sleep(0.005)
    assert most <= 4, "two under way, and two that were answered and not yet shown"
    await sqlite_record.settled()
    assert {row.state for row in sqlite_record.inbox()} == {"answered"}
