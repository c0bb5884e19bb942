from __future__ import annotations

from pathlib import Path

from feishu_bot.config import ServerSettings
from feishu_bot.gate import Gate
from feishu_bot.store.leases import Depth


class Record:
    trouble: str | None = None
    failure: str | None = None

    def problem(self):
        return self.trouble

    def failing(self):
        return self.failure


def gate(*, depth=None, folder=None, clock=lambda: 0.0, **settings):
    return Gate(ServerSettings(**settings), Record(), depth=lambda: depth, folder=folder, monotonic=clock)


def test_it_is_open_while_nothing_stands_in_the_way_also_before_the_first_look(tmp_path):
    assert gate().closed() is None
    assert gate(depth=Depth(10, 0, 0, None), max_waiting=10, folder=tmp_path, min_free_mb=0).closed() is None


def test_it_closes_when_more_waits_than_allowed():
    assert "max_waiting is 10" in gate(depth=Depth(11, 0, 0, None), max_waiting=10).closed()


def test_it_closes_when_the_disk_is_nearly_full_and_opens_when_it_is_looked_at_again(tmp_path):
    now = [0.0]
    full = gate(folder=tmp_path, min_free_mb=2**40, clock=lambda: now[0])
    assert "min_free_mb" in full.closed()
    assert any("min_free_mb" in reason for reason in full.degraded(0))


def test_a_folder_that_is_gone_is_no_accident():
    assert gate(folder=Path("/nowhere/at/all")).closed() is None


def test_it_closes_while_the_store_is_in_trouble_and_when_the_server_stops():
    own = gate()
    own._store.trouble = "the writer thread has ended"
    assert own.closed() == "the writer thread has ended"
    own._store.trouble = None
    own.draining = True
    assert own.closed() is not None


def test_a_message_that_waits_for_long_makes_the_server_degraded():
    own = gate(depth=Depth(1, 1_000, 0, None), max_waiting_age_s=10)
    assert own.degraded(11_000) == []
    assert own.degraded(12_500) == ["the oldest message has waited 12 s"]


def test_a_change_that_could_not_be_written_makes_the_server_degraded_and_leaves_it_open():
    found = gate()
    found._store.failure = "database or disk is full"
    assert found.closed() is None, "the next one may find room"
    assert found.degraded(0) == ["the database could not be written: database or disk is full"]
