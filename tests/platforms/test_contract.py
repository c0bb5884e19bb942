from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.platforms.contract")

from feishu_bot.platforms.base import platform_types  # noqa: E402  # the contract's asserts are rewritten first
from tests.platforms.contract import Found, PlatformContract, found, has_samples  # noqa: E402  # as above

TYPES = {name: platform for name, platform in sorted(platform_types().items()) if not platform.pull}


class TestContract(PlatformContract):
    @pytest.fixture(params=[name for name, platform in TYPES.items() if has_samples(platform)])
    def platform_found(self, request: pytest.FixtureRequest) -> Found:
        return found(TYPES[request.param])


@pytest.mark.parametrize("name", TYPES)
def test_every_platform_has_samples(name):
    assert has_samples(TYPES[name]), f"write tests/platforms/samples/{name}.py; see contract.py"
