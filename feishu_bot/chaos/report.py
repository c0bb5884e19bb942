"""A run on one page, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from feishu_bot.chaos.scenario import WORDS
from feishu_bot.chaos.verdict import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.chaos.driver import Result

_SHOWN_COMPLAINTS: Final = 3
_COLUMN: Final = 15
_KEPT: Final = "every acknowledged message has one stored answer, seen once, in order, within its budget"


def page(result: Result) -> str:
    """Return the report in words."""
    scenario, verdict = result.scenario, result.verdict
    processes = f"{scenario.groups} x {scenario.workers} processes" + (" in namespaces" * scenario.apart)
    lines = [f"{result.kind}, {processes}, lease {scenario.lease_s:g} s, seed {scenario.seed}"]

    def line(name: str, words: str) -> None:
        lines.append(f"  {name:<{_COLUMN}} {words}")

    line(
        "sent",
        f"{result.sent} messages of {scenario.chats} people in {result.seconds:.0f} s; {result.repeated} sent again "
        f"after the acknowledgement, {result.reordered} pairs out of turn or at once",
    )
    line("accidents", _named({WORDS[kind]: count for kind, count in result.done.items()}) or "none")
    if result.details:
        line("", _named(result.details))
    line("acknowledged", f"{verdict.acknowledged}, the request {_times(result.ack_s)}")
    line("", f"{result.posts} requests in all; from the first of a message {_times(result.waited_s)}")
    line("answered", f"{verdict.answered}, seen {_times(verdict.answer_s)} after the acknowledgement")
    if verdict.refused:
        line("", f"{verdict.refused} more were told that their budget is used up")
    if result.given_up:
        line("", f"{result.given_up} ended dead in an outage, said so, and were answered by `dead retry`")
    if result.folded:
        line("", f"{result.folded} second copies were known to a platform by their key")
    line("settled", f"{result.settled_s:.0f} s after the last accident; {result.model_calls} model calls")
    line("wrong", " · ".join(f"{kind} {len(found)}" for kind, found in verdict.breaches.items()))
    lines += [f"    {words}" for words in verdict.examples()]
    if result.complaints:
        line("logged faults", f"{len(result.complaints)}, such as")
        lines += [f"    {words}" for words in sorted(set(result.complaints))[:_SHOWN_COMPLAINTS]]
    lines.append(
        f"  {'KEPT' if verdict.kept else 'BROKEN':<{_COLUMN}} {_KEPT if verdict.kept else 'see above'}"
    )
    return "\n".join(lines)


def document(result: Result) -> dict[str, Any]:
    """Return the report as JSON has it; times are in seconds."""
    scenario, verdict = result.scenario, result.verdict
    return {
        "database": result.kind,
        "groups": scenario.groups,
        "workers": scenario.workers,
        "namespaces": scenario.apart,
        "lease_s": scenario.lease_s,
        "seed": scenario.seed,
        "kept": verdict.kept,
        "seconds": round(result.seconds, 1),
        "settled_s": round(result.settled_s, 1),
        "messages": result.sent,
        "requests": result.posts,
        "repeated": result.repeated,
        "reordered": result.reordered,
        "accidents": dict(result.done),
        "details": dict(result.details),
        "acknowledged": verdict.acknowledged,
        "answered": verdict.answered,
        "refused_by_budget": verdict.refused,
        "given_up_at_first": result.given_up,
        "folded_by_platforms": result.folded,
        "model_calls": result.model_calls,
        "request_s": _percentiles(result.ack_s),
        "acknowledged_s": _percentiles(result.waited_s),
        "answered_s": _percentiles(verdict.answer_s),
        "breaches": {kind: len(found) for kind, found in verdict.breaches.items()},
        "examples": verdict.examples(),
        "logged_faults": len(result.complaints),
    }


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {
        name: round(percentile(values, share), 4)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def _times(values: Sequence[float]) -> str:
    return " · ".join(f"{name} {_duration(value)}" for name, value in _percentiles(values).items())


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
