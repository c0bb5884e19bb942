from __future__ import annotations

import pytest


@pytest.fixture(params=["pool", "session"])
def way(request: pytest.FixtureRequest) -> str:
    """What an address has before its host: nothing for our client; a name, which makes it aiohttp's."""
    return "" if request.param == "pool" else "name:password@"
