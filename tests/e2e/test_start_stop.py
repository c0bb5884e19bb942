"""Starting, waiting, refusing to start, and stopping."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys

import aiohttp
import pytest
from sqlalchemy.engine import make_url

from feishu_bot.app import App
from feishu_bot.config import load
from feishu_bot.reference import platform_settings
from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import PATIENCE_S, ROOT, configuration, free_port, until
from tests.e2e.proxy import Proxy
from tests.e2e.test_store_failures import on_servers, server_url, until_ready  # noqa: F401 - a fixture

BUDGETS = [{"name": "ever", "window": "total", "limit_tokens": 10_000_000}]


def run(*arguments, cwd):
    """Run the program as a user does, and return exit code, output and errors."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bot.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ starting


async def test_the_program_itself_starts_in_an_empty_folder_answers_and_stops(http, tmp_path):
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "bot.py"),
        "run",
        "--port",
        str(port),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**os.environ, "FEISHU_BOT__PLUGINS__ENABLED": "[]"},
    )

    async def ask():
        try:
            async with http.post(f"http://127.0.0.1:{port}/chat", data=b'{"message":"hi"}') as response:
                return await response.json() if response.status == 200 else None
        except aiohttp.ClientConnectorError:
            return None

    for _ in range(600):
        if (answer := await ask()) is not None:
            break
        await asyncio.sleep(0.05)
    assert answer["response"] == "hi"
    assert answer["usage"]["model"] == "echo"
    process.terminate()
    _, errors = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in errors
    assert (tmp_path / "data" / "conversations.db").exists()


async def test_a_plain_start_imports_nothing_that_only_pages_accounts_vendors_or_other_databases_need(
    tmp_path,
):
    (tmp_path / "config.yaml").write_text(
        "server: {port: 0}\nplugins: {enabled: []}\nlogging: {format: json}\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-X", "importtime", str(ROOT / "bot.py"), "run", cwd=tmp_path, stderr=stream
        )
        await until(
            lambda: process.returncode is not None or '"event":"ready"' in log.read_text(), "the start"
        )
        serving = process.returncode is None
        if serving:
            process.terminate()
        await process.wait()
    assert serving, log.read_text()[-2000:]
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in log.read_text().splitlines()
        if line.startswith("import time:")
    }
    assert {"aiohttp", "feishu_bot", "sqlalchemy", "tiktoken"} <= imported  # the list itself is whole
    assert not imported & {
        *("jinja2", "markdown_it", "nh3"),  # pages that somebody opens
        *("argon2", "_argon2_cffi_bindings"),  # passwords
        *("psycopg", "psycopg_binary", "pymysql"),  # other databases
        *("mcp", "pydantic_ai", "anthropic", "openai", "google"),  # models and tools that are not configured
        *("alembic", "mako"),  # migrations of an older schema
        *("httpx", "requests", "numpy", "playwright"),
    }


async def test_messages_recorded_before_a_start_are_answered_by_it(bots, people, feishu, db_url, record):
    config = configuration(db_url, feishu=feishu)
    bot = await bots.start(config, crash=("acknowledged", 3))
    for n in range(3):
        await people.post(bot, people.event(f"{n}", user=f"u{n}"))
    await bot.ended()
    await bots.start(config)
    assert sorted(await people.replies(3)) == ["0", "1", "2"]


async def test_a_start_tells_what_the_database_holds_and_reads_ahead_what_was_said_last(
    bots, people, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu)
    bot = await bots.start(config)
    for n in range(3):
        await people.say(bot, f"{n}", user=f"u{n}")
    await people.replies(3)
    await bot.stop()
    persistence = {"conversation_persistence": {"warm_sessions": 2, "db_url": db_url}}
    bot = await bots.start({**config, "ai": {**config["ai"], **persistence}})
    await until(lambda: bot.lines("sessions warmed"), "histories to be read")
    (ready,), (warmed,) = bot.lines("database ready"), bot.lines("sessions warmed")
    assert (warmed["conversations"], warmed["sessions"]) == (3, 2)
    assert ready["kind"] in ready["where"].replace("mysql", "mariadb")


@on_servers
async def test_a_database_that_is_away_is_waited_for(bots, people, feishu, server_url):  # noqa: F811 - the fixture
    port = free_port()
    async with Proxy(server_url, up=False) as proxy:
        bot = bots.launch(configuration(proxy.url, feishu=feishu, server={"port": port}))
        bot.url = f"http://127.0.0.1:{port}"
        await until(lambda: bot.lines("waiting for the database"), "the server to wait")
        async with people.http.get(f"{bot.url}/healthz") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        async with people.http.get(f"{bot.url}/readyz") as response:
            assert response.status == 503
        event = people.event("hi")
        assert await people.post(bot, event) == 503
        async with people.http.post(f"{bot.url}/webhook/feishu", data=b"x") as response:
            assert response.status == 401, "who cannot sign is refused all the same"
        proxy.up = True
        await until_ready(people, bot, 200)
        assert await people.post(bot, event) == 200
        assert await people.replies(1) == ["hi"]
        await bot.stop()
        assert bot.complaints() == []


class _Lost(logging.Handler):
    """Takes the way to the database away at the moment when it has been opened, and gives it back later."""

    def __init__(self, proxy):
        super().__init__()
        self.proxy = proxy
        self.waited = False

    def emit(self, record):
        if record.msg == "database ready":
            self.proxy.up = False
            self.proxy.cut()
        elif record.msg == "waiting for the database":
            self.waited = self.proxy.up = True


@on_servers
async def test_a_database_that_goes_away_between_its_opening_and_the_start_is_waited_for(
    tmp_path,
    server_url,  # noqa: F811 - the fixture
):
    async with Proxy(server_url) as proxy:
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(configuration(proxy.url)))
        app = App(load(file, platform_settings=platform_settings()).settings)
        lost = _Lost(proxy)
        log = logging.getLogger("feishu_bot.app")
        log.addHandler(lost)
        log.setLevel(logging.INFO)
        try:
            await app.start()
            assert lost.waited, "nothing had to be waited for"
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"http://127.0.0.1:{app.port}/readyz") as response,
            ):
                assert response.status == 200
        finally:
            log.removeHandler(lost)
            log.setLevel(logging.NOTSET)
            await app.stop()


async def test_a_server_that_waits_for_its_database_can_be_stopped(bots):
    bot = bots.launch(configuration("postgresql://nobody@127.0.0.1:1/none"))
    await until(lambda: bot.lines("waiting for the database"), "the server to wait")
    assert await bot.stop() == 0
    assert bot.complaints() == []


async def test_messages_of_an_account_that_is_switched_off_wait_until_it_is_on_again(
    bots, people, feishu, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu)
    dying = await bots.start(config, crash=("acknowledged", 1))
    await people.post(dying, people.event("hello"))
    await dying.ended()
    off = await bots.start(configuration(sqlite_url))
    (lane,) = await until(
        lambda: [
            r for r in sqlite_record.rows(schema.lanes) if r.ready_at and r.ready_at > sqlite_record.now_ms()
        ],
        "the message to be put off",
    )
    assert lane.lease_token is None
    (row,) = sqlite_record.inbox()
    assert (row.state, row.attempts) == ("open", 0)
    assert await off.stop() == 0
    await bots.start(config)
    assert await people.replies(1) == ["hello"]


def only_line(bot):
    """Return the one line that is no log; there must be no other, and no traceback."""
    (line,) = [line["text"] for line in bot.lines() if "text" in line]
    assert not [line for line in bot.lines() if "exception" in line]
    return line


async def refused(bots, config):
    bot = bots.launch(config)
    assert await bot.ended() == 1
    return only_line(bot)


async def test_a_port_in_use_is_exit_1_with_one_line(bots, sqlite_url):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = await refused(bots, configuration(sqlite_url, server={"port": port}))
    assert line.startswith("error:")
    assert str(port) in line


async def test_a_wrong_password_is_exit_1_with_one_line_that_does_not_hold_it(bots, mariadb_url):
    url = make_url(mariadb_url).set(username="nobody", password="hunter2-secret")
    line = await refused(bots, configuration(url.render_as_string(hide_password=False)))
    assert "Access denied" in line
    assert "hunter2" not in bots.started[-1].log.read_text()


@pytest.mark.parametrize("change", [{"database": "no_such_database"}, {"username": "no_such_role"}], ids=str)
async def test_a_database_or_role_that_does_not_exist_is_exit_1(bots, postgresql_url, change):
    url = make_url(postgresql_url).set(**change)
    line = await refused(bots, configuration(url.render_as_string(hide_password=False)))
    assert "does not exist" in line


async def test_a_newer_schema_is_exit_1_and_is_left_as_it_is(bots, db_url, record):
    record.execute_text("UPDATE alembic_version SET version_num = '9999'")
    line = await refused(bots, configuration(db_url))
    assert "9999" in line
    assert "newer" in line
    assert record.execute_text("SELECT version_num FROM alembic_version") == [("9999",)]


@pytest.mark.parametrize(
    "content", [b"this is no database " * 500, b"SQLite format 3\0" + b"\xff" * 8000], ids=["rubbish", "torn"]
)
async def test_a_damaged_file_is_exit_1_and_is_left_as_it_is(bots, tmp_path, content):
    file = tmp_path / "bot.db"
    file.write_bytes(content)
    line = await refused(bots, configuration(f"sqlite:///{file}"))
    assert line.startswith("error:")
    assert file.read_bytes() == content


async def test_a_folder_that_cannot_be_made_is_exit_1(bots, tmp_path):
    (tmp_path / "file").write_text("")
    line = await refused(bots, configuration(f"sqlite:///{tmp_path}/file/bot.db"))
    assert line.startswith("error:")


def test_help_and_mistakes_have_the_exit_codes_of_a_command_line(tmp_path):
    code, output, _ = run("run", "--help", cwd=tmp_path)
    assert code == 0
    assert "--config" in output
    (tmp_path / "config.yaml").write_text("server: {prot: 1}\nchat: {language: fr}\n")
    code, _, errors = run("check", cwd=tmp_path)
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("config.yaml:") for line in lines)
    assert "port" in lines[0]
    assert run("run", cwd=tmp_path)[0] == 2
    assert run("run", "--config", "missing.yaml", cwd=tmp_path)[0] == 2
    assert run("run", "--port", "70000", cwd=tmp_path)[0] == 2


async def test_an_account_without_its_secret_is_exit_2(bots, feishu, sqlite_url):
    config = configuration(sqlite_url, feishu=feishu, platforms={"feishu": {"encrypt_key": ""}})
    bot = bots.launch(config)
    assert await bot.ended() == 2
    assert "encrypt_key" in bot.log.read_text()
    assert "Traceback" not in bot.log.read_text()


# ------------------------------------------------------------------------------------------------ stopping


async def test_what_runs_is_finished_and_what_waits_is_left_for_the_next_start(
    bots, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model, budgets=BUDGETS)
    bot = await bots.start(config)
    model.script(Behaviour(delay_s=1.0))
    await people.say(bot, "running")
    await until(lambda: model.count == 1, "the call")
    await people.say(bot, "waiting")
    assert await bot.stop() == 0
    assert bot.complaints() == []
    assert feishu.texts() == ["echo: running"]
    running, waiting = record.inbox()
    assert (running.state, running.attempts) == ("answered", 1)
    assert (waiting.state, waiting.attempts) == ("open", 0)
    assert record.rows(schema.processes) == []
    assert all(r.lease_until == 0 and r.send_until == 0 for r in record.rows(schema.lanes))
    await bots.start(config)
    assert await people.replies(2) == ["echo: running", "echo: waiting"]
    await record.settled()
    assert [c.outcome for c in record.ledger()] == ["ok", "ok"]
    record.check_accounts()


async def test_under_full_traffic_nothing_acknowledged_is_lost_and_nothing_is_booked_twice(
    bots, people, model, feishu, db_url, record
):
    config = configuration(db_url, feishu=feishu, model=model, budgets=BUDGETS)
    model.default = Behaviour(delay_s=0.02)
    bot = await bots.start(config)
    acknowledged = []

    async def talk(user):
        for n in range(1000):
            text = f"{user} {n}"
            if await people.post(bot, people.event(text, user=user)) != 200:
                return
            acknowledged.append(text)

    talks = asyncio.gather(*(talk(f"u{n}") for n in range(20)))
    await until(lambda: len(acknowledged) > 100, "traffic")
    assert await bot.stop() == 0
    await talks
    assert bot.complaints() == []
    await bots.start(config)
    await record.settled()
    assert {f"echo: {text}" for text in acknowledged} <= set(feishu.texts())
    assert len(feishu.texts()) == len(set(feishu.texts())) == record.count(schema.inbox)
    assert {c.outcome for c in record.ledger()} == {"ok"}, "no call was cut off, so none is booked as unknown"
    record.check_accounts()
    record.check_ends()


async def test_an_answer_on_its_way_out_still_leaves(bots, people, feishu, sqlite_url, sqlite_record):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    feishu.fail(Failure(delay_s=0.5))
    await people.say(bot, "hi")
    await until(lambda: any(path.endswith("/reply") for _, path in feishu.requests), "the attempt")
    assert await bot.stop() == 0
    assert feishu.texts() == ["hi"]
    (part,) = sqlite_record.outbox()
    assert (part.state, part.attempts) == ("sent", 1)


async def test_an_interrupt_at_the_terminal_stops_as_a_signal_does(bots, http, sqlite_url):
    bot = await bots.start(configuration(sqlite_url))
    bot.signal(signal.SIGINT)
    assert await bot.ended() == 0
    assert bot.complaints() == []


async def test_who_waits_at_the_door_gets_his_answer_before_the_server_stops(bots, http, model, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, model=model))
    model.script(Behaviour(delay_s=0.5))

    async def ask():
        async with http.post(f"{bot.url}/chat", data=b'{"message": "hi"}') as response:
            return response.status, (await response.json())["response"]

    asking = asyncio.create_task(ask())
    await until(lambda: model.count == 1, "the call")
    assert await bot.stop() == 0
    assert await asking == (200, "echo: hi")


async def test_a_second_signal_stops_at_once_and_the_next_start_answers(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, feishu=feishu, model=model, budgets=BUDGETS)
    bot = await bots.start(config)
    model.script(Behaviour("hang"))
    await people.say(bot, "hi")
    await until(lambda: model.count == 1, "the call")
    bot.signal(signal.SIGTERM)
    async with aiohttp.ClientSession() as session:
        for _ in range(500):
            try:
                async with session.get(f"{bot.url}/healthz", headers={"Connection": "close"}):
                    await asyncio.sleep(0.01)
            except aiohttp.ClientError:
                break
    assert bot.exit_code is None, "it waits for the answer"
    bot.signal(signal.SIGTERM)
    assert await bot.ended() == 1
    assert bot.complaints() == []
    (row,) = sqlite_record.inbox()
    assert row.state == "open"
    await bots.start(config)
    assert await people.replies(1) == ["echo: hi"]
    await sqlite_record.settled()
    assert [c.outcome for c in sqlite_record.ledger()] == ["unknown", "ok"]
    sqlite_record.check_accounts()


async def test_while_it_stops_new_messages_are_put_off_and_not_acknowledged(
    bots, people, model, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    model.script(Behaviour(delay_s=1.0))
    await people.say(bot, "hi")
    await until(lambda: model.count == 1, "the call")
    bot.signal(signal.SIGTERM)
    statuses = []
    while bot.exit_code is None and len(statuses) < 1000:
        statuses.append(await people.post(bot, people.event("late", user="bob", message_id="om_late")))
        await asyncio.sleep(0.02)
    await bot.ended()
    taken = sqlite_record.inbox(event_key="om:om_late")
    assert set(statuses) <= {0, 200, 503}
    assert bool(taken) == (200 in statuses)
    assert {503, 0} & set(statuses)


async def test_monitors_may_ask_for_the_headers_alone(bots, people, sqlite_url):
    bot = await bots.start(configuration(sqlite_url))
    for path in ("/healthz", "/readyz"):
        async with people.http.head(f"{bot.url}{path}") as response:
            assert (response.status, await response.read()) == (200, b"")
