"""What ``/metrics`` shows. Counts since this process started; plain integers on a message's way."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from feishu_bot.model import End
from feishu_bot.peers import SILENT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from feishu_bot.intake import IntakeCounts
    from feishu_bot.model import CallUsage
    from feishu_bot.peers import Peers

_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.5, 1, 3)
_SLOW = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


# Gauges of one process; the others tell of the database, and are the same in all.
_OWN_GAUGES: Final = ("feishu_bot_messages_active", "feishu_bot_model_circuit_open", "feishu_bot_worker")


class Metrics(Collector):
    """Counters, and two histograms of seconds.

    ``arrived`` is counted where events are recorded. ``peers``: the other workers, whose counts are added.
    """

    def __init__(
        self,
        arrived: IntakeCounts,
        gauges: Callable[[], dict[str, float]],
        peers: Peers | None = None,
        circuits: Callable[[], dict[str, bool]] = dict,
    ) -> None:
        self._arrived = arrived
        self._gauges = gauges
        self._peers = peers
        self._circuits = circuits
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
        for account, count in sorted(self._arrived.received.items()):
            received.add_metric([account], count)
        yield received
        duplicates = CounterMetricFamily("feishu_bot_duplicates", "Repeated events", labels=["account"])
        for account, count in sorted(self._arrived.duplicates.items()):
            duplicates.add_metric([account], count)
        yield duplicates
        refused = CounterMetricFamily(
            "feishu_bot_refused_requests", "Requests not accepted", labels=["account", "status"]
        )
        for (account, status), count in sorted(self.refused.items()):
            refused.add_metric([account, status], count)
        yield refused
        ends = CounterMetricFamily("feishu_bot_ended", "Events by their end", labels=["account", "end"])
        for account in sorted({a for a, _ in self.ends} | set(self._arrived.received)):
            for end in End:
                count = self.ends[account, end.value]
                if end is End.IGNORED:
                    count += self._arrived.ignored[account]
                ends.add_metric([account, end.value], count)
        yield ends
        tokens = CounterMetricFamily("feishu_bot_tokens", "Tokens booked", labels=["model", "direction"])
        for (model, direction), count in sorted(self.tokens.items()):
            tokens.add_metric([model, direction], count)
        yield tokens
        circuits = GaugeMetricFamily(
            "feishu_bot_model_circuit_open", "Models that are left alone for now", labels=["model"]
        )
        for model, is_open in sorted(self._circuits().items()):
            circuits.add_metric([model], float(is_open))
        yield circuits
        for name, value in sorted(self._gauges().items()):
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(f"feishu_bot_{name.removesuffix('_total')}", name.replace("_", " "))
            metric.add_metric([], value)
            yield metric

    def describe(self) -> Iterator[Metric]:
        """Return nothing: what is collected is named at each scrape."""
        return iter(())

    def counts(self) -> list[Any]:
        """Return everything as plain data, for ``add_up`` in another process."""
        return [
            [m.name, m.type, m.documentation, [[s.name, s.labels, s.value] for s in m.samples]]
            for m in self.registry.collect()
        ]

    async def render(self) -> bytes:
        """Return Prometheus's text format, for all workers of this machine."""
        if self._peers is None:
            return generate_latest(self.registry)
        await self._peers.refresh()
        families = add_up([self.counts(), *self._peers.counts()])
        return generate_latest(_Families([*families, self._workers(self._peers)]))

    @staticmethod
    def _workers(peers: Peers) -> list[Any]:
        """Return a gauge that shows which workers are heard of; 0 for one that is not."""
        ages = {**peers.ages(), peers.slot: 0.0}
        samples = [
            ["feishu_bot_worker", {"worker": str(slot)}, float(ages.get(slot, SILENT_S) < SILENT_S)]
            for slot in range(peers.count)
        ]
        return ["feishu_bot_worker", "gauge", "Workers of this machine that are heard of", samples]


def add_up(counts: Iterable[list[Any]]) -> list[Any]:
    """Return the sums of what several processes have counted; the first one's word counts for the database."""
    families: dict[str, list[Any]] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for number, process in enumerate(counts):
        for name, kind, documentation, samples in process:
            families.setdefault(name, [name, kind, documentation])
            values = sums.setdefault(name, {})
            for sample, labels, value in samples:
                key = (sample, tuple(labels.items()))
                if sample.endswith("_created"):
                    values[key] = min(value, values.get(key, value))
                elif kind != "gauge" or name in _OWN_GAUGES:
                    values[key] = values.get(key, 0) + value
                elif number == 0:
                    values[key] = value
    return [
        [*family, [[sample, dict(labels), value] for (sample, labels), value in sums[name].items()]]
        for name, family in families.items()
    ]


class _Families(Collector):
    """Counts as plain data, in the form that is rendered."""

    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for name, kind, documentation, samples in self._families:
            metric = Metric(name, documentation, kind)
            for sample, labels, value in samples:
                metric.add_sample(sample, labels, value)
            yield metric
