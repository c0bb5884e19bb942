"""The released migrations, run from nothing, make the tables that the program makes by itself."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from feishu_bot.errors import SchemaMismatch
from feishu_bot.store.engine import open_engine
from feishu_bot.store.migrations import SCRIPTS, check, current_version, upgrade
from feishu_bot.store.schema import HEAD, metadata
from tests.databases import KINDS


def migrate(url: str) -> Engine:
    """Run all migrations, one after the other, on a database without tables."""
    engine = open_engine(url)
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return engine


def described(engine: Engine) -> dict[str, Any]:
    """Return all that the database says of its tables."""
    with engine.connect() as connection:
        kind = engine.dialect.name
        if kind == "sqlite":
            rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
            return {name: sorted(_parts(sql)) for name, sql in rows if name != "alembic_version"}
        names = [name for name in inspect(connection).get_table_names() if name != "alembic_version"]
        if kind == "mysql":
            tables = {
                name: connection.execute(text(f"SHOW CREATE TABLE `{name}`")).one()[1] for name in names
            }
            return {name: sorted(_parts(sql)) for name, sql in tables.items()}
        columns = connection.execute(
            text(
                "SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default,"
                " datetime_precision FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
            )
        ).all()
        indexes = connection.execute(
            text(
                "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2"
            )
        ).all()
        rules = connection.execute(
            text(
                "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
                " WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2"
            )
        ).all()
    found: dict[str, Any] = {}
    for row in (*columns, *indexes, *rules):
        if row[0] != "alembic_version":
            found.setdefault(row[0], []).append(tuple(row[1:]))
    return found


def _parts(sql: str) -> list[str]:
    """Return a statement's lines, whatever their order and separators: constraints may stand in any."""
    lines = " ".join(sql.replace("\t", " ").split(" ")).splitlines()
    return [" ".join(line.split()).strip(" ,") for line in lines if line.strip(" ,()")]


@pytest.mark.parametrize(("db_url", "blank_db_url"), [(kind, kind) for kind in KINDS], indirect=True)
def test_migrations_from_nothing_make_the_same_tables(db_url, blank_db_url):
    made, migrated = open_engine(db_url), migrate(blank_db_url)
    expected, found = described(made), described(migrated)
    assert expected.keys() == found.keys()
    for name, parts in expected.items():
        assert found[name] == parts, name
    made.dispose()
    migrated.dispose()


def test_alembic_finds_no_difference_between_tables_and_program(db_url):
    engine = open_engine(db_url)
    with engine.connect() as connection:
        options = {
            "compare_type": True,
            "include_name": lambda name, kind, _parents: not _is_search(name, kind),
        }
        differences = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    assert [d for d in differences if not _is_drawn_up_elsewhere(d)] == []
    engine.dispose()


def _is_search(name: str | None, kind: str) -> bool:
    return kind == "table" and str(name).startswith("messages_search")


def _is_drawn_up_elsewhere(difference: Any) -> bool:
    """Indexes that only some kinds of database have are compared by the test above."""
    if isinstance(difference, list):  # a column that is another
        return False
    kind, subject = difference[0], difference[1]
    elsewhere = {"ix_messages_search_terms", "ix_outbox_unsent_age"}
    return kind in {"add_index", "remove_index"} and subject.name in elsewhere


def test_the_newest_migration_is_the_programs_version():
    assert ScriptDirectory(str(SCRIPTS)).get_current_head() == HEAD


def test_a_fresh_database_is_made_once(blank_db_url):
    engine = open_engine(blank_db_url)
    with pytest.raises(SchemaMismatch, match="no tables"):
        check(engine)
    assert upgrade(engine) == "created"
    check(engine)
    assert upgrade(engine) == "current"
    with engine.connect() as connection:
        assert current_version(connection) == HEAD
    engine.dispose()


@pytest.mark.parametrize(("db_url", "blank_db_url"), [("mariadb", "mariadb")], indirect=True)
@pytest.mark.parametrize("done", ["a table without its indexes", "all but the version"])
def test_a_creation_that_was_cut_off_is_finished_by_the_next_start(blank_db_url, db_url, done):
    """MariaDB commits each statement that makes a table by itself."""
    engine = open_engine(blank_db_url)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM alembic_version"))
        if done == "a table without its indexes":
            connection.execute(text("DROP TABLE alembic_version"))
            connection.execute(text("DROP INDEX ix_outbox_unsent_lane ON outbox"))
            connection.execute(text("DROP TABLE `usage`"))
    assert upgrade(engine) == "created"
    check(engine)
    whole = open_engine(db_url)
    assert described(engine) == described(whole)
    whole.dispose()
    engine.dispose()
