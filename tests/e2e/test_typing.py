"""The sign that an answer is being made, when the process that has put it up dies."""

from __future__ import annotations

import time

from feishu_bot.store import schema, signs
from feishu_bot.store.signs import Sign
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import configuration, until
from tests.stores import Clock, opened


async def test_a_reaction_of_a_killed_process_is_removed_by_the_one_that_takes_over(
    bots, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model)
    model.script(Behaviour(kind="hang"))
    bot = await bots.start(config)
    message_id = await people.say(bot, "think")
    await until(lambda: record.rows(schema.controls, kind="sign"), "the reaction on record")
    assert list(feishu.shown.values()) == [(message_id, "Typing")]
    await bot.kill()

    bot = await bots.start(config)
    await people.replies(1)
    await until(lambda: not feishu.shown, "the end of the reaction")
    await until(lambda: not record.rows(schema.controls, kind="sign"), "the end of the note")
    assert feishu.texts() == ["echo: think"]
    await bot.stop()
    assert bot.complaints() == []


async def test_a_reaction_left_behind_after_the_answer_is_removed_at_the_next_start_when_the_platform_is_there(
    bots, feishu, sqlite_url, sqlite_record
):
    feishu.shown["reaction_left"] = ("om_old", "Typing")
    async with opened(sqlite_url, Clock(int(time.time() * 1000))) as store:
        sign = Sign("feishu", "om_old", "reaction_left")
        await store.run(lambda tx: signs.note(tx, sign, owner="elsewhere/boot/1|7|9"))
    feishu.fail(Failure(status=503), on="reactions")
    first = await bots.start(configuration(sqlite_url, feishu=feishu))
    await until(lambda: any(m == "DELETE" for m, _ in feishu.requests), "the first try")
    await first.stop()
    assert feishu.shown
    second = await bots.start(configuration(sqlite_url, feishu=feishu))
    await until(lambda: not feishu.shown, "the end of the reaction")
    await until(lambda: not sqlite_record.rows(schema.controls, kind="sign"), "the end of the note")
    await second.stop()
    assert first.complaints() == second.complaints() == []
