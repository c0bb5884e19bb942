"""What the page of the chat commands shows, held against the commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from feishu_bot.app import App
from feishu_bot.config import load
from feishu_bot.plugins import load_plugin
from feishu_bot.reference import platform_settings
from tests.chat import PlainBot

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "commands.md").read_text().replace("\\|", "¦")
TABLE, _, ELSEWHERE = PAGE.partition("## Coming from another bot")
ROW = re.compile(r"^\| `/(\w+) ?([^`]*)`(?: \(`/(\w+)`\))? \| `/(\w+)` \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
NAMED = re.compile(r"`/(\w+)[^`]*`")


@pytest.fixture
async def commands(tmp_path):
    """Return the commands that a server has without plugins."""
    (tmp_path / "config.yaml").write_text("plugins: {enabled: []}\n")
    app = App(load(folder=tmp_path, platform_settings=platform_settings(), environ={}).settings)
    await app.plugins.start(lambda _name: PlainBot())
    found = app.plugins.commands()
    await app.plugins.stop()
    return found


@pytest.fixture
async def brought_along():
    """Return the commands of the plugin that the page names."""
    return await load_plugin(ROOT / "plugins", "qq_group").hooks["commands"](PlainBot())


async def test_the_page_has_every_command_with_its_names_arguments_and_who_may_use_it(commands):
    rows = {}
    for name, usage, other, chinese, who in ROW.findall(TABLE):
        names = {name, chinese, *([other] if other else [])}
        rows[name] = (names, usage.replace("¦", "|"), who == "admins")
    assert rows == {c.name: (set(c.names), c.usage, c.admin_only) for c in commands}


async def test_every_command_has_a_chinese_name_and_help_in_both_languages(commands, brought_along):
    for command in (*commands, *brought_along):
        assert any(not alias.isascii() for alias in command.aliases), command.name
        assert set(command.help) == {"zh", "en"}, command.name


async def test_every_command_that_the_page_offers_to_those_who_come_from_elsewhere_exists(
    commands, brought_along
):
    known = {name for command in (*commands, *brought_along) for name in command.names}
    offered = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", ELSEWHERE, re.MULTILINE)
    assert len(offered) > 10
    assert set(NAMED.findall(" ".join(offered))) - known == set()
    said = set(NAMED.findall(TABLE.replace("`/usr/bin/env`", "")))
    assert said - known == set()
