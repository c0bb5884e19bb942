"""Counts by another model's encoding are corrected by what the model reports, within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.drift import MOST, Drift

OTHER = "deepseek:deepseek-chat"


def test_a_model_that_reports_more_is_reserved_more_after_a_few_calls():
    drift = Drift(1.15)
    assert drift.factor(OTHER) == 1.15
    for _ in range(5):
        drift.learn(OTHER, counted=1000, reported=1300)
    assert drift.factor(OTHER) == pytest.approx(1.15 * 1.3, rel=0.01)
    assert drift.factor("qwen:qwen-plus") == 1.15, "each model by itself"


def test_a_model_that_reports_less_goes_back_slowly_and_never_below_our_count():
    drift = Drift(1.15)
    drift.learn(OTHER, counted=1000, reported=1400)
    high = drift.factor(OTHER)
    drift.learn(OTHER, counted=1000, reported=500)
    assert 0.95 * high < drift.factor(OTHER) < high
    for _ in range(500):
        drift.learn(OTHER, counted=1000, reported=500)
    assert drift.factor(OTHER) == 1.15


def test_a_model_whose_encoding_is_at_hand_is_never_widened():
    drift = Drift(1.15)
    drift.learn("openai:gpt-4o", counted=100, reported=10**9)
    assert drift.factor("openai:gpt-4o") == drift.factor("echo") == 1.0


def test_a_short_prompt_teaches_nothing():
    drift = Drift(1.15)
    drift.learn(OTHER, counted=8, reported=30)
    assert drift.factor(OTHER) == 1.15


def test_families_that_are_known_to_need_more_begin_with_more():
    drift = Drift(1.15)
    assert drift.factor("mistral:mistral-large") >= 1.18
    assert drift.factor("anthropic:claude-sonnet-4-0") > 1.3


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**12))))
def test_whatever_is_reported_the_factor_stays_within_its_bounds(calls):
    drift = Drift(1.2)
    for counted, reported in calls:
        drift.learn(OTHER, counted=counted, reported=reported)
        assert 1.2 <= drift.factor(OTHER) <= 1.2 * MOST
