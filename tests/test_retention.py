from __future__ import annotations

import pytest

from feishu_bot.config import BotSettings
from feishu_bot.retention import Retention


def retention(*, days=None, cleanup_days=30, retention=(), chats=()):
    settings = BotSettings.model_validate(
        {
            "ai": {"conversation_persistence": {"cleanup_days": cleanup_days}},
            "schedule": {"retention": list(retention)},
            "chats": list(chats),
        }
    )
    return Retention.of(settings, days)


def days_of(kept, platform="feishu", chat_id="oc_1", user_key="feishu:group:ou_1"):
    return kept.days_of(platform, chat_id, user_key)


def test_without_rules_all_are_kept_for_cleanup_days_or_what_is_given_instead():
    assert days_of(retention()) == 30
    assert days_of(retention(days=7)) == 7
    assert days_of(retention(cleanup_days=0)) is None
    assert days_of(retention(days=0)) is None


def test_the_first_rule_that_matches_wins():
    kept = retention(
        retention=[
            {"match": {"platform": "qq"}, "days": 3},
            {"match": {"platform": "feishu", "chat": "oc_*"}, "days": 0},
            {"match": {"chat": "oc_1"}, "days": 5},
        ],
        chats=[{"match": {"platform": "feishu"}, "cleanup_days": 90}, {"cleanup_days": 60}],
    )
    assert days_of(kept, "qq") == 3
    assert days_of(kept) is None
    assert days_of(kept, "onebot") == 5
    assert days_of(kept, chat_id="cc") == 90
    assert days_of(kept, "onebot", None) == 60


def test_a_chat_that_says_nothing_of_it_is_kept_as_all():
    kept = retention(chats=[{"match": {"chat": "oc_1"}}, {"cleanup_days": 60}])
    assert days_of(kept) == 30
    assert days_of(kept, chat_id="oc_2") == 60


@pytest.mark.parametrize(
    ("user_key", "types"),
    [
        ("feishu:private:ou_1", {"private"}),
        ("feishu:group:ou_1", {"group"}),
        ("qq:channel:1", {"channel"}),
        ("feishu:chat:oc_1", {"group", "channel"}),
        ("somebody", set()),
    ],
)
def test_the_type_is_that_of_the_user_key(user_key, types):
    for chat_type in ("private", "group", "channel"):
        kept = retention(retention=[{"match": {"type": chat_type}, "days": 1}])
        assert days_of(kept, user_key=user_key) == (1 if chat_type in types else 30)


def test_the_shortest_time_is_that_of_any_rule():
    assert retention(cleanup_days=0).shortest is None
    assert retention(cleanup_days=0, retention=[{"days": 0}, {"days": 9}]).shortest == 9
    assert retention(chats=[{"cleanup_days": 2}]).shortest == 2
