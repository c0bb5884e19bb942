from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.model import FakeModelServer
from tests.e2e.bots import SECRET, Bots, Nursery, People, Record, configuration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.e2e.bots import Bot


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def bots(nursery: Nursery, tmp_path: Path) -> Iterator[Bots]:
    """The test's servers; a folder without config.yaml, plugins or data is their working directory."""
    made = Bots(nursery, tmp_path)
    yield made
    made.end()


@pytest.fixture
async def feishu() -> AsyncIterator[FakeFeishu]:
    async with FakeFeishu(app_secret=SECRET) as fake:
        yield fake


@pytest.fixture
async def model() -> AsyncIterator[FakeModelServer]:
    async with FakeModelServer() as server:
        yield server


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def people(http: aiohttp.ClientSession, feishu: FakeFeishu) -> People:
    return People(http, feishu)


@pytest.fixture
def record(db_url: str) -> Iterator[Record]:
    made = Record(db_url)
    yield made
    made.close()


@pytest.fixture
def sqlite_record(sqlite_url: str) -> Iterator[Record]:
    made = Record(sqlite_url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def _shared(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server for all tests of a module: one that stores nothing, whatever they send."""
    databases = request.getfixturevalue("databases")
    with databases.database("sqlite") as url:
        made = Bots(nursery, tmp_path_factory.mktemp("shared"))
        nowhere = FakeFeishu()
        nowhere.url = "http://127.0.0.1:9"
        bot = made.launch(configuration(url, feishu=nowhere, platforms={"feishu": {"bot_open_id": "ou_bot"}}))
        record = Record(url)
        yield bot, record
        record.close()
        made.end()


@pytest.fixture
async def shared_bot(_shared: Any) -> tuple[Bot, Record]:
    bot, record = _shared
    return await bot.listening(), record
