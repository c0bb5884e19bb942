"""Parts that wait for another attempt, and the new way to their platform that ends the waiting."""

from __future__ import annotations

from feishu_bot.store import outbox
from feishu_bot.store.schema import lanes
from feishu_bot.store.schema import outbox as parts
from feishu_bot.store.waiting import NOT_CONNECTED, hasten, left_by_others, waiting_parts
from feishu_bot.store.work import Lease, NoWork, PartToSend, SendResult
from tests.transact import OWNER, Database


def postponed(
    db: Database, lane: str, account: str = "onebot", *, for_ms: int = 60_000, error: str | None = None
) -> PartToSend:
    """Put a part into the outbox and try it in vain."""
    row = {
        "source": f"s-{lane}",
        "kind": "note",
        "part": 0,
        "lane_key": lane,
        "account": account,
        "payload": "{}",
    }
    db.run(outbox.push, [row])
    part = db.step(lease(lane))
    db.step(lease(lane), SendResult(part.id, "pending", error=error, not_before=db.clock() + for_ms))
    return part


def lease(lane: str, token: str = "") -> Lease:
    return Lease(lane, OWNER, token or f"t-{lane}")


def test_a_part_that_waits_may_go_at_once_when_its_account_has_a_new_way(db):
    part = postponed(db, "a")
    assert db.step(lease("a", "early")) is NoWork.WAIT
    assert db.run(waiting_parts, "onebot") == ["a"]
    db.run(hasten, "onebot", ["a"])
    assert db.run(waiting_parts, "onebot") == []
    assert db.step(lease("a", "again")).id == part.id


def test_parts_to_other_accounts_go_on_waiting(db):
    postponed(db, "a")
    postponed(db, "b", account="feishu")
    assert db.run(waiting_parts, "onebot") == ["a"]
    db.run(hasten, "onebot", ["a", "b"])
    assert [p.not_before > db.clock() for p in db.rows(parts)] == [False, True]


def test_a_lane_that_is_being_sent_for_is_left_alone(db):
    postponed(db, "a", for_ms=0)
    db.step(lease("a", "sending"))
    before = db.rows(lanes)
    assert db.run(waiting_parts, "onebot") == []
    db.run(hasten, "onebot", ["a"])
    assert [(r.send_token, r.send_until) for r in db.rows(lanes)] == [
        (r.send_token, r.send_until) for r in before
    ]
    assert [p.state for p in db.rows(parts)] == ["attempting"]


def test_no_more_lanes_are_named_than_asked_for_and_hastening_twice_is_as_once(db):
    for lane in "abcde":
        postponed(db, lane)
    assert len(db.run(waiting_parts, "onebot", most=3)) == 3
    for _ in range(2):
        db.run(hasten, "onebot", list("edcba"))
    assert [p.not_before for p in db.rows(parts)] == [0] * 5


def test_only_what_a_process_without_a_client_has_left_is_found_for_the_one_that_has_it(db):
    postponed(db, "a", error=NOT_CONNECTED)
    postponed(db, "b", error="1200 too fast")
    postponed(db, "c", account="feishu", error=NOT_CONNECTED)
    postponed(db, "d", error=NOT_CONNECTED)
    db.run(hasten, "onebot", ["d"])
    db.step(lease("d", "sending"))
    assert db.run(left_by_others, "onebot") == [("a", "{}")]
    db.run(hasten, "onebot", ["a"])
    assert db.run(left_by_others, "onebot") == []
