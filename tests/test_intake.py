"""What is recorded of an event, and under which key."""

from __future__ import annotations

import asyncio

import pytest

from feishu_bot.access import Access
from feishu_bot.config import AccessSettings, BotSettings, ChatSettings
from feishu_bot.errors import StoreUnavailable
from feishu_bot.intake import Intake
from feishu_bot.model import Attachment, ChatType, InboundMessage, Mention
from feishu_bot.store.work import Recorded


class Record:
    """Keeps what it is given, when it is let; a known key is a repeat."""

    def __init__(self):
        self.arrivals = []
        self.hold = None

    def receive(self, arrivals):
        future = asyncio.get_running_loop().create_future()
        if self.hold is not None:
            self.hold.append((arrivals, future))
        else:
            asyncio.get_running_loop().call_soon(self.release, arrivals, future)
        return future

    def release(self, arrivals, future):
        results = []
        for arrival in arrivals:
            known = any(a.event_key == arrival.event_key for a in self.arrivals)
            results.append(Recorded.REPEAT if known else Recorded.NEW)
            if not known:
                self.arrivals.append(arrival)
        future.set_result(results)


class Door:
    def __init__(self, *, wants_events=False, access=None, **chat):
        self.record = Record()
        self.lanes = []
        settings = BotSettings(chat=ChatSettings(**chat))
        self.intake = Intake(
            settings,
            self.record,
            Access(access or AccessSettings(), ()),
            recorded=self.lanes.append,
            wants_events=lambda: wants_events,
        )

    async def take(self, **fields):
        """Record one message and return its arrival."""
        await self.intake.record([message(**fields)])
        return self.record.arrivals[-1]


def message(**fields):
    return InboundMessage(
        **{"account": "feishu", "event_key": "om:1", "sender_id": "ou_ann", "text": "hello you"} | fields
    )


GROUP = {"chat_type": ChatType.GROUP, "chat_id": "oc_team"}


async def test_a_message_is_recorded_open_with_its_tokens_and_its_lane_is_told():
    door = Door()
    arrival = await door.take()
    assert (arrival.account, arrival.event_key, arrival.state) == ("feishu", "om:1", "open")
    assert InboundMessage.from_json(arrival.payload).tokens == 2
    assert door.lanes == [arrival.lane_key] == ["user:feishu:private:ou_ann"]


async def test_a_long_text_is_counted_too():
    arrival = await Door().take(text="word " * 2000)
    assert InboundMessage.from_json(arrival.payload).tokens == 2001


@pytest.mark.parametrize(
    ("fields", "chat", "reason"),
    [
        ({"sender_is_bot": True}, {}, "from a bot"),
        ({"outsider": True}, {}, "from outside the company"),
        ({}, {"enable_private": False}, "private chats are off"),
        ({**GROUP}, {"enable_in_groups": False}, "groups are off"),
        ({**GROUP, "addressed": False}, {}, "not addressed"),
        ({"kind": "event"}, {}, "event"),
    ],
    ids=str,
)
async def test_what_needs_no_answer_is_recorded_ignored_without_a_word_of_it(fields, chat, reason):
    door = Door(**chat)
    arrival = await door.take(
        sender_name="Ann",
        mentions=(Mention("ou_x", "secret name"),),
        attachments=(Attachment("file", "key", "secret.pdf"),),
        extra={"secret": 1},
        **fields,
    )
    assert (arrival.state, arrival.reason) == ("ignored", reason)
    assert not [word for word in ("hello", "Ann", "secret") if word in arrival.payload]
    assert door.lanes == []
    assert door.intake.counts.ignored["feishu"] == 1


async def test_what_is_not_addressed_is_only_seen_so_that_an_addressed_copy_is_taken():
    door = Door()
    seen = await door.take(**GROUP, addressed=False)
    taken = await door.take(**GROUP, addressed=True)
    assert (seen.event_key, taken.event_key) == ("om:1#seen", "om:1")
    assert door.intake.counts.received["feishu"] == 2


async def test_without_the_need_of_a_mention_and_with_events_wanted_they_are_work():
    assert (await Door(require_at_in_groups=False).take(**GROUP, addressed=False)).state == "open"
    door = Door(wants_events=True)
    arrival = await door.take(kind="event", chat_id="oc_team")
    assert (arrival.state, arrival.lane_key) == ("open", "event:feishu:oc_team")
    assert (await Door(access=AccessSettings(outsiders="allow")).take(outsider=True)).state == "open"


async def test_a_repeat_is_counted_and_wakes_nobody():
    door = Door()
    results = [await door.intake.record([message()]) for _ in range(3)]
    assert results == [[Recorded.NEW], [Recorded.REPEAT], [Recorded.REPEAT]]
    assert (door.intake.counts.received["feishu"], door.intake.counts.duplicates["feishu"]) == (1, 2)
    assert len(door.lanes) == 1
    assert await door.intake.record([]) == []


async def test_keys_and_ids_are_bounded_and_nul_is_replaced():
    arrival = await Door().take(
        event_key="om:" + "x" * 500, chat_id="c" * 500, message_id="m" * 500, text="a\0b", sender_name="n\0"
    )
    assert len(arrival.event_key) <= 255
    kept = InboundMessage.from_json(arrival.payload)
    assert (len(kept.chat_id), len(kept.message_id)) == (255, 255)
    assert (kept.text, kept.sender_name) == ("a\ufffdb", "n\ufffd")
    other = await Door().take(event_key="om:" + "x" * 499 + "y")
    assert other.event_key != arrival.event_key


async def test_what_nobody_waited_for_is_counted_and_worked_on_all_the_same_when_it_is_on_disk():
    door = Door()
    door.record.hold = []
    recording = asyncio.create_task(door.intake.record([message()]))
    await asyncio.sleep(0)
    recording.cancel()
    await asyncio.gather(recording, return_exceptions=True)
    assert door.intake.counts.received["feishu"] == 0
    ((arrivals, future),) = door.record.hold
    door.record.release(arrivals, future)
    await asyncio.sleep(0)
    assert door.intake.counts.received["feishu"] == 1
    assert len(door.lanes) == 1


async def test_what_the_store_did_not_take_is_neither_counted_nor_worked_on():
    door = Door()
    door.record.hold = []
    recording = asyncio.create_task(door.intake.record([message()]))
    await asyncio.sleep(0)
    ((_, future),) = door.record.hold
    future.set_exception(StoreUnavailable("away"))
    with pytest.raises(StoreUnavailable):
        await recording
    assert door.lanes == []
    assert not door.intake.counts.received
