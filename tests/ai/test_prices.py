"""What calls cost: by the built-in table, by prices of one's own, in whole millionths of a dollar."""

from __future__ import annotations

import tomllib
from datetime import date
from decimal import Decimal
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.prices import Prices, built_in, models_without_price
from feishu_bot.config import BotSettings, PriceSettings, load
from feishu_bot.errors import ConfigError
from feishu_bot.reference import platform_settings

TABLES = tomllib.loads(files("feishu_bot.ai").joinpath("prices.toml").read_text(encoding="utf-8"))


def test_every_price_of_the_table_has_its_source_and_its_date():
    assert sum(len(table["models"]) for table in TABLES.values()) == len(built_in()) > 50
    for table in TABLES.values():
        assert table["source"]
        assert date(2025, 1, 1) < table["read"] < date(2100, 1, 1)
        for name, (new, cached, output) in table["models"].items():
            assert name == name.lower()
            assert 0 <= cached <= new <= output or new == output == 0, name


@pytest.mark.parametrize(
    ("model", "cost"),
    [
        ("echo", 0),
        ("ollama:qwen2:7b", 0),
        ("openai:gpt-4o", 2500 + 5000),
        ("openai:gpt-4o-2024-05-13", 5000 + 7500),  # dearer than its later versions
        ("openai:GPT-4o-mini", 150 + 300),
        ("openai:gpt-4o-audio-preview", None),  # another price than gpt-4o's, and not known
        ("deepseek:deepseek-chat", 280 + 210),
        ("other:gpt-4o", None),
        ("gpt-4o", None),
    ],
)
def test_a_model_costs_what_the_longest_name_that_fits_says(model, cost):
    assert Prices({}).cost(model, 1000, 500) == cost


def test_prices_of_ones_own_go_before_the_table_also_as_a_wider_pattern():
    own = {"openai:*": PriceSettings(input=1, output=2), "openai:o3": PriceSettings(input=3, output=4)}
    prices = Prices(own)
    assert prices.cost("openai:gpt-4o", 10, 10) == 30
    assert prices.cost("openai:o3", 10, 10) == 70
    assert prices.cost("deepseek:deepseek-chat", 1_000_000, 0) == 280_000


def test_what_the_provider_had_at_hand_is_cheaper_and_never_more_than_the_input():
    prices = Prices({"m": PriceSettings(input=10, cached_input=1, output=100)})
    assert prices.cost("m", 100, 1, 40) == 60 * 10 + 40 + 100
    assert prices.cost("m", 100, 0, 500) == 100
    assert Prices({"m": PriceSettings(input=10, output=1)}).cost("m", 100, 0, 40) == 1000


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_cost_is_the_exact_product_rounded_up(new, cached, output):
    cached = min(cached, new)
    found = Prices({}).cost("deepseek:deepseek-v4-pro", new, output, cached)
    exact = (new - cached) * Decimal("0.435") + cached * Decimal("0.003625") + output * Decimal("0.87")
    assert 0 <= found - exact < 1


def test_a_limit_on_costs_needs_a_price_for_every_model_that_may_be_asked():
    ai = {
        "model": "openai:gpt-4o",
        "fallback_models": ["my:spare", "echo"],
        "agents": {"coder": {"model": "my:coder", "fallback_models": ["deepseek:deepseek-chat", "my:x"]}},
    }
    money = {"name": "a", "limit_cost_usd": 1}
    cheap = {"name": "b", "limit_requests": 1, "on_exceeded": "degrade", "degrade_to": "my:small"}
    found = list(models_without_price(BotSettings(ai=ai, budgets=[money, cheap])))
    assert [model for _, model in found] == ["my:spare", "my:coder", "my:x", "my:small"]
    assert found[1][0] == ("ai", "agents", "coder", "model")
    assert list(models_without_price(BotSettings(ai=ai, budgets=[cheap]))) == []
    priced = {**ai, "prices": {"my:*": {"input": 1, "output": 1}}}
    assert list(models_without_price(BotSettings(ai=priced, budgets=[money, cheap]))) == []


def test_the_check_of_a_configuration_names_the_line_of_a_model_without_a_price(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "ai:\n  model: my:model\n  base_url: http://x\nbudgets:\n  - {name: a, limit_cost_usd: 1}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load(file, platform_settings=platform_settings(), environ={}, unpriced=models_without_price)
    (line,) = refused.value.mistakes
    assert line == (
        f"{file}:2:3: ai.model: a budget limits costs, and this model has no known price "
        "(got 'my:model'); expected a price in ai.prices"
    )
