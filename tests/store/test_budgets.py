"""Reservations: a limit is hard, and every reservation is ended exactly once."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete
from sqlalchemy.exc import DBAPIError

from feishu_bot.model import CallUsage
from feishu_bot.store.budgets import CallRequest, read_balances, reserve, settle
from feishu_bot.store.engine import is_conflict
from feishu_bot.store.schema import budget_windows, reservations, usage
from feishu_bot.store.work import Amounts, Balance, Charge, PlannedCall
from tests.processes import all_at_once, started, wait_for_all
from tests.transact import Database, row_locks

WHO = {"user_key": "k", "user_id": "web:ann", "chat_id": None, "platform": "web", "tenant_id": "default"}
LIMIT = 1000


def charge(budget="daily", key="ann", start=0, limit=LIMIT):
    return Charge(budget, key, start, limit, None)


def request(n, tokens, *charges, attempt=1, call=0):
    planned = PlannedCall("echo", tokens // 3, tokens, charges or (charge(),))
    return CallRequest(n, attempt, call, planned, WHO)


def refusals(db, *requests, **more):
    return [reserved.refusal for reserved in db.run(reserve, requests, **more)]


def used(n, tokens, *, attempt=1, call=0, outcome="ok"):
    return {(n, attempt, call): CallUsage(call, "echo", tokens // 3, tokens - tokens // 3, outcome)}


def balances(db):
    return {(w.budget, w.key, w.window_start): (w.used, w.reserved) for w in db.rows(budget_windows)}


def balance(db):
    (found,) = balances(db).values()
    return found


# -------------------------------------------------------------------------------------------------- reserve


def test_a_call_is_reserved_in_every_budget_it_is_charged_to(db):
    both = charge(), charge("global", "all", limit=5000)
    assert refusals(db, *[request(1, 300, *both)]) == [None]
    assert balances(db) == {("daily", "ann", 0): (0, 300), ("global", "all", 0): (0, 300)}
    row = db.row(reservations)
    assert (row.inbox_id, row.attempt, row.call, row.tokens, row.input_tokens) == (1, 1, 0, 300, 100)


def test_what_fills_a_budget_to_the_last_token_fits(db):
    assert refusals(db, *[request(1, LIMIT)]) == [None]
    (refusal,) = refusals(db, request(2, 1))
    assert (refusal.budget, refusal.used, refusal.reserved, refusal.limit) == ("daily", 0, LIMIT, LIMIT)
    assert balance(db) == (0, LIMIT)


def test_the_items_of_a_list_are_decided_in_their_order(db):
    found = refusals(db, request(1, 600), request(2, 600), request(3, 400), request(4, 1))
    assert [f is None for f in found] == [True, False, True, False]
    assert (found[1].reserved, found[3].reserved) == (600, 1000)
    assert balance(db) == (0, 1000)
    assert [r.inbox_id for r in db.rows(reservations)] == [1, 3]


def test_a_call_refused_by_one_budget_takes_nothing_from_the_others(db):
    tight = charge("tight", limit=10)
    (refusal,) = refusals(db, request(1, 300, charge(), tight))
    assert refusal.budget == "tight"
    assert balances(db) == {("daily", "ann", 0): (0, 0), ("tight", "ann", 0): (0, 0)}
    assert db.rows(reservations) == []


def test_windows_and_keys_are_counted_apart(db):
    db.run(
        reserve,
        [
            request(1, 900, charge(start=0)),
            request(2, 900, charge(start=1)),
            request(3, 900, charge(key="bob")),
        ],
    )
    assert set(balances(db).values()) == {(0, 900)}
    assert len(balances(db)) == 3


def test_a_call_without_budgets_is_reserved_so_that_its_crash_is_booked(db):
    planned = PlannedCall("echo", 5, 20, ())
    assert refusals(db, CallRequest(1, 1, 0, planned, WHO)) == [None]
    db.run(settle, [1], {}, {})
    assert db.row(usage).outcome == "unknown"
    assert db.rows(budget_windows) == []


def test_balances_are_read_without_making_rows(db):
    assert db.run(read_balances, [charge()]) == {}
    db.run(reserve, [request(1, 7)])
    found = db.run(read_balances, [charge(), charge("other")])
    assert found == {("daily", "ann", 0): Balance(reserved=Amounts(7, 1, 0))}
    assert db.run(read_balances, []) == {}


# --------------------------------------------------------------------------------------------------- settle


def test_a_settled_call_counts_what_it_used(db):
    db.run(reserve, [request(1, 300)])
    db.run(settle, [1], used(1, 120), {1: None})
    assert balance(db) == (120, 0)
    assert db.rows(reservations) == []
    booked = db.row(usage)
    assert (booked.input_tokens, booked.output_tokens, booked.outcome, booked.user_id) == (
        40,
        80,
        "ok",
        "web:ann",
    )
    assert booked.at == db.clock.utc()


@pytest.mark.parametrize("told", [True, False])
def test_a_call_whose_outcome_nobody_knows_is_booked_whole(db, told):
    db.run(reserve, [request(1, 300)])
    db.run(settle, [1], used(1, 5, outcome="unknown") if told else {}, {})
    assert balance(db) == (300, 0)
    booked = db.row(usage)
    assert (booked.input_tokens, booked.output_tokens, booked.outcome) == (100, 200, "unknown")


def test_a_call_that_certainly_failed_is_given_back(db):
    db.run(reserve, [request(1, 300)])
    db.run(settle, [1], used(1, 0, outcome="failed"), {})
    assert balance(db) == (0, 0)
    assert db.rows(usage) == db.rows(reservations) == []


def test_a_call_over_its_reservation_is_booked_as_reported_logged_and_the_next_is_refused(db, caplog):
    db.run(reserve, [request(1, 300)])
    with caplog.at_level(logging.WARNING):
        db.run(settle, [1], used(1, 1200), {})
    assert balance(db) == (1200, 0)
    assert [r.message for r in caplog.records] == ["call over its reservation"]
    (refusal,) = refusals(db, request(2, 1))
    assert refusal.used == 1200


def test_a_call_is_settled_in_the_window_it_was_reserved_in(db):
    db.run(reserve, [request(1, 300, charge(start=0))])
    db.run(reserve, [request(2, 100, charge(start=86_400_000))])
    db.run(settle, [1], used(1, 200), {})
    assert balances(db) == {("daily", "ann", 0): (200, 0), ("daily", "ann", 86_400_000): (0, 100)}


def test_settling_again_changes_nothing(db):
    db.run(reserve, [request(1, 300)])
    for rerun in (False, True, False):
        db.run(settle, [1], used(1, 120), {}, rerun=rerun)
    assert balance(db) == (120, 0)
    assert len(db.rows(usage)) == 1


def test_reserving_again_in_a_second_run_changes_nothing(db):
    both = [request(1, 300), request(2, 300)]
    db.run(reserve, both[:1])
    assert refusals(db, *both, rerun=True) == [None, None]
    assert balance(db) == (0, 600)


def test_all_calls_of_a_message_end_with_it(db):
    db.run(reserve, [request(1, 100), request(1, 100, call=1), request(1, 100, attempt=2), request(2, 100)])
    db.run(settle, [1], used(1, 10), {1: 77})
    assert balance(db) == (210, 100)
    assert [(u.attempt, u.call, u.outcome, u.conversation_id) for u in db.rows(usage)] == [
        (1, 0, "ok", 77),
        (1, 1, "unknown", 77),
        (2, 0, "unknown", 77),
    ]


@pytest.mark.parametrize(("used_tokens", "reserved"), [(-1, 0), (0, -1)])
def test_the_database_itself_refuses_a_negative_balance(db, used_tokens, reserved):
    row = {"budget": "b", "key": "k", "window_start": 0, "used": used_tokens, "reserved": reserved}
    with pytest.raises(DBAPIError):
        db.put(budget_windows, row)


# ---------------------------------------------------------------------------------------------- concurrency


def until_done(function, conflicts=None):
    """Run a transaction again after a conflict, as the writer does; note the conflict."""
    while True:
        try:
            return function()
        except DBAPIError as error:
            if not is_conflict(error):
                raise
            if conflicts is not None:
                conflicts.append(error)


def test_threads_that_reserve_at_once_never_pass_a_limit(db_url):
    """Each holds two budgets, named in another order, and settles half of what it got; nobody meets a deadlock."""
    databases = [Database(db_url) for _ in range(4)]
    shared, tight = charge("shared", "all", limit=1000), charge("a-tight", "all", limit=700)
    granted, over, conflicts = [], [], []

    def spend(n):
        db = databases[n]
        for turn in range(25):
            number = n * 100 + turn
            order = (shared, tight) if (n + turn) % 2 else (tight, shared)
            call = request(number, 37, *order)
            (refusal,) = until_done(lambda call=call: refusals(db, call), conflicts)
            if refusal is None:
                granted.append(number)
                if turn % 2:
                    until_done(
                        lambda number=number: db.run(settle, [number], used(number, 20), {}), conflicts
                    )
            found = db.run(read_balances, [shared, tight])
            over.extend(
                f
                for key, f in found.items()
                if f.used.tokens + f.reserved.tokens > (1000 if key[0] == "shared" else 700)
            )

    threads = [threading.Thread(target=spend, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == conflicts == []
    open_calls = len(databases[0].rows(reservations))
    settled = len(databases[0].rows(usage))
    assert open_calls + settled == len(granted)
    assert set(balances(databases[0]).values()) == {(20 * settled, 37 * open_calls)}
    assert 20 * settled + 37 * open_calls > 700 - 37
    for database in databases:
        database.close()


def spend_all(connection, url, first):
    db = Database(url)
    assert db.rows(usage) == []  # it is connected
    wait_for_all(connection)
    calls = [request(first + n, 13, charge("global", "all", limit=500)) for n in range(30)]
    answers = [until_done(lambda call=call: refusals(db, call)) for call in calls]
    connection.send(answers.count([None]))
    db.close()


def test_processes_that_reserve_at_once_fill_a_limit_and_never_pass_it(db, db_url):
    with started(spend_all, *((db_url, n * 1000) for n in range(3))) as spenders:
        all_at_once(spenders)
        granted = [spender.heard() for spender in spenders]
    assert sum(granted) == 500 // 13
    assert balance(db) == (0, 500 // 13 * 13)
    assert len(db.rows(reservations)) == sum(granted)


@row_locks
def test_a_window_that_two_nodes_make_at_once_is_one_row(db, db_url):
    other = Database(db_url)
    found = []
    waiting = threading.Thread(target=lambda: found.extend(refusals(other, request(2, 600))))
    with db.transaction() as tx:
        reserve(tx, [request(1, 600)])
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join()
    assert found[0].reserved == 600
    assert balance(db) == (0, 600)
    other.close()


# -------------------------------------------------------------------------------------------------- property

KEYS = ["ann", "bob"]
LIMITS = {"ann": 100, "bob": 100, "all": 150}

reserving = st.tuples(
    st.just("reserve"), st.lists(st.tuples(st.integers(0, 60), st.sampled_from(KEYS)), min_size=1, max_size=4)
)
ending = st.tuples(
    st.just("settle"),
    st.tuples(st.integers(0, 30), st.sampled_from(["ok", "unknown", "failed"]), st.integers(0, 90)),
)
again = st.tuples(st.just("again"), st.none())


@pytest.fixture(scope="module")
def one_database(tmp_path_factory):
    from feishu_bot.store.migrations import upgrade  # noqa: PLC0415  # after the network guard

    url = f"sqlite:///{tmp_path_factory.mktemp('budgets') / 'bot.db'}"
    upgrade(url)
    database = Database(url)
    yield database
    database.close()


class Model:
    """What the balances must be, kept beside the database."""

    def __init__(self, db) -> None:
        self.db = db
        self.number = 0
        self.used: dict[str, int] = defaultdict(int)
        self.held: dict[int, tuple[int, str]] = {}
        self.last: tuple[int, dict] | None = None

    def reserved(self, key):
        return sum(tokens for tokens, holder in self.held.values() if key in {holder, "all"})

    def reserve(self, wishes):
        calls = []
        for tokens, key in wishes:
            self.number += 1
            own = charge("daily", key, limit=LIMITS[key]), charge("global", "all", limit=LIMITS["all"])
            calls.append(request(self.number, tokens, *own))
        found = refusals(self.db, *calls)
        for call, (tokens, key), refusal in zip(calls, wishes, found, strict=True):
            room = all(self.used[k] + self.reserved(k) + tokens <= LIMITS[k] for k in (key, "all"))
            assert (refusal is None) == room
            if room:
                self.held[call.inbox_id] = (tokens, key)

    def settle(self, ending):
        if not self.held:
            return
        index, outcome, tokens = ending
        number = sorted(self.held)[index % len(self.held)]
        reserved, key = self.held.pop(number)
        counted = {"ok": min(tokens, reserved), "unknown": reserved, "failed": 0}[outcome]
        self.last = number, used(number, min(tokens, reserved), outcome=outcome)
        self.db.run(settle, [number], self.last[1], {})
        self.used[key] += counted
        self.used["all"] += counted

    def again(self, _):
        if self.last is not None:
            self.db.run(settle, [self.last[0]], self.last[1], {}, rerun=True)

    def check(self):
        for (_, key, _), found in balances(self.db).items():
            assert found == (self.used[key], self.reserved(key))
            assert sum(found) <= LIMITS[key]
        assert {r.inbox_id for r in self.db.rows(reservations)} == set(self.held)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(reserving, ending, again), max_size=25))
def test_any_sequence_of_calls_leaves_balances_that_are_right_and_within_the_limits(one_database, steps):
    for table in (budget_windows, reservations, usage):
        one_database.run(lambda tx, table=table: tx.connection.execute(delete(table)))
    model = Model(one_database)
    for kind, values in steps:
        getattr(model, kind)(values)
        model.check()


# ------------------------------------------------------------------------------- cost, requests, other limits


def priced(n, micro_usd, *charges, tokens=30):
    planned = PlannedCall("echo", tokens // 3, tokens, charges, micro_usd)
    return CallRequest(n, 1, 0, planned, WHO)


def limited(budget="daily", key="ann", **limits):
    return Charge(budget, key, 0, limits.pop("limit", None), None, **limits)


def test_calls_are_counted_and_the_last_one_that_fits_is_made(db):
    two = limited(limit_requests=2)
    found = refusals(db, *(priced(n, None, two) for n in (1, 2, 3)))
    assert [f is None for f in found] == [True, True, False]
    assert (found[2].unit, found[2].reserved, found[2].limit, found[2].wanted) == ("requests", 2, 2, 1)
    db.run(settle, [1, 2], used(1, 10) | used(2, 0, outcome="failed"), {})
    row = db.row(budget_windows)
    assert (row.used_requests, row.reserved_requests) == (1, 0), "what was certainly not billed is no call"


def test_costs_are_held_to_the_millionth_and_settled_to_what_they_were(db):
    dollar = limited(limit_micro_usd=1_000_000)
    assert refusals(db, priced(1, 600_000, dollar), priced(2, 400_000, dollar)) == [None, None]
    (refusal,) = refusals(db, priced(3, 1, dollar))
    assert (refusal.unit, refusal.reserved, refusal.limit, refusal.wanted) == (
        "cost",
        1_000_000,
        1_000_000,
        1,
    )
    cost = CallUsage(0, "echo", 10, 5, cost_micro_usd=123_456, cached_tokens=4, reasoning_tokens=2)
    db.run(settle, [1, 2], {(1, 1, 0): cost}, {})
    row = db.row(budget_windows)
    assert (row.used_micro_usd, row.reserved_micro_usd) == (523_456, 0), "the second is booked whole"
    first, second = db.rows(usage)
    assert (first.cost_micro_usd, first.cached_tokens, first.reasoning_tokens) == (123_456, 4, 2)
    assert (second.cost_micro_usd, second.outcome) == (400_000, "unknown")


def test_a_limit_on_costs_refuses_a_call_whose_price_nobody_knows(db):
    (refusal,) = refusals(db, priced(1, None, limited(limit_micro_usd=1_000_000)))
    assert refusal.unpriced
    assert refusals(db, priced(2, None, limited("tokens", limit=100))) == [None]


def test_all_limits_of_a_budget_hold_at_once(db):
    both = limited(limit=1000, limit_requests=2, limit_micro_usd=50)
    assert refusals(db, priced(1, 40, both)) == [None]
    assert [r.unit for r in refusals(db, priced(2, 11, both), priced(3, 1, both, tokens=971))] == [
        "cost",
        "tokens",
    ]
    assert refusals(db, priced(4, 1, both)) == [None]
    assert [r.unit for r in refusals(db, priced(5, 1, both))] == ["requests"]


def test_another_limit_finds_what_was_used_before(db):
    db.run(reserve, [priced(1, 70, limited(limit=1000))])
    db.run(settle, [1], {(1, 1, 0): CallUsage(0, "echo", 10, 20, cost_micro_usd=70)}, {})
    tight = limited(limit_requests=1), limited(limit_micro_usd=70), limited(limit=30)
    assert [r.used for charge in tight for r in refusals(db, priced(2, 1, charge))] == [1, 70, 30]


def test_a_soft_budget_counts_over_its_limit_and_refuses_nothing(db):
    soft = limited(limit=10, soft=True, watched=True)
    (reserved,) = db.run(reserve, [request(1, 300, soft)])
    assert reserved.refusal is None
    assert reserved.standings == ((soft, Balance()),)
    db.run(settle, [1], used(1, 200), {})
    (reserved,) = db.run(reserve, [request(2, 300, soft)])
    assert reserved.standings[0].balance.used == Amounts(200, 1, 0)
    assert balance(db) == (200, 300)


def test_what_was_granted_is_added_to_each_limit(db):
    row = {"budget": "daily", "key": "ann", "window_start": 0, "granted": 5, "granted_requests": 1}
    db.put(budget_windows, row | {"granted_micro_usd": 7})
    one = limited(limit=25, limit_requests=1, limit_micro_usd=13)
    assert refusals(db, priced(1, 10, one, tokens=15), priced(2, 10, one, tokens=15)) == [None, None]
    (refusal,) = refusals(db, priced(3, 0, one, tokens=1))
    assert (refusal.limit, refusal.reserved) == (30, 30)


def test_that_a_budget_was_told_of_is_kept_and_never_taken_back(db):
    window = charge().window
    for n, level in ((1, 1), (2, 2), (3, 1)):
        db.run(reserve, [request(n, 10)])
        db.run(settle, [n], used(n, 10), {}, told={window: level})
    assert db.row(budget_windows).told == 2


def test_a_budget_that_knows_another_model_is_named_before_one_that_does_not(db):
    hard, cheaper = limited("hard", limit=5), limited("cheaper", limit=5, degrade_to="small")
    (refusal,) = refusals(db, request(1, 10, hard, cheaper))
    assert (refusal.budget, refusal.degrade_to) == ("cheaper", "small")


def test_a_second_run_finds_the_model_that_the_first_one_reserved(db):
    planned = PlannedCall("small", 3, 9, (charge(),))
    db.run(reserve, [CallRequest(1, 1, 0, planned, WHO)])
    (reserved,) = db.run(reserve, [request(1, 9)], rerun=True)
    assert (reserved.refusal, reserved.model) == (None, "small")
