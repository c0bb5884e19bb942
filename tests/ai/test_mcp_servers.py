"""Tools of MCP servers: of programs that are started, and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from pathlib import Path

import pytest

from feishu_bot.ai import mcp_servers
from feishu_bot.ai.chat_model import ToolCall
from feishu_bot.ai.mcp_servers import McpServers, _Server, check_servers
from feishu_bot.config import McpServerSettings, load
from feishu_bot.errors import ConfigError
from tests.e2e.bots import PATIENCE_S, free_port, until

SERVER = str(Path(__file__).parent / "tool_server.py")
SHOP = {"command": sys.executable, "args": (SERVER,)}


class Clock:
    """Lets no time pass between two tries."""

    def __init__(self):
        self.waits = []

    async def sleep(self, seconds):
        self.waits.append(seconds)
        await asyncio.sleep(0.01)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def connect(clock):
    made = McpServers(sleep=clock.sleep)

    async def configure(**servers):
        await made.configure({name: McpServerSettings(**own) for name, own in servers.items()})
        return made

    yield configure
    await made.stop()


async def connected(servers):
    await until(lambda: not servers.problems(), "the connection")
    return servers


def run(servers, name, arguments="{}"):
    return servers.run_tool(None, ToolCall("c", name, arguments))


def pid_of(said):
    return int(re.search(r"says (\d+)", said)[1])


async def test_the_tools_of_a_program_are_called_by_its_name_and_theirs(connect):
    servers = await connected(await connect(shop={**SHOP, "env": {"GREETING": "hello"}}))
    specs = {spec.name: spec for spec in servers.tools()}
    assert sorted(specs) == ["shop_close_down", "shop_many", "shop_price", "shop_slow_answer"]
    assert specs["shop_price"].description == "Tells a price."
    assert specs["shop_price"].parameters["required"] == ["article"]
    assert servers.tools() is servers.tools()
    said = await run(servers, "shop_price", '{"article": "tea", "count": 2}')
    assert said.startswith("2 tea cost 6, says ")
    assert said.endswith(", hello")
    assert await run(servers, "shop_many") == "one\ntwo"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"article": "gold"}', "The tool has failed: Error executing tool price"),
        ("{}", "The tool has failed: "),
        ("{", "The tool was not run: the arguments are not JSON."),
        ("[]", "The tool was not run: the arguments are no JSON object."),
    ],
)
async def test_what_is_wrong_with_a_call_is_told_in_words(connect, arguments, words):
    servers = await connected(await connect(shop=SHOP))
    assert (await run(servers, "shop_price", arguments)).startswith(words)
    assert "3, says" in await run(servers, "shop_price", '{"article": "tea"}')


async def test_a_tool_that_takes_too_long_is_given_up_and_the_server_stays(connect):
    servers = await connected(await connect(shop={**SHOP, "timeout_s": 1.5}))
    pid = pid_of(await run(servers, "shop_price", '{"article": "tea"}'))
    assert await run(servers, "shop_slow_answer") == "The tool took longer than 1.5 s."
    assert pid_of(await run(servers, "shop_price", '{"article": "tea"}')) == pid


async def test_a_program_that_dies_is_started_again_and_its_tools_stay(connect, clock):
    servers = await connected(await connect(shop=SHOP))
    pid, tools = pid_of(await run(servers, "shop_price", '{"article": "tea"}')), servers.tools()
    assert await run(servers, "shop_close_down") == "The tool's server has gone away; it may be back soon."
    assert pid_of(await run(servers, "shop_price", '{"article": "tea"}')) != pid
    assert servers.tools() == tools
    assert clock.waits


async def test_a_program_that_cannot_be_started_is_a_problem_with_its_reason(connect, clock):
    servers = await connect(
        nobody={"command": "/nonexistent/program"}, mute={"command": "/bin/true"}, shop=SHOP
    )
    await until(lambda: len(servers.problems()) == 2 and len(clock.waits) > 8, "the other two")
    nobody, mute = servers.problems()
    assert nobody.startswith("mcp server nobody is not connected: FileNotFoundError")
    assert mute.startswith("mcp server mute is not connected: ")
    assert "3, says" in await run(servers, "shop_price", '{"article": "tea"}')
    assert 15.0 in clock.waits


@pytest.mark.parametrize("ends", ["as a lost connection", "not at all"])
async def test_stopping_ends_also_where_the_clients_library_keeps_a_cancellation_to_itself(
    connect, monkeypatch, ends
):
    tries = []

    async def connects(server, stack, stderr):
        tries.append(server)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if ends == "as a lost connection":
                raise OSError("gone") from None
        await asyncio.Event().wait()

    monkeypatch.setattr(_Server, "_connect", connects)
    monkeypatch.setattr(mcp_servers, "_AGAIN_S", 0.05)
    servers = await connect(shop=SHOP)
    await until(lambda: tries, "the first try")
    async with asyncio.timeout(PATIENCE_S):
        await servers.stop()
    assert len(tries) == 1


async def test_only_the_tools_that_are_chosen_are_there(connect):
    servers = await connected(await connect(shop={**SHOP, "tools": ("pr*",)}, twin={**SHOP, "tools": ()}))
    assert [spec.name for spec in servers.tools()] == ["shop_price"]
    assert await run(servers, "twin_price") == "The tool is not there any more."


async def test_another_configuration_leaves_what_is_unchanged(connect):
    one, two = {**SHOP, "tools": ("price",)}, {**SHOP, "tools": ("many",)}
    servers = await connected(await connect(one=one, two=two))
    pid = pid_of(await run(servers, "one_price", '{"article": "tea"}'))
    await connected(await connect(one=one, three=two))
    assert sorted(spec.name for spec in servers.tools()) == ["one_price", "three_many"]
    assert pid_of(await run(servers, "one_price", '{"article": "tea"}')) == pid


@contextlib.asynccontextmanager
async def serving(port):
    process = await asyncio.create_subprocess_exec(
        sys.executable, SERVER, str(port), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 30
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            else:
                writer.close()
                break
        yield process.pid
    finally:
        process.kill()
        await process.wait()


async def test_a_server_is_reached_over_http_and_again_when_it_was_away(connect):
    port = free_port()
    async with serving(port) as pid:
        url = f"http://127.0.0.1:{port}/mcp"
        servers = await connected(
            await connect(shop={"url": url, "timeout_s": 10, "headers": {"X-Key": "k"}})
        )
        assert pid_of(await run(servers, "shop_price", '{"article": "tea"}')) == pid
    calling = asyncio.create_task(run(servers, "shop_price", '{"article": "tea"}'))
    await until(servers.problems, "the loss")
    async with serving(port) as pid:
        assert pid_of(await calling) == pid
        await connected(servers)


def test_without_the_client_the_configuration_says_what_to_install(monkeypatch):
    servers = {"shop": McpServerSettings(**SHOP)}
    assert check_servers(servers) == []
    monkeypatch.setitem(sys.modules, "mcp", None)
    assert check_servers({}) == []
    (line,) = check_servers(servers)
    assert "pip install 'feishu-bot[mcp]'" in line


@pytest.mark.parametrize(
    "own", ["{}", "{command: x, url: 'http://h/mcp'}", "{url: nonsense}", "{command: x, tool: y}"]
)
def test_a_server_has_a_command_or_a_url(tmp_path, own):
    (tmp_path / "config.yaml").write_text(f"ai: {{mcp_servers: {{shop: {own}}}}}")
    with pytest.raises(ConfigError, match="mcp_servers"):
        load(folder=tmp_path, platform_settings={}, environ={})
