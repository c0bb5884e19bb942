"""Delivery beside its record: who looks at a lane, and who is handed a part of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from feishu_bot.config import PlatformSettings
from feishu_bot.delivery import Delivery
from feishu_bot.errors import NotConnected
from feishu_bot.model import ChatType, Target
from feishu_bot.parts import part_payload
from feishu_bot.push import push_rows
from feishu_bot.store import outbox, schema
from feishu_bot.store.work import Lease, NoWork, PartToSend, SendStep
from tests.platforms.onebots import until
from tests.stores import opened, rows


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

    async def read(self, function):
        return False  # the chat refuses nothing

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


# ------------------------------------------------------------------------------- a client of one process alone


class BySocket(Account):
    """A platform whose clients connect to one process; ``bots`` are connected to this one."""

    name = "by_socket"
    has_socket = True
    max_part_chars = max_part_bytes = max_parts = None

    def __init__(self, *bots: str) -> None:
        super().__init__()
        self.bots = bots

    def reaches(self, target: Target) -> bool:
        return target.sender_id in self.bots

    async def send(self, outgoing) -> str:
        if not self.reaches(outgoing.target):
            raise NotConnected("nobody is connected", after_s=3600.0)
        return await super().send(outgoing)


@asynccontextmanager
async def beside(url: str, platform: BySocket, *, sharers: int = 2):
    async with opened(url) as store:
        delivery = Delivery(store, {"qq": platform}, sharers=lambda: sharers)
        yield store, delivery
        await delivery.stop(1.0)


async def push(store, text: str, user: str) -> str:
    target = Target(ChatType.PRIVATE, sender_id=user)
    found = push_rows("qq", BySocket(), source=text, target=target, text=text, max_chars=100)
    await store.run(lambda tx: outbox.push(tx, found))
    return found[0]["lane_key"]


async def test_what_a_process_without_a_client_has_left_is_sent_by_the_one_that_has_it(db_url):
    lost, found = BySocket(), BySocket("ann")
    async with beside(db_url, lost) as (store, without), beside(db_url, found) as (_, having):
        for user in ("ann", "bob"):
            without.nudge(await push(store, f"to {user}", user))
        await until(lambda: not without.lanes)
        assert [r["state"] for r in await rows(store, schema.outbox)] == ["pending"] * 2
        await without.gather()
        await until(lambda: not without.lanes)
        assert lost.texts == []
        await having.gather()
        await until(lambda: not having.lanes)
        assert found.texts == ["to ann"]
        attempts = [(r["state"], r["attempts"]) for r in await rows(store, schema.outbox)]
        assert attempts == [("sent", 2), ("pending", 1)], "what it cannot reach either, it leaves alone"


async def test_a_server_that_is_alone_leaves_what_waits_to_the_connection_that_comes(sqlite_url):
    async with beside(sqlite_url, BySocket("ann"), sharers=1) as (store, alone):
        alone._platforms["qq"].bots = ()
        alone.nudge(await push(store, "to ann", "ann"))
        await until(lambda: not alone.lanes)
        alone._platforms["qq"].bots = ("ann",)
        await alone.gather()
        await until(lambda: not alone.lanes)
        assert alone._platforms["qq"].texts == []
        alone.hasten("qq")
        await until(lambda: alone._platforms["qq"].texts == ["to ann"])
