"""What a model call costs, in millionths of a US dollar: whole numbers, so that every sum is exact."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from feishu_bot.config import BotSettings, PriceSettings

_PER = 1_000_000  # prices are for so many tokens, and kept in so many parts of a dollar


class Price(NamedTuple):
    """Millionths of a dollar per million tokens, which is dollars per million million tokens: whole numbers."""

    input: int
    cached_input: int
    output: int

    @classmethod
    def of(cls, input_usd: float, cached_usd: float | None, output_usd: float) -> Price:
        """Return the price for so many dollars per million tokens."""
        cached = input_usd if cached_usd is None else cached_usd
        return cls(round(input_usd * _PER), round(cached * _PER), round(output_usd * _PER))


@cache
def built_in() -> Mapping[str, Price]:
    """Return the prices that come with the program (``prices.toml``), by name or pattern."""
    text = files("feishu_bot.ai").joinpath("prices.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return MappingProxyType({
        name: Price.of(*price) for table in tables.values() for name, price in table["models"].items()
    })  # fmt: skip


class Prices:
    """Prices by model: those of ``ai.prices``, then the built-in ones; the longest name or pattern that fits."""

    def __init__(self, own: Mapping[str, PriceSettings]) -> None:
        self._own = {name: Price.of(p.input, p.cached_input, p.output) for name, p in own.items()}
        self._known: dict[str, Price | None] = {}

    def of(self, model: str) -> Price | None:
        """Return what a model costs; None where that is not known."""
        if model not in self._known:
            own = _longest(model, self._own)
            self._known[model] = own if own is not None else _longest(model, built_in())
        return self._known[model]

    def cost(self, model: str, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> int | None:
        """Return the cost in millionths of a dollar, rounded up; None where the model has no known price.

        ``cached_tokens`` are those of the input that the provider had at hand.
        """
        price = self.of(model)
        if price is None:
            return None
        cached = min(cached_tokens, input_tokens)
        parts = (
            (input_tokens - cached) * price.input + cached * price.cached_input + output_tokens * price.output
        )
        return -(-parts // _PER)


def _longest(model: str, prices: Mapping[str, Price]) -> Price | None:
    name = model.lower()
    fits = [pattern for pattern in prices if fnmatchcase(name, pattern.lower())]
    return prices[max(fits, key=len)] if fits else None


def named_models(settings: BotSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every model that a configuration can call, with its key path."""
    ai = settings.ai
    yield ("ai", "model"), ai.model
    for place, model in enumerate(ai.fallback_models):
        yield ("ai", "fallback_models", str(place)), model
    for name, agent in ai.agents.items():
        if agent.model is not None:
            yield ("ai", "agents", name, "model"), agent.model
        for place, model in enumerate(agent.fallback_models or ()):
            yield ("ai", "agents", name, "fallback_models", str(place)), model
    for place, budget in enumerate(settings.budgets):
        if budget.degrade_to is not None:
            yield ("budgets", str(place), "degrade_to"), budget.degrade_to


def models_without_price(settings: BotSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the models that a limit on costs meets and cannot count, with their key paths."""
    if settings.ai.enabled and any(budget.limit_cost_usd is not None for budget in settings.budgets):
        prices = Prices(settings.ai.prices)
        yield from ((path, model) for path, model in named_models(settings) if prices.of(model) is None)
