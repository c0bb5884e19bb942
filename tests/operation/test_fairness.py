"""A group whose members all speak at once does not stand in anybody's way."""

from __future__ import annotations

import asyncio

from feishu_bot.testing.model import Behaviour
from feishu_bot.worker import MAX_PER_CHAT
from tests.e2e.bots import configuration, until

MEMBERS = MAX_PER_CHAT + 50


async def test_while_a_group_has_its_share_at_work_quiet_chats_are_answered_at_once(
    bots, people, model, feishu, db_url, record
):
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model))
    model.default = Behaviour("hang")
    for start in range(0, MEMBERS, 25):
        await asyncio.gather(
            *(people.say(bot, f"busy {n}", user=f"m{n}", chat="oc_busy") for n in range(start, start + 25))
        )
    await until(lambda: len(model.requests) == MAX_PER_CHAT, "the group's share to be at work")
    model.default = Behaviour()
    quiet = [f"q{n}" for n in range(10)]
    await asyncio.gather(*(people.say(bot, f"I am {user}", user=user) for user in quiet))
    await people.replies(len(quiet))
    assert sorted(feishu.texts()) == [f"echo: I am {user}" for user in quiet]
    assert len(model.requests) == MAX_PER_CHAT + len(quiet), "no more of the group was begun"
    await until(lambda: sum(row.state == "open" for row in record.inbox()) == MEMBERS, "their ends")
    assert bot.complaints() == []
