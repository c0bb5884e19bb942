"""What operators change of budgets: once, whatever is run again, and beside what is being used."""

from __future__ import annotations

import threading

from feishu_bot.store import allowances
from feishu_bot.store.audit import Order
from feishu_bot.store.budgets import reserve, settle
from feishu_bot.store.schema import audit, budget_windows
from feishu_bot.store.work import Amounts
from tests.store.test_budgets import charge, refusals, request, until_done, used
from tests.transact import Database

ORDER = Order("web:boss", "web:ann", "in:1")


def test_an_order_that_is_carried_out_twice_changes_the_budget_once(db):
    for rerun in (False, True):
        done = db.run(allowances.grant, [charge()], Amounts(100), ORDER, rerun=rerun)
        assert done is not rerun
    assert db.row(budget_windows).granted == 100
    assert len(db.rows(audit)) == 1
    assert db.run(allowances.grant, [charge()], Amounts(5, 2, 3), ORDER._replace(source="in:2"))
    row = db.row(budget_windows)
    assert (row.granted, row.granted_requests, row.granted_micro_usd) == (105, 2, 3)


def test_what_is_granted_again_and_again_stays_within_what_every_database_can_hold(db):
    for number in range(12):
        order = ORDER._replace(source=f"in:{number}")
        assert db.run(allowances.grant, [charge()], Amounts(10**15, 1, 2**53), order)
    row = db.row(budget_windows)
    assert (row.granted, row.granted_requests, row.granted_micro_usd) == (2**53, 12, 2**53)


def test_a_reset_leaves_what_is_reserved_so_that_it_is_settled_into_the_new_count(db):
    db.run(reserve, [request(1, 300), request(2, 500)])
    db.run(settle, [1], used(1, 300), {})
    assert db.run(allowances.reset, [charge()], ORDER)
    assert not db.run(allowances.reset, [charge()], ORDER)
    row = db.row(budget_windows)
    assert (row.used, row.reserved, row.used_requests, row.reserved_requests) == (0, 500, 0, 1)
    db.run(settle, [2], used(2, 120), {})
    row = db.row(budget_windows)
    assert (row.used, row.reserved, row.used_requests, row.reserved_requests) == (120, 0, 1, 0)


def test_a_reset_of_what_nobody_has_used_is_on_record_and_makes_no_row(db):
    assert db.run(allowances.reset, [charge()], ORDER)
    assert db.rows(budget_windows) == []
    assert db.row(audit).target == "web:ann"


def test_grants_while_others_reserve_are_all_there_and_no_limit_is_passed(db_url):
    databases = [Database(db_url) for _ in range(3)]
    granted = []

    def spend(n):
        for turn in range(30):
            call = request(n * 1000 + turn, 100)
            (refusal,) = until_done(lambda call=call: refusals(databases[n], call))
            granted.append(refusal is None)

    def give():
        for turn in range(10):
            order = ORDER._replace(source=f"in:{turn}")
            until_done(
                lambda order=order: databases[0].run(allowances.grant, [charge()], Amounts(100), order)
            )

    threads = [threading.Thread(target=spend, args=(n,)) for n in (1, 2)] + [threading.Thread(target=give)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    row = databases[0].row(budget_windows)
    assert row.granted == 1000
    assert row.reserved == 100 * sum(granted) <= 2000
    assert len(databases[0].rows(audit)) == 10
    for database in databases:
        database.close()
