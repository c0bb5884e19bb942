"""Opening a database, and that the three kinds mean the same."""

from __future__ import annotations

import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import column, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from feishu_bot.errors import StoreUnavailable
from feishu_bot.store.engine import (
    CONNECT_TIMEOUT_S,
    capabilities,
    database_now_ms,
    insert_ignore,
    is_conflict,
    is_disconnect,
    is_hopeless,
    is_refusal,
    normalise_url,
    open_engine,
    ping,
    store_errors,
)
from feishu_bot.store.inbox import receive
from feishu_bot.store.schema import budget_windows, conversations, inbox, job_runs, lanes
from feishu_bot.store.work import Recorded
from tests.transact import Database, answered, arrival, row_locks

ALIKE = ["Ou_A", "ou_a", "ou_a ", "ou_á", "ou_ａ"]


# ----------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("sqlite:///x.db", "sqlite"),
        ("sqlite+aiosqlite:///x.db", "sqlite"),
        ("postgres://u@h/d", "postgresql+psycopg"),
        ("postgresql://u@h/d", "postgresql+psycopg"),
        ("postgresql+asyncpg://u@h/d", "postgresql+psycopg"),
        ("mysql://u@h/d", "mysql+pymysql"),
        ("mariadb://u@h/d", "mysql+pymysql"),
        ("mysql+aiomysql://u@h/d", "mysql+pymysql"),
    ],
)
def test_a_url_gets_our_driver_whatever_it_names(given, driver):
    assert normalise_url(given).drivername == driver


def test_mariadb_is_always_spoken_to_in_utf8mb4():
    assert normalise_url("mysql://u@h/d?charset=latin1").query["charset"] == "utf8mb4"


@pytest.mark.parametrize("url", ["", "no url", "oracle://u:hidden@h/d", "mongodb://u:hidden@h/d", "://"])
def test_a_url_that_is_none_of_ours_is_refused_without_its_password(url):
    with pytest.raises(StoreUnavailable) as told:
        normalise_url(url)
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_server_that_does_not_answer_is_told_without_the_password(kind):
    engine = open_engine(f"{kind}://someone:hidden@127.0.0.1:1/nothing")
    with pytest.raises(StoreUnavailable) as told:
        ping(engine)
    assert "hidden" not in str(told.value)
    assert not is_hopeless(told.value)
    engine.dispose()


@row_locks
def test_a_database_that_does_not_exist_is_hopeless(db_url):
    engine = open_engine(db_url + "_not_there")
    with pytest.raises(StoreUnavailable) as told:
        ping(engine)
    assert is_hopeless(told.value)
    engine.dispose()


def test_a_file_that_is_no_database_is_hopeless(tmp_path):
    (tmp_path / "bot.db").write_text("these are no pages of a database, but they are many characters " * 9)
    engine = open_engine(f"sqlite:///{tmp_path}/bot.db")
    with pytest.raises(StoreUnavailable) as told:
        ping(engine)
    assert is_hopeless(told.value)
    engine.dispose()


def test_the_folder_of_a_file_is_made(tmp_path):
    engine = open_engine(f"sqlite:///{tmp_path}/new/folder/bot.db")
    ping(engine)
    assert (tmp_path / "new/folder/bot.db").exists()
    engine.dispose()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be made"):
        open_engine(f"sqlite:///{tmp_path}/file/bot.db")


def test_an_error_tells_neither_statement_nor_values(db):
    with pytest.raises(StoreUnavailable) as told, store_errors(), db.transaction() as tx:
        tx.connection.execute(text("SELECT :word FROM no_such_table"), {"word": "private words"})
    assert "private words" not in str(told.value)
    assert "SELECT" not in str(told.value)
    assert "no_such_table" in str(told.value)


# ------------------------------------------------------------------------------------------------- settings


def test_sqlite_keeps_what_is_acknowledged_and_checks_references(sqlite_url):
    engine = open_engine(sqlite_url)
    with engine.connect() as connection:
        found = {
            pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
            for pragma in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    engine.dispose()


def test_a_reader_stops_no_writer_on_sqlite(sqlite_url):
    engine = open_engine(sqlite_url)
    with engine.execution_options(reader=True).connect() as reader:
        reader.execute(select(lanes)).all()
        with engine.begin() as connection:
            connection.execute(insert(lanes), {"key": "a"})
        assert reader.execute(select(lanes)).all() == []
    engine.dispose()


@row_locks
def test_a_transaction_sees_what_was_committed_before_each_statement(db, db_url):
    other = Database(db_url)
    with db.transaction() as tx:
        assert tx.connection.execute(select(lanes.c.key)).all() == []
        other.put(lanes, {"key": "a"})
        assert tx.connection.execute(select(lanes.c.key)).scalars().all() == ["a"]
    other.close()


@pytest.mark.parametrize(
    ("server_url", "questions", "limits"),
    [
        ("postgresql_url", ["SHOW statement_timeout"], ["30s"]),
        ("mariadb_url", ["SELECT @@max_statement_time", "SELECT @@innodb_lock_wait_timeout"], ["30.0", "10"]),
    ],
)
def test_no_statement_runs_and_no_lock_is_waited_for_without_end(request, server_url, questions, limits):
    engine = open_engine(request.getfixturevalue(server_url))
    with engine.connect() as connection:
        found = [connection.execute(text(question)).scalar_one() for question in questions]
    assert [str(value) for value in found] == limits
    engine.dispose()


@pytest.mark.parametrize(
    ("server_url", "limit", "slow"),
    [
        ("postgresql_url", "SET statement_timeout = 1", "SELECT pg_sleep(10)"),
        (
            "mariadb_url",
            "SET max_statement_time = 0.01",
            "SELECT MAX(SHA2(CONCAT(a.seq, b.seq), 512)) FROM seq_1_to_10000 a, seq_1_to_10000 b",
        ),
    ],
)
def test_a_statement_that_takes_too_long_is_run_again_like_one_that_met_a_lock(
    request, server_url, limit, slow
):
    engine = open_engine(request.getfixturevalue(server_url))
    with engine.connect() as connection:
        connection.execute(text(limit))
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text(slow)).all()
    assert is_conflict(caught.value)
    engine.dispose()


def test_a_pool_that_has_lent_all_its_connections_is_not_waited_for_without_end(postgresql_url):
    engine = open_engine(postgresql_url, pool_size=1, max_overflow=0)
    assert engine.pool._timeout == CONNECT_TIMEOUT_S
    engine.pool._timeout = 0.01
    with engine.connect(), pytest.raises(StoreUnavailable, match="QueuePool limit"), store_errors():
        engine.connect()
    engine.dispose()


def test_the_databases_clock_tells_the_time(db):
    before = int(time.time() * 1000)
    with db.transaction() as tx:
        found = database_now_ms(tx.connection)
    assert abs(found - before) < 3_600_000  # a wrong unit or zone is further off


# ------------------------------------------------------------------------------------------- the same for all


def test_identifiers_are_compared_as_bytes(db):
    """Letter case, accents, widths and trailing blanks make other lanes, events, accounts, scopes and budgets."""
    arrivals = [arrival(key, lane=f"user:{key}") for key in ALIKE]
    assert db.run(receive, arrivals) == [Recorded.NEW] * len(ALIKE)
    assert db.run(receive, arrivals) == [Recorded.REPEAT] * len(ALIKE)
    assert sorted(r.key for r in db.rows(lanes)) == sorted(f"user:{key}" for key in ALIKE)
    works = db.begin(*(f"user:{key}" for key in ALIKE))
    assert [w.message.event_key for w in works] == ALIKE
    db.commit(*map(answered, works))
    assert sorted(c.scope_key for c in db.rows(conversations)) == sorted(f"user:{key}" for key in ALIKE)
    db.put(budget_windows, *({"budget": "b", "key": key, "window_start": 0} for key in ALIKE))
    with db.transaction() as tx:
        found = (
            tx.connection.execute(select(inbox.c.event_key).where(inbox.c.event_key == "ou_a "))
            .scalars()
            .all()
        )
        assert found == ["ou_a "]
    assert db.run(receive, [arrival("ou_a", account="Web")]) == [Recorded.NEW]


def test_an_update_that_changes_nothing_has_matched_its_rows(db):
    db.put(lanes, {"key": "a", "lease_until": 5}, {"key": "b", "lease_until": 5})
    with db.transaction() as tx:
        same = update(lanes).values(lease_until=5)
        assert tx.connection.execute(same).rowcount == 2
        assert tx.connection.execute(same.where(lanes.c.key == "b")).rowcount == 1
        assert tx.connection.execute(same.where(lanes.c.key == "c")).rowcount == 0


def test_an_insert_that_may_meet_its_row_leaves_it_alone(db):
    for node in ("first", "second"):
        row = {"job": "j", "fire_time": 1, "node": node, "started_at": 0}
        with db.transaction() as tx:
            tx.connection.execute(insert_ignore(db.kind, job_runs, ("job", "fire_time")), row)
    assert db.row(job_runs).node == "first"


@pytest.mark.parametrize(
    "given",
    [
        datetime(2025, 6, 18, 12, 0, 0, 123456, tzinfo=UTC),
        datetime(2025, 6, 18, 20, 0, 0, 123456, tzinfo=timezone(timedelta(hours=8))),
        datetime(2025, 6, 18, 12, 0, 0, 123456),  # noqa: DTZ001  # naive: read as UTC
    ],
)
def test_an_instant_comes_back_as_the_same_instant_in_utc(db, given):
    row = {"public_id": "p", "user_key": "u", "platform": "web", "created_at": given, "last_activity": given}
    db.put(conversations, row)
    found = db.row(conversations).created_at
    assert found == datetime(2025, 6, 18, 12, 0, 0, 123456, tzinfo=UTC)
    assert found.tzinfo is UTC


def test_long_and_rare_texts_are_kept_as_they_are(db):
    payload = "饕餮 😀 \\ ' \" %s :x \u2028" * 10_000
    row = {
        "account": "a",
        "event_key": "e",
        "lane_key": "l",
        "payload": payload,
        "state": "open",
        "received_at": 1,
    }
    db.put(inbox, row)
    assert db.row(inbox).payload == payload


# ---------------------------------------------------------------------------------------------------- errors


def failure(function):
    with pytest.raises(DBAPIError) as caught:
        function()
    return caught.value


def test_a_taken_key_is_a_refusal_and_no_outage(db):
    db.put(lanes, {"key": "a"})
    error = failure(lambda: db.put(lanes, {"key": "a"}))
    assert isinstance(error, IntegrityError)
    assert is_refusal(error)
    assert not is_conflict(error)
    assert not is_disconnect(error)


@row_locks
def test_a_value_that_does_not_fit_is_a_refusal(db):
    assert is_refusal(failure(lambda: db.put(lanes, {"key": "a" * 999})))


@row_locks
def test_a_deadlock_is_a_conflict(db, db_url):
    other = Database(db_url)
    db.put(lanes, {"key": "a"}, {"key": "b"})
    caught = []

    def lock(tx, key):
        tx.connection.execute(select(lanes).where(lanes.c.key == key).with_for_update()).all()

    def cross():
        try:
            with other.transaction() as tx:
                lock(tx, "b")
                both.wait()
                lock(tx, "a")
        except DBAPIError as error:
            caught.append(error)

    both = threading.Barrier(2)
    thread = threading.Thread(target=cross)
    thread.start()
    try:
        with db.transaction() as tx:
            lock(tx, "a")
            both.wait()
            lock(tx, "b")
    except DBAPIError as error:
        caught.append(error)
    thread.join()
    assert [is_conflict(error) for error in caught] == [True]
    other.close()


def test_a_new_file_that_another_process_is_just_making_is_waited_for(tmp_path):
    file = tmp_path / "new.db"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE made (x)")
    opened = []

    def open_it():
        engine = open_engine(f"sqlite:///{file}")
        with engine.connect() as connection:
            opened.extend(connection.execute(text("SELECT name FROM sqlite_master")).scalars())
        engine.dispose()

    waiting = threading.Thread(target=open_it)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    other.execute("COMMIT")
    other.close()
    waiting.join()
    assert opened == ["made"]


def test_a_locked_file_is_a_conflict(sqlite_url):
    db, other = Database(sqlite_url), Database(sqlite_url)
    with db.transaction() as tx:
        tx.connection.execute(delete(lanes))
        with other.engine.execution_options(reader=True).connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=0")
            connection.rollback()
            error = failure(lambda: connection.execute(insert(lanes), {"key": "a"}))
    assert is_conflict(error)
    db.close()
    other.close()


@row_locks
@pytest.mark.parametrize("at", ["rest", "work"])
def test_a_connection_that_was_ended_by_the_server_is_a_disconnect(db, db_url, at):
    other = Database(db_url)
    own, sleep, end = {
        "postgresql": ("pg_backend_pid()", "SELECT pg_sleep(60)", "SELECT pg_terminate_backend(:n)"),
        "mariadb": ("connection_id()", "SELECT SLEEP(60) FROM lanes WHERE 1", "KILL :n"),
    }[db.kind]
    db.put(lanes, {"key": "a"})

    def run():
        with db.transaction() as tx:
            number = tx.connection.execute(select(column(own, is_literal=True))).scalar()
            killing = threading.Thread(target=kill, args=(number,))
            killing.start()
            try:
                if at == "rest":
                    killing.join()
                tx.connection.execute(text(sleep if at == "work" else "SELECT 1")).all()
            finally:
                killing.join()

    def kill(number):
        while at == "work" and not asleep(number):
            time.sleep(0.01)
        with other.transaction() as tx:
            tx.connection.execute(text(end), {"n": number})

    def asleep(number):
        shown = {
            "postgresql": "SELECT query FROM pg_stat_activity WHERE pid = :n",
            "mariadb": "SELECT info FROM information_schema.processlist WHERE id = :n",
        }[db.kind]
        with other.transaction() as tx:
            return "sleep" in str(tx.connection.execute(text(shown), {"n": number}).scalar()).lower()

    error = failure(run)
    assert is_disconnect(error)
    assert not is_conflict(error)
    assert capabilities(other.engine).kind == db.kind
    other.close()
