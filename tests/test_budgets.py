"""Which budgets count a message, by a clock that may jump, and what is told of them."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.budgets import NEARLY, OVER, Budgets
from feishu_bot.config import BotSettings, BudgetSettings
from feishu_bot.model import BudgetRefusal, CallUsage, ChatType, InboundMessage
from feishu_bot.store.work import Amounts, Balance, Standing
from feishu_bot.windows import window_bounds

GROUP = InboundMessage("feishu", "1", sender_id="ou:ann", chat_id="oc_team", chat_type=ChatType.GROUP)
PRIVATE = InboundMessage("feishu", "2", sender_id="ou:ann", chat_id="oc_p2p")
NOON = 1_750_248_000_000
WINDOWS = ["minute", "hour", "day", "week", "month"]


def budgets(*configured, zone="Asia/Shanghai"):
    settings = BotSettings(
        chat={"language": "en"},
        budgets=[BudgetSettings(**{"limit_tokens": 1000, **budget}) for budget in configured],
        schedule={"timezone": zone},
    )
    return Budgets(settings, tenant=lambda account: f"tenant of {account}", local_time=str)


@pytest.mark.parametrize(
    ("scope", "in_group", "in_private"),
    [
        ("user", "feishu:ou%3Aann", "feishu:ou%3Aann"),
        ("chat", "feishu:oc_team", "feishu:private:ou%3Aann"),
        ("platform", "feishu", "feishu"),
        ("tenant", "tenant of feishu", "tenant of feishu"),
        ("global", "*", "*"),
    ],
)
def test_each_scope_has_its_own_count(scope, in_group, in_private):
    found = budgets({"name": "b", "scope": scope})
    assert [c.key for m in (GROUP, PRIVATE) for c in found.charges(m, NOON)] == [in_group, in_private]


def test_a_budget_that_degrades_counts_every_model_but_the_one_it_degrades_to():
    found = budgets({"name": "dear", "on_exceeded": "degrade", "degrade_to": "small"}, {"name": "all"})
    assert [c.budget for c in found.charges(GROUP, NOON, model="big")] == ["dear", "all"]
    assert [c.budget for c in found.charges(GROUP, NOON, model="small")] == ["all"]
    assert [c.budget for c in found.charges(GROUP, NOON, model="other", spared=frozenset({"dear"}))] == [
        "all"
    ]


def test_a_person_is_counted_in_whatever_chat_and_not_where_a_budget_is_for_others():
    found = budgets(
        {"name": "all"},
        {"name": "one chat", "match": {"chat": "oc_x"}} | {"name": "one-chat"},
        {"name": "others", "match": {"user": "feishu:bob"}},
        {"name": "qq", "match": {"platform": "qq*"}},
        {"name": "chat", "scope": "chat"},
    )
    charges = found.of_person("feishu", "ou:ann", NOON)
    assert [(c.budget, c.key) for c in charges] == [("all", GROUP.person), ("one-chat", GROUP.person)]


@given(
    st.lists(st.integers(946_684_800_000, 4_102_444_800_000), min_size=1, max_size=20),
    st.sampled_from(WINDOWS),
    st.sampled_from(["Asia/Shanghai", "America/Sao_Paulo", "Australia/Lord_Howe", "UTC"]),
)
def test_however_the_clock_jumps_each_instant_is_counted_in_its_own_window(instants, window, zone):
    found = budgets({"name": "b", "window": window}, zone=zone)
    for now in [*instants, *sorted(instants), *sorted(instants, reverse=True)]:
        (charge,) = found.charges(GROUP, now)
        assert (charge.window_start, charge.ends_ms) == window_bounds(window, now, ZoneInfo(zone))


def standing(found, *, used=0, granted=0, told=0):
    (charge,) = found.charges(GROUP, NOON)
    return Standing(charge, Balance(used=Amounts(used, 0, 0), granted=Amounts(granted, 0, 0), told=told))


@pytest.mark.parametrize(
    ("used", "taken", "granted", "told", "level"),
    [
        (0, 799, 0, 0, None),
        (0, 800, 0, 0, NEARLY),
        (799, 1, 0, 0, NEARLY),
        (800, 1, 0, 1, None),
        (999, 1, 0, 1, None),
        (1000, 1, 0, 1, OVER),
        (0, 5000, 0, 0, OVER),
        (5000, 1, 0, 2, None),
        (0, 900, 1000, 0, None),
        (0, 1600, 1000, 0, NEARLY),
    ],
)
def test_what_is_used_is_told_once_when_it_is_near_and_once_when_it_is_over(
    used, taken, granted, told, level
):
    found = budgets({"name": "b", "window": "total", "on_exceeded": "warn", "warn_at": 0.8})
    calls = [CallUsage(0, "m", taken, 0), CallUsage(1, "m", 10_000, 0, "failed")]
    warnings = found.warnings([standing(found, used=used, granted=granted, told=told)], calls, language="en")
    assert [(window, reached) for window, reached, _ in warnings] == (
        [] if level is None else [(("b", GROUP.person, 0), level)]
    )


@pytest.mark.parametrize(
    ("unit", "en", "zh"),
    [
        ("tokens", "has used 1500000 of 2000000 tokens.", "已用 1500000，上限 2000000 个 token。"),
        ("requests", "has used 1500000 of 2000000 calls.", "已用 1500000，上限 2000000 次调用。"),
        ("cost", "has used $1.50 of $2.", "已用 $1.50，上限 $2。"),
    ],
)
def test_who_is_refused_reads_used_and_limit_in_their_unit_and_when_the_window_ends(unit, en, zh):
    refusal = BudgetRefusal("b", 1_000_000, 500_000, 2_000_000, 9, 77, unit=unit)
    found = budgets({"name": "b"})
    assert en in found.refused(refusal, prefix="/", language="en")
    assert "It is renewed at 77." in found.refused(refusal, prefix="/", language="en")
    assert zh in found.refused(refusal, prefix="/", language="zh")
