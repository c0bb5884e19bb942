"""One server, four conversations on three platforms at once: each with its own history, also after a kill -9."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.chats import Chats
from feishu_bot.testing.model import Behaviour, FakeModelServer
from tests.e2e.bots import configuration, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from feishu_bot.testing.chats import Chat


@pytest.fixture
async def chats() -> AsyncIterator[Chats]:
    async with Chats() as made:
        yield made


@pytest.fixture
async def model() -> AsyncIterator[FakeModelServer]:
    async with FakeModelServer(answer="on {}".format) as server:
        yield server


async def say(chats: Chats, turn: str) -> None:
    """Have everybody speak at the same time."""
    await asyncio.gather(*(chat.say(f"{turn} in {chat.name}") for chat in chats.all.values()))


async def answered(chats: Chats, turns: Sequence[str]) -> None:
    def wanted(chat: Chat) -> list[str]:
        return [f"on {turn} in {chat.name}" for turn in turns]

    everybody = chats.all.values()
    await until(
        lambda: all(list(c.shown()) == wanted(c) for c in everybody),
        f"{turns}, not {[c.shown() for c in everybody]}",
    )


def histories(model: FakeModelServer) -> dict[str, list[str]]:
    """Return what the model was told last for each chat, by the chat."""
    found = {}
    for request in model.requests:
        said = [m["content"] for m in request.body["messages"] if m["role"] != "system"]
        found[said[-1].rpartition(" in ")[2]] = said
    return found


async def test_four_chats_of_three_platforms_each_with_its_own_history_go_on_after_a_kill(
    bots, chats, model, db_url, record
):
    config = configuration(db_url, model=model, platforms=chats.accounts)
    bot = await bots.start(config)
    await chats.connect(bot.url)
    turns = ["one", "two"]
    for n, turn in enumerate(turns):
        await say(chats, turn)
        await answered(chats, turns[: n + 1])
    # The third turn dies while the model thinks about all of it.
    model.script(*[Behaviour("hang")] * len(chats.all))
    before = len(model.requests)
    await say(chats, "three")
    await until(lambda: len(model.requests) == before + len(chats.all), "four calls of the model")
    await bot.kill()
    assert record.count(schema.inbox, state="open") == len(chats.all)
    bot = await bots.start(config)
    await chats.connect(bot.url)
    turns.append("three")
    await answered(chats, turns)
    turns.append("four")
    await say(chats, "four")
    await answered(chats, turns)
    await record.settled()
    for chat in chats.all:
        said = [words for turn in turns for words in (f"{turn} in {chat}", f"on {turn} in {chat}")]
        assert histories(model)[chat] == said[:-1], "nothing of another chat, nothing missing, nothing twice"
    assert {row.state for row in record.outbox()} == {"sent"}
    assert {row.state for row in record.inbox()} == {"answered"}
    assert len(record.rows(schema.conversations)) == len(chats.all)
    assert bot.complaints() == []
    record.check_accounts()
    record.check_ends()
