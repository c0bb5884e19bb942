"""What is saved of a damaged SQLite file."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert

from feishu_bot.errors import RestoreRefused, StoreUnavailable
from feishu_bot.store.engine import open_engine
from feishu_bot.store.inspection import check
from feishu_bot.store.recovery import damage_of, recover
from feishu_bot.store.schema import conversations, inbox, messages, totals
from feishu_bot.store.search import search_messages
from tests.filled import SAID, SAID_MS, contents, fill

NOW = datetime(2025, 6, 19, 3, 30, tzinfo=UTC)
PAGE = 4096
PEOPLE, SAYINGS, CAME = 30, 60, 400


@pytest.fixture
def path(sqlite_url: str) -> Path:
    """A SQLite file with some hundred pages, at rest."""
    fill(sqlite_url)
    engine = open_engine(sqlite_url)
    with engine.begin() as connection:
        people = [
            {
                "id": 100 + n,
                "public_id": f"p{n}",
                "scope_key": f"s{n}",
                "user_key": f"web:private:{n}",
                "platform": "web",
                "message_count": SAYINGS,
                "last_seq": SAYINGS,
                "total_tokens": 2 * SAYINGS + 5,
                "created_at": SAID,
                "last_activity": SAID,
            }
            for n in range(PEOPLE)
        ]
        connection.execute(insert(conversations), people)
        said = [
            {
                "conversation_id": 100 + n,
                "seq": seq,
                "role": "user",
                "content": f"{n} 说了 {seq} " + "words " * (seq * 3),
                "sender_id": f"web:private:{n}",
                "tokens": 2,
                "timestamp": SAID + timedelta(minutes=seq),
            }
            for seq in range(1, SAYINGS + 1)
            for n in range(PEOPLE)
        ]
        connection.execute(insert(messages), said)
        came = [
            {
                "account": "many",
                "event_key": f"e{n}",
                "lane_key": f"lane{n}",
                "payload": "p" * 300,
                "state": "answered",
                "received_at": SAID_MS,
                "ended_at": SAID_MS,
            }
            for n in range(CAME)
        ]
        connection.execute(insert(inbox), came)
        ended = {"day": "2025-06-18", "account": "many", "end": "answered", "shard": 0, "count": CAME}
        connection.execute(insert(totals), ended)
    engine.dispose()
    return Path(sqlite_url.removeprefix("sqlite:///"))


def pages_of(path: Path, name: str, kind: str) -> list[int]:
    """Return the numbers of a b-tree's pages, root first."""
    with closing(sqlite3.connect(path)) as driver:
        statement = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = ? ORDER BY path"
        return [number for (number,) in driver.execute(statement, (name, kind))]


def overwrite(path: Path, *numbers: int, with_: bytes = bytes(PAGE)) -> None:
    with path.open("r+b") as file:
        for number in numbers:
            file.seek((number - 1) * PAGE)
            file.write(with_)


def by_id(rows):
    return {row["id"]: row for row in rows}


def saved(path: Path, tmp_path: Path):
    """Recover, and prove what is always true: the old file is as it was, the new one right, no row made up."""
    before = path.read_bytes()
    target = tmp_path / "saved.db"
    done = recover(path, target, now=NOW)
    assert path.read_bytes() == before
    assert [finding for finding in done.findings if finding.wrong] == []
    assert [finding for finding in check(f"sqlite:///{target}") if finding.wrong] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved.db"]
    return done, contents(f"sqlite:///{target}")


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def test_of_a_file_without_damage_every_row_is_saved(path, tmp_path):
    before = contents(url(path))
    done, after = saved(path, tmp_path)
    assert after == before
    assert (done.stand_ins, done.unread_bytes) == (0, 0)
    assert all(table.unread == [] for table in done.tables)
    assert {table.name: table.saved for table in done.tables} == {
        name: len(rows) for name, rows in before.items()
    }


def test_of_a_broken_leaf_only_its_own_rows_are_lost(path, tmp_path):
    before = by_id(contents(url(path))["messages"])
    leaf = pages_of(path, "messages", "leaf")[40]
    with closing(sqlite3.connect(path)) as driver:
        statement = "SELECT ncell FROM dbstat WHERE pageno = ?"
        (held,) = driver.execute(statement, (leaf,)).fetchone()
    overwrite(path, leaf)
    done, after = saved(path, tmp_path)
    found = by_id(after["messages"])
    assert len(before) - len(found) == held
    assert all(before[n] == row for n, row in found.items())
    (report,) = [table for table in done.tables if table.unread]
    assert (report.name, len(report.unread)) == ("messages", 1)
    lost = sorted(before.keys() - found.keys())
    assert report.unread == [f"ids {lost[0]} to {lost[-1]}"]


def test_counters_and_totals_are_those_of_the_rows_that_were_saved(path, tmp_path):
    overwrite(path, pages_of(path, "messages", "leaf")[40], pages_of(path, "inbox", "leaf")[3])
    _, after = saved(path, tmp_path)
    assert len(after["inbox"]) < CAME + 3
    removed = sum(
        row["count"] for row in after["totals"] if (row["account"], row["end"]) == ("many", "removed")
    )
    assert removed == CAME + 3 - len(after["inbox"])
    assert sum(row["message_count"] for row in after["conversations"]) == len(after["messages"])


def test_when_the_root_of_a_table_is_broken_its_rows_are_read_from_the_pages(path, tmp_path):
    before = contents(url(path))
    with closing(sqlite3.connect(path)) as driver:
        (root,) = driver.execute("SELECT rootpage FROM sqlite_master WHERE name = 'messages'").fetchone()
    overwrite(path, root, with_=b"\xff" * PAGE)
    done, after = saved(path, tmp_path)
    assert after["messages"] == before["messages"]
    (report,) = [table for table in done.tables if table.name == "messages"]
    assert report.from_pages == report.saved == len(before["messages"])


def test_without_its_first_page_a_file_still_gives_messages_and_conversations(path, tmp_path):
    before = contents(url(path))
    overwrite(path, 1)
    assert damage_of(path) is not None
    done, after = saved(path, tmp_path)
    for name in ("conversations", "messages", "inbox", "outbox"):
        assert after[name] == before[name]
    # The sums of the ledger are lost: all its rows are to be added up anew.
    assert after["usage"] == [row | {"fresh": 1} for row in before["usage"]]
    assert after["usage_names"] == after["usage_hours"] == []
    assert done.tables[0].unread == ["the list of tables"]
    (lane,) = after["lanes"]
    assert (lane["key"], lane["ready_at"], lane["send_ready_at"]) == ("lane", SAID_MS, SAID_MS)


def test_messages_whose_conversation_is_lost_get_one_under_their_speaker(path, tmp_path):
    before = by_id(contents(url(path))["conversations"])
    overwrite(path, pages_of(path, "conversations", "leaf")[-1])
    done, after = saved(path, tmp_path)
    found = by_id(after["conversations"])
    assert found.keys() >= {message["conversation_id"] for message in after["messages"]}
    stand_ins = {n: row for n, row in found.items() if row["title"] == "recovered"}
    assert len(stand_ins) == done.stand_ins > 0
    for n, row in stand_ins.items():
        if n >= 100:
            assert row["user_key"] == before[n]["user_key"]
            assert row["message_count"] == SAYINGS
        else:  # nobody is named as the speaker
            assert row["user_key"] == f"recovered:private:{n}"


def test_a_file_that_is_cut_off_gives_what_is_left_of_it(path, tmp_path):
    before = by_id(contents(url(path))["messages"])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    assert damage_of(path) is not None
    _, after = saved(path, tmp_path)
    found = by_id(after["messages"])
    assert len(found) > len(before) // 10
    assert all(before[n] == row for n, row in found.items())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_pages_are_garbage_what_is_saved_is_right(path, tmp_path, seed):
    rng = random.Random(seed)
    before = contents(url(path))
    count = path.stat().st_size // PAGE
    for number in rng.sample(range(1, count + 1), 12):
        overwrite(
            path,
            number,
            with_=rng.choice([bytes(PAGE), rng.randbytes(PAGE), b"\x0d" + rng.randbytes(PAGE - 1)]),
        )
    done, after = saved(path, tmp_path)
    assert done.tables
    found, known = by_id(after["messages"]), by_id(before["messages"])
    assert all(known[n] == row for n, row in found.items() if n in known)
    assert len(found) > len(known) // 2


def test_what_is_only_in_the_log_is_saved_too(sqlite_url, tmp_path):
    fill(sqlite_url)
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path, isolation_level=None)) as driver:
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        driver.execute("UPDATE conversations SET title = 'in the log' WHERE id = 5")
        before = path.read_bytes()
        log = path.with_name("bot.db-wal").read_bytes()
        done = recover(path, tmp_path / "saved.db", now=NOW)
        assert (path.read_bytes(), path.with_name("bot.db-wal").read_bytes()) == (before, log)
    assert done.unread_bytes == 0
    found = by_id(contents(url(tmp_path / "saved.db"))["conversations"])
    assert found[5]["title"] == "in the log"


def test_saved_messages_are_found_by_the_search(path, tmp_path):
    saved(path, tmp_path)
    engine = open_engine(url(tmp_path / "saved.db"))
    with engine.connect() as connection:
        hits = search_messages(connection, "sqlite", "世界")
    engine.dispose()
    assert len(hits) == 1


def test_ids_of_lost_rows_are_not_used_again(path, tmp_path):
    overwrite(path, *pages_of(path, "inbox", "leaf"))
    saved(path, tmp_path)
    with closing(sqlite3.connect(tmp_path / "saved.db")) as driver:
        used = dict(driver.execute("SELECT name, seq FROM sqlite_sequence"))
    assert used["inbox"] >= 3  # a reply and the ledger still name it


def test_a_reservation_whose_message_is_lost_is_booked(path, tmp_path):
    overwrite(path, *pages_of(path, "inbox", "leaf"))
    _, after = saved(path, tmp_path)
    assert after["inbox"] == []
    assert after["reservations"] == []
    used = {row["key"]: (row["used"], row["reserved"]) for row in after["budget_windows"]}
    assert used["web:u1"] == (60, 0)


def test_nothing_is_written_over_what_is_there(path, tmp_path):
    target = tmp_path / "mine"
    target.write_text("mine")
    with pytest.raises(RestoreRefused, match="exists"):
        recover(path, target, now=NOW)
    assert target.read_text() == "mine"
    with pytest.raises(StoreUnavailable, match="no file"):
        recover(tmp_path / "none.db", tmp_path / "saved.db", now=NOW)


def test_what_is_no_database_at_all_gives_an_empty_one(tmp_path):
    path = tmp_path / "bot.db"
    path.write_bytes(random.Random(1).randbytes(3 * PAGE + 17))
    assert damage_of(path) == "file is not a database"
    done = recover(path, tmp_path / "saved.db", now=NOW)
    assert sum(table.saved for table in done.tables) == 0


def test_damage_is_told_from_a_sound_an_empty_and_a_missing_file(path, tmp_path):
    assert damage_of(path) is None
    assert damage_of(tmp_path / "none.db") is None
    (tmp_path / "empty.db").touch()
    assert damage_of(tmp_path / "empty.db") is None
    overwrite(path, pages_of(path, "messages", "leaf")[3])
    assert damage_of(path) is not None
