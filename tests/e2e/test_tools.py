"""Tools of a plugin, asked for by a model, in a server that runs."""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until

PLUGIN = """
from feishu_bot.hooks import Tool

async def stock(context, article: str):
    "Tells how much is in stock."
    return {"article": article, "asked by": context.message.sender_id}

async def tools(bot):
    return [Tool(stock)]
"""
TOOL_SERVER = str(Path(__file__).parents[1] / "ai" / "tool_server.py")
TEA = Behaviour(tool_calls=(("stock", '{"article": "tea"}'),))


@pytest.fixture
def shop(bots):
    (bots.folder / "plugins").mkdir()
    (bots.folder / "plugins" / "shop.py").write_text(PLUGIN)
    return {"enabled": ["shop"]}


async def test_calls_and_results_are_stored_with_the_answer_and_told_again(
    bots, shop, people, feishu, model, db_url, record
):
    budgets = [{"name": "ever", "window": "total", "limit_tokens": 100_000}]
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, plugins=shop, budgets=budgets))
    model.script(TEA, Behaviour(text="twelve"))
    await people.say(bot, "how much tea?")
    assert await people.replies(1) == ["twelve"]
    await people.say(bot, "thank you")
    await people.replies(2)
    await record.settled()
    stored = record.messages()
    assert [(m.role, m.content) for m in stored] == [
        ("user", "how much tea?"),
        ("assistant", ""),
        ("tool", '{"article":"tea","asked by":"ou_ann"}'),
        ("assistant", "twelve"),
        ("user", "thank you"),
        ("assistant", "echo: thank you"),
    ]
    assert orjson.loads(stored[1].metadata_json)["tool_calls"][0]["name"] == "stock"
    assert orjson.loads(stored[2].metadata_json) == {"tool_name": "stock", "tool_call_id": "call_0"}
    prompt = model.requests[2].body["messages"]
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert prompt[2]["tool_calls"][0]["id"] == prompt[3]["tool_call_id"] == "call_0"
    (window,) = record.rows(schema.budget_windows)
    assert (window.reserved, window.used) == (0, model.tokens)
    assert record.count(schema.usage) == 3


@pytest.mark.parametrize("persistent", [True, False])
async def test_a_server_that_dies_between_two_calls_asks_again_with_nothing_stored(
    bots, shop, people, feishu, model, sqlite_url, sqlite_record, persistent
):
    keeps = {"conversation_persistence": {"enabled": persistent}}
    config = configuration(sqlite_url, feishu=feishu, model=model, plugins=shop, ai=keeps)
    bot = await bots.start(config)
    model.script(TEA, Behaviour(kind="hang"), TEA, Behaviour(text="twelve"))
    await people.say(bot, "how much tea?")
    while model.count < 2:
        model.asked.clear()
        await model.asked.wait()
    await bot.kill()
    assert sqlite_record.messages() == []
    await bots.start(config)
    assert await people.replies(1) == ["twelve"]
    await sqlite_record.settled()
    assert [m.role for m in sqlite_record.messages()] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ] * persistent
    assert [u.outcome for u in sqlite_record.rows(schema.usage)] == ["unknown", "unknown", "ok", "ok"]


async def test_a_tool_is_offered_only_where_the_configuration_chooses_it(
    bots, shop, people, feishu, model, sqlite_url
):
    bot = await bots.start(
        configuration(sqlite_url, feishu=feishu, model=model, plugins=shop, ai={"tools": []})
    )
    await people.say(bot, "how much tea?")
    await people.replies(1)
    assert "tools" not in model.requests[0].body


async def test_a_tool_of_an_mcp_server_is_called_and_a_server_that_is_away_stops_nothing(
    bots, people, http, feishu, model, sqlite_url
):
    servers = {
        "shop": {"command": sys.executable, "args": [TOOL_SERVER], "tools": ["price"]},
        "gone": {"command": "/nonexistent/program"},
    }
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai={"mcp_servers": servers}))
    await until(lambda: bot.lines("mcp server connected"), "the tools")
    model.script(Behaviour(tool_calls=(("shop_price", '{"article": "tea"}'),)), Behaviour(text="three"))
    await people.say(bot, "what does tea cost?")
    assert await people.replies(1) == ["three"]
    assert [t["function"]["name"] for t in model.requests[0].body["tools"]] == ["shop_price"]
    assert model.requests[1].body["messages"][-1]["content"].startswith("1 tea cost 3, says ")
    async with http.get(f"{bot.url}/readyz") as response:
        (problem,) = (await response.json())["degraded"]
    assert problem.startswith("mcp server gone is not connected: FileNotFoundError")
    assert await bot.stop() == 0
