"""One's own conversations by HTTP: lists, changes, search, export; coming back to an answer, and stopping it."""

from __future__ import annotations

import asyncio
from base64 import b64encode

import orjson
import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from tests.e2e.bots import configuration, until
from tests.e2e.browsers import Browser, add_accounts
from tests.e2e.test_chat import parse_event


@pytest.fixture
async def ann(bots, sqlite_url):
    """A script of ann's, with bob's beside it as ``ann.other``."""
    bot = await bots.start(configuration(sqlite_url))
    tokens = await add_accounts(sqlite_url, ann="user", bob="user")
    async with Browser(bot, token=tokens["ann"]) as made, Browser(bot, token=tokens["bob"]) as other:
        made.other = other
        yield made


async def say(browser, message, **more):
    status, answer = await browser.ask("POST", "/chat", {"message": message, **more})
    assert status == 200, answer
    return answer


async def test_conversations_are_listed_in_pages_the_one_used_last_first(ann):
    made = [(await say(ann, f"hi {n}"))["conversation_id"] for n in range(3)]
    await say(ann, "again", conversation_id=made[0])
    await say(ann.other, "not ann's")
    _, first = await ann.ask("GET", "/conversations?limit=2")
    assert [item["id"] for item in first["items"]] == [made[0], made[2]]
    assert first["next"] == made[2]
    _, rest = await ann.ask("GET", f"/conversations?limit=2&before={first['next']}")
    assert ([item["id"] for item in rest["items"]], rest["next"]) == ([made[1]], None)
    item = first["items"][0]
    assert (item["title"], item["message_count"], item["agent"]) == ("hi 0", 4, None)
    assert item["created_at"].endswith("Z")
    assert (await ann.ask("GET", f"/conversations/{made[0]}"))[1] == item


async def test_messages_come_newest_first_and_both_ways(ann):
    cid = (await say(ann, "one"))["conversation_id"]
    await say(ann, "two **bold**", conversation_id=cid)
    _, page = await ann.ask("GET", f"/conversations/{cid}/messages?limit=3&html")
    assert [(m["role"], m["content"]) for m in page["items"]] == [
        ("assistant", "two **bold**"),
        ("user", "two **bold**"),
        ("assistant", "one"),
    ]
    assert page["items"][0]["html"] == "<p>two <strong>bold</strong></p>\n"
    _, rest = await ann.ask("GET", f"/conversations/{cid}/messages?before={page['next']}")
    assert ([m["content"] for m in rest["items"]], rest["next"]) == (["one"], None)
    assert "html" not in rest["items"][0]
    _, newer = await ann.ask("GET", f"/conversations/{cid}/messages?after={rest['items'][0]['id']}&limit=2")
    assert [m["content"] for m in newer["items"]] == ["two **bold**", "one"]
    assert newer["next"] == newer["items"][0]["id"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "before=x", "before=-1", "before=1&after=1", "limit=٣"]
)
async def test_a_page_that_cannot_be_is_400(ann, query):
    cid = (await say(ann, "hi"))["conversation_id"]
    assert (await ann.ask("GET", f"/conversations/{cid}/messages?{query}"))[0] == 400


async def test_a_conversation_is_renamed_cleared_forked_and_deleted(ann, sqlite_record):
    first = await say(ann, "one")
    cid = first["conversation_id"]
    await say(ann, "two", conversation_id=cid)
    status, renamed = await ann.ask("PATCH", f"/conversations/{cid}", {"title": "  a <b>\n title "})
    assert (status, renamed["title"]) == (200, "a <b> title")
    status, fork = await ann.ask("POST", f"/conversations/{cid}/fork", {"message_id": first["message_id"]})
    assert (status, fork["parent_id"], fork["message_count"]) == (200, cid, 2)
    assert (await say(ann, "three", conversation_id=fork["id"]))["conversation_id"] == fork["id"]
    before = sqlite_record.rows(schema.conversations, id=cid)[0].version
    status, cleared = await ann.ask("POST", f"/conversations/{cid}/clear")
    assert (status, cleared["message_count"], cleared["total_tokens"]) == (200, 0, 0)
    assert sqlite_record.rows(schema.conversations, id=cid)[0].version > before
    assert (await ann.ask("DELETE", f"/conversations/{cid}")) == (204, None)
    assert (await ann.ask("DELETE", f"/conversations/{cid}"))[0] == 404
    await until(lambda: not sqlite_record.rows(schema.conversations, id=cid), "its rows to go")
    assert sqlite_record.count(schema.messages, conversation_id=fork["id"]) == 4


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("GET", "/messages", None),
        ("GET", "/export", None),
        ("GET", "/export?format=md", None),
        ("PATCH", "", {"title": "mine now"}),
        ("DELETE", "", None),
        ("POST", "/clear", None),
        ("POST", "/fork", {"message_id": 2}),
    ],
)
async def test_somebody_elses_conversation_does_not_exist(ann, method, path, body, sqlite_record):
    theirs = (await say(ann.other, "secret"))["conversation_id"]
    answer = await ann.ask(method, f"/conversations/{theirs}{path}", body)
    assert answer[0] == 404
    assert answer == await ann.ask(method, f"/conversations/999{path}", body), "nothing tells the two apart"
    assert sqlite_record.count(schema.messages) == 2
    mine = (await say(ann, "mine"))["conversation_id"]
    (asked, _) = sqlite_record.messages(conversation_id=theirs)
    status, _ = await ann.ask("POST", f"/conversations/{mine}/fork", {"message_id": asked.id})
    assert status == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "", {}),
        ("PATCH", "", {"title": ""}),
        ("PATCH", "", {"title": 5}),
        ("PATCH", "", {"title": "x" * 201}),
        ("PATCH", "", {"title": "a\0b"}),
        ("PATCH", "", b"nonsense"),
        ("POST", "/fork", {}),
        ("POST", "/fork", {"message_id": "1"}),
        ("POST", "/fork", {"message_id": True}),
        ("GET", "/export?format=exe", None),
    ],
)
async def test_a_change_that_cannot_be_is_400(ann, method, path, body):
    cid = (await say(ann, "hi"))["conversation_id"]
    assert (await ann.ask(method, f"/conversations/{cid}{path}", body))[0] == 400


async def test_search_finds_ones_own_words_and_marks_them(ann):
    cid = (await say(ann, "the quick brown <b>fox</b>"))["conversation_id"]
    await say(ann.other, "another fox")
    _, found = await ann.ask("GET", "/search?q=fox")
    assert {item["conversation_id"] for item in found["items"]} == {cid}
    assert {"text": "fox", "hit": True} in found["items"][0]["snippet"]
    _, page = await ann.ask("GET", "/search?q=fox&limit=1")
    _, rest = await ann.ask("GET", f"/search?q=fox&limit=1&offset={page['next']}")
    assert (len(page["items"]), len(rest["items"]), rest["next"]) == (1, 1, None)
    assert (await ann.ask("GET", "/search?q=bob"))[1]["items"] == []
    for bad in ("", "q=", "q=" + "x" * 201, "q=a&offset=-1"):
        assert (await ann.ask("GET", f"/search?{bad}"))[0] == 400


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "md"])
async def test_a_conversation_is_exported_as_a_file(ann, kind):
    cid = (await say(ann, "keep this 你好"))["conversation_id"]
    status, text = await ann.ask("GET", f"/conversations/{cid}/export?format={kind}")
    assert status == 200
    assert "keep this 你好" in (orjson.dumps(text).decode() if kind == "json" else text)
    assert ann.response.headers["Content-Disposition"] == f'attachment; filename="conversation-{cid}.{kind}"'


async def test_the_last_question_is_answered_anew_in_place_of_its_answer(ann, sqlite_record):
    cid = (await say(ann, "one"))["conversation_id"]
    await say(ann, "/retry", conversation_id=cid)
    assert [m.content for m in sqlite_record.messages(conversation_id=cid)] == ["one", "one"]


async def test_what_comes_along_is_taken_or_told_that_it_cannot_be_read(bots, sqlite_url, model):
    bot = await bots.start(configuration(sqlite_url, model=model))
    async with Browser(bot) as local:
        files = [{"name": "notes.txt", "data": b64encode(b"the secret number is 42").decode()}]
        await say(local, "what is it?", files=files)
        assert "the secret number is 42" in str(model.requests[0].body)
        picture = b64encode(PNG).decode()
        await say(local, "and this?", files=[{"name": "p.png", "data": picture}])
        assert picture in str(model.requests[1].body)
        await say(local, "", files=[{"name": "p.png", "data": picture}])
        program = [{"name": "a.exe", "data": b64encode(b"MZ\0\0").decode()}]
        status, _ = await local.ask("POST", "/chat", {"message": "run it", "files": program})
        assert status == 403, "told, not left out"


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


@pytest.mark.parametrize(
    "files",
    [
        "x",
        [1],
        [{}],
        [{"name": "a", "data": "***"}],
        [{"name": "", "data": "YQ=="}],
        [{"name": "a\nb", "data": "YQ=="}],
        [{"name": "x" * 121, "data": "YQ=="}],
        [{"name": "a", "data": ""}],
        [{"name": "a", "data": "YQ=="}] * 5,
    ],
)
async def test_files_that_are_none_are_400(ann, files):
    assert (await ann.ask("POST", "/chat", {"message": "hi", "files": files}))[0] == 400


# ----------------------------------------------------------------------------------- coming back, stopping


async def stream(browser, body, *, until_event=None, query=""):
    """Return the events of an answer; ``until_event`` leaves after the first of that name."""
    events = []
    headers = {"Accept": "text/event-stream"}
    async with browser.session.post(
        f"{browser.bot.url}/chat{query}", data=orjson.dumps(body), headers=headers
    ) as response:
        rest = ""
        async for chunk in response.content.iter_any():
            rest += chunk.decode()
            *blocks, rest = rest.split("\n\n")
            events += [parse_event(block) for block in blocks if not block.startswith(":")]
            if any(name == until_event for name, _ in events):
                break
    return events


def shown(events):
    """Return what a page shows after these events."""
    text = ""
    for name, data in events:
        if name == "delta":
            text = (text if data["at"] else "") + data["text"]
        elif name == "done":
            text = data["response"]
    return text


@pytest.fixture
async def local(bots, sqlite_url, model):
    async with Browser(await bots.start(configuration(sqlite_url, model=model))) as made:
        yield made


WORDS = [f"word{n} " for n in range(40)]


async def test_who_comes_back_in_the_middle_loses_and_doubles_nothing(local, model):
    model.script(Behaviour(text="".join(WORDS), chunks=len(WORDS), chunk_delay_s=0.05))
    body = {"message": "go", "request_id": "r1"}
    first = await stream(local, body, until_event="delta")
    assert 0 < len(shown(first)) < len("".join(WORDS))
    _, open_questions = await local.ask("GET", "/chat/pending")
    assert open_questions["items"] == [
        {
            "request_id": "r1",
            "conversation_id": None,
            "follows": None,
            "message": "go",
            "agent": None,
            "files": [],
        }
    ]
    again, other = await asyncio.gather(stream(local, body), stream(local, body))
    for events in (again, other):
        deltas = [data for name, data in events if name == "delta"]
        assert deltas[0]["at"] == 0
        assert deltas[0]["text"].startswith(shown(first))
        assert all(d["at"] > 0 for d in deltas[1:])
        assert "".join(d["text"] for d in deltas) == "".join(WORDS)
        assert events[-1][0] == "done"
    assert model.count == 1
    assert (await local.ask("GET", "/chat/pending"))[1]["items"] == []


async def test_what_follows_a_question_without_an_answer_yet_is_in_the_same_conversation(local, model):
    model.script(Behaviour(text="one two three", chunks=3, chunk_delay_s=0.3))
    first = asyncio.create_task(say(local, "go", request_id="r1"))
    await until(lambda: model.count, "the call")
    second = asyncio.create_task(say(local, "and?", request_id="r2", follows="r1"))
    async with asyncio.timeout(10):
        while len(items := (await local.ask("GET", "/chat/pending"))[1]["items"]) < 2:
            assert items, "the first is not answered yet"
    assert [(item["request_id"], item["follows"]) for item in items] == [("r1", None), ("r2", "r1")]
    number = (await first)["conversation_id"]
    assert (await second)["conversation_id"] == number
    assert (await say(local, "later", follows="r1"))["conversation_id"] == number
    for bad in ({"follows": 5}, {"follows": ""}, {"follows": "r1", "conversation_id": number}):
        assert (await local.ask("POST", "/chat", {"message": "x"} | bad))[0] == 400


async def test_nobody_follows_somebody_elses_question(bots, sqlite_url, model):
    bot = await bots.start(configuration(sqlite_url, model=model))
    tokens = await add_accounts(sqlite_url, ann="user", bob="user")
    async with Browser(bot, token=tokens["ann"]) as ann, Browser(bot, token=tokens["bob"]) as bob:
        number = (await say(ann, "go", request_id="r1"))["conversation_id"]
        assert (await say(bob, "and?", follows="r1"))["conversation_id"] != number


async def test_an_answer_goes_on_when_the_page_is_closed(local, model, sqlite_record):
    model.script(Behaviour(text="one two three", chunks=3, chunk_delay_s=0.1))
    await stream(local, {"message": "go", "request_id": "r1"}, until_event="delta")
    await until(lambda: len(sqlite_record.messages()) == 2, "the answer")
    assert sqlite_record.messages()[1].content == "one two three"


async def test_a_stopped_answer_ends_where_it_is_and_is_kept(local, model, sqlite_record):
    model.script(Behaviour(text="".join(WORDS), chunks=len(WORDS), chunk_delay_s=0.2))
    body = {"message": "go", "request_id": "r1"}
    task = asyncio.create_task(stream(local, body))
    await until(lambda: model.count, "the call")
    first = await stream(local, body, until_event="delta")
    assert (await local.ask("POST", "/chat/stop", {"request_id": "r1"}))[0] == 202
    events = await task
    assert events[-1][0] == "done"
    said = events[-1][1]["response"]
    assert said.startswith(shown(first))
    assert len(said) < len("".join(WORDS))
    asked, answered = sqlite_record.messages()
    assert (asked.content, answered.content) == ("go", said)
    assert orjson.loads(answered.metadata_json)["finish_reason"] == "stopped"
    assert [row.outcome for row in sqlite_record.ledger()] == ["unknown"], "it may have been billed"
    assert sqlite_record.count(schema.reservations) == 0
    assert await say(local, "and now?", conversation_id=events[-1][1]["conversation_id"])


async def test_an_answer_stopped_before_its_first_word_leaves_the_question(local, model, sqlite_record):
    model.script(Behaviour(delay_s=30))
    task = asyncio.create_task(stream(local, {"message": "go", "request_id": "r1"}))
    await until(lambda: model.count, "the call")
    await local.ask("POST", "/chat/stop", {"request_id": "r1"})
    name, data = (await task)[-1]
    assert (name, data["response"]) == ("done", "Stopped.")
    assert [m.content for m in sqlite_record.messages()] == ["go"]


async def test_a_stop_reaches_the_process_that_writes(local, bots, model, sqlite_url):
    model.script(Behaviour(text="".join(WORDS), chunks=len(WORDS), chunk_delay_s=0.5))
    task = asyncio.create_task(stream(local, {"message": "go", "request_id": "r1"}))
    await until(lambda: model.count, "the call")
    async with Browser(await bots.start(configuration(sqlite_url, model=model))) as elsewhere:
        assert (await elsewhere.ask("POST", "/chat/stop", {"request_id": "r1"}))[0] == 202
        assert (await task)[-1][0] == "done"


async def test_nobody_stops_somebody_elses_answer(bots, sqlite_url, model):
    bot = await bots.start(configuration(sqlite_url, model=model))
    tokens = await add_accounts(sqlite_url, ann="user", bob="user")
    model.script(Behaviour(text="one two three", chunks=3, chunk_delay_s=0.6))
    async with Browser(bot, token=tokens["ann"]) as ann, Browser(bot, token=tokens["bob"]) as bob:
        task = asyncio.create_task(say(ann, "go", request_id="r1"))
        await until(lambda: model.count, "the call")
        assert (await bob.ask("POST", "/chat/stop", {"request_id": "r1"}))[0] == 202
        assert (await bob.ask("GET", "/chat/pending"))[1]["items"] == []
        assert (await task)["response"] == "one two three"
        for bad in ({}, {"request_id": 5}, {"request_id": ""}, []):
            assert (await bob.ask("POST", "/chat/stop", bad))[0] == 400


async def test_with_html_the_answer_comes_as_a_page_may_show_it(local, model):
    model.script(Behaviour(text="**bold** <script>alert(1)</script>", chunks=4, chunk_delay_s=0.01))
    events = await stream(local, {"message": "go"}, query="?html")
    pieces = [data["html"] for name, data in events if name == "html"]
    assert pieces
    assert all("<script" not in piece for piece in pieces)
    assert events[-1][1]["html"] == "<p><strong>bold</strong> &lt;script&gt;alert(1)&lt;/script&gt;</p>\n"
    _, answer = await local.ask("POST", "/chat?html", {"message": "*hi*"})
    assert answer["html"] == "<p>echo: <em>hi</em></p>\n"
    assert (await local.ask("GET", "/agents"))[1]["items"] == [{"name": "default"}]
