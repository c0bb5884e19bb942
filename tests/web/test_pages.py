"""The templates and words of the pages, and what people are told where there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from feishu_bot.web.accounts import browser_of
from feishu_bot.web.admin_words import console_words
from feishu_bot.web.words import words
from tests.e2e.bots import configuration
from tests.e2e.browsers import Browser, add_accounts
from tests.e2e.conftest import bots, nursery  # noqa: F401

TEMPLATES = Path(__file__).parents[2] / "feishu_bot" / "web" / "templates"
SOURCES = {path.relative_to(TEMPLATES).as_posix(): path.read_text() for path in TEMPLATES.rglob("*.html")}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_word_that_a_template_names_is_there_and_is_the_word(name):
    for variable, key in re.findall(r"\b([tw])\.(\w+)", re.sub(r"<script.*?</script>", "", SOURCES[name])):
        known = words("en") if variable == "t" else console_words("en")
        assert key in known, key
        assert not hasattr(dict, key), f"{variable}.{key} is a method of a dict: write {variable}[{key!r}]"


async def test_people_are_told_in_a_page_what_programs_are_told_in_json(bots, sqlite_url):  # noqa: F811
    bot = await bots.start(configuration(sqlite_url))
    await add_accounts(sqlite_url, ada="admin")
    browsers = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "Accept-Language": "zh-CN"}
    async with Browser(bot) as ada:
        await ada.log_in("ada")
        for path, status, sentence in (
            ("/nothing", 404, "没有这个页面"),
            ("/admin/dead/in-99", 404, "没有这个页面"),
            ("/admin/conversations/99", 404, "没有这个页面"),
            ("/conversations/99/export", 404, "没有这个页面"),
            ("/admin?days=8", 400, "无法理解此地址"),
        ):
            found, text = await ada.ask("GET", path, headers=browsers)
            assert (found, ada.response.content_type) == (status, "text/html"), path
            assert sentence in text
            assert "script-src 'self'" in ada.response.headers["Content-Security-Policy"]
            found, told = await ada.ask("GET", path)
            assert (found, set(told["error"])) == (status, {"code", "message"}), path
        assert (await ada.ask("DELETE", "/conversations/99", headers=browsers))[1]["error"][
            "code"
        ] == "not_found"


_WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (f"Mozilla/5.0 (X11; Linux x86_64) {_WEBKIT} Chrome/140.0.0.0 Safari/537.36", "Chrome 140 · Linux"),
        (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {_WEBKIT} Chrome/140.0 Safari/537.36 Edg/141.0", "Edge 141 · Windows"),
        (f"Mozilla/5.0 (Linux; Android 15; Pixel 9) {_WEBKIT} Chrome/140.0 Mobile Safari/537.36", "Chrome 140 · Android"),
        (f"Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) {_WEBKIT} Version/18.0 Safari/604.1", "Safari 18 · iPhone"),
        ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:143.0) Gecko/20100101 Firefox/143.0", "Firefox 143 · macOS"),
        ("Mozilla/5.0 <script>", "Mozilla/5.0 <script>"),
        ("nightly report", "nightly report"),
        ("", ""),
    ],
    ids=["chrome", "edge", "android", "iphone", "firefox", "markup", "label", "empty"],
)  # fmt: skip
def test_a_session_is_told_by_its_browser(label, told):
    assert browser_of(label) == told
