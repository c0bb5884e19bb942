"""``bot.py chat``: the terminal's door, with and without a server beside."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

import pytest

from feishu_bot.store import schema
from tests.e2e.bots import Bot, configuration

BOT = Path(__file__).parents[2] / "bot.py"


async def chat_alone(file, words, *options):
    """Type lines at ``bot.py chat``, as anybody does; return exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(BOT), "chat", "--config", str(file), *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate("".join(f"{line}\n" for line in words).encode())
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def chat(bots, tmp_path):
    """As ``chat_alone``, from a program that is warm."""
    numbers = itertools.count()

    async def run(file, words, *options):
        number = next(numbers)
        reads, log, errors = (tmp_path / f"chat-{number}-{name}" for name in ("in", "out", "err"))
        reads.write_text("".join(f"{line}\n" for line in words))
        words = ["chat", "--config", str(file), *options]
        pid = bots.nursery.start("bot", words, bots.folder, log, reads=reads, errors=errors)
        code = await Bot(pid, log).ended()
        return code, log.read_text(), errors.read_text()

    return run


async def test_each_line_is_answered_in_order_and_the_conversation_goes_on_the_next_time(
    bots, model, db_url, record, chat
):
    file = bots.write(configuration(db_url, model=model))
    assert await chat(file, ["one", "", "two"], "--user", "ann") == (0, "echo: one\necho: two\n", "")
    assert (await chat(file, ["three"], "--user", "ann"))[1] == "echo: three\n"
    assert [m["content"] for m in model.requests[-1].body["messages"]][1:-1] == [
        *("one", "echo: one", "two", "echo: two")
    ]
    (conversation,) = record.rows(schema.conversations)
    assert (conversation.user_key, conversation.message_count) == ("terminal:private:ann", 6)
    assert {row.state for row in record.inbox()} == {"answered"}
    record.check_accounts()


async def test_a_server_beside_neither_answers_twice_nor_is_disturbed(
    bots, people, feishu, model, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model))
    code, out, _ = await chat_alone(
        bots.write(configuration(sqlite_url, feishu=feishu, model=model)), ["hi"] * 5
    )
    assert (code, out) == (0, "echo: hi\n" * 5)
    await people.say(bot, "hello")
    assert await people.replies(1) == ["echo: hello"]
    await sqlite_record.settled()
    assert len(sqlite_record.messages()) == 12
    assert len(model.requests) == 6


async def test_commands_errors_and_wrong_use_are_told(bots, sqlite_url, chat):
    file = bots.write(configuration(sqlite_url))
    _, out, _ = await chat(file, ["/whoami", "/nothing"], "--user", "a:b")
    assert "Person: terminal:a%3Ab" in out
    assert "Unknown command: /nothing." in out
    assert (await chat(file, [], "--user", "\n"))[0] == 2
    off = configuration(sqlite_url, platforms={"terminal": {"enabled": False}})
    code, _, err = await chat(bots.write(off), ["x"])
    assert (code, err) == (
        2,
        "platforms: the terminal is switched off; set platforms.terminal.enabled: true\n",
    )


@pytest.mark.parametrize("url", ["postgresql://nobody:secret@127.0.0.1:1/none"])
async def test_a_database_that_cannot_be_reached_is_one_line(bots, url, chat):
    code, out, err = await chat(bots.write(configuration(url)), ["x"])
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "secret" not in err
    assert len(err.splitlines()) == 1
