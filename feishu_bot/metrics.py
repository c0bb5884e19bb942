"""What ``/metrics`` shows. Counts since this process started; plain integers on a message's way."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from feishu_bot.model import End

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from feishu_bot.model import CallUsage

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.5, 1, 3)
_SLOW = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """Counters, and two histograms of seconds."""

    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self._gauges = gauges
        self.received: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.ends: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.acknowledged = Histogram(
            "feishu_bot_acknowledge_seconds",
            "From an event's arrival to its acknowledgement",
            buckets=_QUICK,
            registry=self.registry,
        )
        self.answered = Histogram(
            "feishu_bot_answer_seconds",
            "From a message's record to its end",
            buckets=_SLOW,
            registry=self.registry,
        )

    def count_calls(self, calls: tuple[CallUsage, ...]) -> None:
        for call in calls:
            if call.outcome != "failed":
                self.tokens[call.model, "input"] += call.input_tokens
                self.tokens[call.model, "output"] += call.output_tokens

    def collect(self) -> Iterator[Metric]:
        """Yield every counter and gauge (called by the registry)."""
        received = CounterMetricFamily("feishu_bot_received", "Events recorded", labels=["account"])
        for account, count in sorted(self.received.items()):
            received.add_metric([account], count)
        yield received
        duplicates = CounterMetricFamily("feishu_bot_duplicates", "Repeated events", labels=["account"])
        for account, count in sorted(self.duplicates.items()):
            duplicates.add_metric([account], count)
        yield duplicates
        refused = CounterMetricFamily(
            "feishu_bot_refused_requests", "Requests not accepted", labels=["account", "status"]
        )
        for (account, status), count in sorted(self.refused.items()):
            refused.add_metric([account, status], count)
        yield refused
        ends = CounterMetricFamily("feishu_bot_ended", "Events by their end", labels=["account", "end"])
        for account in sorted({a for a, _ in self.ends} | set(self.received)):
            for end in End:
                ends.add_metric([account, end.value], self.ends[account, end.value])
        yield ends
        tokens = CounterMetricFamily("feishu_bot_tokens", "Tokens booked", labels=["model", "direction"])
        for (model, direction), count in sorted(self.tokens.items()):
            tokens.add_metric([model, direction], count)
        yield tokens
        for name, value in sorted(self._gauges().items()):
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(f"feishu_bot_{name.removesuffix('_total')}", name.replace("_", " "))
            metric.add_metric([], value)
            yield metric

    def describe(self) -> Iterator[Metric]:
        """Return nothing: what is collected is named at each scrape."""
        return iter(())

    def render(self) -> bytes:
        return generate_latest(self.registry)
