"""Delivery beside its record: who looks at a lane, and who is handed a part of it."""

from __future__ import annotations

import asyncio

from feishu_bot.config import PlatformSettings
from feishu_bot.delivery import Delivery
from feishu_bot.model import ChatType, Target
from feishu_bot.pipeline import part_payload
from feishu_bot.store.work import Lease, NoWork, PartToSend, SendStep


class Account:
    """A platform that takes everything."""

    pull = False
    idempotent_for_s = None
    settings = PlatformSettings(type="account")

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def send(self, outgoing) -> str:
        self.texts.append(outgoing.text)
        return "id"


class LaneHeldByACommit:
    """A record whose one lane is held under a lease that a commit has just handed out."""

    owner = "test"

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.recorded: list[str] = []
        self.done = asyncio.Event()

    def now_ms(self) -> int:
        return 1_000_000

    async def send_step(self, step: SendStep):
        if step.result is not None:
            self.recorded.append(step.lease.token)
            self.done.set()
            return NoWork.IDLE
        self.asked.set()
        await self.go_on.wait()
        return NoWork.BUSY


def part(lane: str) -> PartToSend:
    payload = part_payload(Target(ChatType.PRIVATE, sender_id="ann"), "hello")
    return PartToSend(
        lease=Lease(lane, "test", "of the commit"),
        id=1,
        source="in:1",
        kind="answer",
        part=0,
        account="web",
        payload=payload,
        attempts=1,
        reply_before=None,
        first_attempt_at=0,
        unknown_at=None,
    )


async def test_a_part_that_is_handed_over_while_its_lane_is_looked_at_is_sent():
    record, account = LaneHeldByACommit(), Account()
    delivery = Delivery(record, {"web": account})
    delivery.nudge("lane")
    await record.asked.wait()
    delivery.take(part("lane"))
    record.go_on.set()
    await asyncio.wait_for(record.done.wait(), 20)
    assert account.texts == ["hello"]
    assert record.recorded == ["of the commit"]
    await delivery.stop(1.0)
