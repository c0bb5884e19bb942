"""The console in a real browser: every page with data, on a desktop and a phone, in both themes and languages."""

from __future__ import annotations

import re

import pytest
import pytest_asyncio

from feishu_bot.store import schema
from tests.browser import scenes
from tests.browser.conftest import ONE_LOOP
from tests.browser.test_accessibility import axe, check, is_within  # noqa: F401
from tests.e2e.bots import configuration, until
from tests.e2e.browsers import Browser, add_accounts

pytestmark = ONE_LOOP
PAGES = (
    *("", "?days=30&by=model", "/dead", "/dead/in-1", "/conversations", "/conversations?q=whale"),
    *(
        "/conversations/1",
        "/budgets",
        "/jobs",
        "/platforms",
        "/config",
        "/logs",
        "/people",
        "/people/ada",
        "/audit",
    ),
)


@pytest_asyncio.fixture(loop_scope="session")
async def console(bots, feishu, sqlite_url, sqlite_record):
    budgets = [{"name": "daily", "limit_tokens": 100_000, "limit_cost_usd": 5}]
    platforms = {"onebot": {"enabled": True, "access_token": "a token of the tests"}}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, budgets=budgets, platforms=platforms))
    scenes.add_letters(sqlite_record)
    scenes.add_use(sqlite_record)
    scenes.add_records(sqlite_record)
    await scenes.add_others(sqlite_url, sqlite_record)
    tokens = await add_accounts(sqlite_url, ann="user", ada="admin", vic="viewer")
    scenes.settle_accounts(sqlite_record)
    async with Browser(bot, token=tokens["ann"]) as ann:
        for words in ("Where does the blue whale live?", "中文也可以：你好，机器人！"):
            assert (await ann.ask("POST", "/chat", {"message": words}))[0] == 200
    await until(lambda: sqlite_record.count(schema.budget_windows), "what was used of the budget")
    scenes.add_budgets(sqlite_record)
    return bot


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("", {"viewport": {"width": 1200, "height": 800}}),
        ("-phone", {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "locale": "zh-CN"}),
    ],
    ids=["desktop", "phone-zh"],
)  # fmt: skip
async def test_every_page_fits_says_what_it_is_and_has_nothing_serious(
    console,
    chromium,
    axe,  # noqa: F811
    suffix,
    options,
):
    async with chromium.visitor(console, bypass_csp=True, **options) as visitor:
        page = await visitor.log_in("ada", "/admin")
        for place in PAGES:
            await page.goto(f"{console.url}/admin{place}")
            assert await is_within(page), f"{place}: the page is wider than the window"
            assert await page.locator("h1").count() == 1
            name = "-".join(["console" + suffix, *re.findall(r"\w+", place)])
            await scenes.picture(page, name, whole=place.startswith("?"))
            assert await check(page, axe) == [], place
            await page.emulate_media(color_scheme=options.get("color_scheme", "light"))
        assert await page.evaluate("document.documentElement.lang") == ("zh" if suffix else "en")
        assert visitor.complaints == []
    assert console.complaints() == []


async def test_a_dead_letter_is_retried_after_a_question(console, chromium, sqlite_record):
    async with chromium.visitor(console) as visitor:
        page = await visitor.log_in("ada", "/admin/dead")
        row = page.locator("tr", has=page.get_by_role("link", name="in-2", exact=True))
        await row.get_by_role("button", name="Retry").click()
        dialog = page.locator("#ask")
        assert "Retry in-2?" in await dialog.inner_text()
        await page.keyboard.press("Escape")
        assert not await dialog.is_visible()
        assert sqlite_record.rows(schema.inbox, id=2)[0].state == "dead"
        await row.get_by_role("button", name="Retry").press("Enter")
        await dialog.get_by_role("button", name="Yes").click()
        await page.wait_for_url("**/admin/dead?done=*")
        assert await row.count() == 0
        await until(lambda: sqlite_record.rows(schema.inbox, id=2)[0].state == "answered", "the answer")
        await page.get_by_role("link", name="Audit").click()
        assert "dead.retry" in await page.locator("table").inner_text()
        assert visitor.complaints == []


async def test_accounts_and_tokens_are_made_after_a_question_and_shown_once(console, chromium, sqlite_record):
    async with chromium.visitor(console) as visitor:
        page = await visitor.log_in("ada", "/admin/people")
        await page.fill("[name=name]", "new")
        await page.select_option("[name=role]", "viewer")
        await page.get_by_role("button", name="New account").press("Enter")
        dialog = page.locator("#ask")
        assert "Make the account new (viewer)?" in await dialog.inner_text()
        await dialog.get_by_role("button", name="Yes").click()
        await page.locator("#secret").wait_for()
        password = await page.inner_text("#secret")
        await page.reload()  # the browser sends the form again
        assert "shown once" in await page.locator(".notice.bad").inner_text()
        await page.get_by_role("link", name="ann").first.click()
        await page.fill("[name=label]", "nightly")
        await page.get_by_role("button", name="New token").click()
        await dialog.get_by_role("button", name="Yes").click()
        await page.get_by_role("button", name="Copy").click()
        await page.get_by_role("button", name="Copied").wait_for()
        await page.get_by_role("link", name="Back to the account").click()
        row = page.locator("tr", has_text="nightly")
        await row.get_by_role("button", name="Revoke").click()
        assert "Revoke this token of ann?" in await dialog.inner_text()
        await dialog.get_by_role("button", name="Yes").click()
        await page.wait_for_url("**/admin/people?done=ann")
        assert sqlite_record.count(schema.tokens, label="nightly") == 0
        assert visitor.complaints == []
    async with chromium.visitor(console) as new:
        page = await new.log_in("new", "/account", password)
        assert "viewer" in await page.inner_text("h1")


async def test_the_console_works_without_scripts(console, chromium, sqlite_record):
    async with chromium.visitor(console) as visitor:
        await visitor.log_in("ada", "/admin")
        cookies = await visitor.context.cookies()
    async with chromium.visitor(console, java_script_enabled=False) as visitor:
        await visitor.context.add_cookies(cookies)
        page = await visitor.open("/admin/platforms")
        await page.get_by_role("button", name="Pause everything").click()
        await page.get_by_role("button", name="Yes").click()
        await page.wait_for_url("**/admin/platforms?done=*")
        assert "web:ada" in await page.locator(".notice.row").inner_text()
        assert sqlite_record.count(schema.controls, kind="pause") == 1


async def test_the_figures_change_by_themselves(console, chromium, sqlite_record):
    async with chromium.visitor(console) as visitor:
        page = await visitor.log_in("vic", "/admin")
        dead = page.locator("[data-live=dead]")
        assert await dead.inner_text() == "5"
        sqlite_record.execute(schema.inbox.delete().where(schema.inbox.c.id == 1))
        await page.locator("[data-live=dead]", has_text="4").wait_for()
        assert await page.get_by_role("button", name="Yes").is_visible() is False
