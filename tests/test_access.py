from __future__ import annotations

import pytest

from feishu_bot.access import Access, applies
from feishu_bot.config import AccessSettings, MatchSettings
from feishu_bot.model import ChatType, InboundMessage


def message(sender="ou_ann", chat="oc_team", account="feishu", chat_type=ChatType.GROUP):
    return InboundMessage(account, "k", sender_id=sender, chat_id=chat, chat_type=chat_type)


@pytest.mark.parametrize(
    "name",
    ["feishu:ou_ann", "feishu:group:ou_ann", "feishu:oc_team", "feishu:*", "feishu:ou_???", "*:group:*"],
)
def test_a_rule_names_a_person_a_user_key_a_chat_or_a_pattern(name):
    assert not Access(AccessSettings(deny=(name,)), ()).allows(message())
    assert Access(AccessSettings(default="deny", allow=(name,)), ()).allows(message())


@pytest.mark.parametrize(
    "name",
    [
        "ou_ann",
        "feishu:ou_Ann",
        "feishu:ou_an",
        "feishu:private:ou_ann",
        "lark:*",
        "feishu:OC_TEAM",
        "feishu:ou_ann ",
    ],
)
def test_identifiers_are_compared_as_bytes_and_as_a_whole(name):
    assert Access(AccessSettings(deny=(name,)), ()).allows(message())


def test_deny_wins_over_allow_and_the_default_is_for_the_rest():
    rules = Access(AccessSettings(default="deny", allow=("feishu:*",), deny=("feishu:ou_ann",)), ())
    assert not rules.allows(message())
    assert rules.allows(message(sender="ou_bob"))
    assert not rules.allows(message(account="lark"))


def test_a_colon_in_an_id_cannot_make_somebody_else():
    rules = Access(AccessSettings(deny=("feishu:group:ou_ann",)), ())
    assert rules.allows(message(sender="group:ou_ann", chat="", chat_type=ChatType.PRIVATE))


def test_admins_are_persons_or_user_keys():
    rules = Access(AccessSettings(), ("feishu:ou_ann", "feishu:private:ou_bob"))
    assert rules.is_admin(message())
    assert not rules.is_admin(message(sender="ou_bob"))
    assert rules.is_admin(message(sender="ou_bob", chat_type=ChatType.PRIVATE))


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        (None, True),
        ({}, True),
        ({"platform": "feishu"}, True),
        ({"platform": "fei*", "chat": "oc_*"}, True),
        ({"platform": "fei*", "chat": "oc_x"}, False),
        ({"user": "feishu:ou_ann"}, True),
        ({"user": "feishu:group:*"}, True),
        ({"user": "ou_ann"}, False),
    ],
)
def test_a_match_holds_when_all_of_it_does(match, holds):
    assert applies(None if match is None else MatchSettings(**match), message()) is holds
