"""axe-core finds nothing serious on any page, in either theme, on a desktop and on a phone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser.conftest import ONE_LOOP
from tests.e2e.bots import configuration
from tests.e2e.browsers import add_accounts

pytestmark = ONE_LOOP
AXE = "axe-core@4"
SERIOUS = {"serious", "critical"}


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """The text of axe-core, from npm into a folder that goes with the tests."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm to get axe-core by")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), AXE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"npm cannot get axe-core: {done.stderr.strip()[-200:]}")
    return (Path(folder) / "node_modules/axe-core/axe.min.js").read_text()


async def check(page, axe):
    await page.evaluate(axe)
    found = await page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{v['id']}: {node['target']} {node.get('failureSummary', '')}"
        for v in found["violations"]
        if v["impact"] in SERIOUS
        for node in v["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
async def test_nothing_serious_is_found(chromium, bots, sqlite_url, model, axe, scheme, width):
    bot = await bots.start(configuration(sqlite_url, model=model))
    async with chromium.visitor(
        bot, color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True
    ) as visitor:
        page = await visitor.open()
        assert await check(page, axe) == []
        for text in ("**hello** `code`\n\n```\ncode\n```\n\n| a |\n|-|\n| b |", "/help"):
            await page.fill("#text", text)
            await page.press("#text", "Enter")
            await page.locator(".message.assistant[data-id], .message.note").last.wait_for()
        await page.locator(".message.note").wait_for()
        assert await check(page, axe) == []
        await page.click("#more")
        assert await check(page, axe) == []
        await page.click("[data-action=rename]")
        assert await check(page, axe) == []
        await page.click("#dialog-no")
        if width < 700:
            await page.click("#menu")
        await page.fill("#search", "hello")
        await page.locator("#results a").first.wait_for()
        assert await check(page, axe) == []
        await add_accounts(sqlite_url, ann="user")
        page = await visitor.open("/login")
        assert await check(page, axe) == []
        page = await visitor.log_in("ann", "/account")
        await page.locator("#sessions li").wait_for()
        assert await check(page, axe) == []
