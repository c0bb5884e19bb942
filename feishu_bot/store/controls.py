"""What operators have ordered, read by every process each second; and what each process says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from sqlalchemy import bindparam, delete, func, select, update

from feishu_bot.store.engine import insert_ignore, insert_set
from feishu_bot.store.leases import Owner
from feishu_bot.store.schema import controls, processes
from feishu_bot.store.work import LEASE_MS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from feishu_bot.store.work import Transaction

ALL: Final = "all"
MODELS: Final = "models"
_ACCOUNT: Final = "account:"
SILENT_MS: Final = (
    2 * LEASE_MS
)  # a process that has said nothing for so long does not count as one that works
_STOPS_KEPT_MS: Final = 60_000  # each process looks every second
_WARNINGS_KEPT_MS: Final = 40 * 24 * 3_600_000  # longer than any budget window that ends


def account_target(account: str) -> str:
    """Return how a pause of one account is called; an account may be named ``all``."""
    return _ACCOUNT + account


@dataclass(frozen=True, slots=True)
class Pause:
    """Messages are kept and not answered: of ``all``, of one account, or (``models``) those for a model.

    ``at`` (ms) tells one pause from the next. ``say``: what each chat is told, once.
    """

    target: str
    at: int
    say: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Orders:
    """All orders in force. ``drains`` names the processes that are to take nothing new."""

    pauses: tuple[Pause, ...] = ()
    drains: frozenset[str] = frozenset()
    reload_at: int = 0
    stops: frozenset[str] = frozenset()  # event keys of questions whose answers nobody wants any more

    def pause_of(self, account: str) -> Pause | None:
        """Return the pause that holds all messages of an account, if there is one."""
        targets = (ALL, _ACCOUNT + account)
        return next((pause for pause in self.pauses if pause.target in targets), None)

    @property
    def models(self) -> Pause | None:
        """The pause that holds questions for a model."""
        return next((pause for pause in self.pauses if pause.target == MODELS), None)


_ORDERS = select(controls.c.kind, controls.c.name, controls.c.value, controls.c.at).where(
    controls.c.kind.in_(["drain", "pause", "reload", "stop"])
)


def read_orders(tx: Transaction) -> Orders:
    """Return the orders in force."""
    pauses, drains, stops, reload_at = [], set(), set(), 0
    for row in tx.connection.execute(_ORDERS.order_by(controls.c.kind, controls.c.name)):
        if row.kind == "pause":
            value = orjson.loads(row.value)
            pauses.append(Pause(row.name, row.at, value.get("say"), value.get("by")))
        elif row.kind == "drain":
            drains.add(row.name)
        elif row.kind == "stop":
            stops.add(row.name)
        else:
            reload_at = max(reload_at, row.at)
    return Orders(tuple(pauses), frozenset(drains), reload_at, frozenset(stops))


def _set(tx: Transaction, kind: str, name: str, value: Mapping[str, Any] | None = None) -> None:
    row = {"kind": kind, "name": name, "value": orjson.dumps(value or {}).decode(), "at": tx.now_ms}
    tx.connection.execute(insert_set(tx.kind, controls, ("kind", "name"), ("value", "at")), row)


def pause(tx: Transaction, target: str, *, say: str | None = None, by: str | None = None) -> None:
    """Have messages kept and not answered, by every process."""
    _set(tx, "pause", target, {"say": say, "by": by})


def resume(tx: Transaction, target: str | None = None) -> int:
    """End one pause, or all pauses and drains; return how many orders that were."""
    statement = delete(controls)
    if target is None:
        statement = statement.where(controls.c.kind.in_(["drain", "pause"]))
    else:
        statement = statement.where(controls.c.kind == "pause", controls.c.name == target)
    return int(tx.connection.execute(statement).rowcount)


def drain(tx: Transaction, owners: Sequence[str]) -> None:
    """Have these processes take nothing new; the orders for processes that are no more are removed."""
    known = select(processes.c.owner)
    tx.connection.execute(delete(controls).where(controls.c.kind == "drain", controls.c.name.not_in(known)))
    for owner in owners:
        _set(tx, "drain", owner)


def inherit_drain(tx: Transaction, dead: str, heir: str) -> None:
    """Have the order to drain a worker that died mean the one that replaces it. Safe to run twice."""
    ordered = (controls.c.kind == "drain") & (controls.c.name == dead)
    if tx.connection.execute(delete(controls).where(ordered)).rowcount:
        _set(tx, "drain", heir)


def stop_answer(tx: Transaction, event_key: str) -> None:
    """Have the process that answers this question, whichever it is, end the answer where it is."""
    old = controls.c.at < tx.now_ms - _STOPS_KEPT_MS
    tx.connection.execute(delete(controls).where(controls.c.kind == "stop", old))
    _set(tx, "stop", event_key)


def order_reload(tx: Transaction) -> int:
    """Have every process read its configuration again; return the order's number, higher than any before."""
    last = tx.connection.execute(select(func.max(controls.c.at)).where(controls.c.kind == "reload")).scalar()
    number = max(tx.now_ms, (last or 0) + 1)
    row = {"kind": "reload", "name": "", "value": "{}", "at": number}
    tx.connection.execute(insert_set(tx.kind, controls, ("kind", "name"), ("value", "at")), row)
    return number


# ------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True, slots=True)
class Process:
    """A server process, by its own last words; instants in ms."""

    owner: Owner
    version: str
    started_at: int
    heartbeat_at: int
    report: Mapping[str, Any]


_REPORT = update(processes).where(processes.c.owner == bindparam("o")).values(report=bindparam("words"))
_SERVERS = (
    select(processes)
    .where(processes.c.report.is_not(None), processes.c.heartbeat_at > bindparam("since"))
    .order_by(processes.c.host, processes.c.started_at, processes.c.pid)
)
_COUNT = select(func.count()).where(
    processes.c.report.is_not(None), processes.c.heartbeat_at > bindparam("since")
)


def report(tx: Transaction, owner: str, words: Mapping[str, Any]) -> None:
    """Put down what a process says of itself."""
    tx.connection.execute(_REPORT, {"o": owner, "words": orjson.dumps(words).decode()})


def count_servers(tx: Transaction) -> int:
    """Return how many server processes have been heard of lately."""
    return int(tx.connection.execute(_COUNT, {"since": tx.now_ms - SILENT_MS}).scalar_one())


def read_servers(tx: Transaction, *, silent_ms: int = SILENT_MS) -> list[Process]:
    """Return the server processes that have been heard of lately, those of one host together."""
    rows = tx.connection.execute(_SERVERS, {"since": tx.now_ms - silent_ms})
    return [
        Process(Owner.parse(r.owner), r.version, r.started_at, r.heartbeat_at, orjson.loads(r.report))
        for r in rows
    ]


# --------------------------------------------------------------------------------------------------- alerts

_THIS = (controls.c.kind == bindparam("k")) & (controls.c.name == bindparam("n"))
_TURN = update(controls).where(_THIS, controls.c.at <= bindparam("before")).values(at=bindparam("now"))


def claim_turn(tx: Transaction, kind: str, name: str, every_ms: int) -> bool:
    """Say whether it is this caller's turn: over all processes at most once in ``every_ms``."""
    row = {"kind": kind, "name": name, "value": "{}", "at": 0}
    tx.connection.execute(insert_ignore(tx.kind, controls, ("kind", "name")), row)
    times = {"now": tx.now_ms, "before": tx.now_ms - every_ms}
    return int(tx.connection.execute(_TURN, {"k": kind, "n": name, **times}).rowcount) == 1


def give_turn_back(tx: Transaction, kind: str, name: str) -> None:
    """Undo ``claim_turn``: what was to be done could not be."""
    tx.connection.execute(update(controls).where(_THIS).values(at=0), {"k": kind, "n": name})


def first_warnings(tx: Transaction, names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that were never returned before; each is returned once, by one process."""
    old = (controls.c.kind == "warned") & (controls.c.at < tx.now_ms - _WARNINGS_KEPT_MS)
    tx.connection.execute(delete(controls).where(old))
    return [name for name in names if claim_turn(tx, "warned", name, _WARNINGS_KEPT_MS)]
