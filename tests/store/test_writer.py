"""Group commit: one thread writes for everybody, and each caller knows of its own change."""

from __future__ import annotations

import asyncio
import fcntl
import resource
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import column, event, insert, select, text, update

from feishu_bot.errors import StoreError, StoreUnavailable
from feishu_bot.store import turn
from feishu_bot.store import writer as writing
from feishu_bot.store.engine import database_now_ms, open_engine
from feishu_bot.store.schema import job_runs, totals
from feishu_bot.store.writer import DatabaseClock, Writer
from tests.transact import Database, row_locks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.store.work import Transaction


def save(tx: Transaction, names: Sequence[str]) -> list[str]:
    """Store names; ``bad`` ones are an error of the caller."""
    if any(name.startswith("bad") for name in names):
        raise ValueError("a bad name")
    rows = [{"job": name, "fire_time": 1, "node": "n", "started_at": tx.now_ms} for name in names]
    tx.connection.execute(insert(job_runs), rows)
    return [f"saved {name}" for name in names]


def note(tx: Transaction, names: Sequence[str]) -> list[str]:
    """Store names another way; a second run changes nothing."""
    known = set(tx.connection.execute(select(job_runs.c.job)).scalars())
    new = [name for name in names if name not in known]
    if new:
        save(tx, new)
    return [f"noted {name}" for name in names]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for happens on a thread
        await asyncio.sleep(0.001)


def saved(db: Database) -> list[str]:
    return [r.job for r in db.rows(job_runs)]


@asynccontextmanager
async def writer_on(url: str, **more: Any):
    engine = open_engine(url)
    writer = Writer(engine, DatabaseClock(), **more)
    writer.start()
    try:
        yield writer
    finally:
        await asyncio.to_thread(writer.stop)
        engine.dispose()


@pytest.fixture
async def writer(db_url):
    async with writer_on(db_url) as writer:
        yield writer


class Gate:
    """A job that holds the writer until it is opened, so that the jobs behind it come in one batch."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._entered, self._open = threading.Event(), threading.Event()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._writer.submit(self._wait, [None], merge=False))
        await asyncio.to_thread(self._entered.wait)

    def _wait(self, _tx: Transaction, items: Sequence[Any]) -> Sequence[Any]:
        self._entered.set()
        self._open.wait()
        return items

    async def __aexit__(self, *_error: object) -> None:
        await asyncio.sleep(0)  # the tasks made meanwhile hand in their jobs
        self._open.set()
        await self._task


async def together(writer: Writer, *jobs: tuple[Any, Sequence[Any]], merge: bool = True) -> list[Any]:
    """Hand in jobs so that they are taken as one batch; return results and errors."""
    async with Gate(writer):
        tasks = [asyncio.create_task(writer.submit(f, items, merge=merge)) for f, items in jobs]
    return await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------------------------------------- group commit


async def test_each_caller_gets_the_results_of_its_own_items(writer, db):
    found = await together(writer, (save, ["a", "b"]), (note, ["c"]), (save, ["d"]), (save, []))
    assert found == [["saved a", "saved b"], ["noted c"], ["saved d"], []]
    assert saved(db) == ["a", "b", "c", "d"]


async def test_jobs_that_wait_are_written_together(writer, db):
    calls = []

    def count(tx: Transaction, names: Sequence[str]) -> list[str]:
        calls.append(list(names))
        return save(tx, names)

    before = writer.batches
    await together(writer, *((count, [f"n{i:02}"]) for i in range(20)))
    assert calls == [[f"n{i:02}" for i in range(20)]]
    assert writer.batches == before + 2  # the gate's and theirs
    assert len(saved(db)) == 20


async def test_jobs_that_must_not_be_merged_are_run_one_by_one(writer):
    calls = []

    def count(tx: Transaction, names: Sequence[str]) -> list[str]:
        calls.append(list(names))
        return save(tx, names)

    await together(writer, (count, ["a"]), (count, ["b"]), merge=False)
    assert calls == [["a"], ["b"]]


async def test_a_caller_is_answered_after_the_commit(writer, db):
    async def look(name: str) -> bool:
        await writer.submit(save, [name])
        return name in saved(db)

    assert await asyncio.gather(*(look(f"n{i}") for i in range(5))) == [True] * 5


async def test_what_is_to_follow_the_commit_does_and_only_then(writer, db):
    seen = []

    def change(tx: Transaction, names: Sequence[str]) -> list[str]:
        tx.after_commit.append(lambda: seen.append((names[0], names[0] in saved(db))))
        return save(tx, names)

    with pytest.raises(ValueError, match="bad"):
        await writer.submit(change, ["bad"])
    await writer.submit(change, ["a"])
    assert seen == [("a", True)]


async def test_callers_of_several_event_loops_are_answered_in_their_own(writer, db):
    found = []

    def elsewhere(name: str) -> None:
        async def call() -> None:
            loop = asyncio.get_running_loop()
            found.extend(await writer.submit(save, [name]))
            assert loop is asyncio.get_running_loop()

        asyncio.run(call())

    await asyncio.gather(
        *(asyncio.to_thread(elsewhere, f"n{i}") for i in range(4)), writer.submit(save, ["own"])
    )
    assert sorted(found) == [f"saved n{i}" for i in range(4)]
    assert len(saved(db)) == 5


async def test_a_caller_whose_loop_has_ended_disturbs_nobody(writer, db):
    loop = asyncio.new_event_loop()
    async with Gate(writer):
        task = loop.create_task(writer.submit(save, ["gone"]))
        await asyncio.to_thread(_run_once, loop)
        task.cancel()
        await asyncio.to_thread(_run_once, loop)
        loop.close()
    assert await writer.submit(save, ["here"]) == ["saved here"]
    assert saved(db) == ["gone", "here"]


def _run_once(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon(loop.stop)
    loop.run_forever()


async def test_a_cancelled_caller_disturbs_nobody(writer, db):
    async with Gate(writer):
        task = asyncio.create_task(writer.submit(save, ["a"]))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert await writer.submit(save, ["b"]) == ["saved b"]


# ----------------------------------------------------------------------------------------------- bad items


async def test_one_bad_job_fails_alone(writer, db):
    names = [f"n{i}" for i in range(9)]
    names[6] = "bad"
    found = await together(writer, *((save, [name]) for name in names))
    assert [type(f) for f in found] == [list] * 6 + [ValueError] + [list] * 2
    assert saved(db) == [name for name in names if name != "bad"]


async def test_a_bad_job_does_not_take_other_functions_with_it(writer, db):
    found = await together(writer, (save, ["a"]), (note, ["bad"]), (note, ["b"]), (save, ["bad"]))
    assert [type(f) for f in found] == [list, ValueError, list, ValueError]
    assert saved(db) == ["a", "b"]


async def test_a_value_the_database_refuses_is_no_outage(writer, db):
    await writer.submit(save, ["a"])
    with pytest.raises(StoreError) as told:
        await writer.submit(save, ["a"])
    assert not isinstance(told.value, StoreUnavailable)
    assert saved(db) == ["a"]


async def test_a_statement_the_database_cannot_run_is_told_without_its_values(writer):
    def wrong(tx: Transaction, items: Sequence[str]) -> list[Any]:
        tx.connection.execute(text("SELECT :private FROM no_such_table"), {"private": items[0]})
        return [None]

    with pytest.raises(StoreUnavailable) as told:
        await writer.submit(wrong, ["secret words"])
    assert "secret words" not in str(told.value)


async def test_a_key_taken_by_another_node_is_looked_at_again(writer, db):
    """The function reads, another node commits, the insert fails: run again, it sees the row."""
    looked = []

    def late(tx: Transaction, names: Sequence[str]) -> list[str]:
        known = set() if not looked else set(tx.connection.execute(select(job_runs.c.job)).scalars())
        looked.append(len(known))
        return save(tx, names) if names[0] not in known else ["known"]

    await writer.submit(save, ["a"])
    assert await writer.submit(late, ["a"]) == ["known"]
    assert looked == [0, 1]


# ------------------------------------------------------------------------------------------------ conflicts


@row_locks
async def test_a_deadlock_is_run_again(writer, db, db_url):
    db.put(job_runs, *({"job": j, "fire_time": 1, "node": "n", "started_at": 0} for j in "ab"))
    other = Database(db_url)
    have_a, have_b = threading.Event(), threading.Event()
    runs = []

    def lock(tx: Transaction, job: str) -> None:
        tx.connection.execute(
            update(job_runs).where(job_runs.c.job == job).values(started_at=job_runs.c.started_at + 1)
        )

    def change(tx: Transaction, items: Sequence[Any]) -> list[str]:
        runs.append(tx.rerun)
        lock(tx, "a")
        have_a.set()
        have_b.wait()
        lock(tx, "b")
        return ["done"]

    def cross() -> None:
        have_a.wait()
        with suppress(Exception), other.transaction() as tx:
            for _ in range(3):  # the heavier one wins where the lighter is chosen to lose
                lock(tx, "b")
            have_b.set()
            lock(tx, "a")

    crossing = asyncio.create_task(asyncio.to_thread(cross))
    assert await writer.submit(change, [None]) == ["done"]
    await crossing
    assert runs[0] is runs[-1] is False
    assert {r.started_at > 0 for r in db.rows(job_runs)} == {True}
    other.close()


@row_locks
async def test_each_function_has_a_transaction_of_its_own_where_rows_are_locked(writer):
    seen = []

    def first(tx: Transaction, items: Sequence[Any]) -> Sequence[Any]:
        seen.append(tx)
        return items

    def second(tx: Transaction, items: Sequence[Any]) -> Sequence[Any]:
        seen.append(tx)
        return items

    await together(writer, (first, [1]), (second, [2]), (first, [3]))
    assert len(seen) == 2
    assert seen[0] is not seen[1]


async def test_a_file_locked_by_another_process_is_waited_for(sqlite_url):
    db = Database(sqlite_url)
    engine = open_engine(sqlite_url)
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA busy_timeout=1"))
    writer = Writer(engine, DatabaseClock())
    writer.start()
    tries = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: tries.append(arguments[2]))
    with db.transaction() as tx:
        save(tx, ["theirs"])
        task = asyncio.create_task(writer.submit(save, ["ours"]))
        await until(lambda: len(tries) >= 3)
        assert not task.done()
    assert await task == ["saved ours"]
    assert saved(db) == ["ours", "theirs"]
    await asyncio.to_thread(writer.stop)
    engine.dispose()
    db.close()


async def test_a_file_that_stays_locked_is_told_to_all_that_wait_at_once(sqlite_url):
    """Nobody waits another time for the same lock, however many there are."""
    db = Database(sqlite_url)
    engine = open_engine(sqlite_url)
    event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA busy_timeout=1"))
    writer = Writer(engine, DatabaseClock(), conflict_s=0.0)
    writer.start()
    tries = []
    await writer.submit(save, ["a"])
    event.listen(engine, "before_cursor_execute", lambda *arguments: tries.append(arguments[2]))
    with db.transaction():
        jobs = (writer.submit(save, [f"n{i}"]) for i in range(8))
        found = await asyncio.gather(*jobs, return_exceptions=True)
    assert {type(f) for f in found} == {StoreUnavailable}
    assert len(tries) <= 3
    assert saved(db) == ["a"]
    assert writer.failing == "database is locked"
    with pytest.raises(ValueError, match="a bad name"):
        await writer.submit(save, ["bad"])
    assert writer.failing == "database is locked", "nothing was written since"
    await writer.submit(save, ["b"])
    assert writer.failing is None
    await asyncio.to_thread(writer.stop)
    engine.dispose()
    db.close()


def line_of(sqlite_url: str) -> Path:
    return Path(sqlite_url.removeprefix("sqlite:///") + turn.SUFFIX)


@contextmanager
def turn_of_another(sqlite_url: str):
    with line_of(sqlite_url).open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield


async def test_processes_that_write_to_one_file_stand_in_line(sqlite_url):
    async with writer_on(sqlite_url) as writer:
        assert await writer.submit(save, ["a"]) == ["saved a"]
        with turn_of_another(sqlite_url):
            task = asyncio.create_task(writer.submit(save, ["b"]))
            done, _ = await asyncio.wait([task], timeout=0.2)
            assert not done, "it is the other's turn"
        assert await task == ["saved b"]
        async with writer_on(sqlite_url) as second:
            both = [w.submit(save, [f"{i} {n}"]) for n in range(20) for i, w in enumerate((writer, second))]
            assert len(await asyncio.gather(*both)) == 40


async def test_where_no_line_can_be_formed_writers_wait_as_sqlite_does(sqlite_url):
    await asyncio.to_thread(line_of(sqlite_url).mkdir)
    async with writer_on(sqlite_url) as writer, writer_on(sqlite_url) as second:
        both = [w.submit(save, [f"{i} {n}"]) for n in range(20) for i, w in enumerate((writer, second))]
        assert len(await asyncio.gather(*both)) == 40


# ------------------------------------------------------------------------------------------ lost connections


def own_number(tx: Transaction) -> int:
    own = "pg_backend_pid()" if tx.kind == "postgresql" else "connection_id()"
    return tx.connection.execute(select(column(own, is_literal=True))).scalar_one()


def end_connection(db: Database, number: int) -> None:
    with db.transaction() as tx:
        kill = "SELECT pg_terminate_backend(:n)" if db.kind == "postgresql" else "KILL :n"
        tx.connection.execute(text(kill), {"n": number})


@row_locks
async def test_a_connection_lost_in_the_middle_is_made_anew_and_nothing_is_doubled(writer, db):
    reruns = []

    def change(tx: Transaction, names: Sequence[str]) -> list[str]:
        reruns.append(tx.rerun)
        result = note(tx, names)
        if len(reruns) == 1:
            end_connection(db, own_number(tx))
        return result

    found = await together(writer, *((change, [f"n{i}"]) for i in range(4)))
    assert found == [[f"noted n{i}"] for i in range(4)]
    assert saved(db) == [f"n{i}" for i in range(4)]
    assert reruns == [False, True]


@row_locks
async def test_a_connection_lost_at_rest_is_made_anew(writer, db):
    def tell(tx: Transaction, items: Sequence[Any]) -> list[int]:
        return [own_number(tx)]

    (first,) = await writer.submit(tell, [None])
    end_connection(db, first)
    assert await writer.submit(save, ["a"]) == ["saved a"]
    (second,) = await writer.submit(tell, [None])
    assert first != second


@row_locks
async def test_a_commit_whose_outcome_is_unknown_is_run_again_with_a_mark(writer, db):
    """The server ends the connection while it commits: whether it was done or not, it is done once."""
    runs = []

    def change(tx: Transaction, names: Sequence[str]) -> list[str]:
        runs.append(tx.rerun)
        result = note(tx, names)
        if len(runs) == 1:
            number = own_number(tx)
            event.listen(tx.connection, "commit", lambda _connection: end_connection(db, number), once=True)
        return result

    assert await writer.submit(change, ["a"]) == ["noted a"]
    assert saved(db) == ["a"]
    assert runs == [False, True]


@row_locks
async def test_a_connection_that_breaks_every_time_is_told_after_three_runs(writer, db):
    runs = []

    def breaks(tx: Transaction, names: Sequence[str]) -> list[str]:
        runs.append(tx.rerun)
        end_connection(db, own_number(tx))
        return note(tx, names)

    with pytest.raises(StoreUnavailable):
        await writer.submit(breaks, ["a"])
    assert runs == [False, True, True]
    assert await writer.submit(save, ["b"]) == ["saved b"]


async def test_a_server_that_is_away_is_told_to_all_that_wait_and_asked_few_times():
    engine = open_engine("postgresql://someone:hidden@127.0.0.1:1/nothing")
    asked = []
    event.listen(engine, "do_connect", lambda *_arguments: asked.append(1) and None)
    writer = Writer(engine, DatabaseClock())
    writer.start()
    functions = [partial(save) for _ in range(5)]  # each of them is run in a transaction of its own
    jobs = [writer.submit(functions[i % 5], [f"n{i}"]) for i in range(30)]
    found = await asyncio.gather(*jobs, return_exceptions=True)
    assert {type(f) for f in found} == {StoreUnavailable}
    assert "hidden" not in str(found[0])
    assert len(asked) <= 2 * writing.RECONNECTS
    await asyncio.to_thread(writer.stop)
    engine.dispose()


# ------------------------------------------------------------------------------------------- dead and stuck


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_writer_that_dies_tells_what_waits_and_is_replaced(writer, db):
    def die(_tx: Transaction, _items: Sequence[Any]) -> Sequence[Any]:
        raise KeyboardInterrupt

    async with Gate(writer):
        dying = asyncio.create_task(writer.submit(die, [None]))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(writer.submit(save, ["a"]))
        await asyncio.sleep(0)
    for task in (dying, waiting):
        with suppress(StoreUnavailable):
            await task
    assert isinstance(dying.exception(), StoreUnavailable)
    await until(lambda: writer.problem() is None)
    assert await writer.submit(note, ["b"]) == ["noted b"]


async def test_a_writer_that_hangs_tells_what_waits_refuses_more_and_is_replaced(db, db_url):
    hold = threading.Event()

    def hang(tx: Transaction, names: Sequence[str]) -> Sequence[str]:
        save(tx, names)
        hold.wait()
        return names

    async with writer_on(db_url, stuck_s=0.05, name="stuck") as writer:
        hanging = asyncio.create_task(writer.submit(hang, ["held"]))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(writer.submit(save, ["a"]))
        with pytest.raises(StoreUnavailable, match="has been running"):
            await hanging
        with pytest.raises(StoreUnavailable):
            await waiting
        if db.kind == "sqlite":  # the one that hangs holds the file
            assert writer.problem() is not None
            with pytest.raises(StoreUnavailable):
                await writer.submit(save, ["b"])
        hold.set()
        await until(lambda: writer.problem() is None)
        await until(lambda: sum(thread.name == "stuck" for thread in threading.enumerate()) == 1)
        assert await writer.submit(save, ["c"]) == ["saved c"]
        assert saved(db) == ["c"]  # those who were told that nothing was written were told the truth


# ------------------------------------------------------------------------------------------ opened and closed


async def test_a_closed_writer_has_finished_what_waited_and_takes_nothing_more(db, db_url):
    async with writer_on(db_url) as writer:
        async with Gate(writer):
            tasks = [asyncio.create_task(writer.submit(save, [f"n{i}"])) for i in range(3)]
            await asyncio.sleep(0)
            closing = asyncio.create_task(asyncio.to_thread(writer.stop))
            await until(lambda: writer.problem() is not None)
        assert await asyncio.gather(*tasks) == [[f"saved n{i}"] for i in range(3)]
        await closing
        assert writer.problem() == "the store is closed"
        with pytest.raises(StoreUnavailable, match="closed"):
            await writer.submit(save, ["late"])
    assert len(saved(db)) == 3


async def test_a_writer_that_cannot_finish_tells_what_is_left(sqlite_url):
    hold = threading.Event()

    def hang(_tx: Transaction, items: Sequence[Any]) -> Sequence[Any]:
        hold.wait()
        return items

    async with writer_on(sqlite_url) as writer:
        tasks = [asyncio.create_task(writer.submit(f, ["x"])) for f in (hang, save)]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(writer.stop, 0.01)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(f) for f in found} == {StoreUnavailable}
        hold.set()


async def test_a_writer_that_was_not_started_takes_nothing(sqlite_url):
    engine = open_engine(sqlite_url)
    writer = Writer(engine, DatabaseClock())
    with pytest.raises(StoreUnavailable, match="not open"):
        await writer.submit(save, ["a"])
    engine.dispose()


async def test_the_log_of_sqlite_is_cut_in_quiet_moments_unless_it_is_read(sqlite_url):
    log = Path(sqlite_url.removeprefix("sqlite:///") + "-wal")
    db = Database(sqlite_url)

    def size() -> int:
        return log.stat().st_size

    async with writer_on(sqlite_url, quiet_s=0.01) as writer:
        with db.engine.execution_options(reader=True).connect() as reader:
            reader.execute(select(totals)).all()
            await writer.submit(save, ["a"])
            await asyncio.sleep(0.05)
            assert size()
            assert await writer.submit(save, ["b"]) == ["saved b"]
        await writer.submit(save, ["c"])
        await until(lambda: not size())
        assert await writer.submit(save, ["d"]) == ["saved d"]
    assert saved(db) == ["a", "b", "c", "d"]
    db.close()


async def test_a_log_that_cannot_be_written_back_for_want_of_room_is_kept_and_stops_nobody(
    sqlite_url, caplog
):
    caplog.set_level("DEBUG", logger=writing.__name__)
    db = Database(sqlite_url)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with writer_on(sqlite_url, quiet_s=0.05) as writer:
        async with Gate(writer):
            saving = asyncio.create_task(writer.submit(save, ["a"]))
            await asyncio.sleep(0)
        await saving
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            await until(lambda: "log not written back" in caplog.messages)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert await writer.submit(save, ["b"]) == ["saved b"]
        assert "writer replaced" not in caplog.messages
    assert saved(db) == ["a", "b"]
    db.close()


# ---------------------------------------------------------------------------------------------------- clock


async def test_the_transactions_time_is_the_databases(writer, db):
    def tell(tx: Transaction, items: Sequence[Any]) -> list[int]:
        return [tx.now_ms]

    (now,) = await writer.submit(tell, [None])
    with db.transaction() as tx:
        assert abs(database_now_ms(tx.connection) - now) < 60_000


def test_a_fixed_clock_is_never_asked_for(sqlite_url):
    db = Database(sqlite_url)
    clock = DatabaseClock(lambda: 7)
    with db.transaction() as tx, db.statements() as seen:
        clock.sync(tx.connection)
    assert (clock.now_ms(), seen) == (7, [])
    db.close()
