"""``selftest`` and ``make chaos`` as an operator types them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from feishu_bot.chaos.servers import environment, why_not_apart
from feishu_bot.store.engine import open_engine

ROOT = Path(__file__).parents[2]


@dataclass
class Done:
    code: int
    out: str
    err: str


async def typed(*words, cwd, interrupt_after=None, **variables) -> Done:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    if interrupt_after is not None:
        await interrupt_after()
        process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    return Done(process.returncode, out.decode(), err.decode())


def selftest(*words, cwd, **more):
    return typed("-m", "feishu_bot", "selftest", *words, cwd=cwd, **more)


async def test_it_runs_on_an_empty_database_reports_on_one_page_and_leaves_it_empty(tmp_path):
    elsewhere = tmp_path / "configured.db"
    done = await selftest(
        *("--minutes", "0.1", "--workers", "2", "--seed", "4", "--json", "--db", "sqlite:///own.db"),
        cwd=tmp_path,
        CONVERSATION_DB_URL=f"sqlite:///{elsewhere}",
    )
    assert done.code == 0, done.err + done.out
    report = json.loads(done.out)
    assert report["kept"]
    assert report["seed"] == 4
    assert report["acknowledged"] == report["messages"] > 0
    assert report["breaches"] == dict.fromkeys(report["breaches"], 0)
    assert "seed 4" in done.err
    assert list(tmp_path.iterdir()) == [], "neither the configured database nor anything of the run is there"


async def test_it_refuses_a_database_that_is_not_empty_and_leaves_it_alone(tmp_path):
    with closing(sqlite3.connect(tmp_path / "full.db")) as connection:
        connection.execute("CREATE TABLE visitors (name TEXT)")
    done = await selftest("--db", "sqlite:///full.db", cwd=tmp_path)
    assert done.code == 2
    assert "not empty: it holds visitors" in done.err
    assert "Traceback" not in done.err


async def test_a_server_that_is_not_there_is_said_in_one_line(tmp_path):
    done = await selftest("--db", "postgresql://nobody@127.0.0.1:1/none", cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1


async def test_an_interrupt_ends_the_sending_and_the_report_comes_all_the_same(tmp_path):
    file = tmp_path / "own.db"

    async def once_messages_are_recorded():
        for _ in range(1200):
            if file.exists() and count(file):
                return
            await asyncio.sleep(0.05)
        raise AssertionError("no message was recorded")

    done = await selftest(
        *("--minutes", "5", "--workers", "2", "--db", f"sqlite:///{file}"),
        cwd=tmp_path,
        interrupt_after=once_messages_are_recorded,
    )
    assert done.code == 0, done.err + done.out
    assert "KEPT" in done.out
    assert "Traceback" not in done.err


def count(file):
    engine = open_engine(f"sqlite:///{file}")
    try:
        with engine.execution_options(reader=True).connect() as connection:
            if (
                connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'inbox'").scalar()
                is None
            ):
                return 0
            return connection.exec_driver_sql("SELECT count(*) FROM inbox").scalar_one()
    finally:
        engine.dispose()


def test_its_servers_see_no_variable_that_could_lead_to_other_data(monkeypatch, tmp_path):
    monkeypatch.setenv("FEISHU_BOT__PLATFORMS__FEISHU__APP_ID", "cli_real")
    monkeypatch.setenv("CONVERSATION_DB_URL", "postgresql://the.real.one/bot")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert not {"FEISHU_BOT__PLATFORMS__FEISHU__APP_ID", "CONVERSATION_DB_URL", "HTTPS_PROXY"} & set(
        environment(tmp_path)
    )


@pytest.mark.skipif(why_not_apart() is not None, reason=f"no namespaces here: {why_not_apart()}")
async def test_groups_of_processes_can_be_as_on_machines_of_their_own(tmp_path):
    words = ("--on", "postgresql", "--minutes", "0.1", "--workers", "2", "--lease", "3", "--seed", "3")
    done = await typed("-m", "feishu_bot.chaos", *words, cwd=tmp_path)
    assert done.code == 0, done.err + done.out
    assert "2 x 2 processes in namespaces" in done.out or "NOT TESTED" in done.err
