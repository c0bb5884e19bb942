"""The machine's clock is set by minutes while messages wait: nothing of what they wait for changes."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import insert, select, update

from feishu_bot.store import jumps
from feishu_bot.store.engine import open_engine
from feishu_bot.store.schema import controls, inbox, lanes, outbox, processes
from feishu_bot.store.writer import DatabaseClock

MINUTE = 60_000
NOW, MONOTONIC = 1_750_000_000_000, 5_000_000


@pytest.fixture
def connection(sqlite_url):
    engine = open_engine(sqlite_url)
    with engine.connect() as made:
        yield made
    engine.dispose()


def fill(connection, now: int) -> None:
    lane = {
        "key": "busy",
        "ready_at": now - 5,
        "lease_owner": "o",
        "lease_token": "t",
        "lease_until": now + 9000,
    }
    connection.execute(insert(lanes), lane)
    connection.execute(insert(lanes), {"key": "idle"})
    row = {"account": "web", "lane_key": "busy", "payload": "{}", "received_at": now - 5}
    connection.execute(insert(inbox), {**row, "event_key": "open", "state": "open"})
    connection.execute(insert(inbox), {**row, "event_key": "ended", "state": "answered"})
    part = {
        "kind": "answer",
        "part": 0,
        "lane_key": "busy",
        "account": "web",
        "payload": "{}",
        "created_at": now,
    }
    connection.execute(insert(outbox), {**part, "source": "a", "state": "pending", "not_before": now + 3000})
    connection.execute(insert(outbox), {**part, "source": "b", "state": "sent", "not_before": now + 3000})
    process = {
        "owner": "o",
        "host": "h",
        "pid": 1,
        "version": "1",
        "started_at": now - 9,
        "heartbeat_at": now,
    }
    connection.execute(insert(processes), process)


def instants(connection, now: int) -> dict[str, object]:
    """Return all that is waited for, counted from ``now``."""

    def since(value):
        return None if value is None else value - now if value else 0

    return {
        "lanes": [
            (r.key, since(r.ready_at), since(r.lease_until), since(r.send_ready_at))
            for r in connection.execute(select(lanes).order_by(lanes.c.key))
        ],
        "open": [
            since(r.received_at) for r in connection.execute(select(inbox).where(inbox.c.state == "open"))
        ],
        "pending": [
            (since(r.not_before), since(r.created_at), r.first_attempt_at)
            for r in connection.execute(select(outbox).where(outbox.c.state == "pending"))
        ],
        "processes": [since(r.heartbeat_at) for r in connection.execute(select(processes))],
    }


@pytest.mark.parametrize("minutes", [10, -10, 600, -600])
def test_what_waits_is_as_far_away_after_a_jump_as_before(connection, minutes):
    jump = minutes * MINUTE
    with connection.begin():
        assert jumps.move_along(connection, NOW, MONOTONIC) == 0, "the first look only notes"
        fill(connection, NOW)
        before = instants(connection, NOW)
    with connection.begin():
        assert jumps.move_along(connection, NOW + jump + 100, MONOTONIC + 100) == jump
        assert instants(connection, NOW + jump) == before
    with connection.begin():
        assert jumps.move_along(connection, NOW + jump + 200, MONOTONIC + 200) == 0, (
            "another process finds it done"
        )
        ended = connection.execute(
            select(inbox.c.received_at).where(inbox.c.state == "answered")
        ).scalar_one()
        sent = connection.execute(select(outbox.c.not_before).where(outbox.c.state == "sent")).scalar_one()
        assert (ended, sent) == (NOW - 5, NOW + 3000), "what is past stays as it was"


def test_a_clock_that_is_corrected_slowly_moves_nothing(connection):
    with connection.begin():
        jumps.move_along(connection, NOW, MONOTONIC)
        fill(connection, NOW)
        before = instants(connection, NOW)
        for step in range(1, 100):
            assert jumps.move_along(connection, NOW + step * 1500, MONOTONIC + step * 1000) == 0
        assert instants(connection, NOW) == before


def test_after_a_start_of_the_machine_the_clock_is_noted_anew(connection):
    with connection.begin():
        jumps.move_along(connection, NOW, MONOTONIC)
        connection.execute(update(controls).where(controls.c.kind == "clock").values(name="an earlier boot"))
        fill(connection, NOW)
        assert jumps.move_along(connection, NOW + 600 * MINUTE, 1000) == 0
        assert len(connection.execute(select(controls).where(controls.c.kind == "clock")).all()) == 1


def test_a_process_notices_a_jump_with_its_next_transaction(connection, monkeypatch):
    shift = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    clock = DatabaseClock(ask=lambda _connection: int(time.time() * 1000))
    with connection.begin():
        clock.sync(connection)
        connection.execute(insert(lanes), {"key": "waits", "ready_at": clock.now_ms() + 5000})
        before = clock.now_ms()
    shift[0] = 600.0
    assert abs(clock.now_ms() - before) < 5000, "until then it goes on as if nothing had happened"
    with connection.begin():
        clock.sync(connection)
        left = connection.execute(select(lanes.c.ready_at)).scalar_one() - clock.now_ms()
        assert clock.now_ms() - before >= 600_000
        assert 0 < left <= 5000
