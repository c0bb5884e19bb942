"""The ledger added up, per hour and per user and chat, so that who asks for all of it need not read all of it.

A row of the ledger is ``fresh`` until a job has added it, in the transaction that takes the mark away; who reads adds
the fresh rows to the sums, in one statement. So a result is exact at every instant, in whatever order the rows of
several processes were committed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Integer, cast, delete, extract, func, select, text, update

from feishu_bot.store.engine import insert_add
from feishu_bot.store.schema import usage, usage_hours, usage_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy import ColumnElement, Connection, Row, Table

    from feishu_bot.store.work import Transaction

    AnyRow = Row[*tuple[Any, ...]]
    Key = tuple[Any, ...]

PIECE: Final = 500  # rows of the ledger added by one transaction
HOUR_S: Final = 3600
USER, CHAT = "user", "chat"  # kinds of names
NOBODY: Final = ""  # stands for null in a key
_TOKENS: Final = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")
NUMBERS: Final = ("calls", *_TOKENS, "priced", "cost_micro_usd")  # ``priced``: calls whose cost is known

_u, _h, _n = usage.c, usage_hours.c, usage_names.c
AMOUNTS: Final = (*[_u[name] for name in _TOKENS], _u.cost_micro_usd)  # of a row of the ledger
_WHOSE = (_u.id, _u.user_id, _u.chat_id, _u.platform, _u.tenant_id, _u.model, _u.at)
_FRESH = select(*_WHOSE, *AMOUNTS).where(_u.fresh == 1).limit(PIECE).with_for_update(skip_locked=True)


def hour_of(kind: str) -> ColumnElement[int]:
    """Return, for a statement, the full hours since 1970 at which a row of the ledger was written."""
    if kind == "sqlite":
        # Without the fraction: SQLite rounds it, so that the last half millisecond would be the next hour's.
        return cast(func.strftime("%s", func.substr(_u.at, 1, 19)), Integer) // HOUR_S
    if kind == "postgresql":
        return cast(func.floor(extract("epoch", _u.at) / HOUR_S), BigInteger)
    hours: ColumnElement[int] = func.timestampdiff(text("HOUR"), text("'1970-01-01'"), _u.at)
    return hours


def _numbers_of(row: AnyRow, sign: int = 1) -> list[int]:
    """Return what a row of the ledger adds to each of ``NUMBERS``."""
    cost = row.cost_micro_usd
    amounts = [1, *[getattr(row, name) for name in _TOKENS], int(cost is not None), cost or 0]
    return [sign * amount for amount in amounts]


class _Added(defaultdict["Key", list[int]]):
    """What is added to each key."""

    def __init__(self) -> None:
        super().__init__(lambda: [0] * len(NUMBERS))

    def add(self, key: Key, numbers: Iterable[int]) -> None:
        self[key] = [a + b for a, b in zip(self[key], numbers, strict=True)]


def add_fresh(tx: Transaction) -> int:
    """Add one piece of fresh rows to the sums; return how many."""
    rows = tx.connection.execute(_FRESH).all()
    if not rows:
        return 0
    hours, names = _Added(), _Added()
    for row in rows:
        numbers = _numbers_of(row)
        hours.add((int(row.at.timestamp()) // HOUR_S, row.tenant_id, row.platform, row.model), numbers)
        for kind, name in ((USER, row.user_id), (CHAT, row.chat_id)):
            names.add((kind, name or NOBODY, row.tenant_id), numbers)
    _add(tx, usage_hours, hours)
    _add(tx, usage_names, names)
    tx.connection.execute(update(usage).where(_u.id.in_([row.id for row in rows])).values(fresh=None))
    return len(rows)


def take_names_off(tx: Transaction, rows: Iterable[AnyRow], *, chats: Iterable[AnyRow]) -> None:
    """Have the sums follow rows of the ledger that lose their user, and some of them their chat; all are locked."""
    names = _Added()
    for kind, column, changed in ((USER, "user_id", rows), (CHAT, "chat_id", chats)):
        for row in changed:
            name = getattr(row, column)
            if row.fresh is None and name:
                names.add((kind, name, row.tenant_id), _numbers_of(row, -1))
                names.add((kind, NOBODY, row.tenant_id), _numbers_of(row))
    _add(tx, usage_names, names)
    gone = {name for _, name, _ in names} - {NOBODY}
    if gone:
        tx.connection.execute(delete(usage_names).where(_n.name.in_(sorted(gone)), _n.calls == 0))


def differences(connection: Connection, kind: str) -> Iterator[str]:
    """Yield what the sums say otherwise than the ledger, one line for each key."""
    amounts = [func.coalesce(func.sum(column), 0) for column in AMOUNTS]
    numbers = (func.count(), *amounts[:-1], func.count(_u.cost_micro_usd), amounts[-1])
    hour = (_h.hour, _h.tenant_id, _h.platform, _h.model)
    name = (_n.name, _n.tenant_id)
    for what, table, named, keys in (
        ("hour", usage_hours, hour, (hour_of(kind), _u.tenant_id, _u.platform, _u.model)),
        (USER, usage_names, name, (func.coalesce(_u.user_id, NOBODY), _u.tenant_id)),
        (CHAT, usage_names, name, (func.coalesce(_u.chat_id, NOBODY), _u.tenant_id)),
    ):
        count = len(keys)
        rows = connection.execute(select(*keys, *numbers).where(_u.fresh.is_(None)).group_by(*keys))
        booked = {tuple(row[:count]): tuple(map(int, row[count:])) for row in rows}
        said = select(*named, *[table.c[n] for n in NUMBERS])
        said = said.where(_n.kind == what) if table is usage_names else said
        added = {tuple(row[:count]): tuple(map(int, row[count:])) for row in connection.execute(said)}
        empty = (0,) * len(numbers)
        for key in booked.keys() | added.keys():
            if booked.get(key, empty) != added.get(key, empty):
                yield f"{what} {key}: {added.get(key, empty)} instead of {booked.get(key, empty)}"


def _add(tx: Transaction, table: Table, added: _Added) -> None:
    keys = tuple(column.name for column in table.primary_key)
    # In sorted order, so that two who add do not wait for each other.
    rows = [
        dict(zip((*keys, *NUMBERS), (*key, *numbers), strict=True)) for key, numbers in sorted(added.items())
    ]
    if rows:
        tx.connection.execute(insert_add(tx.kind, table, keys, NUMBERS), rows)
