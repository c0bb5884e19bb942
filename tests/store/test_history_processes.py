"""Four processes write one conversation, as servers and as programs: what each reads is what is there."""

from __future__ import annotations

import asyncio
import uuid

from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.model import End, InboundMessage
from feishu_bot.store import conversations, threads
from feishu_bot.store.store import Store
from feishu_bot.store.work import LEASE_MS, Arrival, Lease, NewMessage, NoWork, Outcome
from tests.processes import all_at_once, started, wait_for_all
from tests.stores import AnswersLater, Clock, opened, put_conversations

PROCESSES, ROUNDS = 4, 5

LANE = "user:shared"


class Writer:
    """One of the processes: in each round it saves a message and edits the pinned one by the library, then has a
    question answered by the server's way. The history that comes with it is compared with what is stored up to the
    number that was read with it.
    """

    def __init__(self, url: str, name: str, pinned: int) -> None:
        self.name, self.pinned = name, pinned
        self.store, self.manager = Store(url), PersistentConversationManager(url)
        self.planner = AnswersLater()
        self.planner.history_turns = 30
        self.store.open(self.planner, version="test")

    async def rounds(self) -> None:
        for n in range(ROUNDS):
            self.manager.save_message(1, "user", f"{self.name} said {n}")
            self.manager._database.write(self.bump)
            await self.answer(f"{self.name}-{n}")
        self.manager.close()
        await self.store.close()

    def bump(self, tx) -> None:
        conversations.lock(tx, 1)
        row = next(r for r in conversations.page(tx, 1) if r["id"] == self.pinned)
        threads.edit_message(tx, self.pinned, str(int(row["content"]) + 1))

    def pin(self) -> int:
        return int(next(m for m in self.manager.iter_messages(1) if m.id == self.pinned).content)

    async def answer(self, key: str) -> None:
        message = InboundMessage("test", key, text=key, sender_id=self.name)
        await self.store.receive([Arrival("test", key, LANE, message.to_json())])
        while True:
            before = self.pin()
            (work,) = await self.store.begin([Lease(LANE, str(self.store.owner), uuid.uuid4().hex)])
            if not isinstance(work, NoWork):
                break
            await asyncio.sleep(0.05)
        self.compare(work, before, self.pin())
        said = [NewMessage("user", work.message.text, 1), NewMessage("assistant", "yes", 1)]
        await self.store.commit(Outcome(work, End.ANSWERED, messages=tuple(said)))

    def compare(self, work, before: int, after: int) -> None:
        stored = [m for m in self.manager.iter_messages(1) if m.seq <= work.conversation.last_seq]
        # What a program saves between the two looks of one transaction may be there already, never less.
        seen = {row.seq: row.content for row in work.history if row.seq <= work.conversation.last_seq}
        expected = {m.seq: m.content for m in stored if m.seq >= min(seen)}
        users = [m.seq for m in stored if m.role == "user"]
        assert len([seq for seq in users if seq >= min(seen)]) >= min(self.planner.history_turns, len(users))
        if 1 in seen:
            assert before <= int(seen.pop(1)) <= after, (before, after)
            del expected[1]
        assert seen == expected, (seen, expected)


def write(connection, url: str, name: str, pinned: int) -> None:
    async def run() -> None:
        writer = Writer(url, name, pinned)
        wait_for_all(connection)
        await writer.rounds()

    asyncio.run(run())


def test_what_four_processes_read_of_a_conversation_that_all_of_them_write_is_current(db_url):
    with PersistentConversationManager(db_url) as manager:
        assert manager.get_or_create("shared", "test").id == 1
        pinned = manager.save_message(1, "user", "0")
        with started(write, *((db_url, f"p{n}", pinned.id) for n in range(PROCESSES))) as running:
            all_at_once(running)
            assert [child.ended() for child in running] == [0] * PROCESSES
        messages = list(manager.iter_messages(1))
        assert len(messages) == 1 + PROCESSES * ROUNDS * 3
        assert messages[0].content == str(PROCESSES * ROUNDS)


async def history(store, n):
    """Return what a message to conversation ``n`` comes with."""
    lane, key = f"user:web:private:u{n}", f"e{n}-{store.now_ms()}"
    message = InboundMessage("web", key, text="?", sender_id=f"u{n}")
    await store.receive([Arrival("web", key, lane, message.to_json())])
    (work,) = await store.begin([Lease(lane, str(store.owner), key)])
    return [row.content for row in work.history]


async def test_the_conversations_used_last_are_in_memory_before_anybody_asks(db_url):
    clock = Clock()
    async with opened(db_url, clock) as store:
        await put_conversations(store, [3, 2, 1])
        assert await store.warm(2) == 2
        with PersistentConversationManager(db_url) as manager:
            with (
                manager.engine.begin() as connection
            ):  # no version is raised: what is read from memory is the old text
                connection.exec_driver_sql("UPDATE messages SET content = 'changed'")
            assert [await history(store, n) for n in (1, 2, 3)] == [["changed"] * 2, ["x"] * 2, ["x"] * 2]
            manager.save_message(3, "user", "new")
            clock.now_ms += LEASE_MS + 1
            assert await history(store, 3) == ["changed", "changed", "new"]


async def test_nothing_is_read_ahead_where_nothing_is_kept_or_wanted(sqlite_url):
    async with opened(sqlite_url) as store:
        assert await store.warm(100) == 0
        await put_conversations(store, [3])
        assert await store.warm(0) == 0
        assert await store.warm(10**5) == 1
