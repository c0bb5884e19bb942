"""What the configuration takes of workers and alerts."""

from __future__ import annotations

import pytest

from feishu_bot.config import load
from feishu_bot.errors import ConfigError
from feishu_bot.reference import platform_settings

HOOK = "https://open.feishu.cn/open-apis/bot/v2/hook/11111111-token"


def loaded(folder, text: str):
    (folder / "config.yaml").write_text(text)
    return load(folder=folder, environ={}, platform_settings=platform_settings())


def mistakes(folder, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    return caught.value.mistakes


def test_several_workers_cannot_share_a_database_in_memory(tmp_path):
    database = 'ai: {conversation_persistence: {db_url: "sqlite://"}}\n'
    (line,) = mistakes(tmp_path, database + "server:\n  workers: 4\n")
    assert line.startswith(
        "config.yaml:3:3: server.workers: several processes cannot share a database in memory"
    )
    assert loaded(tmp_path, database).settings.server.workers == 1


def test_several_workers_on_sqlite_are_said_to_be_on_one_machine(tmp_path):
    assert any("one machine" in w for w in loaded(tmp_path, "server: {workers: 2}").warnings)
    assert loaded(tmp_path, "server: {workers: 1}").warnings == ()


@pytest.mark.parametrize(
    ("alert", "line"),
    [
        (
            "{to: wep, chat: c}",
            "config.yaml:1:10: alerts.0.to: no account that is enabled (got 'wep'); did you mean web?",
        ),
        ("{to: feishu, chat: c}", "config.yaml:1:10: alerts.0.to: no account that is enabled (got 'feishu')"),
        ("{to: web}", "config.yaml:1:10: alerts.0.chat: missing; expected the chat's id"),
    ],
)
def test_an_alert_needs_an_account_that_is_enabled_and_its_chat(tmp_path, alert, line):
    assert mistakes(tmp_path, f"alerts: [{alert}]") == [line]


def test_an_alert_of_an_unknown_kind_is_a_mistake_with_the_nearest_one(tmp_path):
    (line,) = mistakes(tmp_path, f"alerts: [{{to: {HOOK}, on: [disc]}}]")
    assert "alerts.0.on.0" in line
    assert line.endswith("did you mean disk?")


def test_the_token_in_a_custom_bots_url_is_shown_nowhere(tmp_path):
    found = loaded(tmp_path, f"alerts: [{{to: {HOOK}, secret: hush-hush}}]")
    shown = found.render() + found.to_json() + repr(found.settings)
    assert "11111111-token" not in found.render() + found.to_json()
    assert "hush-hush" not in shown
    assert "bot/v2/hook/***" in found.render()
    assert {"11111111-token", "hush-hush"} <= found.secret_values()
