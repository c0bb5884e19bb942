"""Four processes write one conversation, as servers and as programs: what each reads is what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.model import InboundMessage
from feishu_bot.store.work import LEASE_MS, Arrival, Lease
from tests.stores import Clock, opened, put_conversations

PROCESSES, ROUNDS = 4, 5
ROOT = Path(__file__).parents[2]

# Each round: a message is saved and the pinned one edited by the library, then a question answered by the server's
# way. The history that comes with it is compared with what is stored up to the number that was read with it.
PROGRAM = f"""
import asyncio, sys, uuid
from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.model import InboundMessage
from feishu_bot.store.work import Arrival, Lease, NewMessage, NoWork, Outcome
from feishu_bot.model import End
from tests.stores import AnswersLater
from feishu_bot.store.store import Store

url, name, pinned = sys.argv[1], sys.argv[2], int(sys.argv[3])
LANE = "user:shared"

def pin(manager):
    return next(m for m in manager.iter_messages(1) if m.id == pinned)

async def answer(store, manager, planner, n):
    key = f"{{name}}-{{n}}"
    message = InboundMessage("test", key, text=key, sender_id=name)
    await store.receive([Arrival("test", key, LANE, message.to_json())])
    while True:
        before = int(pin(manager).content)
        (work,) = await store.begin([Lease(LANE, str(store.owner), uuid.uuid4().hex)])
        if not isinstance(work, NoWork):
            break
        await asyncio.sleep(0.05)
    after = int(pin(manager).content)
    stored = [m for m in manager.iter_messages(1) if m.seq <= work.conversation.last_seq]
    # What a program saves between the two looks of one transaction may be there already, never less.
    seen = {{row.seq: row.content for row in work.history if row.seq <= work.conversation.last_seq}}
    expected = {{m.seq: m.content for m in stored if m.seq >= min(seen)}}
    users = [m.seq for m in stored if m.role == "user"]
    assert len([seq for seq in users if seq >= min(seen)]) >= min(planner.history_turns, len(users))
    if 1 in seen:
        assert before <= int(seen.pop(1)) <= after, (before, after)
        del expected[1]
    assert seen == expected, (seen, expected)
    said = [NewMessage("user", work.message.text, 1), NewMessage("assistant", "yes", 1)]
    await store.commit(Outcome(work, End.ANSWERED, messages=tuple(said)))

async def main():
    store, manager = Store(url), PersistentConversationManager(url)
    planner = AnswersLater()
    planner.history_turns = 30
    store.open(planner, version="test")
    print("ready", flush=True)
    sys.stdin.readline()
    for n in range({ROUNDS}):
        manager.save_message(1, "user", f"{{name}} said {{n}}")
        manager._database.write(lambda tx: bump(tx))
        await answer(store, manager, planner, n)
    manager.close()
    await store.close()

def bump(tx):
    from feishu_bot.store import conversations, threads
    conversations.lock(tx, 1)
    row = next(r for r in conversations.page(tx, 1) if r["id"] == pinned)
    threads.edit_message(tx, pinned, str(int(row["content"]) + 1))

asyncio.run(main())
"""


def test_what_four_processes_read_of_a_conversation_that_all_of_them_write_is_current(db_url):
    with PersistentConversationManager(db_url) as manager:
        assert manager.get_or_create("shared", "test").id == 1
        pinned = manager.save_message(1, "user", "0")
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, db_url, f"p{n}", str(pinned.id)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for n in range(PROCESSES)
        ]
        assert [process.stdout.readline() for process in running] == ["ready\n"] * PROCESSES
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [(process.communicate()[0], process.returncode) for process in running]
        assert ended == [("", 0)] * PROCESSES
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
