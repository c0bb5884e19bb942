"""Agents made from a configuration."""

from __future__ import annotations

import re

import pytest

from feishu_bot.ai.profile import DEFAULT, choose_profile, make_profiles, models_of
from feishu_bot.config import AISettings, load
from feishu_bot.errors import ConfigError

AI = AISettings(
    model="openai:gpt-4o",
    fallback_models=("openai:gpt-4.1",),
    system_prompt="Be kind.",
    personas={"pirate": "Arr."},
    agents={
        "plain": {},
        "coder": {"model": "openai:gpt-4.1", "tools": (), "summarize": True},
        "sailor": {"persona": "pirate", "temperature": 0, "max_history_turns": 0},
    },
)


def test_an_agent_is_as_the_ai_part_where_its_own_says_nothing():
    profiles = make_profiles(AI)
    assert list(profiles) == [DEFAULT, "plain", "coder", "sailor"]
    default, plain, coder, sailor = profiles.values()
    assert (plain.model, plain.system_prompt, plain.tools, plain.name) == (
        default.model, "Be kind.", ("*",), "plain",
    )  # fmt: skip
    assert (coder.model, coder.tools, coder.summarize, coder.fallback_models) == (
        "openai:gpt-4.1",
        (),
        True,
        (),
    )
    assert (sailor.system_prompt, sailor.persona, sailor.temperature, sailor.max_history_turns) == (
        "Arr.", "pirate", 0, 0,
    )  # fmt: skip


def test_a_chosen_model_comes_first_and_the_agents_own_is_asked_if_it_fails():
    chosen = choose_profile(make_profiles(AI), {}, agent="plain", persona=None, model="x:spare")
    assert (chosen.model, chosen.fallback_models) == ("x:spare", ("openai:gpt-4o", "openai:gpt-4.1"))


def test_unknown_names_are_passed_over():
    chosen = choose_profile(make_profiles(AI), AI.personas, agent="gone", persona="gone", model=None)
    assert (chosen.name, chosen.system_prompt) == (DEFAULT, "Be kind.")


def test_every_model_is_named_once():
    assert models_of(AI) == ("openai:gpt-4o", "openai:gpt-4.1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ai: {agent_for: [{agent: nobody}]}", "agent_for names 'nobody', which is not in ai.agents"),
        ("ai: {agents: {a: {persona: nobody}}}", "the agent 'a' names a persona that is not in ai.personas"),
        ("ai: {agents: {default: {}}}", 'the agent "default" is ai itself'),
        ("ai: {agents: {a: {modle: x}}}", "modle"),
        ("chats: [{agent: nobody}]", "chats.0 names the agent 'nobody', which is not in ai.agents"),
        ("chats: [{match: {type: crowd}, agent: default}]", "type"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_mistake_of_the_configuration(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(folder=tmp_path, platform_settings={}, environ={})
