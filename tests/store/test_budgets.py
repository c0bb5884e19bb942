"""Reservations: a limit is hard, and every reservation is ended exactly once."""

from __future__ import annotations

import logging
import subprocess
import sys
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
from feishu_bot.store.work import Charge, PlannedCall
from tests.transact import Database, row_locks

WHO = {"user_key": "k", "user_id": "web:ann", "chat_id": None, "platform": "web", "tenant_id": "default"}
LIMIT = 1000


def charge(budget="daily", key="ann", start=0, limit=LIMIT):
    return Charge(budget, key, start, limit, None)


def request(n, tokens, *charges, attempt=1, call=0):
    planned = PlannedCall("echo", tokens // 3, tokens, charges or (charge(),))
    return CallRequest(n, attempt, call, planned, WHO)


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
    assert db.run(reserve, [request(1, 300, *both)]) == [None]
    assert balances(db) == {("daily", "ann", 0): (0, 300), ("global", "all", 0): (0, 300)}
    row = db.row(reservations)
    assert (row.inbox_id, row.attempt, row.call, row.tokens, row.input_tokens) == (1, 1, 0, 300, 100)


def test_what_fills_a_budget_to_the_last_token_fits(db):
    assert db.run(reserve, [request(1, LIMIT)]) == [None]
    (refusal,) = db.run(reserve, [request(2, 1)])
    assert (refusal.budget, refusal.used, refusal.reserved, refusal.limit) == ("daily", 0, LIMIT, LIMIT)
    assert balance(db) == (0, LIMIT)


def test_the_items_of_a_list_are_decided_in_their_order(db):
    found = db.run(reserve, [request(1, 600), request(2, 600), request(3, 400), request(4, 1)])
    assert [f is None for f in found] == [True, False, True, False]
    assert (found[1].reserved, found[3].reserved) == (600, 1000)
    assert balance(db) == (0, 1000)
    assert [r.inbox_id for r in db.rows(reservations)] == [1, 3]


def test_a_call_refused_by_one_budget_takes_nothing_from_the_others(db):
    tight = charge("tight", limit=10)
    (refusal,) = db.run(reserve, [request(1, 300, charge(), tight)])
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
    assert db.run(reserve, [CallRequest(1, 1, 0, planned, WHO)]) == [None]
    db.run(settle, [1], {}, {})
    assert db.row(usage).outcome == "unknown"
    assert db.rows(budget_windows) == []


def test_balances_are_read_without_making_rows(db):
    assert db.run(read_balances, [charge()]) == {}
    db.run(reserve, [request(1, 7)])
    assert db.run(read_balances, [charge(), charge("other")]) == {("daily", "ann", 0): (0, 7)}
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
    (refusal,) = db.run(reserve, [request(2, 1)])
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
    assert db.run(reserve, both, rerun=True) == [None, None]
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
            (refusal,) = until_done(lambda call=call: db.run(reserve, [call]), conflicts)
            if refusal is None:
                granted.append(number)
                if turn % 2:
                    until_done(
                        lambda number=number: db.run(settle, [number], used(number, 20), {}), conflicts
                    )
            found = db.run(read_balances, [shared, tight])
            over.extend(f for key, f in found.items() if sum(f) > (1000 if key[0] == "shared" else 700))

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


_SPENDER = """
import sys
from sqlalchemy.exc import DBAPIError
from tests.store.test_budgets import charge, request, until_done
from tests.transact import Database
from feishu_bot.store.budgets import reserve
db, first = Database(sys.argv[1]), int(sys.argv[2])
db.rows(__import__("feishu_bot.store.schema", fromlist=["x"]).usage)
print("ready", flush=True)
sys.stdin.readline()
calls = [request(first + n, 13, charge("global", "all", limit=500)) for n in range(30)]
print(sum(1 for call in calls for r in until_done(lambda: db.run(reserve, [call])) if r is None))
"""


def test_processes_that_reserve_at_once_fill_a_limit_and_never_pass_it(db, db_url):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    spenders = [
        subprocess.Popen([sys.executable, "-c", _SPENDER, db_url, str(n * 1000)], **pipes) for n in range(3)
    ]
    for spender in spenders:
        assert spender.stdout.readline() == "ready\n"
    for spender in spenders:
        spender.stdin.write("\n")
        spender.stdin.flush()
    granted = [int(spender.communicate()[0]) for spender in spenders]
    assert sum(granted) == 500 // 13
    assert balance(db) == (0, 500 // 13 * 13)
    assert len(db.rows(reservations)) == sum(granted)


@row_locks
def test_a_window_that_two_nodes_make_at_once_is_one_row(db, db_url):
    other = Database(db_url)
    found = []
    waiting = threading.Thread(target=lambda: found.extend(other.run(reserve, [request(2, 600)])))
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
        refusals = self.db.run(reserve, calls)
        for call, (tokens, key), refusal in zip(calls, wishes, refusals, strict=True):
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
