"""The judge: on made-up evidence, each thing that is not as promised is found, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from feishu_bot.chaos.people import APP_SECRET, ENCRYPT_KEY, Chat, Sent, number_of
from feishu_bot.chaos.record import Entry, Record, Window
from feishu_bot.chaos.scenario import EVERYTHING, Scenario, plan
from feishu_bot.chaos.verdict import (
    BUDGET,
    COUNTERS,
    DISORDERED,
    DOUBLED,
    LEFT,
    LOST,
    SERVERS,
    Evidence,
    judge,
)

CHAT = Chat(0)
LIMITS = {"wide": 100}


def evidence(**changes) -> Evidence:
    """Two messages of one chat, one after the other, both answered as promised."""
    sent = [Sent(CHAT, n, first_at=10.0 * n, acked_at=10.0 * n + 1, acked_on=10.0 * n + 1) for n in range(2)]
    record = Record(
        entries={s.message_id: [Entry("answered", "", 1)] for s in sent},
        asked=Counter({(0, 0): 1, (0, 1): 1}),
        answered=Counter({(0, 0): 1, (0, 1): 1}),
        order={0: [0, 1]},
        windows=[Window("wide", "feishu:ou_user0", 30, 0, 30)],
        ledger_tokens=30,
        left={"open messages": 0, "leases": 0},
    )
    seen = {"feishu": [(s.message_id, f"echo: message {s.number} of chat 0", s.acked_on + 1) for s in sent]}
    made = {
        "sent": sent,
        "record": record,
        "seen": seen,
        "given_up": frozenset(),
        "limits": LIMITS,
        "model_tokens": 30,
        "servers": (),
    }
    return Evidence(**{**made, **changes})


def found(given: Evidence) -> set[str]:
    return {kind for kind, sentences in judge(given).breaches.items() if sentences}


def test_what_is_as_promised_is_found_to_be_so():
    verdict = judge(evidence())
    assert verdict.kept
    assert (verdict.acknowledged, verdict.answered, verdict.answer_s) == (2, 2, [1.0, 1.0])


def unrecorded(given):
    del given.record.entries[CHAT.message_id(1)]


def dead(given):
    given.record.entries[CHAT.message_id(1)] = [Entry("dead", "the store refuses", 5)]


def unanswered(given):
    del given.record.answered[0, 1]


def unseen(given):
    given.seen["feishu"].pop()


def untold(given):
    given.record.entries[CHAT.message_id(1)] = [Entry("refused", "budget narrow", 1)]
    given.record.answered[0, 1] = 0
    given.seen["feishu"].pop()


def answered_twice(given):
    given.record.answered[0, 1] = 2


def stored_twice(given):
    given.record.asked[0, 1] = 2


def seen_twice(given):
    given.seen["feishu"].append(given.seen["feishu"][-1])


def told_twice(given):
    given.seen["feishu"].append((CHAT.message_id(1), "Sorry", 20.0))


def recorded_in_another_order(given):
    given.record.order[0].reverse()


def seen_in_another_order(given):
    given.seen["feishu"].reverse()


def not_in_the_ledger(given):
    given.record.windows[0] = Window("wide", "feishu:ou_user0", 31, 0, 30)


def over_the_limit(given):
    given.record.windows[0] = Window("wide", "feishu:ou_user0", 101, 0, 101)


def still_reserved(given):
    given.record.windows[0] = Window("wide", "feishu:ou_user0", 30, 5, 30)


def billed_but_not_booked(given):
    given.record.ledger_tokens = 29


def wrong_counters(given):
    given.record.wrong.append("ends: feishu: 2 messages and 0 removed, but 3 ended and 0 open")


def a_lease_left(given):
    given.record.left["leases"] = 1


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (unrecorded, LOST),
        (dead, LOST),
        (unanswered, LOST),
        (unseen, LOST),
        (untold, LOST),
        (answered_twice, DOUBLED),
        (stored_twice, DOUBLED),
        (seen_twice, DOUBLED),
        (told_twice, DOUBLED),
        (recorded_in_another_order, DISORDERED),
        (seen_in_another_order, DISORDERED),
        (not_in_the_ledger, BUDGET),
        (over_the_limit, BUDGET),
        (still_reserved, BUDGET),
        (billed_but_not_booked, BUDGET),
        (wrong_counters, COUNTERS),
        (a_lease_left, LEFT),
    ],
)
def test_what_is_not_as_promised_is_found(break_it, kind):
    given = evidence()
    break_it(given)
    assert found(given) == {kind}


def test_a_server_that_ended_by_itself_is_found():
    assert found(evidence(servers=["group 0 ended with exit code 1"])) == {SERVERS}


def test_messages_that_were_under_way_at_once_may_stand_in_either_order():
    given = evidence()
    given.sent[1].first_at = 0.5
    recorded_in_another_order(given)
    seen_in_another_order(given)
    assert found(given) == set()


def test_what_was_answered_anew_after_an_outage_is_told_of_once_and_may_stand_later():
    given = evidence(given_up=frozenset({(0, 0)}))
    recorded_in_another_order(given)
    seen_in_another_order(given)
    given.seen["feishu"].insert(0, (CHAT.message_id(0), "Sorry, something went wrong.", 2.0))
    assert found(given) == set()


def test_a_message_that_was_not_acknowledged_may_be_on_record_once_but_not_twice():
    given = evidence()
    given.sent[1].acked_at = None
    assert found(given) == set()
    answered_twice(given)
    assert found(given) == {DOUBLED}


def test_the_same_seed_gives_the_same_accidents_and_another_one_others():
    possible = frozenset(EVERYTHING)
    first, again, other = (
        plan(Scenario(seed=seed, seconds=60, faults=EVERYTHING), possible) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {fault.kind for fault in first} == set(EVERYTHING)
    assert all(fault.at < 60 for fault in first)


def test_accidents_that_a_database_does_not_know_are_left_out():
    faults = plan(Scenario(seed=1, seconds=60, faults=EVERYTHING), frozenset({"kill"}))
    assert {fault.kind for fault in faults} == {"kill"}


def test_an_accident_may_be_named_with_its_detail():
    faults = plan(Scenario(seed=1, faults=("platform feishu lost", "model hang")), frozenset(EVERYTHING))
    assert {(fault.kind, fault.detail) for fault in faults} == {
        ("platform", "feishu lost"),
        ("model", "model hang"),
    }


@pytest.mark.parametrize("number", range(8))
def test_people_write_in_private_and_in_groups_on_both_platforms_each_a_conversation_of_his_own(number):
    chat = Chat(number)
    headers, body = chat.request(3)
    signed = "X-Signature-Ed25519" if chat.platform == "qq" else "X-Lark-Signature"
    assert headers[signed]
    assert body
    assert len({Chat(n).user for n in range(40)}) == 40
    assert ENCRYPT_KEY != APP_SECRET


def test_an_answer_tells_which_message_it_answers():
    assert number_of("echo: message 12 of chat 7") == (7, 12)
    assert number_of("Sorry") is None
