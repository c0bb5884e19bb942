"""What the console reads: lists in pages, the newest first, each with what is looked for in them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import func, literal, or_, select, tuple_, union_all

from feishu_bot.model import End
from feishu_bot.store import budgets, cleanup, controls, leases, trouble
from feishu_bot.store.cleanup import DeadLetter
from feishu_bot.store.schema import (
    accounts,
    budget_windows,
    conversations,
    inbox,
    job_runs,
    outbox,
    tokens,
    totals,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement

    from feishu_bot.store.work import Balance, StoredRow, Transaction, WindowKey

ENDS: Final = tuple(end.value for end in End)


class Page(NamedTuple):
    """A piece of a list: what it is to hold (empty: all), where it begins and how many there may be."""

    text: str = ""
    offset: int = 0
    limit: int = 50


def _in(text: str, *columns: ColumnElement[Any]) -> list[ColumnElement[bool]]:
    return [or_(*(column.contains(text, autoescape=True) for column in columns))] if text else []


def status(tx: Transaction) -> dict[str, Any]:
    """Return what waits, what is paused, and what each server process says of itself."""
    depth, orders = leases.depth(tx), controls.read_orders(tx)
    dead, parts = trouble.given_up_since(tx, 0)

    def age(instant: int | None) -> int | None:
        return None if instant is None else max(0, tx.now_ms - instant)

    return {
        "waiting": depth.waiting,
        "oldest_ms": age(depth.oldest_at),
        "outbox": depth.unsent,
        "outbox_oldest_ms": age(depth.oldest_unsent_at),
        "dead_messages": dead,
        "dead_parts": parts,
        "pauses": [
            {"target": p.target, "since": _instant(p.at), "say": p.say, "by": p.by} for p in orders.pauses
        ],
        "processes": [
            {
                "host": server.owner.host.partition("/")[0],
                "pid": server.owner.pid,
                "version": server.version,
                "up_ms": age(server.started_at),
                "seen_ms": age(server.heartbeat_at),
                **server.report,
            }
            for server in controls.read_servers(tx)
        ],
    }


def _instant(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --------------------------------------------------------------------------------------------- dead letters

_i, _o = inbox.c, outbox.c


def dead_letters(tx: Transaction, page: Page) -> list[DeadLetter]:
    """Return a page of what was given up or expired, without its text."""
    ins = select(
        literal("in").label("side"), _i.id, _i.account, _i.state, _i.reason, _i.attempts, _i.ended_at
    ).where(
        _i.ended_at.is_not(None),
        _i.state.in_(cleanup.GIVEN_UP_IN),
        *_in(page.text, _i.account, _i.reason, _i.lane_key, _i.payload),
    )
    outs = select(
        literal("out").label("side"), _o.id, _o.account, _o.state, _o.last_error, _o.attempts, _o.ended_at
    ).where(
        _o.ended_at.is_not(None),
        _o.state.in_(cleanup.GIVEN_UP_OUT),
        *_in(page.text, _o.account, _o.last_error, _o.lane_key, _o.payload),
    )
    both = union_all(ins, outs).subquery()
    rows = tx.connection.execute(
        select(both)
        .order_by(both.c.ended_at.desc(), both.c.side, both.c.id.desc())
        .offset(page.offset)
        .limit(page.limit)
    )
    return [
        DeadLetter(f"{r.side}-{r.id}", r.account, r.state, r.reason or "", r.attempts, r.ended_at, "")
        for r in rows
    ]


def dead_letter(tx: Transaction, letter: str) -> DeadLetter | None:
    """Return one of them with its text."""
    side, _, number = letter.partition("-")
    table, states = (inbox, cleanup.GIVEN_UP_IN) if side == "in" else (outbox, cleanup.GIVEN_UP_OUT)
    row = tx.connection.execute(
        select(table).where(table.c.id == int(number), table.c.state.in_(states))
    ).one_or_none()
    if row is None:
        return None
    reason = row.reason if side == "in" else row.last_error
    return DeadLetter(letter, row.account, row.state, reason or "", row.attempts, row.ended_at, row.payload)


# -------------------------------------------------------------------------------------------- conversations

_c = conversations.c


def list_conversations(tx: Transaction, page: Page) -> list[StoredRow]:
    """Return a page of everybody's conversations, the one used last first; ``text`` in title, chat or person."""
    statement = (
        select(_c.id, _c.title, _c.user_key, _c.platform, _c.chat_id, _c.message_count, _c.total_tokens)
        .add_columns(_c.last_activity)
        .where(_c.hidden_at.is_(None), *_in(page.text, _c.title, _c.user_key, _c.chat_id))
    )
    ordered = statement.order_by(_c.last_activity.desc(), _c.id.desc())
    return list(tx.connection.execute(ordered.offset(page.offset).limit(page.limit)).mappings())


# ---------------------------------------------------------------------------------------------- budgets, jobs

_w = budget_windows.c


def budget_rows(
    tx: Transaction, windows: Sequence[tuple[str, int]], page: Page
) -> list[tuple[WindowKey, Balance]]:
    """Return a page of what was used in these windows (a budget's name, its beginning), the most tokens first."""
    if not windows:
        return []
    statement = (
        select(*budgets.WINDOW, *budgets.BALANCE)
        .where(tuple_(_w.budget, _w.window_start).in_(windows), *_in(page.text, _w.budget, _w.key))
        .order_by(_w.used.desc(), _w.budget, _w.key)
    )
    rows = tx.connection.execute(statement.offset(page.offset).limit(page.limit))
    return [budgets.balance_of(row) for row in rows]


def list_runs(tx: Transaction, page: Page) -> list[StoredRow]:
    """Return a page of runs of jobs; those that were only introduced are none."""
    statement = select(job_runs).where(job_runs.c.node != "", *_in(page.text, job_runs.c.job))
    ordered = statement.order_by(job_runs.c.started_at.desc(), job_runs.c.job)
    return list(tx.connection.execute(ordered.offset(page.offset).limit(page.limit)).mappings())


# -------------------------------------------------------------------------------------- accounts and sessions

_a, _t = accounts.c, tokens.c


@dataclass(frozen=True, slots=True)
class Person:
    """An account with how many sessions and API tokens stand for it."""

    name: str
    role: str
    created_at: int
    sessions: int
    tokens: int


def list_people(tx: Transaction, page: Page) -> list[Person]:
    """Return a page of the accounts, by name."""
    names = (
        select(_a.name, _a.role, _a.created_at)
        .where(*_in(page.text, _a.name))
        .order_by(_a.name)
        .offset(page.offset)
        .limit(page.limit)
    )
    rows = tx.connection.execute(names).all()
    holds = or_(_t.expires_at.is_(None), _t.expires_at > tx.now_ms)
    counted = tx.connection.execute(
        select(_t.account, _t.kind, func.count())
        .where(_t.account.in_([row.name for row in rows]), holds)
        .group_by(_t.account, _t.kind)
    )
    counts = {(account, kind): int(number) for account, kind, number in counted}
    return [
        Person(
            r.name, r.role, r.created_at, counts.get((r.name, "session"), 0), counts.get((r.name, "api"), 0)
        )
        for r in rows
    ]


def list_tokens(tx: Transaction, page: Page) -> list[StoredRow]:
    """Return a page of the sessions and API tokens that hold, the one used last first; nothing of their secrets."""
    holds = or_(_t.expires_at.is_(None), _t.expires_at > tx.now_ms)
    statement = select(_t.id, _t.account, _t.kind, _t.label, _t.address, _t.created_at, _t.used_at)
    statement = statement.where(holds, *_in(page.text, _t.account, _t.label, _t.address))
    ordered = statement.order_by(_t.used_at.desc(), _t.id.desc())
    return list(tx.connection.execute(ordered.offset(page.offset).limit(page.limit)).mappings())


# -------------------------------------------------------------------------------------------------- traffic


def ended_by_day(tx: Transaction, since_day: str) -> dict[tuple[str, str], int]:
    """Return how many messages have ended: by day (of UTC, ``2026-03-01``) and account."""
    t = totals.c
    rows = tx.connection.execute(
        select(t.day, t.account, func.sum(t.count))
        .where(t.day >= since_day, t.end.in_(ENDS))
        .group_by(t.day, t.account)
    )
    return {(day, account): int(count) for day, account, count in rows if count}


def failed_since(tx: Transaction, since_ms: int, *, most: int = 1000) -> dict[str, tuple[int, str, int]]:
    """Return of each account what was given up since an instant: how often, and the last reason and instant (ms)."""
    found: dict[str, tuple[int, str, int]] = {}
    for table, states, reason in (
        (inbox, cleanup.GIVEN_UP_IN, _i.reason),
        (outbox, cleanup.GIVEN_UP_OUT, _o.last_error),
    ):
        rows = tx.connection.execute(
            select(table.c.account, reason, table.c.ended_at)
            .where(table.c.ended_at >= since_ms, table.c.state.in_(states))
            .order_by(table.c.ended_at.desc())
            .limit(most)
        )
        for account, words, at in rows:
            count, last, last_at = found.get(account, (0, "", 0))
            newest = (words or "", at) if at > last_at else (last, last_at)
            found[account] = (count + 1, *newest)
    return found
