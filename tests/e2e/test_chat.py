"""``POST /chat`` and the page: the browser's and scripts' door."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from io import BytesIO

import aiohttp
import orjson
import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import MODEL, configuration, free_port, until


class Door:
    """``POST /chat`` of one server."""

    def __init__(self, http, bot):
        self.http = http
        self.bot = bot

    async def ask(self, message=None, *, body=None, headers=None, **more):
        """Return status and JSON."""
        data = orjson.dumps({"message": message, **more}) if body is None else body
        url = f"{self.bot.url}/chat"
        async with self.http.post(url, data=BytesIO(data), headers=headers) as response:
            assert response.content_type == "application/json"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            return response.status, await response.json()

    async def stream(self, message, **more):
        """Return the events of a streamed answer."""
        data = orjson.dumps({"message": message, **more})
        headers = {"Accept": "text/event-stream"}
        async with self.http.post(f"{self.bot.url}/chat", data=data, headers=headers) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = (await response.read()).decode()
        return [parse_event(block) for block in text.split("\n\n") if block and not block.startswith(":")]


def parse_event(block):
    name, data = block.split("\n")
    return name.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))


@pytest.fixture
async def door(bots, http, model, sqlite_url):
    return Door(http, await bots.start(configuration(sqlite_url, model=model)))


async def test_a_question_is_answered_with_its_usage_and_the_next_one_goes_on(
    bots, http, model, db_url, record
):
    door = Door(http, await bots.start(configuration(db_url, model=model)))
    status, first = await door.ask("hi")
    (call,) = model.requests
    assert status == 200
    assert first == {
        "response": "echo: hi",
        "conversation_id": first["conversation_id"],
        "message_id": first["message_id"],
        "usage": {
            "input_tokens": call.prompt_tokens,
            "output_tokens": call.output_tokens,
            "total_tokens": call.prompt_tokens + call.output_tokens,
            "model": MODEL,
        },
    }
    _, second = await door.ask("again", conversation_id=first["conversation_id"])
    assert second["conversation_id"] == first["conversation_id"]
    _, other = await door.ask("elsewhere")
    assert other["conversation_id"] != first["conversation_id"]
    stored = {m.id: m.content for m in record.messages(conversation_id=first["conversation_id"])}
    assert list(stored.values()) == ["hi", "echo: hi", "again", "echo: again"]
    assert stored[first["message_id"]] == "echo: hi"
    assert [m["content"] for m in model.requests[1].body["messages"]][1:] == ["hi", "echo: hi", "again"]
    assert record.rows(schema.conversations)[0].user_key == "web:private:local"


async def test_a_repeated_request_id_waits_for_the_first_answer_and_returns_it_also_after_a_restart(
    bots, http, model, db_url, record
):
    config = configuration(db_url, model=model)
    bot = await bots.start(config)
    door = Door(http, bot)
    model.script(Behaviour(delay_s=0.4))
    first, *others = await asyncio.gather(*(door.ask("once", request_id="r1") for _ in range(4)))
    assert first[0] == 200
    assert others == [first] * 3
    assert await door.ask("another text", request_id="r1") == first
    await bot.stop()
    door.bot = await bots.start(config)
    assert await door.ask("once", request_id="r1") == first
    assert [name for name, _ in await door.stream("once", request_id="r1")] == ["done"]
    assert model.count == 1
    assert record.count(schema.inbox) == 1
    _, fresh = await door.ask("once", request_id="r2")
    assert fresh["message_id"] != first[1]["message_id"]


async def test_a_question_whose_server_died_is_answered_by_the_next_one_when_it_is_asked_again(
    bots, http, model, sqlite_url, sqlite_record
):
    config = configuration(sqlite_url, model=model)
    door = Door(http, await bots.start(config, crash=("answered", 1)))
    with pytest.raises(aiohttp.ClientError):
        await door.ask("once", request_id="r1")
    door.bot = await bots.start(config)
    status, answer = await door.ask("once", request_id="r1")
    assert (status, answer["response"]) == (200, "echo: once")
    assert answer["usage"]["total_tokens"] == sum(
        c.input_tokens + c.output_tokens for c in sqlite_record.ledger(outcome="ok")
    )


async def test_an_answer_is_streamed_in_pieces_and_ends_with_the_whole(door, model):
    model.script(Behaviour(text="one two three four", chunks=4, chunk_delay_s=0.02))
    *deltas, (last, done) = await door.stream("count")
    assert {name for name, _ in deltas} == {"delta"}
    assert "".join(data["text"] for _, data in deltas) == "one two three four"
    assert len(deltas) > 1
    assert last == "done"
    assert done["response"] == "one two three four"
    assert done.keys() == {"response", "conversation_id", "message_id", "usage"}


async def test_a_failed_model_is_502_and_an_error_event(door, model):
    model.default = Behaviour("status", status=401)
    status, answer = await door.ask("hi")
    sentence = "Sorry, something went wrong with your message. Please try again later."
    assert (status, answer) == (502, {"error": {"code": "model_failed", "message": sentence}})
    assert await door.stream("hi") == [("error", {"code": "model_failed", "message": sentence})]
    assert await door.ask("hi", request_id="r") == (status, answer)
    assert await door.ask("hi", request_id="r") == (status, answer), "also from the record"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'"hi"',
        b"{}",
        b'{"message": ""}',
        b'{"message": " \\n "}',
        b'{"message": 5}',
        b'{"message": null}',
        b'{"message": "hi", "agent": "nobody"}',
        b'{"message": "hi", "agent": []}',
        b'{"message": "hi", "agent": {}}',
        b'{"message": "hi", "conversation_id": "1"}',
        b'{"message": "hi", "conversation_id": true}',
        b'{"message": "hi", "conversation_id": 1.5}',
        b'{"message": "hi", "conversation_id": 99999999999999999999999}',
        b'{"message": "hi", "request_id": ""}',
        b'{"message": "hi", "request_id": 7}',
        b'{"message": "hi", "request_id": "a\\u0000b"}',
        b'{"message": "hi", "request_id": "' + b"x" * 201 + b'"}',
        b'{"message": "\\ud800"}',
        b'{"message": ' * 50_000,
        '{"message": "hi"}'.encode("utf-16"),
    ],
    ids=range(23),
)
async def test_what_is_no_question_is_400(http, shared_bot, body):
    bot, record = shared_bot
    status, answer = await Door(http, bot).ask(body=body)
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert record.rows(schema.inbox) == []
    assert bot.complaints() == []


@pytest.mark.parametrize("conversation_id", [1, 0, -1, 2**53, 2**63 - 1, 2**64 - 1])
async def test_an_unknown_conversation_is_404(http, shared_bot, conversation_id):
    bot, _ = shared_bot
    status, answer = await Door(http, bot).ask("hi", conversation_id=conversation_id)
    assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_somebody_elses_conversation_is_404_and_stays_as_it_is(
    bots, http, people, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    await people.say(bot, "private")
    await sqlite_record.settled()
    (theirs,) = sqlite_record.rows(schema.conversations)
    status, _ = await Door(http, bot).ask("hi", conversation_id=theirs.id)
    assert status == 404
    assert sqlite_record.count(schema.messages) == 2


async def test_too_large_and_too_long_are_413(bots, http, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, chat={"max_input_tokens": 10}))
    door = Door(http, bot)
    status, answer = await door.ask("x" * 2_000_000)
    assert (status, answer["error"]["code"]) == (413, "too_large")
    status, answer = await door.ask("many words " * 10)
    assert (status, answer["error"]["code"]) == (413, "too_long")
    assert "21 tokens; the limit is 10" in answer["error"]["message"]


async def test_a_used_up_budget_is_429_with_the_numbers(bots, http, sqlite_url):
    budget = {"name": "tiny", "window": "total", "limit_tokens": 5}
    door = Door(http, await bots.start(configuration(sqlite_url, budgets=[budget])))
    status, answer = await door.ask("hi")
    assert (status, answer["error"]["code"]) == (429, "budget_exceeded")
    assert "“tiny” has used 0 of 5 tokens" in answer["error"]["message"]
    status, answer = await door.ask("/usage")
    assert status == 200, "commands keep working"


async def test_an_answer_that_takes_too_long_is_202_and_can_be_fetched_later(bots, http, model, sqlite_url):
    ai = {"timeout_s": 0.2}
    bot = await bots.start(configuration(sqlite_url, model=model))
    door = Door(http, bot)
    _, known = await door.ask("first")
    # Two tries of 0.2 s and five seconds of grace: the plugin that thinks for longer makes it late.
    plugins = bots.folder / "plugins"
    plugins.mkdir()
    (plugins / "slow.py").write_text(
        "import asyncio\nasync def on_message(context):\n    await asyncio.sleep(6)\n    return 'at last'\n"
    )
    config = configuration(
        sqlite_url, model=model, ai=ai, plugins={"directory": str(plugins), "enabled": ["slow"]}
    )
    await bot.stop()
    door.bot = await bots.start(config)
    in_known = door.ask("hi", request_id="a", conversation_id=known["conversation_id"])
    in_new = door.ask("hi", request_id="b")
    assert await asyncio.gather(in_known, in_new) == [
        (202, {"conversation_id": known["conversation_id"], "request_id": "a", "status": "in progress"}),
        (202, {"conversation_id": None, "request_id": "b", "status": "in progress"}),
    ]
    status, answer = await door.ask("hi", request_id="b")
    assert (status, answer["response"]) == (200, "at last")
    assert isinstance(answer["conversation_id"], int)


async def test_a_command_answers_here_too_and_after_new_another_conversation_begins(door):
    _, first = await door.ask("hi")
    status, answer = await door.ask("/new", conversation_id=first["conversation_id"], request_id="n")
    assert (status, answer["conversation_id"]) == (200, None)
    assert answer["usage"] == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "model": ""}
    assert await door.ask("/new", request_id="n") == (status, answer), "also from the record"
    _, usage = await door.ask("/usage", conversation_id=first["conversation_id"], request_id="u")
    assert await door.ask("/usage", request_id="u") == (200, usage)


async def test_a_store_that_is_away_is_503(bots, http):
    port = free_port()
    bot = bots.launch(configuration("postgresql://nobody@127.0.0.1:1/none", server={"port": port}))
    bot.url = f"http://127.0.0.1:{port}"
    await until(lambda: bot.lines("waiting for the database"), "the server")
    status, answer = await Door(http, bot).ask("hi")
    assert (status, answer["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "bot.example.org"},
        {"Host": "127.0.0.1.example.org"},
        {"Host": "["},
        {"Host": "10.0.0.1"},
        {"Forwarded": "for=192.0.2.1"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-Host": "localhost"},
        {"X-Forwarded-Proto": "https"},
        {"X-Real-IP": "127.0.0.1"},
        {"Origin": "https://example.org"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
async def test_only_a_request_of_this_machines_own_page_is_the_local_user(http, shared_bot, headers):
    bot, record = shared_bot
    status, answer = await Door(http, bot).ask("hi", headers=headers)
    assert (status, answer["error"]["code"]) == (403, "forbidden")
    assert record.rows(schema.inbox) == []


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
async def test_the_page_on_this_machine_is_the_local_user(bots, http, sqlite_url, name):
    bot = await bots.start(configuration(sqlite_url))
    host = f"{name}:{bot.url.rsplit(':', 1)[1]}"
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert (await Door(http, bot).ask("hi", headers=headers))[0] == 200


async def test_the_page_loads_only_from_here_and_cannot_be_framed(http, shared_bot):
    bot, _ = shared_bot
    async with http.get(f"{bot.url}/") as response:
        page = await response.text()
        policy = response.headers["Content-Security-Policy"]
        assert response.status == 200
        assert response.content_type == "text/html"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert "Server" not in response.headers
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {"/static/page.css", "/static/icon.svg"} <= {address.partition("?")[0] for address in loaded}
    for path in loaded:
        if path.startswith("#"):
            continue
        assert re.match(r"/(?!/)", path), path
        async with http.get(bot.url + path) as response:
            assert response.status == 200
            assert "Content-Security-Policy" in response.headers


async def test_visitors_from_elsewhere_reach_the_platforms_door_only(bots, http, people, feishu, sqlite_url):
    server = {"private_networks": ["10.0.0.0/8"]}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, server=server))
    for path in ("/", "/readyz", "/metrics", "/static/chat.js", "/chat", "/nothing"):
        async with http.get(bot.url + path) as response:
            assert response.status == 403, path
    async with http.get(f"{bot.url}/healthz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    await people.say(bot, "hi")
    assert await people.replies(1) == ["hi"]


@pytest.mark.parametrize("removed", [False, True], ids=["hidden", "removed"])
async def test_what_was_asked_in_a_conversation_that_is_deleted_meanwhile_is_ignored(
    bots, http, model, db_url, record, removed
):
    door = Door(http, await bots.start(configuration(db_url, model=model)))
    _, known = await door.ask("first")
    model.script(Behaviour(delay_s=0.6))
    running = asyncio.create_task(door.ask("running", conversation_id=known["conversation_id"]))
    await until(lambda: model.count == 2, "the call")
    waiting = asyncio.create_task(door.ask("waiting", conversation_id=known["conversation_id"]))
    await until(lambda: len(record.inbox()) == 3, "the question")
    if removed:
        record.execute(schema.messages.delete())
        record.execute(schema.conversations.delete())
    else:
        record.execute(schema.conversations.update().values(hidden_at=datetime.now(UTC), scope_key=None))
    assert [(await answer)[0] for answer in (running, waiting)] == [404, 404]
    assert [(r.state, r.reason) for r in record.inbox()][1:] == [
        ("ignored", "the conversation was deleted")
    ] * 2
    assert [c.id for c in record.rows(schema.conversations)] == [known["conversation_id"]] * (not removed)
    assert len(record.messages()) == (0 if removed else 2)
    record.check_accounts()
    status, fresh = await door.ask("afresh")
    assert (status, fresh["response"]) == (200, "echo: afresh")
