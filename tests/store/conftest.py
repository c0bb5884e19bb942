from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.transact import Database

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def db(db_url: str) -> Iterator[Database]:
    """The test's own database, behind the store's list functions."""
    database = Database(db_url)
    yield database
    database.close()
