"""Answers of a slow model in Feishu: seen while they are written, and one whole message in the end, whatever dies."""

from __future__ import annotations

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.feishu import make_event
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import configuration, until

LONG = "一二三四五六七八九十" * 6
SLOW = Behaviour(text=LONG, chunks=12, chunk_delay_s=0.3)


@pytest.fixture
def config(feishu, model, db_url):
    return configuration(db_url, feishu=feishu, model=model)


async def no_signs(record):
    await until(lambda: not record.rows(schema.controls, kind="sign"), "the end of the notes", patience_s=60)


async def test_an_answer_grows_in_one_card_and_is_whole_in_the_end(
    bots, people, feishu, model, config, db_url, record
):
    bot = await bots.start(config)
    model.script(SLOW)
    await people.say(bot, "<at id=all></at> tell")
    await until(lambda: feishu.visible and len(feishu.visible[0].text) < len(LONG), "the beginning")
    await until(lambda: feishu.texts() == [LONG], "the end")
    await record.settled()
    (card,) = feishu.cards.all.values()
    assert not card.streaming
    assert len(card.texts) > 3
    assert all(LONG.startswith(text) for text in card.texts[1:])
    (part,) = record.outbox()
    assert (part.state, part.sent_id) == ("sent", card.message_id)
    assert not feishu.shown, "no sign of typing is left"
    if db_url.startswith("sqlite"):  # half a minute; on the others, whoever comes next removes them, below
        await no_signs(record)
    assert feishu.texts() == [LONG]
    assert bot.complaints() == []


async def test_a_process_killed_in_the_middle_leaves_one_whole_message(
    bots, people, feishu, model, config, record
):
    bot = await bots.start(config)
    model.script(Behaviour(text=LONG, chunks=12, chunk_delay_s=3.0))
    await people.say(bot, "tell")
    await until(lambda: feishu.visible, "the beginning")
    await bot.kill()
    assert len(feishu.texts()[0]) < len(LONG)
    await bots.start(config)
    await until(lambda: feishu.texts() == ["echo: tell"], "the whole answer alone")
    await record.settled()
    assert len(feishu.recalled) == 1
    await no_signs(record)
    assert feishu.texts() == ["echo: tell"]


async def test_a_process_killed_before_it_finishes_the_card_has_it_finished_by_the_next(
    bots, people, feishu, model, config, record
):
    bot = await bots.start(config, crash=("committed", 1))
    model.script(SLOW)
    await people.say(bot, "tell")
    await bot.ended()
    assert len(feishu.texts()) == 1
    await bots.start(config)
    await until(lambda: feishu.texts() == [LONG], "the whole answer")
    await record.settled()
    await no_signs(record)
    assert (feishu.texts(), list(feishu.recalled)) == ([LONG], [])
    assert len(feishu.cards.all) == 1


async def test_an_app_without_the_permission_answers_at_the_end(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    feishu.cards.granted = False
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    model.script(SLOW)
    await people.say(bot, "tell")
    await until(lambda: feishu.texts() == [LONG], "the answer")
    await sqlite_record.settled()
    assert feishu.visible[0].msg_type == "text"
    asked = [path for method, path in feishu.requests if "cardkit" in path]
    assert 1 <= len(asked) <= 3
    assert bot.complaints() == []


@pytest.mark.parametrize(
    ("code", "kind", "recalled"),
    [(300309, "interactive", 0), (200740, "text", 1), (99991400, "interactive", 0)],
    ids=["closed", "gone", "too many calls"],
)
async def test_a_card_that_cannot_be_finished_as_usual_still_is_one_whole_message(
    bots, people, feishu, model, sqlite_url, sqlite_record, code, kind, recalled
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    model.script(SLOW)
    await people.say(bot, "tell")
    await until(lambda: feishu.visible and "十" in feishu.visible[0].text, "the beginning")
    before = len(feishu.cards.all["card_1"].texts)
    if code == 300309:
        feishu.cards.all["card_1"].streaming = False
    else:
        feishu.fail(Failure(status=400, code=code), on="cards", times=1 if code == 99991400 else 40)
    await until(lambda: feishu.texts() == [LONG], "the whole answer alone")
    await sqlite_record.settled()
    assert feishu.visible[0].msg_type == kind
    assert len(feishu.recalled) == recalled
    assert before


async def test_a_card_goes_with_its_question(bots, people, feishu, model, config, record):
    bot = await bots.start(config)
    model.script(Behaviour(text=LONG, chunks=12, chunk_delay_s=3.0))
    question = await people.say(bot, "tell")
    await until(lambda: feishu.visible, "the beginning")
    feishu.gone.add(question)
    gone = {"message_id": question, "chat_id": "oc_ann"}
    assert await people.post(bot, make_event(gone, event_type="im.message.recalled_v1")) == 200
    await until(lambda: not feishu.visible, "the end of the card")
    await record.settled()
    assert record.outbox() == []
    assert len(feishu.recalled) == 1
    await no_signs(record)
    assert bot.complaints() == []
