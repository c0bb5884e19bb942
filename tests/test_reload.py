"""Which changes of a configuration hold at once."""

from __future__ import annotations

import pytest

from feishu_bot.config import load
from feishu_bot.reference import platform_settings
from feishu_bot.reload import changes, is_live, merge


def settings(folder, text: str):
    (folder / "config.yaml").write_text(text)
    return load(folder=folder, environ={}, platform_settings=platform_settings()).settings


@pytest.mark.parametrize(
    ("text", "path", "live"),
    [
        ("chat: {language: en}", "chat.language", True),
        ("chat: {answer_within: 1h}", "chat.answer_within", True),
        ("chat: {require_at_in_groups: false}", "chat.require_at_in_groups", False),
        ("access: {deny: [x]}", "access.deny", True),
        ("budgets: []", "budgets", True),
        ("ai: {model: 'openai:gpt-4o', api_key: k}", "ai.model", True),
        (
            "ai: {conversation_persistence: {cleanup_days: 3}}",
            "ai.conversation_persistence.cleanup_days",
            False,
        ),
        ("alerts: [{to: 'https://h/hook/x'}]", "alerts", True),
        ("logging: {level: DEBUG}", "logging.level", True),
        ("server: {min_free_mb: 1}", "server.min_free_mb", True),
        ("server: {port: 1}", "server.port", False),
        ("platforms: {web: {enabled: false}}", "platforms.web.enabled", False),
        ("platforms: {more: {type: web}}", "platforms.more", False),
        ("schedule: {timezone: UTC}", "schedule.timezone", False),
        ("plugins: {enabled: []}", "plugins.enabled", False),
        ("network: {ca_file: x.pem}", "network.ca_file", False),
    ],
)
def test_what_holds_at_once_is_taken_and_the_rest_waits_for_a_restart(tmp_path, text, path, live):
    old, new = settings(tmp_path, ""), settings(tmp_path, text)
    assert path in list(changes(old, new))
    assert is_live(path) == live
    merged = merge(old, new)
    assert list(changes(old, merged)) == (list(changes(old, new)) if live else [])
    assert list(changes(merged, new)) == ([] if live else list(changes(old, new)))


def test_nothing_changes_without_a_change(tmp_path):
    assert list(changes(settings(tmp_path, ""), settings(tmp_path, ""))) == []
