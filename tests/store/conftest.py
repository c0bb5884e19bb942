from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.stores import Clock, opened
from tests.transact import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from feishu_bot.store.store import Store


@pytest.fixture
def db(db_url: str) -> Iterator[Database]:
    """The test's own database, behind the store's list functions."""
    database = Database(db_url)
    yield database
    database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(db_url: str, clock: Clock) -> AsyncIterator[Store]:
    """An open store on the test's own database, which goes by ``clock``."""
    async with opened(db_url, clock) as made:
        yield made
