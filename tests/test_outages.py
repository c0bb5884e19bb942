"""A platform that is away: for a minute, two hours, a day; and parts that an operator holds."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from feishu_bot.delivery import ASIDE_AFTER, GIVE_UP_MS, HELD_MS, Delivery
from feishu_bot.model import ChatType, Target
from feishu_bot.parts import part_payload
from feishu_bot.platforms.base import PlatformContext
from feishu_bot.platforms.feishu import Feishu, FeishuSettings
from feishu_bot.store import outbox, schema
from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import until
from tests.stores import HOUR, Clock, opened, rows

MINUTE = 60_000
LANE = "in:feishu:private:oc_ann:ou_ann"


class Desk:
    """A delivery to a fake Feishu; for all of them the time passes only when it is told to."""

    def __init__(self, store, clock: Clock, fake: FakeFeishu, platform: Feishu) -> None:
        self.store, self.clock, self.fake = store, clock, fake
        self.platform = platform
        self.held = False
        self.delivery = Delivery(store, {"feishu": platform}, holds=lambda _part: self.held)

    async def answers(self, *texts: str, lane: str = LANE) -> None:
        """Put the parts of an answer into the outbox."""
        target = Target(ChatType.PRIVATE, chat_id="oc_ann", sender_id="ou_ann")
        values = [
            {
                "source": f"in:{text}",
                "kind": "answer",
                "part": 0,
                "lane_key": lane,
                "account": "feishu",
                "payload": part_payload(target, text),
            }
            for text in texts
        ]
        await self.store.run(lambda tx: outbox.push(tx, values))

    async def look(self, lane: str = LANE) -> None:
        """Send what may go now."""
        self.delivery.nudge(lane)
        while self.delivery.lanes:  # noqa: ASYNC110  # what is waited for happens in tasks of its own
            await asyncio.sleep(0.001)

    async def after(self, ms: int, *, every_ms: int = MINUTE, lane: str = LANE) -> None:
        """Let time pass, and look again and again meanwhile."""
        end = self.clock.now_ms + ms
        while self.clock.now_ms < end:
            self.clock.now_ms = min(end, self.clock.now_ms + every_ms)
            await self.look(lane)

    async def parts(self) -> list[dict]:
        return await rows(self.store, schema.outbox)


@pytest.fixture
async def desk(db_url):
    clock = Clock()

    def seconds() -> float:
        return clock.now_ms / 1000

    keys = {"app_id": "cli_x", "app_secret": "s", "encrypt_key": "k", "bot_open_id": "ou_bot"}
    rates = {"messages_per_s": None, "messages_per_chat_per_s": None}
    async with opened(db_url, clock) as store, FakeFeishu(clock=seconds) as fake:
        settings = FeishuSettings(type="feishu", base_url=fake.url, **keys, **rates)
        platform = Feishu("feishu", settings, PlatformContext(language="en"), clock=seconds)
        made = Desk(store, clock, fake, platform)
        yield made
        await made.delivery.stop(5.0)
        await platform.stop()


async def test_what_a_platform_that_was_away_for_a_minute_missed_comes_once_and_in_order(desk):
    desk.fake.down = True
    await desk.answers("one", "two", "three")
    await desk.look()
    await desk.after(MINUTE, every_ms=1_000)
    first, *others = await desk.parts()
    assert (first["state"], first["attempts"] > 3) == ("pending", True)
    assert [other["attempts"] for other in others] == [0, 0], "they wait for the first"
    assert desk.fake.texts() == []
    desk.fake.down = False
    await desk.after(2 * MINUTE)
    assert desk.fake.texts() == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("hours", "shown"),
    [(0.5, ["lost"]), (2, ["lost", "(possibly repeated) lost"])],
    ids=["within the hour", "after two hours"],
)
async def test_an_answer_that_may_have_arrived_is_folded_for_an_hour_and_marked_after_it(desk, hours, shown):
    desk.fake.fail(Failure(drop="after"))  # it was taken, and nobody heard of it
    await desk.answers("lost")
    await desk.look()
    assert desk.fake.texts() == ["lost"]
    desk.fake.down = True
    await desk.after(int(hours * HOUR))
    desk.fake.down = False
    await desk.after(20 * MINUTE)
    assert desk.fake.texts() == shown
    assert [part["state"] for part in await desk.parts()] == ["sent"]


async def test_an_answer_that_may_have_arrived_is_given_up_after_an_hour_where_repeats_are_unwanted(desk):
    settings = desk.platform.settings.model_copy(update={"resend_unknown": False})
    desk.platform.settings = settings
    desk.fake.fail(Failure(drop="after"))
    await desk.answers("lost", "next")
    await desk.look()
    desk.fake.down = True
    await desk.after(2 * HOUR)
    desk.fake.down = False
    await desk.after(20 * MINUTE)
    assert desk.fake.texts() == ["lost", "next"]
    first, second = await desk.parts()
    assert (first["state"], second["state"]) == ("dead", "sent")
    assert "resend_unknown" in first["last_error"]


async def test_an_answer_that_certainly_did_not_arrive_carries_no_mark_however_late_it_is(desk):
    desk.fake.fail(Failure(status=503, raw=b""), times=30)
    await desk.answers("late")
    await desk.look()
    await desk.after(2 * HOUR)
    assert desk.fake.texts() == []
    await desk.after(6 * HOUR)
    assert desk.fake.texts() == ["late"]


async def test_pauses_between_attempts_grow_to_a_quarter_of_an_hour_and_a_day_later_it_is_given_up(desk):
    desk.fake.down = True
    await desk.answers("never", "next")
    await desk.look()
    await desk.after(12 * HOUR, every_ms=5 * MINUTE)
    before = (await desk.parts())[0]["attempts"]
    await desk.after(6 * HOUR, every_ms=5 * MINUTE)
    in_six_hours = (await desk.parts())[0]["attempts"] - before
    assert 18 <= in_six_hours <= 24
    await desk.after(GIVE_UP_MS - 18 * HOUR + 30 * MINUTE, every_ms=5 * MINUTE)
    given_up, following = await desk.parts()
    assert given_up["state"] == "dead"
    assert given_up["last_error"]
    assert following["state"] == "pending", "the next one has a day of its own"
    desk.fake.down = False
    await desk.after(HOUR)
    assert desk.fake.texts() == ["next"]


async def test_a_reply_that_alone_keeps_failing_is_set_aside_and_holds_up_nobody(desk):
    desk.fake.down = True
    await desk.answers("bad", "good")
    await desk.look()
    desk.fake.down = False
    for n in range(ASIDE_AFTER):
        await desk.answers(f"other {n}", lane="in:other")  # the chat takes everything else
        await desk.look("in:other")
        desk.fake.fail(Failure(status=503, raw=b""))
        await desk.after(20 * MINUTE, every_ms=20 * MINUTE)
    lanes = Counter(part["lane_key"] for part in await desk.parts() if part["state"] != "sent")
    assert list(lanes) == [f"aside:out-{(await desk.parts())[0]['id']}"]
    assert "good" in desk.fake.texts()
    await desk.after(20 * MINUTE, lane=next(iter(lanes)))
    assert desk.fake.texts()[-1] == "bad"


async def test_a_part_that_an_operator_holds_is_not_tried_and_goes_at_once_when_he_lets_it(desk):
    desk.held = True
    await desk.answers("one", "two")
    await desk.look()
    await desk.after(2 * GIVE_UP_MS, every_ms=HOUR)
    assert [(p["state"], p["attempts"], p["first_attempt_at"]) for p in await desk.parts()] == [
        ("pending", 0, None)
    ] * 2
    assert (await desk.parts())[0]["not_before"] <= desk.clock.now_ms + HELD_MS
    assert desk.fake.accepted == 0
    desk.held = False
    desk.delivery.hasten("feishu")
    await until(lambda: desk.fake.accepted == 2, "both to go")
    assert desk.fake.texts() == ["one", "two"]


async def test_a_part_that_is_held_after_an_attempt_keeps_what_is_known_of_that(desk):
    desk.fake.fail(Failure(drop="after"))
    await desk.answers("lost")
    await desk.look()
    (before,) = await desk.parts()
    desk.held = True
    await desk.after(10 * MINUTE)
    (after,) = await desk.parts()
    for name in ("attempts", "first_attempt_at", "unknown_at"):
        assert after[name] == before[name] is not None
