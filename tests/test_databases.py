"""The test suite's own ground: databases and isolation."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest
from sqlalchemy import inspect, make_url, select, text

from feishu_bot.store.engine import open_engine
from feishu_bot.store.schema import inbox
from tests import databases as making
from tests.databases import Databases, Names, folder_for_files
from tests.isolation import NetworkRefused


def test_each_test_gets_a_database_without_rows_that_it_may_write(db_url):
    engine = open_engine(db_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE visitors (name VARCHAR(40))"))
        connection.execute(text("INSERT INTO visitors VALUES ('饕餮 😀')"))
        assert connection.execute(text("SELECT name FROM visitors")).scalar_one() == "饕餮 😀"
    engine.dispose()


def test_two_databases_of_a_run_do_not_see_each_other(db_url, databases: Databases):
    kind = make_url(db_url).drivername
    with databases.database(kind) as other:
        engines = [open_engine(db_url), open_engine(other)]
        with engines[0].begin() as connection:
            connection.execute(text("CREATE TABLE visitors (name VARCHAR(40))"))
        assert not inspect(engines[1]).has_table("visitors")
        for engine in engines:
            engine.dispose()


def test_a_blank_database_has_no_table(blank_db_url):
    engine = open_engine(blank_db_url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_a_database_is_dropped_although_a_transaction_is_open_in_it(db_url, databases: Databases):
    kind = make_url(db_url).drivername
    with databases.database(kind) as url:
        engine = open_engine(url)
        connection = engine.connect()
        connection.execute(text("CREATE TABLE visitors (name VARCHAR(40))"))
        connection.execute(text("INSERT INTO visitors VALUES ('x')"))
    connection.invalidate()
    engine.dispose()


def test_only_databases_of_ended_processes_count_as_leftovers():
    names = Names()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = names.new()
    assert names.is_leftover(own.replace(str(os.getpid()), str(ended.pid)))
    assert not names.is_leftover(own.replace(str(os.getpid()), str(os.getppid())))
    assert not names.is_leftover("feishu_bot")
    assert not names.is_leftover("feishu_bot_test_000000_1_1")


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80)])
def test_a_connection_beyond_loopback_is_refused(address, refused_hosts):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as client, pytest.raises(NetworkRefused):
        client.connect(address)
    assert refused_hosts == [address[0]]
    refused_hosts.clear()


async def test_a_name_beyond_this_machine_is_not_looked_up(refused_hosts):
    with pytest.raises(NetworkRefused):
        await asyncio.open_connection("chat.example.org", 80)
    assert refused_hosts == ["chat.example.org"]
    refused_hosts.clear()


async def test_loopback_is_open_by_address_and_by_name():
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "localhost", 0)
    host, port = server.sockets[0].getsockname()[:2]
    _reader, writer = await asyncio.open_connection(host, port)
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


def test_settings_and_proxies_of_the_caller_are_not_seen():
    assert not [name for name in os.environ if name.upper().endswith("_PROXY") or name.startswith("FEISHU_")]


def test_a_database_that_is_given_again_is_as_new(databases: Databases, db_url):
    kind = make_url(db_url).drivername
    ids = []
    for _ in range(2):
        with databases.database(kind) as url:
            engine = open_engine(url)
            with engine.begin() as connection:
                connection.execute(
                    inbox.insert().values(
                        account="web", event_key="1", lane_key="1", payload="{}", state="open", received_at=0
                    )
                )
                ids += connection.execute(select(inbox.c.id)).scalars()
            engine.dispose()
    assert ids == [1, 1]


@pytest.mark.parametrize(
    "change", ["CREATE TABLE visitors (name VARCHAR(40))", "UPDATE alembic_version SET version_num = 'other'"]
)
def test_a_database_whose_schema_was_changed_is_not_given_again(databases: Databases, db_url, change):
    kind = make_url(db_url).drivername
    with databases.database(kind) as url:
        engine = open_engine(url)
        with engine.begin() as connection:
            connection.execute(text(change))
        engine.dispose()
    with databases.database(kind) as url:
        engine = open_engine(url)
        assert not inspect(engine).has_table("visitors")
        with engine.connect() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() != "other"
        engine.dispose()


def test_files_are_kept_in_memory_and_what_a_killed_run_has_left_there_goes(monkeypatch, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(making, "_MEMORY", tmp_path)
    dead, running, other = (tmp_path / f"feishu-bot-test-{n}" for n in (ended.pid, os.getppid(), "other"))
    for folder in (dead, running, other):
        folder.mkdir()
    made = folder_for_files(tmp_path / "on the disk")
    assert made == tmp_path / f"feishu-bot-test-{os.getpid()}"
    assert set(tmp_path.iterdir()) == {made, running, other}
    monkeypatch.setattr(making, "_MEMORY_ENOUGH_BYTES", 2**62)
    assert folder_for_files(tmp_path / "on the disk") == tmp_path / "on the disk"
