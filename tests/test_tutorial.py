"""The tutorial: its settings are settings, together, and its commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from feishu_bot.cli import bot
from feishu_bot.config import load
from feishu_bot.reference import platform_settings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
SECRETS = ("DEEPSEEK_API_KEY", "ONEBOT_SECRET", "ONEBOT_TOKEN", "QQ_APP_ID", "QQ_APP_SECRET", "FEISHU_APP_ID",
           "FEISHU_APP_SECRET", "FEISHU_ENCRYPT_KEY", "FEISHU_VERIFICATION_TOKEN")  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_all_settings_of_the_tutorial_hold_together(tmp_path):
    whole: dict = {}
    for block in blocks("yaml"):
        for section, values in yaml.safe_load(block).items():
            whole[section] = {**whole.get(section, {}), **values} if isinstance(values, dict) else values
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    environ = dict.fromkeys(SECRETS, "secret")
    loaded = load(None, platform_settings=platform_settings(), folder=tmp_path, environ=environ)
    assert {name for name, own in loaded.settings.platforms.items() if own.enabled} >= {
        "feishu",
        "qq",
        "onebot",
    }
    assert [budget.name for budget in loaded.settings.budgets] == ["daily-user", "everybody"]


def test_every_command_of_the_tutorial_is_one():
    typed = re.findall(r"bot\.py (\w+)", PAGE)
    assert set(typed) <= set(bot.commands)
    assert {"chat", "demo", "check", "doctor", "selftest"} <= set(typed)


def test_every_page_it_names_is_there():
    for name in re.findall(r"\]\(([\w/]+\.md)\)", PAGE):
        assert (ROOT / "docs" / name).is_file(), name
