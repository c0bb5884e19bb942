"""PostgreSQL's hint that there is something to do for others."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from feishu_bot.store.notices import CHANNEL, Notices
from feishu_bot.store.store import Store
from feishu_bot.store.work import Arrival
from tests.stores import AnswersLater, opened


def arrival(n: int) -> Arrival:
    return Arrival("web", f"event-{n}", f"user:web:private:u{n}", "{}")


async def test_who_has_something_to_give_away_wakes_the_others_once_for_each_commit(postgresql_url):
    with psycopg.connect(postgresql_url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        async with opened(postgresql_url) as store:
            await store.receive([arrival(n) for n in range(50)])
            assert list(listener.notifies(timeout=0.3)) == [], "nobody need know what is begun here at once"
            store.gives_away = lambda: True
            await asyncio.gather(*(store.receive([arrival(n)]) for n in range(100, 150)))
            commits = sum(writer.batches for writer in store._writers)
            heard = list(listener.notifies(timeout=0.3))
    assert 1 <= len(heard) <= commits
    assert len(heard) < 50, "many arrivals of one commit are one notice"


async def test_a_notice_is_heard_by_another_process_and_after_the_connection_broke(
    postgresql_url, monkeypatch
):
    monkeypatch.setattr("feishu_bot.store.notices._RECONNECT_S", 0.05)
    heard = asyncio.Event()
    async with opened(postgresql_url) as store:
        notices = Notices(store.engine, heard.set)
        notices.start()
        with psycopg.connect(postgresql_url, autocommit=True) as other:
            await _until_heard(other, heard)
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ILIKE 'LISTEN%' AND pid <> pg_backend_pid() AND datname = current_database()"
            )
            heard.clear()
            await _until_heard(other, heard)
        await notices.stop()


async def _until_heard(other: psycopg.Connection, heard: asyncio.Event) -> None:
    for _ in range(200):
        other.execute(f"NOTIFY {CHANNEL}")
        try:
            async with asyncio.timeout(0.1):
                await heard.wait()
        except TimeoutError:
            continue
        return
    raise AssertionError("never heard")


@pytest.mark.parametrize("kind", ["sqlite_url", "mariadb_url"])
async def test_where_there_is_no_notify_nothing_is_sent_and_nobody_listens(request, kind):
    store = Store(request.getfixturevalue(kind))
    store.open(AnswersLater(), version="test")
    store.gives_away = lambda: True
    await store.receive([arrival(1)])
    notices = Notices(store.engine, lambda: None)
    notices.start()
    await notices.stop()
    await store.close()
