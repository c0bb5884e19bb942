"""What a persistent chat with four workers on one port has to pass, on each database, point by point."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from feishu_bot.store import schema
from feishu_bot.testing.model import FakeModelServer
from tests.conftest import _database
from tests.databases import KINDS
from tests.e2e.bots import Bots, Record, configuration, free_port, until
from tests.operation.operator import Operator, pids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.bots import Nursery

WORKERS = 4


class Site:
    """A server with four workers; each request comes over a connection of its own, so to any of them."""

    def __init__(self, bots: Bots, db_url: str) -> None:
        self.operator = Operator(bots)
        self.db_url = db_url
        self.model = FakeModelServer(port=free_port())  # where each test has one of its own
        self.record = Record(db_url)
        self.bot: Any = None

    async def open(self) -> None:
        """Start it, if it does not run, and return when it serves."""
        if self.bot is None:
            self.bot = await self.operator.workers(configuration(self.db_url, model=self.model), WORKERS)
            assert len(pids(self.bot)) == WORKERS

    async def restart(self) -> None:
        """Stop the application and start it again."""
        assert await self.bot.stop() == 0
        assert self.bot.complaints() == []
        self.bot = None
        await self.open()

    async def ask(self, message: str, conversation: int | None = None) -> dict[str, Any]:
        """Return the answer, given by whichever worker got the request."""
        body = {"message": message, "conversation_id": conversation}
        async with aiohttp.ClientSession() as http, http.post(f"{self.bot.url}/chat", json=body) as response:
            assert response.status == 200, await response.text()
            found: dict[str, Any] = await response.json()
            return found

    def said(self, conversation: int) -> list[str]:
        """Return what is stored of a conversation, in its order."""
        rows = self.record.messages(conversation_id=conversation)
        return [row.content for row in sorted(rows, key=lambda row: row.seq)]

    def workers_that_answered(self) -> set[int]:
        return {line["worker"] for line in self.bot.lines("message ended")}


@pytest.fixture(scope="module", params=KINDS)
def _site(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    for db_url in _database(request, request.param):
        bots = Bots(nursery, tmp_path_factory.mktemp("site"))
        made = Site(bots, db_url)
        yield made
        bots.end()
        made.record.close()


@pytest.fixture
async def model(_site):
    async with FakeModelServer(port=_site.model.port) as made:
        yield made


@pytest.fixture
async def site(_site, model):
    await _site.open()
    return _site


async def test_a_new_conversation_is_created(site):
    answer = await site.ask("hello")
    assert answer["response"] == "echo: hello"
    (row,) = site.record.rows(schema.conversations, id=answer["conversation_id"])
    assert (row.platform, row.title, row.message_count) == ("web", "hello", 2)
    other = await site.ask("hello")
    assert other["conversation_id"] != answer["conversation_id"]


async def test_messages_sent_one_after_the_other_persist_whichever_worker_gets_them(site, model):
    number = (await site.ask("message 0"))["conversation_id"]
    for n in range(1, 12):
        answer = await site.ask(f"message {n}", number)
        assert (answer["response"], answer["conversation_id"]) == (f"echo: message {n}", number)
    expected = [text for n in range(12) for text in (f"message {n}", f"echo: message {n}")]
    assert site.said(number) == expected
    assert [m["content"] for m in model.requests[-1].body["messages"]][1:] == expected[:-1]
    assert len(site.workers_that_answered()) > 1, "one worker did everything"


async def test_after_a_restart_of_the_application_the_conversation_still_exists(site, model):
    number = (await site.ask("before the restart"))["conversation_id"]
    old = set(pids(site.bot).values())
    await site.restart()
    assert not old & set(pids(site.bot).values())
    assert (await site.ask("after it", number))["conversation_id"] == number
    expected = ["before the restart", "echo: before the restart", "after it", "echo: after it"]
    assert site.said(number) == expected
    assert [m["content"] for m in model.requests[-1].body["messages"]][1:] == expected[:-1]


async def test_messages_sent_rapidly_are_all_answered_and_none_is_stored_twice_or_mixed_up(site):
    first = await asyncio.gather(*(site.ask(f"chat {n}") for n in range(4)))
    numbers = [answer["conversation_id"] for answer in first]
    assert len(set(numbers)) == 4
    words = [(number, f"{n} to {number}") for n in range(10) for number in numbers]
    answers = await asyncio.gather(*(site.ask(text, number) for number, text in words))
    assert [answer["response"] for answer in answers] == [f"echo: {text}" for _, text in words]
    for number in numbers:
        questions = site.said(number)[2::2]
        assert sorted(questions) == sorted(f"{n} to {number}" for n in range(10))
        assert site.said(number)[3::2] == [f"echo: {question}" for question in questions]
        (row,) = site.record.rows(schema.conversations, id=number)
        assert row.message_count == 22
        assert row.total_tokens == sum(m.tokens for m in site.record.messages(conversation_id=number))
    site.record.check_ends()


async def test_after_clearing_a_conversation_all_its_messages_are_deleted_and_no_worker_remembers_them(
    site, model
):
    number = (await site.ask("a secret"))["conversation_id"]
    kept = (await site.ask("of another conversation"))["conversation_id"]
    for n in range(6):
        await site.ask(f"more {n}", number)
    await site.ask("/clear", number)
    assert site.said(number) == []
    (row,) = site.record.rows(schema.conversations, id=number)
    assert (row.message_count, row.total_tokens) == (0, 0)
    assert site.said(kept) == ["of another conversation", "echo: of another conversation"]
    for n in range(6):
        assert (await site.ask(f"anew {n}", number))["conversation_id"] == number
        assert not any("secret" in m["content"] for m in model.requests[-1].body["messages"])
    await until(lambda: len(site.said(number)) == 12, "the new messages")
