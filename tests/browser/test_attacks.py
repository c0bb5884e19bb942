"""What strangers have written, shown in a real browser: on no page does any of it run, or become more than words."""

from __future__ import annotations

import aiohttp
import orjson
import pytest

from feishu_bot.store import schema
from feishu_bot.testing.feishu import sign_and_encrypt, text_event
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.onebot import message_event, sign
from tests.browser.conftest import ONE_LOOP
from tests.e2e.bots import KEY, SECRET, configuration, until
from tests.e2e.browsers import Browser, add_accounts

pytestmark = ONE_LOOP

MARKUP = "<img src=x onerror=alert(1)><svg onload=alert(2)>\"'--><script>document.title='owned'</script>"
# Anything that the page's own scripts and templates never make.
FOREIGN = ":is(img[src=x], svg[onload], script:not([src]):not([type='application/json']), [onerror], iframe)"
PAGES = (
    *("/", "/account", "/admin?by=user", "/admin/dead", "/admin/dead/in-1", "/admin/conversations?in=heads&q=img"),
    *("/admin/conversations", "/admin/conversations?q=onerror", "/admin/budgets", "/admin/platforms", "/admin/config"),
    *("/admin/logs", "/admin/people", "/admin/people/ada", "/admin/audit", "/docs", "/login?next=//x"),
)  # fmt: skip


async def post(url, body, headers):
    async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as answer:
        assert answer.status < 300, await answer.text()


def watched(page):
    """Return where the dialogs of a page are noted: nobody but an attacker opens one."""
    alerts = []

    def note(dialog):
        alerts.append(dialog.message)
        return dialog.dismiss()

    page.on("dialog", note)
    return alerts


async def test_what_platforms_people_and_models_bring_does_nothing_on_any_page(
    chromium, bots, feishu, model, sqlite_url, sqlite_record
):
    onebot = {"enabled": True, "secret": SECRET, "access_token": SECRET}
    budgets = [{"name": "daily", "limit_tokens": 1_000_000}]
    config = configuration(
        sqlite_url, feishu=feishu, model=model, budgets=budgets, platforms={"onebot": onebot}
    )
    bot = await bots.start(config)
    model.default = Behaviour(text=f"{MARKUP}\n\n[x](javascript:alert(3))\n\n```{MARKUP}\n{MARKUP}\n```")
    headers, body = sign_and_encrypt(text_event(MARKUP, open_id=f"ou_{MARKUP}"), encrypt_key=KEY)
    await post(f"{bot.url}/webhook/feishu", body, headers)
    event = message_event(MARKUP, message_id=1, group_id=5, at=True, card=MARKUP, nickname=MARKUP)
    body = orjson.dumps(event)
    await post(f"{bot.url}/webhook/onebot", body, sign(body, SECRET))
    await until(lambda: sqlite_record.count(schema.messages) >= 4, "the answers")
    tokens = await add_accounts(sqlite_url, ada="admin")
    async with Browser(bot, token=tokens["ada"], headers={"User-Agent": MARKUP}) as ada:
        await ada.log_in("ada")
        assert (await ada.ask("POST", "/chat", {"message": MARKUP}))[0] == 200
        model.default = Behaviour("status", status=400, message=MARKUP)
        assert (await ada.ask("POST", "/chat", {"message": MARKUP}))[0] == 502
    sqlite_record.execute(
        schema.inbox.update().where(schema.inbox.c.id == 1).values(state="dead", reason=MARKUP)
    )
    async with chromium.visitor(bot) as visitor:
        page = await visitor.log_in("ada")
        alerts = watched(page)
        numbers = [row.id for row in sqlite_record.rows(schema.conversations)]
        places = (*PAGES, *(f"/admin/conversations/{n}" for n in numbers), f"/?c={numbers[-1]}")
        for place in places:
            await page.goto(bot.url + place)
            await page.wait_for_load_state("networkidle")
            assert await page.locator(FOREIGN).count() == 0, place
            assert await page.title() != "owned", place
        assert alerts == []
        assert not [words for words in visitor.complaints if "Content Security" in words], (
            "it came to nothing before"
        )


@pytest.mark.parametrize(
    "name", [f"{MARKUP}.txt".replace("/", "∕"), "a.txt\u202egnp.exe.txt", "名字 \"'.txt"]
)
async def test_names_of_files_are_words_before_and_after_they_are_sent(chromium, bot, model, name):
    async with chromium.visitor(bot) as visitor:
        page = await visitor.open()
        alerts = watched(page)
        await page.set_input_files(
            "#file", {"name": name, "mimeType": "text/plain", "buffer": b"the number is 42"}
        )
        await page.locator("#files li").wait_for()
        assert await page.inner_text("#files li span") == name
        await page.press("#text", "Enter")
        await page.locator(".message.assistant[data-id], .message.problem").first.wait_for()
        assert await page.locator(FOREIGN).count() == 0
        await page.reload()
        await page.wait_for_load_state("networkidle")
        assert await page.locator(FOREIGN).count() == 0
        assert await page.title() != "owned"
        assert alerts == []
