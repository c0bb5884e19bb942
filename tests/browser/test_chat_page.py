"""The chat page in a real browser."""

from __future__ import annotations

import gzip
import re

import aiohttp
import pytest

from feishu_bot.store import conversations, threads
from feishu_bot.store.work import NewMessage
from feishu_bot.testing.model import Behaviour
from tests.browser.conftest import ELSEWHERE, ONE_LOOP
from tests.e2e.bots import configuration, until
from tests.e2e.browsers import add_accounts
from tests.stores import opened

pytestmark = ONE_LOOP
WORDS = [f"word{n} " for n in range(40)]
LONG = Behaviour(text="".join(WORDS), chunks=len(WORDS), chunk_delay_s=0.06)


async def say(page, text):
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def ask(page, text):
    """Ask and return when the answer is stored and shown."""
    count = await page.locator(".message.assistant[data-id]").count()
    await say(page, text)
    await page.locator(".message.assistant[data-id]").nth(count).wait_for()
    await page.locator(".message.assistant[data-request]").first.wait_for(state="detached")


async def texts(page):
    return [text.strip() for text in await page.locator(".message .words").all_inner_texts()]


def open_conversation(page):
    return int(re.search(r"c=(\d+)", page.url)[1])


async def fill(url, count, said=2):
    """Put conversations of the local user into the database; return their ids."""

    def make(tx):
        row = threads.create(tx, "web:private:local", None, user_id="web:local")
        new = [NewMessage(("user", "assistant")[n % 2], f"message {n}", 1) for n in range(said)]
        for start in range(0, said, 500):
            conversations.append(tx, row["id"], new[start : start + 500])
        return row["id"]

    async with opened(url) as store:
        return [await store.run(make) for _ in range(count)]


async def test_without_an_account_one_talks_at_once_and_the_conversation_is_there_after_a_reload(visitor):
    page = await visitor.open()
    assert await page.locator("#greeting").is_visible()
    await ask(page, "hello")
    assert await texts(page) == ["hello", "echo: hello"]
    assert await page.inner_text("#title") == "hello"
    assert "2 messages" in await page.inner_text("#meter")
    assert await page.locator("#conversations a[aria-current=page]").inner_text() == "hello"
    await page.reload()
    await page.locator(".message").nth(1).wait_for()
    assert await texts(page) == ["hello", "echo: hello"]
    await page.click("#new")
    assert await page.locator("#greeting").is_visible()


async def test_after_the_login_one_sees_ones_own_and_leaves_again(chromium, bots, sqlite_url, model):
    bot = await bots.start(configuration(sqlite_url, model=model))
    await add_accounts(sqlite_url, ann="user", bob="user")
    async with chromium.visitor(bot) as ann, chromium.visitor(bot) as bob:
        page = await ann.open("/")
        assert "/login?next=" in page.url
        await page.fill("[name=name]", "ann")
        await page.fill("[name=password]", "wrong password")
        await page.click("button[type=submit]")
        await page.get_by_text("not right").wait_for()
        page = await ann.log_in("ann")
        await ask(page, "a secret of ann")
        other = await bob.log_in("bob")
        assert await other.locator("#conversations a").count() == 0
        await other.goto(page.url)
        await other.locator("#notice").wait_for()
        assert "no such conversation" in await other.inner_text("#notice")
        account = await ann.open("/account")
        await account.fill("[name=label]", "for <b>tests</b>")
        await account.click("#make-token button")
        await account.locator("#token code").wait_for()
        assert await account.inner_text("#copy") == "Copy"
        assert len(await account.inner_text("#token code")) > 40
        assert "for <b>tests</b>" in await account.inner_text("#tokens")
        await account.click("[data-do=logout]")
        await account.wait_for_url("**/login")
        await page.goto(bot.url)
        assert "/login" in page.url


async def test_the_page_works_by_http_from_another_machine(chromium, bots, sqlite_url, model):
    bot = await bots.start(configuration(sqlite_url, model=model))
    await add_accounts(sqlite_url, ann="user")
    async with chromium.visitor(bot, host=ELSEWHERE) as ann:
        page = await ann.log_in("ann")
        assert not await page.evaluate("isSecureContext")
        await ask(page, "hello")
        await page.locator(".message.user").hover()
        await page.locator(".message.user").get_by_label("Copy the message").click()
        await page.locator(".message.user [href='#i-check']").wait_for()
        await page.focus("#text")
        await page.keyboard.press("Control+V")
        assert await page.input_value("#text") == "hello"
        assert ann.complaints == []


async def test_an_answer_is_shown_as_it_grows_and_a_reload_in_the_middle_loses_and_doubles_nothing(
    visitor, model, sqlite_record
):
    model.script(LONG)
    page = await visitor.open()
    await say(page, "go")
    await page.get_by_text("word3").wait_for()
    assert "word39" not in await page.inner_text("#messages")
    await page.reload()
    await page.get_by_text("word5").wait_for()
    assert (await texts(page))[0] == "go"
    await page.locator(".message.assistant[data-id]").wait_for()
    assert await texts(page) == ["go", "".join(WORDS).strip()]
    assert model.count == 1
    assert len(sqlite_record.messages()) == 2


async def test_what_is_asked_before_the_first_answer_is_there_belongs_to_the_same_conversation(
    visitor, model, sqlite_record
):
    model.script(LONG)
    page = await visitor.open()
    await say(page, "first")
    await page.get_by_text("word3").wait_for()
    await say(page, "second")
    await until(lambda: len(sqlite_record.inbox()) == 2, "both questions on disk")
    await page.reload()
    await page.locator(".message.assistant[data-id]", has_text="echo: second").wait_for()
    await page.locator("[data-request]").first.wait_for(state="detached")
    assert await texts(page) == ["first", "".join(WORDS).strip(), "second", "echo: second"]
    assert [row.content for row in sqlite_record.messages()][::2] == ["first", "second"]
    assert len({row.conversation_id for row in sqlite_record.messages()}) == 1


async def test_a_new_chat_is_new_also_while_another_is_being_answered(visitor, model, sqlite_record):
    model.script(LONG)
    page = await visitor.open()
    await say(page, "first")
    await page.get_by_text("word3").wait_for()
    await page.click("#new")
    assert await page.locator("#greeting").is_visible()
    await ask(page, "second")
    assert await texts(page) == ["second", "echo: second"]
    await page.locator("#conversations a").nth(1).wait_for()
    assert await texts(page) == ["second", "echo: second"]
    await page.locator("#conversations a", has_text="first").click()
    await page.get_by_text("word39").wait_for()
    assert await texts(page) == ["first", "".join(WORDS).strip()]


async def test_after_a_failed_first_answer_the_conversation_goes_on_and_shows_nothing_twice(visitor, model):
    model.script(Behaviour(kind="status", status=400))
    page = await visitor.open()
    await say(page, "first")
    await page.locator(".message.problem").wait_for()
    await ask(page, "second")
    assert await page.locator(".message.user .words").all_inner_texts() == ["first", "second"]
    assert await page.locator("#conversations a").count() == 1


async def test_a_broken_connection_is_taken_up_again(visitor, model, bot):
    model.script(LONG)
    page = await visitor.open()
    broken = []

    async def cut(route):
        if broken:
            await route.continue_()
            return
        broken.append(True)
        await route.abort()

    await page.route("**/chat?html", cut)
    await say(page, "go")
    await page.locator(".message.assistant[data-id]").wait_for()
    assert await texts(page) == ["go", "".join(WORDS).strip()]
    assert broken
    assert model.count == 1
    visitor.complaints.clear()  # the browser says itself that a request failed


async def test_an_answer_goes_on_while_the_page_is_closed(visitor, model, sqlite_record):
    model.script(LONG)
    page = await visitor.open()
    await say(page, "go")
    await page.get_by_text("word3").wait_for()
    await page.close()
    await until(lambda: len(sqlite_record.messages()) == 2, "the answer")
    page = await visitor.open("/")
    await page.click("#conversations a")
    await page.locator(".message.assistant[data-id]").wait_for()
    assert (await texts(page))[1] == "".join(WORDS).strip()


async def test_a_second_tab_sees_what_was_said_in_the_first(visitor):
    page = await visitor.open()
    await ask(page, "one")
    other = await visitor.open(f"/?c={open_conversation(page)}")
    await ask(page, "two")
    await other.get_by_text("echo: two").wait_for()
    assert await texts(other) == ["one", "echo: one", "two", "echo: two"]
    await ask(other, "three")
    await page.get_by_text("echo: three").wait_for()


async def test_a_stopped_answer_stays_as_it_is(visitor, model):
    model.script(LONG)
    page = await visitor.open()
    await say(page, "go")
    await page.get_by_text("word3").wait_for()
    await page.click("#stop")
    await page.locator(".message.assistant[data-id]").wait_for()
    assert "word39" not in await page.inner_text("#messages")
    assert await page.locator("#stop").is_hidden()


async def test_a_conversation_is_renamed_forked_answered_anew_cleared_and_deleted(visitor, sqlite_record):
    page = await visitor.open()
    await ask(page, "one")
    await ask(page, "two")
    await page.click("#more")
    await page.click("[data-action=rename]")
    await page.fill("#dialog-input", "A <b>new</b> title")
    await page.press("#dialog-input", "Enter")
    await page.wait_for_function(
        "() => document.getElementById('title').textContent === 'A <b>new</b> title'"
    )
    # The list may be drawn again at any time: what is gone from the page in the meantime has no text.
    await page.locator("#conversations").get_by_text("A <b>new</b> title", exact=True).wait_for()
    first = open_conversation(page)
    await page.locator(".message.assistant").first.hover()
    await page.locator(".message.assistant").first.get_by_label("Branch off").click()
    await page.wait_for_function(f"() => location.search !== '?c={first}'")
    await page.wait_for_function("() => document.querySelectorAll('.message[data-id]').length === 2")
    assert await texts(page) == ["one", "echo: one"]
    assert await page.locator("#conversations a").count() == 2
    before = sqlite_record.messages()[-1].id
    await page.locator(".message.assistant").last.get_by_label("Answer again").click()
    await page.wait_for_function("() => document.querySelectorAll('.message[data-request]').length === 0")
    await page.locator(f'.message.assistant[data-id="{before}"]').wait_for(state="detached")
    assert await texts(page) == ["one", "echo: one"]
    await page.click("#more")
    await page.click("[data-action=clear]")
    await page.click("#dialog-yes")
    await page.wait_for_function("() => document.querySelectorAll('.message').length === 0")
    await page.click("#more")
    await page.click("[data-action=delete]")
    await page.click("#dialog-no")
    await page.click("#more")
    await page.click("[data-action=delete]")
    await page.click("#dialog-yes")
    await page.wait_for_function("() => location.search === ''")
    assert await page.locator("#conversations a").count() == 1


async def test_search_leads_to_the_message(visitor, sqlite_url):
    (cid,) = await fill(sqlite_url, 1, said=400)
    page = await visitor.open()
    await page.press("body", "Control+k")
    await page.keyboard.type("message 42")
    await page.locator("#results a").first.wait_for()
    assert await page.locator("#results a").first.locator("mark").all_inner_texts() == ["message", "42"]
    await page.click("#results a")
    await page.locator(".message.found").wait_for()
    assert await page.locator(".message.found .words").inner_text() == "message 42"
    assert open_conversation(page) == cid


async def test_a_conversation_is_exported(visitor):
    page = await visitor.open()
    await ask(page, "keep this")
    await page.click("#more")
    async with page.expect_download() as waiting:
        await page.click("[data-action=export_md]")
    download = await waiting.value
    assert download.suggested_filename == f"conversation-{open_conversation(page)}.md"


async def test_thousands_of_messages_and_conversations_are_paged_both_ways(visitor, sqlite_url):
    (long,) = await fill(sqlite_url, 1, said=5000)
    await fill(sqlite_url, 150)
    page = await visitor.open(f"/?c={long}")
    await page.get_by_text("message 4999", exact=True).wait_for()
    for _ in range(6):
        first = await page.locator(".message").first.get_attribute("data-id")
        await page.evaluate("document.getElementById('scroll').scrollTop = 0")
        await page.wait_for_function(
            "first => document.querySelector('.message').dataset.id !== first", arg=first
        )
    assert await page.locator(".message").count() <= 250
    assert await page.get_by_text("message 4999", exact=True).count() == 0, "what is far away was let go"
    for _ in range(20):
        await page.evaluate("document.getElementById('scroll').scrollTop = 1e9")
        if await page.get_by_text("message 4999", exact=True).count():
            break
        await page.wait_for_timeout(100)
    assert await page.get_by_text("message 4999", exact=True).count()
    ids = [int(i) for i in await page.eval_on_selector_all(".message", "all => all.map(e => e.dataset.id)")]
    assert ids == list(range(ids[0], ids[0] + len(ids))), "none is missing or doubled"
    while await page.locator("#conversations a").count() < 151:
        await page.evaluate("document.getElementById('list').scrollTop = 1e9")
        await page.wait_for_timeout(50)
    assert await page.locator("#conversations a").count() == 151


@pytest.mark.parametrize(
    "text",
    ["<img src=x onerror=alert(1)>", "<script>document.title='owned'</script>", "[x](javascript:alert(1))"],
)
async def test_what_people_and_models_write_does_nothing(visitor, model, text):
    model.default = Behaviour(text=f"{text}\n\n```\n{text}\n```")
    page = await visitor.open()
    alerts = []
    page.on("dialog", lambda dialog: alerts.append(dialog.message))
    await ask(page, text)
    await page.reload()
    await page.locator(".message.assistant[data-id]").wait_for()
    assert (await texts(page))[0] == text
    assert await page.locator("#messages :is(script, img, a[href^=javascript])").count() == 0
    assert await page.title() != "owned"
    assert alerts == []


async def test_a_command_answers_without_becoming_part_of_the_conversation(visitor):
    page = await visitor.open()
    await say(page, "/help")
    await page.locator(".message.note").wait_for()
    assert "/history" in await page.inner_text(".message.note")
    await ask(page, "one")
    await say(page, "/whoami")
    await page.locator(".message.note").nth(1).wait_for()
    await ask(page, "two")
    shown = await texts(page)
    assert [text for text in shown if not text.startswith("/") and len(text) < 20] == [
        "one",
        "echo: one",
        "two",
        "echo: two",
    ]
    assert shown.index("/whoami") < shown.index("two"), "what was answered stays where it was"
    await say(page, "/new")
    await page.wait_for_function("() => location.search === ''")


async def test_a_failed_answer_is_told_and_can_be_tried_again(visitor, model):
    page = await visitor.open()
    await ask(page, "one")
    model.default = Behaviour("status", status=401)
    await say(page, "hello")
    await page.locator(".message.problem").wait_for()
    await page.locator(".message.user[data-id]").nth(1).wait_for()
    assert (await texts(page)).count("hello") == 1, "what is stored without an answer is shown once"
    model.default = Behaviour(text="better now")
    await page.get_by_role("button", name="Try again").click()
    await page.get_by_text("better now").wait_for()


async def test_an_agent_that_was_chosen_answers_until_another_is(chromium, bots, sqlite_url, model):
    bot = await bots.start(
        configuration(sqlite_url, model=model, ai={"agents": {"poet": {"system_prompt": "In verse."}}})
    )
    async with chromium.visitor(bot) as visitor:
        page = await visitor.open()
        await ask(page, "one")
        await page.select_option("#agent", "poet")
        for text in ("two", "three"):
            await ask(page, text)
            assert await page.input_value("#agent") == "poet"
            assert "In verse." in str(model.requests[-1].body)
        await page.click("#new")
        assert await page.input_value("#agent") == "default"


async def test_files_and_pictures_go_along(visitor, model, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("the number is 42")
    page = await visitor.open()
    await page.set_input_files("#file", notes)
    await page.get_by_text("notes.txt").wait_for()
    await ask(page, "what is the number?")
    assert "the number is 42" in str(model.requests[-1].body)
    picture = await page.screenshot()
    await page.set_input_files("#file", {"name": "shot.png", "mimeType": "image/png", "buffer": picture})
    await page.locator("#files img").wait_for()
    await ask(page, "and this?")
    assert "image_url" in str(model.requests[-1].body)


async def test_a_file_that_is_left_out_is_told_with_the_true_reason(visitor):
    page = await visitor.open()
    files = [{"name": f"n{n}.txt", "mimeType": "text/plain", "buffer": b"n"} for n in range(5)]
    await page.set_input_files("#file", files)
    await page.get_by_text("At most 4 files; left out: n4.txt").wait_for()
    assert await page.locator("#files li").count() == 4
    await page.get_by_label("Remove n3.txt").click()
    await page.set_input_files("#file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"})
    await page.get_by_text("it is damaged: no.png").wait_for()
    assert await page.locator("#files li").count() == 3
    large = {"name": "large.txt", "mimeType": "text/plain", "buffer": b"n" * 1_000_000}
    await page.set_input_files("#file", large)
    await page.get_by_text("Too large: large.txt").wait_for()


async def test_without_an_account_its_page_offers_nothing_that_would_be_refused(visitor):
    page = await visitor.open("/account")
    assert "python bot.py user add" in await page.inner_text("main")
    assert await page.locator("main button, main input").count() == 0
    await page.click("[data-do=language]")
    await page.get_by_text("还没有账号").wait_for()


async def test_all_is_done_by_keyboard(visitor):
    page = await visitor.open()
    await page.keyboard.type("first line")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("second line")
    await page.keyboard.press("Enter")
    await page.locator(".message.assistant[data-id]").wait_for()
    assert (await texts(page))[0] == "first line\nsecond line"
    await page.locator("#more").focus()
    await page.keyboard.press("Enter")
    await page.keyboard.press("ArrowDown")
    assert await page.evaluate("document.activeElement.dataset.action") == "export_md"
    await page.keyboard.press("Escape")
    assert await page.evaluate("document.activeElement.id") == "more"
    await page.keyboard.press("Control+Shift+O")
    assert await page.locator("#greeting").is_visible()
    await page.reload()
    await page.keyboard.press("Tab")
    focused = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focused != "none"


async def test_on_a_phone_the_list_slides_in_and_nothing_is_wider_than_the_screen(chromium, bot, model):
    model.default = Behaviour(
        text="```\n" + "x" * 300 + "\n```\n\n| a | b |\n|-|-|\n| " + "y" * 200 + " | z |"
    )
    async with chromium.visitor(
        bot, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True
    ) as phone:
        page = await phone.open()
        await ask(page, "a question " * 20)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        assert await page.evaluate("document.getElementById('scroll').scrollWidth") <= 360
        assert not await page.locator("#new").is_visible()
        await page.click("#menu")
        await page.locator("#new").wait_for()
        await page.click("#conversations a")
        await page.locator("#new").wait_for(state="hidden")
        assert phone.complaints == []


async def test_the_page_speaks_the_browsers_language_and_the_one_that_is_chosen(chromium, bot):
    async with chromium.visitor(bot, locale="zh-CN") as visitor:
        page = await visitor.open()
        assert await page.get_attribute("html", "lang") == "zh"
        assert await page.inner_text("#new") == "新对话"
        await page.click("[data-do=language]")
        await page.wait_for_function("() => document.documentElement.lang === 'en'")
        assert await page.inner_text("#new") == "New chat"


async def test_dark_follows_the_system_until_another_theme_is_chosen(chromium, bot):
    async with chromium.visitor(bot, color_scheme="dark") as visitor:
        page = await visitor.open()
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        dark = await page.evaluate(ground)
        await page.select_option("[data-do=theme]", "light")
        assert await page.evaluate(ground) == "rgb(255, 255, 255)" != dark
        await page.reload()
        assert await page.evaluate(ground) == "rgb(255, 255, 255)"


async def test_nothing_moves_while_the_page_loads(visitor):
    page = await visitor.open()
    await ask(page, "hello")
    await page.reload()
    await page.wait_for_load_state("networkidle")
    shift = await page.evaluate(
        """() => new Promise((resolve) => {
            let sum = 0;
            new PerformanceObserver((list) => { for (const e of list.getEntries()) if (!e.hadRecentInput) sum += e.value; })
                .observe({ type: "layout-shift", buffered: true });
            setTimeout(() => resolve(sum), 300);
        })"""
    )
    assert shift < 0.1


async def test_the_first_page_is_small(bot):
    async with aiohttp.ClientSession(auto_decompress=False) as http:
        async with http.get(f"{bot.url}/", headers={"Accept-Encoding": "gzip"}) as response:
            body = await response.read()
            total, html = len(body), gzip.decompress(body).decode()
        paths = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', html))
        for path in paths:
            async with http.get(bot.url + path, headers={"Accept-Encoding": "gzip"}) as response:
                assert response.status == 200
                total += len(await response.read())
    assert len(paths) >= 8
    assert total < 100_000


LOADED = """() => {
    const page = performance.getEntriesByType("navigation")[0];
    return performance.getEntriesByType("resource").map((one) => ({
        path: new URL(one.name).pathname,
        early: one.startTime < page.domInteractive,
        bytes: one.transferSize,
    }));
}"""


@pytest.mark.parametrize(("path", "files"), [("/", 9), ("/admin", 5)])
async def test_until_a_page_is_ready_only_its_files_are_asked_for_and_each_once(
    chromium, bots, sqlite_url, path, files
):
    bot = await bots.start(configuration(sqlite_url))
    await add_accounts(sqlite_url, ada="admin")
    async with chromium.visitor(bot) as ada:
        page = await ada.log_in("ada", "/account")
        await page.goto(bot.url + path)
        await page.wait_for_load_state("networkidle")
        first = await page.evaluate(LOADED)
        own = [one for one in first if one["path"].startswith("/static/")]
        asked = [one["path"] for one in own if one["bytes"]]
        assert len(asked) == len(set(asked))
        assert len({one["path"] for one in own}) == files
        assert [one for one in first if one["early"] and one not in own] == [], (
            "no call comes before the page"
        )
        await page.goto(bot.url + "/account")
        await page.goto(bot.url + path)
        await page.wait_for_load_state("networkidle")
        again = [one for one in await page.evaluate(LOADED) if one["path"].startswith("/static/")]
        assert sum(one["bytes"] for one in again) == 0, "what is there already is not asked for again"


async def test_the_page_of_the_api_needs_nothing_from_elsewhere(visitor):
    page = await visitor.open("/docs")
    assert await page.locator("details").count() > 20
    await page.get_by_text("/conversations/{id}/fork", exact=True).click()
    assert "message_id" in await page.locator("details[open]").inner_text()
    assert "`" not in await page.inner_text("#operations")
