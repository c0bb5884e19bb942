"""Who may read what is stored: on POSIX systems the server's own user, and whom an operator has let in."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from stat import S_IMODE
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from feishu_bot.store import migrations
from feishu_bot.store.backup import backup
from feishu_bot.store.engine import open_engine
from feishu_bot.store.recovery import recover
from feishu_bot.store.restore import restore

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the rights of POSIX")
NOW = datetime(2025, 6, 18, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _open_to_all():
    before = os.umask(0)
    yield
    os.umask(before)


def rights(path: Path) -> str:
    return oct(S_IMODE(path.stat().st_mode))


def test_a_new_database_is_for_its_owner_alone(tmp_path):
    file = tmp_path / "data" / "new.db"
    engine = open_engine(f"sqlite:///{file}")
    assert not file.exists()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE said (text TEXT)"))
    with engine.connect():
        found = {path.name: rights(path) for path in file.parent.iterdir()}
    engine.dispose()
    assert rights(file.parent) == "0o700"
    assert found == dict.fromkeys(("new.db", "new.db-wal", "new.db-shm"), "0o600")


def test_a_database_that_is_there_keeps_the_rights_it_was_given(tmp_path):
    folder, file = tmp_path / "shared", tmp_path / "shared" / "old.db"
    folder.mkdir(mode=0o770)
    file.touch(mode=0o660)
    engine = open_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE said (text TEXT)"))
    with engine.connect():
        found = {rights(path) for path in folder.iterdir()}
    engine.dispose()
    assert rights(folder) == "0o770"
    assert found == {"0o660"}


def test_what_is_made_of_a_database_is_for_its_owner_alone(tmp_path):
    file = tmp_path / "data" / "bot.db"
    migrations.upgrade(f"sqlite:///{file}")
    made, _ = backup(f"sqlite:///{file}", tmp_path / "backups", now=NOW, program="test")
    restore(made.path, f"sqlite:///{tmp_path / 'again' / 'restored.db'}", now=NOW)
    recover(file, tmp_path / "saved.db", now=NOW)
    for path in (made.path, tmp_path / "again" / "restored.db", tmp_path / "saved.db"):
        assert rights(path) == "0o600", path
