"""Backups and what is restored from them."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from sqlalchemy import insert, inspect, select, text, update

from feishu_bot.errors import BackupDamaged, RestoreRefused, StoreUnavailable
from feishu_bot.store.archive import verify
from feishu_bot.store.backup import backup, last_good_backup, newest_readable, rotate, try_out
from feishu_bot.store.engine import capabilities, database_now_ms, open_engine
from feishu_bot.store.leases import Owner
from feishu_bot.store.migrations import current_version
from feishu_bot.store.restore import restore
from feishu_bot.store.schema import HEAD, conversations, messages, processes
from feishu_bot.store.search import search_messages
from tests.filled import SAID, TEXTS, contents, fill, is_empty, leases, say
from tests.versions import ADDS, NEXT, released, write_next

NOW = datetime(2025, 6, 19, 3, 30, tzinfo=UTC)


def back_up(url, folder, **options):
    return backup(url, folder, now=NOW, program="test", **options)


def run(url, *statements):
    engine = open_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement) if isinstance(statement, str) else statement)
    engine.dispose()


def test_what_one_kind_of_database_held_another_holds_after_a_restore(db_url, blank_db_url, tmp_path):
    fill(db_url)
    before = contents(db_url)
    made, manifest = back_up(db_url, tmp_path, trial=True)
    assert manifest.tables["messages"].rows == len(TEXTS)
    done = restore(made.path, blank_db_url, now=NOW)
    assert (done.waiting, done.unsent, done.kept) == (1, 1, None)
    assert contents(blank_db_url) == before
    assert leases(blank_db_url) == []
    assert say(blank_db_url) == len(TEXTS) + 2  # the id of the message that was removed is not used again


def test_a_restored_database_is_searched_like_the_one_that_was_backed_up(db_url, blank_db_url, tmp_path):
    fill(db_url)
    made, _ = back_up(db_url, tmp_path)
    restore(made.path, blank_db_url, now=NOW)
    engine = open_engine(blank_db_url)
    kind = capabilities(engine).kind
    with engine.connect() as connection:
        for words, seq in (("世界", 3), ("quotes", 4)):
            (hit,) = search_messages(connection, kind, words)
            assert hit["content"] == TEXTS[seq - 1]
    engine.dispose()


def test_what_is_written_during_a_backup_is_in_it_whole_or_not_at_all(db_url, blank_db_url, tmp_path):
    fill(db_url)
    engine = open_engine(db_url)
    stop, began = threading.Event(), threading.Event()
    told: list[str] = []

    def write() -> None:
        """Count each message in its conversation by the transaction that stores it, as all writers do."""
        seq = 1000
        while not stop.is_set():
            seq += 1
            row = {"conversation_id": 1, "seq": seq, "role": "user", "content": "w" * 2000, "timestamp": SAID}
            with engine.begin() as connection:
                connection.execute(insert(messages), row)
                connection.execute(
                    update(conversations)
                    .where(conversations.c.id == 1)
                    .values(message_count=conversations.c.message_count + 1, last_seq=seq)
                )
            began.set()

    def progress(what: str, _done: int, _total: int | None) -> None:
        # The backup goes on only when the writer has committed once more, so there is always writing beside it.
        if what not in told:
            told.append(what)
            began.clear()
            assert began.wait(20)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert began.wait(20)
        made, manifest = back_up(db_url, tmp_path, progress=progress)
    finally:
        stop.set()
        writer.join()
        engine.dispose()
    assert "messages" in told
    restore(made.path, blank_db_url, now=NOW)
    held = contents(blank_db_url)
    said = [m for m in held["messages"] if m["conversation_id"] == 1]
    (conversation,) = [c for c in held["conversations"] if c["id"] == 1]
    assert conversation["message_count"] == len(said) == manifest.tables["messages"].rows
    assert len(TEXTS) < len(said) < len(contents(db_url)["messages"])


def test_a_backup_can_be_proved_without_this_program(sqlite_url, tmp_path):
    fill(sqlite_url)
    made, manifest = back_up(sqlite_url, tmp_path)
    *lines, last = gzip.decompress(made.path.read_bytes()).splitlines(keepends=True)
    assert orjson.loads(last)["sha256"] == hashlib.sha256(b"".join(lines)).hexdigest()
    assert orjson.loads(lines[0]) == {
        "format": "feishu-bot backup",
        "version": 1,
        "schema": HEAD,
        "kind": "sqlite",
        "program": "test",
        "created_at": "2025-06-19T03:30:00Z",
    }
    assert sum(line.startswith(b"[") for line in lines) == manifest.rows
    assert made.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damage", ["cut off", "a byte changed", "something added", "a row less", "another file"]
)
def test_a_damaged_backup_is_refused_before_anything_is_touched(sqlite_url, tmp_path, damage):
    fill(sqlite_url)
    made, _ = back_up(sqlite_url, tmp_path)
    packed = made.path.read_bytes()
    lines = gzip.decompress(packed).splitlines(keepends=True)
    row = next(n for n, line in enumerate(lines) if line.startswith(b"["))
    made.path.write_bytes(
        {
            "cut off": packed[: len(packed) // 2],
            "a byte changed": packed[:300] + bytes([packed[300] ^ 1]) + packed[301:],
            "something added": gzip.compress(b"".join([*lines, b"[]\n"])),
            "a row less": gzip.compress(b"".join(lines[:row] + lines[row + 1 :])),
            "another file": b"hello",
        }[damage]
    )
    before = contents(sqlite_url)
    with pytest.raises(BackupDamaged, match=made.path.name):
        restore(made.path, sqlite_url, now=NOW, force=True)
    assert contents(sqlite_url) == before


@pytest.mark.parametrize("place", range(0, 1200, 37))
def test_no_changed_byte_goes_unnoticed(sqlite_url, tmp_path, place):
    made, _ = back_up(sqlite_url, tmp_path)
    packed = bytearray(made.path.read_bytes())
    if 4 <= place % len(packed) < 10:  # gzip's own flags and time say nothing of what is in it
        place += 10
    packed[place % len(packed)] ^= 0x55
    made.path.write_bytes(packed)
    with pytest.raises((BackupDamaged, RestoreRefused)):
        verify(made.path)


def test_a_backup_of_a_newer_program_is_refused(db_url, tmp_path):
    made, _ = back_up(db_url, tmp_path)
    lines = gzip.decompress(made.path.read_bytes()).splitlines(keepends=True)

    def rewrite(old: bytes, new: bytes) -> None:
        changed = [lines[0].replace(old, new), *lines[1:-1]]
        end = orjson.loads(lines[-1]) | {"sha256": hashlib.sha256(b"".join(changed)).hexdigest()}
        made.path.write_bytes(gzip.compress(b"".join([*changed, orjson.dumps(end) + b"\n"])))

    rewrite(b'"version":1', b'"version":2')
    with pytest.raises(RestoreRefused, match="format 2"):
        restore(made.path, db_url, now=NOW)
    rewrite(f'"schema":"{HEAD}"'.encode(), b'"schema":"9999"')
    with pytest.raises(RestoreRefused, match="schema 9999"):
        restore(made.path, db_url, now=NOW)


def test_a_database_with_rows_is_replaced_only_by_force(db_url, tmp_path):
    made, _ = back_up(db_url, tmp_path)
    fill(db_url)
    before = contents(db_url)
    with pytest.raises(RestoreRefused, match="holds 3 conversations and 8 messages; --force replaces it"):
        restore(made.path, db_url, now=NOW)
    assert contents(db_url) == before
    done = restore(made.path, db_url, now=NOW, force=True)
    assert is_empty(db_url)
    if db_url.startswith("sqlite"):
        assert contents(f"sqlite:///{done.kept}") == before


def test_a_restore_leaves_the_schema_as_it_was(db_url, tmp_path):
    fill(db_url)
    before = described(db_url)
    made, _ = back_up(db_url, tmp_path)
    restore(made.path, db_url, now=NOW, force=True)
    assert described(db_url) == before


def test_a_backup_of_an_older_version_is_migrated_on_its_way(db_url, tmp_path):
    fill(db_url)
    before = contents(db_url)
    made, _ = back_up(db_url, tmp_path / "backups", trial=True)
    scripts = released(tmp_path / "migrations")
    write_next(scripts, ADDS)
    restore(made.path, db_url, now=NOW, force=True, head=NEXT, scripts=scripts)
    assert contents(db_url) == before
    engine = open_engine(db_url)
    with engine.connect() as connection:
        moods = connection.execute(text("SELECT mood FROM conversations")).scalars().all()
        version = current_version(connection)
    engine.dispose()
    assert (moods, version) == (["calm"] * 3, NEXT)


def described(url):
    """Return how the tables are made, in the words of the inspector and, where it has them, of the server."""
    engine = open_engine(url)
    with engine.connect() as connection:
        look = inspect(connection)
        found = {
            name: (
                [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in look.get_columns(name)],
                look.get_pk_constraint(name),
                sorted(look.get_foreign_keys(name), key=repr),
                sorted(re.sub(r" at 0x\w+", "", repr(index)) for index in look.get_indexes(name)),
                sorted(look.get_unique_constraints(name), key=repr),
                sorted(look.get_check_constraints(name), key=repr),
            )
            for name in look.get_table_names()
        }
        if engine.dialect.name == "mysql":
            for name in look.get_table_names():
                ((_, made),) = connection.execute(text(f"SHOW CREATE TABLE `{name}`")).all()
                found[f"{name} made"] = re.sub(r" AUTO_INCREMENT=\d+", "", made)
    engine.dispose()
    return found


def test_a_restore_that_fails_half_way_leaves_the_old_rows(db_url, tmp_path):
    fill(db_url)
    made, _ = back_up(db_url, tmp_path)
    lines = gzip.decompress(made.path.read_bytes()).splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if line.startswith(b'["2025-06-18"'))  # of the totals
    lines[last] = b'["2025-06-18","web","dead",0,null]\n'  # proved by its checksum, and refused by the table
    rewritten(made.path, lines)
    verify(made.path)
    run(db_url, update(conversations).values(title="now"))
    before = contents(db_url)
    with pytest.raises(StoreUnavailable):
        restore(made.path, db_url, now=NOW, force=True)
    assert contents(db_url) == before
    assert all(not name.startswith(("restore_", "replaced_")) for name in described(db_url))
    assert [p.name for p in tmp_path.iterdir()] == [made.path.name]
    restore(
        made.path.rename(made.path.with_name("x")) and back_up(db_url, tmp_path)[0].path,
        db_url,
        now=NOW,
        force=True,
    )
    assert contents(db_url) == before


def rewritten(path, lines):
    """Write lines of a backup with the counts and checksums that they have now."""
    ends, name = {}, ""
    for line in lines[1:-1]:
        if line.startswith(b"{"):
            name = orjson.loads(line)["table"]
            ends[name] = [0, hashlib.sha256()]
        else:
            ends[name][0] += 1
            ends[name][1].update(line)
    end = {
        "end": {name: {"rows": n, "sha256": digest.hexdigest()} for name, (n, digest) in ends.items()},
        "sha256": hashlib.sha256(b"".join(lines[:-1])).hexdigest(),
    }
    path.write_bytes(gzip.compress(b"".join([*lines[:-1], orjson.dumps(end) + b"\n"])))


def test_a_mariadb_restore_that_was_killed_is_cleared_away_by_the_next(mariadb_url, tmp_path):
    fill(mariadb_url)
    made, _ = back_up(mariadb_url, tmp_path)
    before, made_of = contents(mariadb_url), described(mariadb_url)
    run(
        mariadb_url,
        "CREATE TABLE restore_messages LIKE messages",
        "CREATE TABLE replaced_messages LIKE messages",
        # Killed between the swap and the last step, the reference bears the other name.
        "ALTER TABLE messages DROP FOREIGN KEY fk_messages_conversation_id, ADD CONSTRAINT "
        "restore_fk_messages_conversation_id FOREIGN KEY (conversation_id) REFERENCES conversations (id) "
        "ON DELETE CASCADE",
    )
    restore(made.path, mariadb_url, now=NOW, force=True)
    assert contents(mariadb_url) == before
    assert described(mariadb_url) == made_of


def test_a_database_in_use_is_not_replaced(db_url, tmp_path):
    made, _ = back_up(db_url, tmp_path)
    here = Owner.current()
    engine = open_engine(db_url)
    with engine.begin() as connection:
        now_ms = database_now_ms(connection)
        row = {"owner": str(here), "host": here.host, "pid": here.pid, "version": "test"}
        connection.execute(insert(processes), row | {"started_at": now_ms, "heartbeat_at": now_ms})
    engine.dispose()
    with pytest.raises(RestoreRefused, match=f"process {here.pid} on .* is using the database"):
        restore(made.path, db_url, now=NOW, force=True)
    run(db_url, update(processes).values(heartbeat_at=0))
    restore(made.path, db_url, now=NOW)
    assert is_empty(db_url)


def test_a_sqlite_file_that_another_program_has_open_is_not_replaced(sqlite_url, tmp_path):
    made, _ = back_up(sqlite_url, tmp_path)
    fill(sqlite_url)
    engine = open_engine(sqlite_url)
    with engine.connect() as connection:
        connection.execute(select(conversations.c.id)).all()
        connection.rollback()  # idle, but open
        with pytest.raises(RestoreRefused, match="another program has the database open"):
            restore(made.path, sqlite_url, now=NOW, force=True)
    engine.dispose()
    restore(made.path, sqlite_url, now=NOW, force=True)
    assert is_empty(sqlite_url)


def test_a_damaged_sqlite_file_is_replaced_and_kept_beside(sqlite_url, tmp_path):
    fill(sqlite_url)
    before = contents(sqlite_url)
    made, _ = back_up(sqlite_url, tmp_path)
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    path.write_bytes(b"damaged")
    with pytest.raises(RestoreRefused, match="cannot be read"):
        restore(made.path, sqlite_url, now=NOW)
    done = restore(made.path, sqlite_url, now=NOW, force=True)
    assert contents(sqlite_url) == before
    assert done.kept.read_bytes() == b"damaged"


def test_a_trial_finds_rows_that_do_not_make_a_sound_database(sqlite_url, tmp_path):
    fill(sqlite_url)
    made, _ = back_up(sqlite_url, tmp_path)
    try_out(made.path)
    lines = gzip.decompress(made.path.read_bytes()).splitlines(keepends=True)
    first = 1 + next(n for n, line in enumerate(lines) if b'"conversations"' in line)
    rewritten(made.path, lines[:first] + lines[first + 1 :])  # a conversation less
    verify(made.path)
    with pytest.raises(BackupDamaged, match="refers to a row of conversations that is missing"):
        try_out(made.path)
    assert [p.name for p in tmp_path.iterdir()] == [made.path.name]


def test_a_backup_whose_rows_change_on_the_way_is_not_good(sqlite_url, tmp_path):
    fill(sqlite_url)
    made, _ = back_up(sqlite_url, tmp_path)
    lines = gzip.decompress(made.path.read_bytes()).splitlines(keepends=True)
    first = 1 + next(n for n, line in enumerate(lines) if b'"conversations"' in line)
    columns = orjson.loads(lines[first - 1])["columns"]
    row = orjson.loads(lines[first])
    row[columns.index("message_count")] = "8"  # a text that the column takes as a number
    lines[first] = orjson.dumps(row) + b"\n"
    rewritten(made.path, lines)
    with pytest.raises(BackupDamaged, match="conversations"):
        try_out(made.path)


def test_the_newest_backups_are_kept_and_nothing_else_is_removed(sqlite_url, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "feishu-bot-mine.jsonl.gz").write_text("mine")
    made = [
        backup(sqlite_url, tmp_path, now=NOW + timedelta(days=n), program="test")[0] for n in (1, 0, 2, 2)
    ]
    assert last_good_backup(tmp_path) == made[3]
    assert rotate(tmp_path, 2) == [made[0].path, made[1].path]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "feishu-bot-20250621T033000Z-2.jsonl.gz",
        "feishu-bot-20250621T033000Z.jsonl.gz",
        "feishu-bot-mine.jsonl.gz",
        "notes.txt",
    ]
    made[3].path.write_bytes(made[3].path.read_bytes()[:-20])
    assert newest_readable(tmp_path) == made[2]


def test_what_a_killed_backup_left_is_removed_after_a_day(sqlite_url, tmp_path):
    old, recent = tmp_path / ".feishu-bot-1.jsonl.gz.partial", tmp_path / ".bot.db.7.partial"
    for path, age in ((old, timedelta(days=2)), (recent, timedelta(hours=1))):
        path.write_bytes(b"x")
        os.utime(path, ((NOW - age).timestamp(),) * 2)
    back_up(sqlite_url, tmp_path)
    assert not old.exists()
    assert recent.exists()


def test_there_is_no_backup_where_there_is_no_folder(tmp_path):
    assert last_good_backup(tmp_path / "none") is None
    assert newest_readable(tmp_path / "none") is None


def test_a_database_that_does_not_exist_is_not_backed_up_and_not_made(tmp_path):
    with pytest.raises(StoreUnavailable, match="there is no database"):
        back_up(f"sqlite:///{tmp_path}/none.db", tmp_path / "backups")
    assert not (tmp_path / "none.db").exists()


def test_nothing_is_restored_into_memory(sqlite_url, tmp_path):
    made, _ = back_up(sqlite_url, tmp_path)
    with pytest.raises(RestoreRefused, match="a database in memory"):
        restore(made.path, "sqlite://", now=NOW)
