"""Many threads and processes on the same conversations, and connections that break under them."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from feishu_bot.ai.conversation_store import (
    ConversationNotFound,
    MessageRecord,
    PersistentConversationManager,
    StoreUnavailable,
)
from feishu_bot.store import conversations, values
from tests.processes import all_at_once, started, wait_for_all
from tests.sizes import FULL_SIZE
from tests.wire import Wire

PROCESSES, THREADS = 8, 4
SAVES = 10_000 if FULL_SIZE else 960
CONVERSATIONS = 3


def race_and_save(connection, url, number):
    """Be one of the processes: all threads of all of them first race to make one conversation, then save into three."""
    manager = PersistentConversationManager(url)
    ids, errors = [], []

    def race(n):
        ids.append(manager.get_or_create("raced", "test").id)

    def save(n):
        for i in range(SAVES // PROCESSES // THREADS):
            which = 1 + (number + n + i) % CONVERSATIONS
            manager.save_message(which, "user" if i % 2 else "assistant", f"{number}/{n}/{i}", tokens=which)

    def run(function, n):
        try:
            function(n)
        except Exception as error:  # noqa: BLE001  # whatever it is, the test is told
            errors.append(repr(error))

    for function, count in ((race, 8), (save, THREADS)):
        threads = [threading.Thread(target=run, args=(function, n)) for n in range(count)]
        wait_for_all(connection)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    connection.send((sorted(set(ids)), errors))
    manager.close()


@pytest.fixture
def manager(db_url):
    with PersistentConversationManager(db_url) as opened:
        yield opened


def check_counters(manager, conversation_id):
    record = manager.get_conversation(conversation_id)
    messages = list(manager.iter_messages(conversation_id))
    assert record.message_count == len(messages)
    assert record.total_tokens == sum(m.tokens for m in messages)
    assert [m.seq for m in messages] == list(range(1, len(messages) + 1))
    assert record.last_seq == len(messages)
    return messages


def test_saves_of_eight_processes_are_counted_exactly(db_url, manager):
    for n in range(CONVERSATIONS):
        assert manager.get_or_create(f"shared{n}", "test").id == n + 1
    with started(race_and_save, *((db_url, number) for number in range(PROCESSES))) as running:
        for _ in range(2):  # the race, then the saves: all wait for all
            all_at_once(running)
        ends = [child.heard() for child in running]
    raced = manager.get_conversation_by_user("raced")
    assert ends == [([raced.id], [])] * PROCESSES
    assert manager.get_stats()["total_conversations"] == CONVERSATIONS + 1
    saved = [m for n in range(CONVERSATIONS) for m in check_counters(manager, n + 1)]
    expected = SAVES // PROCESSES // THREADS * PROCESSES * THREADS
    assert len({m.content for m in saved}) == len(saved) == expected


def test_one_manager_serves_many_threads_that_do_everything_at_once(manager):
    ids = [manager.get_or_create(f"user{n}", "test").id for n in range(3)]

    def work(n):
        mine = ids[n % 3]
        for i in range(6):
            saved = manager.save_message(mine, "user", f"{n}-{i}", tokens=n)
            manager.load_history(mine, 3)
            if i % 3 == 0:
                manager.edit_message(saved.id, "edited", tokens=1)
            if i % 3 == 1:
                manager.delete_message(saved.id)
            manager.save_message(mine, "assistant", "same", key=f"{n}-{i // 2}")
            manager.create_thread(f"threads{n % 2}", f"{n}-{i}")

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    for conversation_id in ids:
        record = manager.get_conversation(conversation_id)
        messages = list(manager.iter_messages(conversation_id))
        assert record.message_count == len(messages)
        assert record.total_tokens == sum(m.tokens for m in messages)
    for n in range(2):
        threads = manager.list_threads(f"threads{n}", limit=1000)
        assert len(threads) == 16 * 6
        assert sum(t.is_current for t in threads) == 1


def test_the_same_key_saved_by_many_at_once_is_one_message(manager):
    conversation = manager.get_or_create("u", "test")

    def save(n):
        return manager.save_message(conversation.id, "user", f"from {n}", tokens=1, key="one").id

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(save, range(16)))) == 1
    assert len(check_counters(manager, conversation.id)) == 1


def test_deleting_while_others_save_leaves_nothing_behind(manager):
    conversation = manager.get_or_create("u", "test")
    stopped = threading.Event()

    def save(n):
        saves = 0
        while not stopped.is_set():
            try:
                manager.save_message(conversation.id, "user", "x")
            except ConversationNotFound:
                return saves
            saves += 1
        return saves

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(save, n) for n in range(4)]
        while manager.get_conversation(conversation.id).message_count < 20:
            pass
        manager.delete_conversation(conversation.id)
        assert sum(r.result() for r in running) >= 20
    with manager.get_session() as session:
        assert session.query(MessageRecord).count() == 0


def test_a_forked_process_has_connections_of_its_own(manager):
    conversation = manager.get_or_create("u", "test")
    program = """
import os, sys, threading
from feishu_bot.ai.conversation_store import PersistentConversationManager
manager = PersistentConversationManager(sys.argv[1])
conversation = manager.get_or_create("u", "test")
children = []
for n in range(3):
    child = os.fork()
    if not child:
        for i in range(20):
            manager.save_message(conversation.id, "user", f"{n}-{i}", tokens=1)
        os._exit(0)
    children.append(child)
for i in range(20):
    manager.save_message(conversation.id, "user", f"parent-{i}", tokens=1)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
manager.load_history(conversation.id)
manager.close()
print(codes)
"""
    url = manager.engine.url.render_as_string(hide_password=False)
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[0, 0, 0]\n", "")
    assert len(check_counters(manager, conversation.id)) == 80


# ---------------------------------------------------------------------------------- broken connections


@pytest.fixture(params=["postgresql", "mariadb"])
def wire(request):
    with Wire(request.getfixturevalue(f"{request.param}_url")) as leads_there:
        yield leads_there


def test_a_connection_lost_in_the_middle_of_a_transaction_is_made_again_and_the_work_with_it(wire):
    with PersistentConversationManager(wire.url) as manager:
        conversation = manager.get_or_create("u", "test")
        new = [values.new_message("user", "half?", 3)]
        runs = []

        def save(tx):
            rows = conversations.append(tx, conversation.id, new)
            runs.append(rows[0]["seq"])
            if len(runs) == 1:
                wire.cut()  # what is done so far is undone by the server
                conversations.append(tx, conversation.id, new)
            return rows

        manager._database.write(save)
        assert len(runs) == 2
        assert len(check_counters(manager, conversation.id)) == 1


def test_a_connection_lost_in_the_commit_is_told_unless_a_key_makes_it_repeatable(wire):
    with PersistentConversationManager(wire.url) as manager:
        conversation = manager.get_or_create("u", "test")
        runs = []

        def save(tx, key):
            rows = conversations.append(tx, conversation.id, [values.new_message("user", "x", 1, key=key)])
            runs.append(key)
            if runs.count(key) == 1:
                wire.cut()
            return rows

        with pytest.raises(StoreUnavailable, match="may have been done") as caught:
            manager._database.write(lambda tx: save(tx, None))
        assert caught.value.outcome_unknown
        assert runs == [None]
        rows = manager._database.write(lambda tx: save(tx, "k"), repeatable=True)
        assert runs == [None, "k", "k"]
        assert manager.save_message(conversation.id, "user", "x", key="k").id == rows[0]["id"]
        assert len(check_counters(manager, conversation.id)) == 1


def test_a_manager_works_again_after_all_its_connections_were_cut(wire):
    with PersistentConversationManager(wire.url) as manager:
        conversation = manager.get_or_create("u", "test")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: manager.save_message(conversation.id, "user", f"{n}"), range(8)))
            wire.cut()
            list(pool.map(lambda n: manager.save_message(conversation.id, "user", f"{n}"), range(8)))
        assert len(check_counters(manager, conversation.id)) == 16


def test_while_the_server_is_away_everything_is_store_unavailable_and_nothing_half_done(wire):
    with PersistentConversationManager(wire.url) as manager:
        conversation = manager.get_or_create("u", "test")
        wire.down = True
        wire.cut()
        for call in (
            lambda: manager.save_message(conversation.id, "user", "x"),
            lambda: manager.load_history(conversation.id),
            lambda: manager.get_or_create("v", "test"),
        ):
            with pytest.raises(StoreUnavailable) as caught:
                call()
            assert not caught.value.outcome_unknown
        wire.down = False
        manager.save_message(conversation.id, "user", "y")
        assert [m.content for m in check_counters(manager, conversation.id)] == ["y"]


def test_a_forced_deadlock_is_run_again(wire):
    with PersistentConversationManager(wire.url) as manager:
        one, two = (manager.get_or_create(key, "test").id for key in ("one", "two"))
        met = threading.Barrier(2, timeout=20)
        tries = []

        def cross(first, second):
            def both(tx):
                conversations.append(tx, first, [values.new_message("user", f"{first} first", 1)])
                tries.append(first)
                if tries.count(first) == 1:
                    met.wait()
                conversations.append(tx, second, [values.new_message("user", f"{first} second", 1)])

            manager._database.write(both)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(cross, one, two), pool.submit(cross, two, one)]:
                done.result()
        assert len(tries) > 2
        assert len(check_counters(manager, one)) == len(check_counters(manager, two)) == 2


def test_a_locked_sqlite_file_is_waited_for(sqlite_url):
    with (
        PersistentConversationManager(sqlite_url) as manager,
        PersistentConversationManager(sqlite_url) as other,
    ):
        conversation = manager.get_or_create("u", "test")
        holds = other.engine.connect()
        holds.execute(text("UPDATE conversations SET summary = 'held'"))
        waiting = threading.Thread(target=manager.save_message, args=(conversation.id, "user", "x"))
        waiting.start()
        assert manager.load_history(conversation.id) == []  # readers do not wait
        holds.commit()
        holds.close()
        waiting.join()
        assert len(check_counters(manager, conversation.id)) == 1
