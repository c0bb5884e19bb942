"""Whether the promise was kept: what was acknowledged is held against what is on record and what was seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.chaos.people import number_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from feishu_bot.chaos.people import Sent
    from feishu_bot.chaos.record import Record

LOST: Final = "lost"  # acknowledged, and not answered on record or not seen
DOUBLED: Final = "doubled"  # answered or seen more than once
DISORDERED: Final = "out of order"
BUDGET: Final = "budget"  # a window differs from the ledger, is over its limit, or a call is not booked
COUNTERS: Final = "counters"  # ``db check`` finds something
LEFT: Final = "left behind"  # leases, reservations, open messages, unsent parts
SERVERS: Final = "servers"  # one ended by itself, or did not stop when asked
KINDS: Final = (LOST, DOUBLED, DISORDERED, BUDGET, COUNTERS, LEFT, SERVERS)

ANSWERED, REFUSED = "answered", "refused"
_EXAMPLES: Final = 5
_OVER_BUDGET: Final = "budget narrow"

Key = tuple[int, int]


@dataclass(slots=True)
class Verdict:
    """``breaches`` holds, by kind, a sentence for each thing that is not as promised."""

    breaches: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    acknowledged: int = 0
    answered: int = 0
    refused: int = 0  # their budget was used up
    answer_s: list[float] = field(default_factory=list)  # from the acknowledgement until it was seen

    @property
    def kept(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.breaches.values())

    def add(self, kind: str, sentences: Iterable[str]) -> None:
        self.breaches[kind].extend(sentences)

    def examples(self) -> list[str]:
        """Return some of what is wrong, with its kind."""
        return [f"{kind}: {what}" for kind, found in self.breaches.items() for what in found[:_EXAMPLES]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known after a run.

    ``seen`` is, by platform, what its chats show in order: the message replied to, the text, the instant.
    ``given_up`` are the messages that had ended dead before somebody had them answered anew; ``limits`` the
    budgets' limits; ``model_tokens`` what the model would bill.
    """

    sent: Sequence[Sent]
    record: Record
    seen: Mapping[str, Sequence[Sequence[Any]]]
    given_up: frozenset[Key]
    limits: Mapping[str, int]
    model_tokens: int
    servers: Sequence[str] = ()


def judge(evidence: Evidence) -> Verdict:
    """Return what is wrong, and some figures."""
    verdict = Verdict()
    acknowledged = [s for s in evidence.sent if s.acked_at is not None]
    verdict.acknowledged = len(acknowledged)
    answers, others, shown = _seen(evidence)
    for sent in acknowledged:
        _judge_message(evidence, verdict, sent, answers, others)
    for sent in evidence.sent:
        if sent.acked_at is None and (found := evidence.record.answered[sent.chat.number, sent.number]) > 1:
            verdict.add(DOUBLED, [f"{_name(sent)} has {found} stored answers"])
    _judge_order(evidence, verdict, acknowledged, shown)
    _judge_budgets(evidence, verdict)
    verdict.add(COUNTERS, evidence.record.wrong)
    verdict.add(LEFT, [f"{count} {what}" for what, count in evidence.record.left.items() if count])
    verdict.add(SERVERS, evidence.servers)
    return verdict


def _name(sent: Sent) -> str:
    return f"message {sent.number} of chat {sent.chat.number} ({sent.chat.platform})"


def _seen(evidence: Evidence) -> tuple[dict[Key, list[float]], Counter[str], dict[int, list[int]]]:
    """Return when each answer was shown, how many other replies each message has, and each chat's order."""
    answers: dict[Key, list[float]] = defaultdict(list)
    others: Counter[str] = Counter()
    order: dict[int, list[int]] = defaultdict(list)
    for messages in evidence.seen.values():
        for reply_to, text, at in messages:
            found = number_of(text)
            if found is None:
                others[reply_to] += 1
                continue
            answers[found].append(at)
            order[found[0]].append(found[1])
    return answers, others, order


def _judge_message(
    evidence: Evidence,
    verdict: Verdict,
    sent: Sent,
    answers: Mapping[Key, Sequence[float]],
    others: Mapping[str, int],
) -> None:
    """Each acknowledged message has one stored answer, and it is seen once; or its budget was used up, and says so."""
    key, record = (sent.chat.number, sent.number), evidence.record
    entries = record.entries.get(sent.message_id, [])
    shown, said = len(answers.get(key, ())), others.get(sent.message_id, 0)
    if len(entries) != 1:
        kind = DOUBLED if entries else LOST
        verdict.add(kind, [f"{_name(sent)} is {len(entries)} times in the inbox"])
        return
    (entry,) = entries
    if entry.state == REFUSED and entry.reason == _OVER_BUDGET:
        verdict.refused += 1
        wanted, told = 0, 1 + (key in evidence.given_up)
    elif entry.state == ANSWERED:
        verdict.answered += 1
        wanted, told = 1, int(key in evidence.given_up)
    else:
        verdict.add(LOST, [f"{_name(sent)} ended {entry.state}: {entry.reason or 'without a reason'}"])
        return
    stored = record.answered[key]
    if stored != wanted or record.asked[key] > 1:
        kind = LOST if stored < wanted else DOUBLED
        verdict.add(kind, [f"{_name(sent)} has {stored} stored answers and stands {record.asked[key]} times"])
    if shown != wanted:
        verdict.add(LOST if shown < wanted else DOUBLED, [f"{_name(sent)}: its answer is seen {shown} times"])
    if said != told:
        verdict.add(LOST if said < told else DOUBLED, [f"{_name(sent)}: {said} other replies, not {told}"])
    if shown and sent.acked_on is not None and key not in evidence.given_up:
        verdict.answer_s.append(max(0.0, answers[key][0] - sent.acked_on))


def _judge_order(
    evidence: Evidence, verdict: Verdict, acknowledged: Sequence[Sent], shown: Mapping[int, Sequence[int]]
) -> None:
    """Hold the order of record and chats against the instants: what was acknowledged earlier stands earlier."""
    chats: dict[int, dict[int, Sent]] = defaultdict(dict)
    for sent in acknowledged:
        if (sent.chat.number, sent.number) not in evidence.given_up:  # answered anew, so later
            chats[sent.chat.number][sent.number] = sent
    for chat, numbers in chats.items():
        for where, order in (
            ("on record", evidence.record.order.get(chat, [])),
            ("seen", shown.get(chat, [])),
        ):
            known = [numbers[n] for n in dict.fromkeys(order) if n in numbers]
            verdict.add(
                DISORDERED,
                [
                    f"{_name(late)} stands {where} before what was acknowledged before it"
                    for late in _early(known)
                ],
            )


def _early(order: Sequence[Sent]) -> list[Sent]:
    """Return those that stand before one that was acknowledged before they were sent."""
    found: list[Sent] = []
    least: list[float] = []  # of those that follow: when the first of them was acknowledged
    for sent in reversed(order):
        if least and least[-1] < sent.first_at:
            found.append(sent)
        assert sent.acked_at is not None  # noqa: S101  # only such are asked about
        least.append(min(sent.acked_at, least[-1] if least else sent.acked_at))
    return found


def _judge_budgets(evidence: Evidence, verdict: Verdict) -> None:
    for window in evidence.record.windows:
        name = f"budget {window.budget} of {window.key}"
        if window.used != window.ledger:
            verdict.add(BUDGET, [f"{name}: {window.used} used, {window.ledger} in the ledger"])
        if window.used + window.reserved > evidence.limits.get(window.budget, 0):
            verdict.add(
                BUDGET, [f"{name}: {window.used} used and {window.reserved} reserved are over its limit"]
            )
        if window.reserved:
            verdict.add(BUDGET, [f"{name}: {window.reserved} still reserved"])
    if evidence.record.ledger_tokens < evidence.model_tokens:
        verdict.add(
            BUDGET,
            [
                f"{evidence.record.ledger_tokens} tokens in the ledger, the model bills {evidence.model_tokens}"
            ],
        )


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of them lies; 0.0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
