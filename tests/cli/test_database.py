"""``backup``, ``restore`` and ``db`` as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from feishu_bot.store.engine import open_engine
from tests.filled import TEXTS, contents, fill, is_empty

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def bot(typed):
    return typed


def test_a_backup_is_written_where_the_configuration_says_and_restored(db_url, tmp_path, bot):
    fill(db_url)
    before = contents(db_url)
    code, out, err = bot(db_url, "backup", "--try")
    assert (code, err) == (0, "")
    (file,) = (tmp_path / "data" / "backups").iterdir()
    assert f"wrote {file}: " in out
    assert "read back and tried out" in out

    code, out, err = bot(db_url, "restore", str(file))
    assert (code, out) == (1, "")
    assert err == "error: the database holds 3 conversations and 8 messages; --force replaces it\n"
    code, out, err = bot(db_url, "restore", str(file), "--force")
    assert (code, err) == (0, "")
    assert "restored 3 conversations and 8 messages" in out
    assert "1 messages were waiting for an answer then and 1 replies to be sent" in out
    assert ("is kept in" in out) == db_url.startswith("sqlite")
    assert contents(db_url) == before


def test_a_backup_goes_where_it_is_told_and_the_oldest_are_removed(sqlite_url, tmp_path, bot):
    for _ in range(3):
        code, out, _ = bot(sqlite_url, "backup", "--to", str(tmp_path / "there"), "--keep", "2", "--json")
        assert code == 0
    told = json.loads(out)
    assert told["path"] in [str(path) for path in (tmp_path / "there").iterdir()]
    assert len(list((tmp_path / "there").iterdir())) == 2
    assert len(told["removed"]) == 1
    assert told["rows"]["messages"] == 0


def test_a_damaged_backup_is_an_error_in_one_line(sqlite_url, tmp_path, bot):
    (tmp_path / "b.gz").write_bytes(b"nothing")
    code, out, err = bot(sqlite_url, "restore", str(tmp_path / "b.gz"))
    assert (code, out) == (1, "")
    assert err.startswith("error: b.gz is damaged")
    assert err.count("\n") == 1
    assert bot(sqlite_url, "restore", str(tmp_path / "none"))[::2] == (
        1,
        f"error: there is no file {tmp_path}/none\n",
    )
    assert bot(sqlite_url, "restore")[0] == 2


def test_an_upgrade_makes_the_tables_once(blank_db_url, bot):
    assert bot(blank_db_url, "db", "upgrade")[:2] == (0, "created: schema 0001\n")
    assert bot(blank_db_url, "db", "upgrade")[:2] == (0, "the schema was 0001 already\n")
    assert is_empty(blank_db_url)


def test_a_newer_database_is_refused_by_every_command(db_url, bot):
    engine = open_engine(db_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    for command in (["db", "upgrade"], ["db", "check"], ["backup"]):
        code, out, err = bot(db_url, *command)
        assert (code, out) == (1, ""), command
        assert "9999" in err


def test_stats_print_rows_and_sizes(db_url, bot):
    fill(db_url)
    code, out, err = bot(db_url, "db", "stats", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert {table["name"]: table["rows"] for table in told["tables"]}["messages"] == len(TEXTS)
    assert told["size"] > 0
    code, out, _ = bot(db_url, "db", "stats")
    assert code == 0
    assert "schema 0001" in out


def test_a_check_says_what_is_wrong_and_fails(db_url, bot):
    fill(db_url)
    code, out, err = bot(db_url, "db", "check")
    assert (code, err) == (0, "")
    assert {line.split()[1] for line in out.splitlines()} == {"right"}
    engine = open_engine(db_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE conversations SET message_count = 1 WHERE id = 5"))
    engine.dispose()
    code, out, err = bot(db_url, "db", "check")
    assert (code, err) == (1, "error: wrong: counters\n")
    assert "1 conversations count other messages or tokens than they have: 5" in out
    code, out, _ = bot(db_url, "db", "check", "--json")
    assert code == 1
    assert [finding["check"] for finding in json.loads(out) if finding["wrong"]] == ["counters"]


def test_a_vacuum_says_what_it_gained(db_url, bot):
    code, out, err = bot(db_url, "db", "vacuum")
    assert (code, err) == (0, "")
    assert " before, " in out


def test_a_damaged_file_is_recovered_into_a_new_one(sqlite_url, tmp_path, bot):
    fill(sqlite_url)
    before = contents(sqlite_url)
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with path.open("r+b") as file:
        file.write(bytes(100))
    code, out, err = bot(sqlite_url, "db", "recover", "--to", str(tmp_path / "saved.db"))
    assert (code, err) == (0, "")
    assert "8 rows saved, 8 of them from the pages alone" in out
    assert contents(f"sqlite:///{tmp_path}/saved.db")["messages"] == before["messages"]
    code, out, err = bot(sqlite_url, "db", "recover", "--to", str(tmp_path / "saved.db"))
    assert (code, out, err) == (1, "", f"error: {tmp_path}/saved.db exists; name a file that does not\n")


def test_only_a_sqlite_file_is_recovered(postgresql_url, tmp_path, bot):
    code, _, err = bot(postgresql_url, "db", "recover", "--to", str(tmp_path / "saved.db"))
    assert code == 1
    assert "only a SQLite file" in err


def test_no_command_makes_a_database_that_does_not_exist(tmp_path, bot):
    url = f"sqlite:///{tmp_path}/none.db"
    for command in (
        ["db", "stats"],
        ["db", "check"],
        ["db", "vacuum"],
        ["backup"],
        ["search", "x"],
        ["export"],
        ["forget", "web:ann"],
        ["usage"],
        ["cleanup"],
        ["dead", "list"],
    ):
        code, out, err = bot(url, *command)
        assert (code, out) == (1, ""), command
        assert f"there is no database at {tmp_path}/none.db" in err
    assert not (tmp_path / "none.db").exists()


def test_the_server_refuses_a_damaged_file_and_names_the_newest_good_backup(sqlite_url, tmp_path, bot):
    _, out, _ = bot(sqlite_url, "backup", "--json")
    made = json.loads(out)["path"]
    Path(sqlite_url.removeprefix("sqlite:///")).write_bytes(b"damaged" * 1000)
    command = [sys.executable, "bot.py", "run", "--port", "0", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the database ")
    assert f"the newest good backup is {made}: `bot.py restore {made} --force`" in last
    assert "Traceback" not in done.stderr

    assert bot(sqlite_url, "restore", made, "--force")[0] == 0
    assert bot(sqlite_url, "db", "check")[0] == 0
