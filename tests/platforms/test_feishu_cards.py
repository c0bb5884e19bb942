from __future__ import annotations

import pytest

from feishu_bot.errors import RetryLater, Undeliverable
from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.serving import Failure
from tests.platforms.test_feishu_send import GROUP, Clock, connected, part


@pytest.fixture
async def fake():
    async with FakeFeishu() as server:
        server.know_message("om_question", "oc_group")
        yield server


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def platform(fake, clock):
    async with connected(fake.url, clock=clock) as connection:
        yield connection


async def shown(platform, clock, *texts):
    """Show an answer's texts, one after the other; return what it is finished by."""
    stream = await platform.show_text(GROUP, "made")
    for text in texts:
        clock.now += 1
        await platform.show_text(GROUP, text)
    return stream


def updates(fake):
    return sum(path.endswith("/content") for _, path in fake.requests)


async def test_a_card_whose_question_was_recalled_is_finished_in_its_place(fake, platform, clock):
    stream = await shown(platform, clock, "on", "one")
    fake.gone.add("om_question")
    message = fake.visible[0].message_id
    assert await platform.send(part("one two", stream=stream)) == message
    assert fake.texts() == ["one two"]


async def test_a_card_whose_question_was_recalled_is_taken_back(fake, platform, clock):
    stream = await shown(platform, clock, "one")
    fake.gone.add("om_question")
    await platform.drop_text(GROUP, stream)
    assert (fake.texts(), len(fake.recalled)) == ([], 1)


async def test_a_card_that_nobody_has_seen_is_not_sent_to_be_taken_back(fake, platform, clock):
    await platform.drop_text(GROUP, await shown(platform, clock))
    assert (fake.accepted, len(fake.recalled)) == (0, 0)


async def test_a_failure_while_a_card_is_finished_does_not_lose_the_card(fake, platform, clock):
    stream = await shown(platform, clock, "one")
    fake.gone.add("om_question")
    fake.fail(Failure(status=400, code=99991400), on="cards")
    with pytest.raises(RetryLater):
        await platform.send(part("one two", stream=stream))
    clock.now += 1
    await platform.send(part("one two", stream=stream))
    assert fake.texts() == ["one two"]


async def test_an_update_that_comes_after_the_end_changes_nothing(fake, platform, clock):
    stream = await shown(platform, clock, "one")
    async with connected(
        fake.url, clock=clock
    ) as another:  # a process that delivers what this one has written
        await another.send(part("one two", stream=stream))
    clock.now += 1
    with pytest.raises(Undeliverable):
        await platform.show_text(GROUP, "one tw")
    assert (fake.texts(), fake.accepted) == (["one two"], 1)


async def test_a_text_that_no_card_holds_becomes_a_message_and_the_card_goes(fake, platform, clock):
    stream = await shown(platform, clock, "one")
    whole = "<at>" * 5000
    await platform.send(part(whole, stream=stream))
    assert fake.texts() == [whole.replace("<", "\uff1c")]
    assert len(fake.recalled) == 1


async def test_all_cards_of_an_app_are_written_into_at_one_pace(fake, platform, clock):
    await shown(platform, clock, "one")
    before = updates(fake)
    for _ in range(90):
        await platform.show_text(GROUP, "one two")
        clock.now += 0.01
    assert 20 <= updates(fake) - before <= 30


async def test_after_too_many_calls_no_card_is_written_into_for_a_while(fake, platform, clock):
    await shown(platform, clock, "one")
    fake.fail(Failure(status=400, code=99991400), on="cards")
    clock.now += 1
    with pytest.raises(RetryLater):
        await platform.show_text(GROUP, "one two")
    before = updates(fake)
    clock.now += 4
    await platform.show_text(GROUP, "one two")
    assert updates(fake) == before
    clock.now += 2
    await platform.show_text(GROUP, "one two")
    assert fake.texts() == ["one two"]


@pytest.mark.parametrize(("code", "ends"), [(99991400, False), (300120, False), (99991672, True)])
async def test_answers_are_shown_no_more_once_the_app_may_not_and_not_for_a_moments_trouble(
    fake, platform, code, ends
):
    fake.fail(Failure(status=400, code=code), on="cards", times=3)
    for _ in range(3):
        with pytest.raises((RetryLater, Undeliverable)):
            await platform.show_text(GROUP, "one")
    assert (platform.shows_text(GROUP) is None) is ends
