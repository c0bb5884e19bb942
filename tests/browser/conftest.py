"""Chromium, driven by Playwright. Skipped with the reason where there is none; CI installs it.

It is started once, and each visitor gets a context of his own in it: nothing is shared but the program. So the tests
here, and what they ask for, run on one event loop: each file says so with ``ONE_LOOP``.
"""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.model import FakeModelServer
from tests.e2e.bots import SECRET, configuration
from tests.e2e.browsers import PASSWORD

# The servers and the database of a test are those of the end-to-end tests.
from tests.e2e.conftest import bots, nursery, sqlite_record  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
ELSEWHERE = "elsewhere.test"  # leads here, and is no loopback name: a browser trusts it less
ONE_LOOP = pytest.mark.asyncio(loop_scope="session")
# Each window draws the lists of its address bar as pages, which takes more of the processor than a test's own page.
# What Playwright itself leaves out stands here too, as the last list is the one that counts.
LEFT_OUT = (
    *("WebUIOmniboxPopup", "WebUIOmniboxAimPopup"),
    *("AvoidUnnecessaryBeforeUnloadCheckSync", "DestroyProfileOnBrowserClose", "HttpsUpgrades"),
    *("HttpsFirstBalancedModeAutoEnable", "LensOverlay", "MediaRouter", "PaintHolding"),
    *("ThirdPartyStoragePartitioning", "AvoidCorsURLLoaderRestartOnRedirect", "OptimizationHints"),
    *("NetworkTimeServiceQuerying", "AimEnabled", "PreconnectToSearch"),
)
ARGUMENTS = (
    "--no-sandbox",
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
    f"--disable-features={','.join(LEFT_OUT)}",
)
REQUIRED = os.environ.get("REQUIRE_BROWSER") == "1"


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(
        (found for name in NAMES if (found := shutil.which(name))), None
    )


@dataclass
class Visitor:
    """Somebody with a browser of his own. ``complaints``: what the page has said to the console."""

    context: BrowserContext
    url: str
    complaints: list[str] = field(default_factory=list)

    async def open(self, path: str = "/", *, ready: bool = True) -> Page:
        page = await self.context.new_page()
        page.on(
            "console", lambda m: self.complaints.append(m.text) if m.type in {"error", "warning"} else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                self.complaints.append(request.url)
                if not request.url.startswith((self.url, "blob:", "data:"))
                else None
            ),
        )
        await page.goto(self.url + path)
        if ready:
            await page.wait_for_load_state("networkidle")
        return page

    async def log_in(self, name: str, path: str = "/", password: str = PASSWORD) -> Page:
        page = await self.open(f"/login?next={path}")
        await page.fill("[name=name]", name)
        await page.fill("[name=password]", password)
        await page.click("button[type=submit]")
        await page.wait_for_url(self.url + path)
        await page.wait_for_load_state("networkidle")
        return page


@dataclass
class Browsers:
    browser: Any

    @asynccontextmanager
    async def visitor(self, bot: Any, *, host: str | None = None, **options: Any) -> AsyncIterator[Visitor]:
        """``host``: the name by which the server is asked, a machine's elsewhere as far as the browser knows."""
        options = {"locale": "en-US", "viewport": {"width": 1200, "height": 800}} | options
        context = await self.browser.new_context(**options)
        url = bot.url if host is None else bot.url.replace("127.0.0.1", host)
        try:
            yield Visitor(context, url)
        finally:
            await context.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Browsers]:
    playwright = pytest.importorskip("playwright.async_api")
    path = find_chromium()
    if path is None:
        reason = "no Chromium: make browser installs it (Debian), or CHROMIUM names one"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield Browsers(browser)
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def feishu() -> AsyncIterator[FakeFeishu]:
    async with FakeFeishu(app_secret=SECRET) as fake:
        yield fake


@pytest_asyncio.fixture(loop_scope="session")
async def model() -> AsyncIterator[FakeModelServer]:
    async with FakeModelServer() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def bot(bots, model, sqlite_url):  # noqa: F811
    return await bots.start(configuration(sqlite_url, model=model))


@pytest_asyncio.fixture(loop_scope="session")
async def visitor(chromium, bot):
    """Whoever sits at this machine, while there is no account; his page has nothing to complain about."""
    async with chromium.visitor(bot) as made:
        yield made
        assert made.complaints == []
        assert bot.complaints() == []
