"""axe-core finds nothing serious on any page, in either theme and language, on a desktop and on a phone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser import scenes
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
    """Return what is serious on a page, in either theme. All that a theme changes are colours."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(axe)
    serious = []
    for scheme, options in (("light", {}), ("dark", {"runOnly": ["cat.color"]})):
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await scenes.settled(page)
        found = await page.evaluate(
            "options => axe.run(document, { resultTypes: ['violations'], ...options })", options
        )
        serious += [
            f"{scheme}: {v['id']}: {node['target']} {node.get('failureSummary', '')}"
            for v in found["violations"]
            if v["impact"] in SERIOUS
            for node in v["nodes"]
        ]
    return serious


async def is_within(page):
    """Say whether the page is no wider than its window."""
    return await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "locale"), [(360, "zh-CN"), (1200, "en-US")], ids=["phone-zh", "desktop"])
async def test_nothing_serious_is_found_while_one_talks(chromium, bot, axe, width, locale):
    async with chromium.visitor(
        bot, locale=locale, viewport={"width": width, "height": 800}, bypass_csp=True
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


@pytest.mark.parametrize(
    ("suffix", "language", "options"),
    [
        ("", "en", {}),
        ("-dark", "zh", {"color_scheme": "dark"}),
        ("-phone", "en", {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}),
    ],
    ids=["light", "dark-zh", "phone"],
)
async def test_every_page_fits_and_has_nothing_serious(
    chromium, bots, sqlite_url, sqlite_record, axe, suffix, language, options
):
    bot = await bots.start(configuration(sqlite_url, ai={"agents": {"poet": {"system_prompt": "In verse."}}}))
    await add_accounts(sqlite_url, ann="admin", bob="user")
    shown = await scenes.add_talks(sqlite_url, sqlite_record, "ann", language)
    locale = {"en": "en-US", "zh": "zh-CN"}[language]
    async with chromium.visitor(bot, locale=locale, bypass_csp=True, **options) as visitor:

        async def see(page, name):
            await scenes.picture(page, name + suffix)
            assert await is_within(page), name
            assert await check(page, axe) == [], name
            await page.emulate_media(color_scheme=options.get("color_scheme", "light"))

        await see(await visitor.open("/login"), "login")
        page = await visitor.log_in("ann", f"/?c={shown}")
        await page.locator(".message.assistant[data-id]").wait_for()
        await page.locator("#conversations a").nth(11).wait_for(state="attached")
        await see(page, "chat")
        if suffix == "-phone":
            await page.click("#menu")
            await page.locator("#new").wait_for()
            await see(page, "chat-list")
        await see(await visitor.open("/"), "chat-new")
        page = await visitor.open("/account")
        await page.locator("#tokens li").wait_for()
        await see(page, "account")
        page = await visitor.open("/docs")
        await page.locator("summary", has_text="/conversations/{id}/fork").click()
        await page.evaluate("document.querySelector('details[open]').previousElementSibling.scrollIntoView()")
        await see(page, "docs")
        await page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        await see(page, "docs-open")
    async with chromium.visitor(bot, locale=locale, bypass_csp=True, **options) as visitor:
        page = await visitor.log_in("bob", "/account")
        await page.goto(f"{bot.url}/admin")
        await see(page, "refused")
        await page.goto(f"{bot.url}/nothing")
        await see(page, "nothing")
