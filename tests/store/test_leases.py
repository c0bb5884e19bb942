"""Who works: owners, heartbeats, what is ready, and what the dead leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from feishu_bot.errors import StoreUnavailable
from feishu_bot.store import leases, outbox
from feishu_bot.store.leases import FORGOTTEN_MS, STALE_MS, Owner
from feishu_bot.store.schema import lanes, processes
from feishu_bot.store.work import LEASE_MS, Lease, NoWork, Work
from tests.processes import started
from tests.transact import LANE, OWNER, Database, answered

BOB = "user:web:private:bob"
HERE = Owner("node-a/boot-a/1", 1, "1")


def pushed(db, lane=LANE):
    note = {"source": lane, "kind": "note", "part": 0, "lane_key": lane, "account": "web", "payload": "1"}
    db.run(outbox.push, [note])


# --------------------------------------------------------------------------------------------------- owners


@pytest.mark.parametrize("owner", [HERE, Owner("odd|host/b/1", 77, "123"), Owner.current()])
def test_an_owner_is_read_back_from_its_text(owner):
    assert Owner.parse(str(owner)) == owner


def test_this_process_is_not_gone():
    own = Owner.current()
    assert own.pid == os.getpid()
    assert not own.is_gone(own.host)


def test_an_earlier_process_with_the_same_number_is_gone():
    own = Owner.current()
    assert replace(own, started="1").is_gone(own.host)


def test_a_process_of_another_host_is_never_known_to_be_gone():
    assert not Owner("elsewhere/boot/1", 2**22 + 1, "1").is_gone(Owner.current().host)


def test_a_killed_process_that_nobody_has_waited_for_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    own = Owner.current()
    program = "from feishu_bot.store.leases import Owner; print(Owner.current(), flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    told = subprocess.Popen([sys.executable, "-c", program], **pipes)
    owner = Owner.parse(told.stdout.readline().strip())
    assert not owner.is_gone(own.host)
    told.kill()
    os.waitid(os.P_PID, told.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
    assert owner.is_gone(own.host)
    told.wait()
    assert owner.is_gone(own.host)
    child.communicate()
    told.stdin.close()
    told.stdout.close()


# ------------------------------------------------------------------------------------------------- registers


def test_a_process_is_on_the_list_until_it_leaves(db):
    db.run(leases.register, HERE, "1.0")
    db.run(leases.register, HERE, "1.0")
    row = db.row(processes)
    assert (row.owner, row.host, row.version, row.heartbeat_at) == (str(HERE), HERE.host, "1.0", db.clock())
    db.clock.now_ms += 5000
    db.run(leases.renew, str(HERE), [], [])
    assert db.row(processes).heartbeat_at == db.clock()
    db.run(leases.unregister, HERE)
    assert db.rows(processes) == []


def test_a_second_machine_on_sqlite_is_refused_while_the_first_is_heard_of(sqlite_url):
    db = Database(sqlite_url)
    db.run(leases.register, HERE, "1.0")
    elsewhere = Owner("node-b/boot-b/1", 1, "1")
    with pytest.raises(StoreUnavailable, match=r"another machine \(node-a\)"):
        db.run(leases.register, elsewhere, "1.0")
    assert len(db.rows(processes)) == 1
    db.clock.now_ms += STALE_MS
    db.run(leases.register, elsewhere, "1.0")
    assert len(db.rows(processes)) == 2
    db.close()


@pytest.mark.parametrize("host", ["node-b/boot-a/2", "node-a/boot-b/1"], ids=["container", "restart"])
def test_another_container_and_the_machine_after_a_restart_are_the_same_machine(sqlite_url, host):
    db = Database(sqlite_url)
    db.run(leases.register, HERE, "1.0")
    db.run(leases.register, Owner(host, 1, "1"), "1.0")
    assert len(db.rows(processes)) == 2
    db.close()


@pytest.mark.parametrize("db_url", ["postgresql", "mariadb"], indirect=True)
def test_several_machines_share_a_database_server(db):
    db.run(leases.register, HERE, "1.0")
    db.run(leases.register, Owner("node-b/boot-b/1", 1, "1"), "1.0")
    assert len(db.rows(processes)) == 2


def test_a_process_not_heard_of_for_a_day_is_forgotten(db):
    db.run(leases.register, HERE, "1.0")
    db.clock.now_ms += FORGOTTEN_MS + 1
    db.run(leases.register, replace(HERE, pid=2), "1.0")
    assert db.row(processes).pid == 2


# --------------------------------------------------------------------------------------- what the dead leave


def claim(connection, url):
    """Begin a message and an answer, and wait to be killed."""
    db, owner = Database(url), Owner.current()
    db.run(leases.register, owner, "1.0")
    db.begin_one(owner=str(owner))
    db.step(Lease(BOB, str(owner), "s"))
    connection.send(str(owner))
    connection.recv()


def test_what_a_killed_process_held_is_taken_over_at_once(db, db_url):
    db.receive("a")
    pushed(db, BOB)
    own = Owner.current()
    bob = Lease(BOB, str(own), "mine")
    with started(claim, (db_url,)) as (child,):
        name = child.heard()
        assert db.begin_one(token="t2") is NoWork.BUSY
        assert db.run(leases.take_over, own.host) == []
        assert db.step(bob) is NoWork.BUSY
    assert db.run(leases.take_over, own.host) == [name]
    assert db.run(leases.ready_lanes, 9) == ([LANE], [BOB])
    work = db.begin_one(token="t2")
    assert (work.attempt, work.message.event_key) == (2, "a")
    assert db.step(bob).unknown_at is not None
    assert db.rows(processes) == []
    assert db.run(leases.take_over, own.host) == []


def test_a_process_of_another_host_keeps_its_leases_until_they_end(db):
    db.receive("a")
    db.begin_one(owner=str(HERE))
    assert db.run(leases.take_over, Owner.current().host) == []
    assert db.run(leases.ready_lanes, 9) == ([], [])
    db.clock.now_ms += LEASE_MS + 1
    assert db.run(leases.ready_lanes, 9) == ([LANE], [])


def test_a_process_that_leaves_gives_its_lanes_back(db):
    db.run(leases.register, HERE, "1.0")
    db.receive("a")
    pushed(db, BOB)
    work = db.begin_one(owner=str(HERE))
    db.step(Lease(BOB, str(HERE), "s"))
    db.run(leases.unregister, HERE)
    assert db.run(leases.ready_lanes, 9) == ([LANE], [BOB])
    assert db.commit_one(answered(work)).end is not None  # what nobody took it may still end


def test_only_its_own_leases_are_released(db):
    db.receive("a")
    db.receive("b", lane=BOB)
    db.begin_one(owner=str(HERE))
    db.begin_one(BOB, owner=OWNER, token="t2")
    db.run(leases.release_owner, str(HERE))
    assert db.run(leases.ready_lanes, 9) == ([LANE], [])


def test_only_its_own_leases_are_renewed(db):
    db.receive("a")
    db.begin_one(owner=str(HERE))
    until = db.row(lanes).lease_until
    db.clock.now_ms += 5
    db.run(leases.renew, OWNER, [LANE, BOB], [LANE])
    assert db.row(lanes).lease_until == until
    db.run(leases.renew, str(HERE), [LANE], [LANE])
    assert db.row(lanes).lease_until == until + 5
    assert db.row(lanes).send_until == 0


# ------------------------------------------------------------------------------------------- given back, ready


def test_a_message_that_is_given_back_is_ready_at_its_instant(db):
    db.receive("a")
    work = db.begin_one()
    db.run(leases.give_back, work.lease, db.clock() + 1000)
    assert db.run(leases.ready_lanes, 9) == ([], [])
    assert db.run(leases.waiting_lanes) == [LANE]
    db.clock.now_ms += 1000
    assert db.run(leases.ready_lanes, 9) == ([LANE], [])
    assert db.run(leases.waiting_lanes) == []
    assert db.begin_one(token="t2").attempt == 2


def test_a_lane_that_another_has_taken_is_not_given_back(db):
    db.receive("a")
    work = db.begin_one()
    db.clock.now_ms += LEASE_MS + 1
    db.begin_one(token="t2")
    db.run(leases.give_back, work.lease, 5)
    assert db.row(lanes).lease_token == "t2"


def test_ready_lanes_come_oldest_first_and_not_more_than_asked_for(db):
    for n, lane in enumerate(("c", "a", "b")):
        db.clock.now_ms += 1
        db.receive(f"m{n}", lane=lane)
        pushed(db, f"out-{lane}")
    assert db.run(leases.ready_lanes, 2) == (["c", "a"], ["out-c", "out-a"])


def test_the_depth_counts_what_waits_and_how_old_it_is(db):
    assert db.run(leases.depth) == leases.Depth(0, None, 0, None)
    db.receive("a", "b")
    oldest = db.clock()
    db.clock.now_ms += 10
    db.receive("c")
    pushed(db)
    pushed(db, BOB)
    assert db.run(leases.depth) == leases.Depth(3, oldest, 2, db.clock())
    for n in range(3):
        work = db.begin_one(token=f"t{n}")
        assert isinstance(work, Work)
        db.commit_one(answered(work, parts=0))
    assert db.run(leases.depth) == leases.Depth(0, None, 2, db.clock())
