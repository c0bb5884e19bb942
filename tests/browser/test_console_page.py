"""The console in a real browser: every page with data, on a desktop and a phone, in both themes and languages."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import insert

from feishu_bot.model import ChatType, InboundMessage
from feishu_bot.store import schema
from tests.browser.conftest import ONE_LOOP
from tests.browser.test_accessibility import axe, check  # noqa: F401
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
PICTURES = os.environ.get("CONSOLE_PICTURES")  # a folder for a picture of each page, to look at them


def add_data(record):
    """Three months of use by several people, and letters that were given up."""
    now = datetime.now(UTC)
    for day in range(90):
        for n, (platform, model) in enumerate(
            (("feishu", "gpt-4o"), ("qq", "deepseek-chat"), ("web", "echo"))
        ):
            at = now - timedelta(days=day, minutes=n)
            tokens = (n + 1) * (1000 + 397 * (day % 7))
            row = {"inbox_id": 10_000 + day * 10 + n, "attempt": 1, "call": 1, "platform": platform, "model": model,
                   "user_id": f"{platform}:person_{day % 5}", "input_tokens": tokens, "output_tokens": tokens // 3,
                   "cost_micro_usd": tokens * 7, "outcome": "ok", "at": at}  # fmt: skip
            record.execute(insert(schema.usage).values(**row))
            row = {"day": at.date().isoformat(), "account": platform, "end": "answered", "shard": 99}
            record.execute(insert(schema.totals).values(**row, count=20 + 9 * n + day % 11))
    for n in range(1, 4):
        message = InboundMessage(
            "web", f"lost{n}", chat_type=ChatType.PRIVATE, sender_id="ann", text="Are you there?"
        )
        row = {"account": "web", "event_key": f"lost{n}", "lane_key": f"web:private:ann{n}", "payload": message.to_json(),
               "state": "dead", "reason": "the model failed: 500 internal error", "attempts": 5,
               "received_at": record.now_ms(), "ended_at": record.now_ms() - n * 60_000}  # fmt: skip
        record.execute(insert(schema.inbox).values(**row))


@pytest_asyncio.fixture(loop_scope="session")
async def console(bots, sqlite_url, sqlite_record):
    budgets = [{"name": "daily", "limit_tokens": 100_000, "limit_cost_usd": 5}]
    bot = await bots.start(configuration(sqlite_url, budgets=budgets))
    add_data(sqlite_record)
    tokens = await add_accounts(sqlite_url, ann="user", ada="admin", vic="viewer")
    async with Browser(bot, token=tokens["ann"]) as ann:
        for words in ("Where does the blue whale live?", "中文也可以：你好，机器人！"):
            assert (await ann.ask("POST", "/chat", {"message": words}))[0] == 200
    return bot


async def picture(page, name):
    if PICTURES:
        await page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("desktop", {"viewport": {"width": 1280, "height": 800}}),
        ("phone-dark-zh", {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "locale": "zh-CN"}),
    ],
)  # fmt: skip
async def test_every_page_fits_says_what_it_is_and_has_nothing_serious(console, chromium, axe, name, options):  # noqa: F811
    async with chromium.visitor(console, bypass_csp=True, **options) as visitor:
        page = await visitor.log_in("ada", "/admin")
        for place in PAGES:
            await page.goto(f"{console.url}/admin{place}")
            wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{place}: the page is wider than the window"
            assert await page.locator("h1").count() == 1
            await picture(page, f"{name}{place.replace('/', '-').replace('?', '-')}")
            assert await check(page, axe) == [], place
        if "zh" in name:
            assert await page.evaluate("document.documentElement.lang") == "zh"
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
        assert await dead.inner_text() == "3"
        sqlite_record.execute(schema.inbox.delete().where(schema.inbox.c.id == 1))
        await page.locator("[data-live=dead]", has_text="2").wait_for()
        assert await page.get_by_role("button", name="Yes").is_visible() is False
