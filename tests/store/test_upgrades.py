"""The schema's way up, with a second version made up here."""

from __future__ import annotations

import multiprocessing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import insert, inspect, select, text

from feishu_bot.errors import SchemaMismatch, StoreUnavailable
from feishu_bot.store.engine import open_engine
from feishu_bot.store.migrations import check, current_version, upgrade
from feishu_bot.store.schema import HEAD, conversations, messages
from tests.versions import ADDS, NEXT, released, write_next

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2025, 6, 18, 12, tzinfo=UTC)

REMAKES = """
    with op.batch_alter_table("conversations") as batch:
        batch.alter_column("title", existing_type=sa.String(255), type_=sa.String(300))
"""
FAILS = """
    op.execute("UPDATE no_such_table SET mood = 1")
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    return released(tmp_path / "migrations")


def put(url: str, n: int) -> None:
    """Store a conversation with a message, as the program of the first version does."""
    engine = open_engine(url)
    with engine.begin() as connection:
        values = {"user_key": f"web:private:{n}", "platform": "web", "created_at": NOW, "last_activity": NOW}
        connection.execute(insert(conversations), {"id": n, "public_id": f"p{n}", **values})
        said = {"seq": 1, "role": "user", "content": "hello", "timestamp": NOW}
        connection.execute(insert(messages), {"conversation_id": n, **said})
    engine.dispose()


def look(url: str) -> tuple[str | None, set[str], int, int]:
    """Return version, columns of the conversations, and how many conversations and messages there are."""
    engine = open_engine(url)
    with engine.connect() as connection:
        columns = {column["name"] for column in inspect(connection).get_columns("conversations")}
        found = (
            current_version(connection),
            columns,
            len(connection.execute(select(conversations.c.id)).all()),
            len(connection.execute(select(messages.c.id)).all()),
        )
    engine.dispose()
    return found


def test_an_upgrade_keeps_the_rows_and_tells_its_steps(db_url, scripts):
    put(db_url, 1)
    write_next(scripts, ADDS, REMAKES)
    steps: list[str] = []
    assert upgrade(db_url, head=NEXT, scripts=scripts, step=steps.append) == "upgraded"
    version, columns, *counts = look(db_url)
    assert (version, counts, steps) == (NEXT, [1, 1], [NEXT])
    assert "mood" in columns
    assert upgrade(db_url, head=NEXT, scripts=scripts) == "current"


def test_a_fresh_database_can_be_made_at_any_version(blank_db_url, scripts):
    write_next(scripts, ADDS)
    assert upgrade(blank_db_url, head=NEXT, scripts=scripts) == "created"
    put(blank_db_url, 1)
    assert look(blank_db_url)[0] == NEXT


def test_a_newer_database_is_refused_and_left_alone(db_url, scripts):
    write_next(scripts, ADDS)
    upgrade(db_url, head=NEXT, scripts=scripts)
    before = look(db_url)
    with pytest.raises(SchemaMismatch, match="use the newer program"):
        upgrade(db_url)
    engine = open_engine(db_url)
    with pytest.raises(SchemaMismatch, match=NEXT):
        check(engine)
    engine.dispose()
    assert look(db_url) == before


def test_a_migration_that_fails_leaves_a_schema_that_the_old_program_works_with(db_url, scripts):
    put(db_url, 1)
    write_next(scripts, ADDS, FAILS)
    with pytest.raises(StoreUnavailable, match="no_such_table"):
        upgrade(db_url, head=NEXT, scripts=scripts)
    put(db_url, 2)
    version, columns, *counts = look(db_url)
    assert (version, counts) == (HEAD, [2, 2])
    if not db_url.startswith(("mysql", "mariadb")):  # there each statement commits by itself
        assert "mood" not in columns

    write_next(scripts, ADDS)  # corrected, it goes on where it failed
    assert upgrade(db_url, head=NEXT, scripts=scripts) == "upgraded"
    version, columns, *counts = look(db_url)
    assert (version, counts) == (NEXT, [2, 2])
    assert "mood" in columns


def eight_processes(url: str, **where) -> list[str]:
    """Upgrade in eight processes at once and return what each says it did."""
    forking = multiprocessing.get_context("fork")  # nothing to import eight times
    together, told = forking.Barrier(8), forking.SimpleQueue()

    def start() -> None:
        together.wait(30)
        try:
            told.put(upgrade(url, **where))
        except (StoreUnavailable, SchemaMismatch) as error:
            told.put(str(error))

    processes = [forking.Process(target=start) for _ in range(8)]
    for process in processes:
        process.start()
    answers = sorted(told.get() for _ in processes)
    for process in processes:
        process.join()
    return answers


def test_of_eight_processes_that_start_at_once_one_upgrades(db_url, scripts):
    put(db_url, 1)
    write_next(scripts, ADDS, '\n    op.execute("UPDATE conversations SET last_seq = last_seq + 1")\n')
    assert eight_processes(db_url, head=NEXT, scripts=scripts) == ["current"] * 7 + ["upgraded"]
    engine = open_engine(db_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT last_seq FROM conversations")).scalars().all() == [1]
    engine.dispose()


def test_of_eight_processes_that_start_at_once_one_makes_the_tables(blank_db_url):
    assert eight_processes(blank_db_url) == ["created"] + ["current"] * 7
    put(blank_db_url, 1)
