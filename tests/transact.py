"""The store's list functions, each run in a transaction of the test's own, on one or several connections."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, select

from feishu_bot.model import End, InboundMessage
from feishu_bot.store import outbox as sending
from feishu_bot.store.commit import commit
from feishu_bot.store.engine import capabilities, open_engine
from feishu_bot.store.history import HistoryCache
from feishu_bot.store.inbox import begin, receive
from feishu_bot.store.work import (
    Arrival,
    Charge,
    Lease,
    NewConversation,
    NewMessage,
    NewPart,
    Outcome,
    Planned,
    PlannedCall,
    SendResult,
    SendStep,
    Transaction,
    Work,
)
from tests.stores import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Table

# For tests with two transactions that write at the same time, which SQLite does not have.
row_locks = pytest.mark.parametrize("db_url", ["postgresql", "mariadb"], indirect=True)

OWNER = "test-host/boot/1|1|1"
LANE = "user:web:private:ann"
DAILY = Charge("daily-user", "web:ann", 0, 1000, None)


class Plans:
    """Plans what the test says: a call against budgets, or to wait until an instant."""

    history_turns = 2

    def __init__(self) -> None:
        self.call: PlannedCall | None = None
        self.wait_ms: int | None = None

    def reserve(self, tokens: int = 100, *charges: Charge) -> None:
        self.call = PlannedCall("echo", tokens // 2, tokens, charges or (DAILY,))

    def tenant(self, account: str) -> str:
        return "default"

    def plan(self, message, conversation, history, *, attempt, received_at, now_ms) -> Planned:
        return Planned(wait_ms=self.wait_ms) if self.wait_ms is not None else Planned(call=self.call)


class Database:
    """One database, as the list functions see it. Every method is one committed transaction."""

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self.engine = open_engine(url)
        self.kind = capabilities(self.engine).kind
        self.clock = clock or Clock()
        self.cache = HistoryCache()
        self.plans = Plans()
        self._seen = 0

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def transaction(self, *, rerun: bool = False) -> Iterator[Transaction]:
        with self.engine.connect() as connection:
            with connection.begin():
                tx = Transaction(connection, self.kind, self.clock(), rerun=rerun)
                yield tx
            for callback in tx.after_commit:
                callback()

    def run(self, function: Callable[..., Any], *arguments: Any, rerun: bool = False, **named: Any) -> Any:
        with self.transaction(rerun=rerun) as tx:
            return function(tx, *arguments, **named)

    def rows(self, table: Table) -> list[Any]:
        with self.transaction() as tx:
            return list(tx.connection.execute(select(table).order_by(*table.primary_key)))

    def row(self, table: Table) -> Any:
        (row,) = self.rows(table)
        return row

    def put(self, table: Table, *rows: dict[str, Any]) -> None:
        with self.transaction() as tx:
            tx.connection.execute(insert(table), list(rows))

    @contextmanager
    def statements(self) -> Iterator[list[str]]:
        """Collect the statements that are run meanwhile; an ``executemany`` is one."""
        seen: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
            if not statement.startswith("BEGIN"):
                seen.append(statement)

        event.listen(self.engine, "before_cursor_execute", note)
        try:
            yield seen
        finally:
            event.remove(self.engine, "before_cursor_execute", note)

    # ------------------------------------------------------------------------------ the way of a message

    def receive(self, *keys: str, lane: str = LANE, **more: Any) -> list[Any]:
        """Record one message of Ann for each key."""
        return self.run(receive, [arrival(key, lane=lane, **more) for key in keys])

    def begin(self, *lanes: str, token: str = "t1", owner: str = OWNER, **more: Any) -> list[Any]:
        leases = [Lease(lane, owner, token) for lane in lanes or (LANE,)]
        return self.run(begin, leases, planner=self.plans, cache=self.cache, **more)

    def begin_one(self, lane: str = LANE, **more: Any) -> Any:
        (found,) = self.begin(lane, **more)
        return found

    def commit(self, *outcomes: Outcome, **more: Any) -> list[Any]:
        return self.run(commit, outcomes, cache=self.cache, keep_turns=self.plans.history_turns, **more)

    def commit_one(self, outcome: Outcome, **more: Any) -> Any:
        (found,) = self.commit(outcome, **more)
        return found

    def answer(self, key: str, *, lane: str = LANE, token: str | None = None, **more: Any) -> Any:
        """Record, begin and end one message."""
        self.receive(key, lane=lane)
        work = self.begin_one(lane, token=token or f"t-{key}")
        assert isinstance(work, Work), work
        return self.commit_one(answered(work, **more))

    def step(self, lease: Lease, result: SendResult | None = None, **more: Any) -> Any:
        (found,) = self.run(sending.send_step, [SendStep(lease, result)], **more)
        return found


def arrival(key: str, *, lane: str = LANE, account: str = "web", state: str = "open", **more: Any) -> Arrival:
    payload = InboundMessage(account, key, text=f"say {key}", sender_id="ann", **more).to_json()
    return Arrival(account, key, lane, payload, state, None if state == "open" else "not for us")


def answered(
    work: Work, end: End = End.ANSWERED, *, parts: int = 1, says: str = "hello", **more: Any
) -> Outcome:
    """Return the outcome of a message that was answered: two messages, and the parts of one answer."""
    more.setdefault("messages", turn(work, says))
    more.setdefault("conversation", conversation_of(work))
    more.setdefault("parts", tuple(NewPart("answer", n, f'{{"text": "{says} {n}"}}') for n in range(parts)))
    return Outcome(work, end, **more)


def turn(work: Work, says: str = "hello") -> tuple[NewMessage, ...]:
    key = f"in:{work.inbox_id}"
    return (
        NewMessage("user", work.message.text, 3, sender_id="web:private:ann", save_key=f"{key}:user"),
        NewMessage("assistant", says, 5, save_key=f"{key}:assistant"),
    )


def conversation_of(work: Work) -> NewConversation | None:
    if work.conversation is not None:
        return None
    message = work.message
    return NewConversation(
        public_id=message.conversation or f"public-{work.inbox_id}",
        scope_key=work.lease.lane_key,
        user_key="web:private:ann",
        platform=message.account,
        chat_id=message.chat_id or None,
        user_id="web:ann",
        agent=None,
        title=message.text[:50],
    )
