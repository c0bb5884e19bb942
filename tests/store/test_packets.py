"""More than MariaDB takes at once is told as what it is, and not as a server that went away."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DataError

from feishu_bot.ai.conversation_store import PersistentConversationManager, TooLarge
from feishu_bot.errors import StoreError, StoreUnavailable
from feishu_bot.store.engine import is_conflict, is_disconnect, is_refusal, open_engine, reason_of
from feishu_bot.store.packets import BoundedConnection
from feishu_bot.store.schema import inbox
from feishu_bot.store.work import Recorded
from tests.stores import opened, rows
from tests.transact import arrival

MOST_WORTH_A_TEST = 64 * 2**20


@pytest.fixture
def most(mariadb_url):
    engine = open_engine(mariadb_url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT @@max_allowed_packet")).scalar()
    engine.dispose()
    if found > MOST_WORTH_A_TEST:
        pytest.skip(f"the server takes {found} bytes at once")
    return found


def statement(size: int) -> str:
    return "SELECT LENGTH('" + "x" * (size - len("SELECT LENGTH('')")) + "')"


def test_the_largest_statement_is_sent_and_a_larger_one_is_not(mariadb_url, most):
    engine = open_engine(mariadb_url)
    with engine.connect() as connection:
        number = connection.execute(text("SELECT connection_id()")).scalar()
        assert connection.exec_driver_sql(statement(most - 2)).scalar() > 0
        with pytest.raises(DataError) as caught:
            connection.exec_driver_sql(statement(most - 1))
        assert connection.execute(text("SELECT connection_id()")).scalar() == number  # it was not cut off
    error = caught.value
    assert is_refusal(error)
    assert not is_disconnect(error)
    assert not is_conflict(error)
    assert f"max_allowed_packet is {most}" in reason_of(error)
    engine.dispose()


def test_what_counts_are_bytes_and_not_characters(mariadb_url, most):
    engine = open_engine(mariadb_url)
    with engine.connect() as connection, pytest.raises(DataError):
        connection.execute(select(text(":said")), {"said": "字" * (most // 3)})
    engine.dispose()


async def test_a_message_that_is_too_large_is_refused_and_the_others_are_recorded(mariadb_url, most):
    async with opened(mariadb_url) as store:
        answers = await asyncio.gather(
            store.receive([arrival("before")]),
            store.receive([arrival("large", quoted="x" * most)]),
            store.receive([arrival("after")]),
            return_exceptions=True,
        )
        assert [row["event_key"] for row in await rows(store, inbox)] == ["before", "after"]
    assert answers[0] == answers[2] == [Recorded.NEW]
    assert isinstance(answers[1], StoreError)
    assert not isinstance(answers[1], StoreUnavailable)
    assert "max_allowed_packet" in str(answers[1])


def test_the_library_says_that_it_is_too_large_and_goes_on(mariadb_url, most):
    manager = PersistentConversationManager(mariadb_url)
    found = manager.get_or_create("web:private:u", "web")
    with pytest.raises(TooLarge, match=f"max_allowed_packet is {most}"):
        manager.save_message(found.id, "user", "x" * most, tokens=1)
    manager.save_message(found.id, "user", "less", tokens=1)
    assert [message["content"] for message in manager.load_history(found.id)] == ["less"]
    manager.close()


def test_rows_stored_together_are_counted_too(mariadb_url, most):
    engine = open_engine(mariadb_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TEMPORARY TABLE words (word LONGTEXT)")
        insert = "INSERT INTO words (word) VALUES (%s)"
        connection.exec_driver_sql(insert, [("x" * 2**18,), ("y" * 2**18,)])
        with pytest.raises(DataError, match="max_allowed_packet"):
            connection.exec_driver_sql(insert, [("x" * most,), ("y",)])
        assert connection.exec_driver_sql("SELECT count(*) FROM words").scalar() == 2
    engine.dispose()


def test_connections_that_verify_nothing_encrypt_with_the_same_and_others_with_what_they_ask_for():
    one, other = (BoundedConnection(defer_connect=True) for _ in range(2))
    assert one.ctx is other.ctx
    assert one.ctx.verify_mode is ssl.CERT_NONE
    assert not one._ssl_required
    asked = BoundedConnection(defer_connect=True, ssl_verify_cert=True, ssl_verify_identity=True)
    assert asked.ctx.verify_mode is ssl.CERT_REQUIRED
    assert asked._ssl_required
