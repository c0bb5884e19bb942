"""Servers with several workers, and the commands of their operator, as processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import (  # noqa: F401  # fixtures
    bots,
    feishu,
    http,
    model,
    nursery,
    people,
    record,
    sqlite_record,
)
from tests.operation.operator import Operator

if TYPE_CHECKING:
    from tests.e2e.bots import Bots


@pytest.fixture
def operator(bots: Bots) -> Operator:  # noqa: F811  # the fixture of that name
    return Operator(bots)
