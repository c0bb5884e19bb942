"""The example of ``docs/platforms/writing-one.md``, as it stands there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("tests.platforms.contract")

from feishu_bot import platforms  # noqa: E402  # the contract's asserts are rewritten first
from feishu_bot.platforms.base import platform_types  # noqa: E402  # as above
from tests.platforms.contract import Found, PlatformContract  # noqa: E402  # as above

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[2] / "docs" / "platforms" / "writing-one.md"
_FILE = re.compile(r"^`([^`\n]+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    return dict(_FILE.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """Both files of the page; the platform is found as any file of the package is."""
    folder = tmp_path_factory.mktemp("written")
    platform, samples = folder / "tinychat.py", folder / "tinychat_samples.py"
    for path, source in zip((platform, samples), files().values(), strict=True):
        path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(samples.stem, samples)
    module = importlib.util.module_from_spec(spec)
    sys.modules[samples.stem] = module
    spec.loader.exec_module(module)
    platforms.__path__.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield Found(platform_types()["tinychat"], module.samples)
    finally:
        platforms.__path__.remove(str(folder))
        del sys.modules[samples.stem], sys.modules["feishu_bot.platforms.tinychat"], platforms.tinychat


class TestWorkedExample(PlatformContract):
    @pytest.fixture
    def platform_found(self, example: Found) -> Found:
        return example


def test_the_page_names_the_two_files_of_a_platform():
    assert list(files()) == ["feishu_bot/platforms/tinychat.py", "tests/platforms/samples/tinychat.py"]
