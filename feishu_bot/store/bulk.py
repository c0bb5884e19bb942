"""One statement with many rows, compiled once and handed to the driver itself.

SQLAlchemy's own way prepares every row anew, which on a message's way cost more than the database did. Here the
statement is compiled once for its columns; per row only dates are converted and the values put into their order.
"""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Insert, Update
    from sqlalchemy.engine import Dialect

    from feishu_bot.store.work import Transaction


class _Prepared(NamedTuple):
    """A compiled statement. ``in_order`` makes the driver's parameters of a row, None where it takes names."""

    sql: str
    in_order: Callable[[dict[str, Any]], Any] | None
    constants: dict[str, Any]
    converted: tuple[tuple[str, Callable[[Any], Any]], ...]


def execute_many(tx: Transaction, statement: Insert | Update, rows: Sequence[dict[str, Any]]) -> int:
    """Run ``statement`` for each row; return how many rows it matched.

    All rows have the same keys: the columns, or the names of its parameters.
    """
    if not rows:
        return 0
    prepared = _prepare(statement, tx.connection.dialect, tuple(rows[0]))
    parameters: list[Any] = list(rows)
    if prepared.constants:
        parameters = [{**prepared.constants, **row} for row in parameters]
    for name, convert in prepared.converted:
        parameters = [{**row, name: convert(row[name])} for row in parameters]
    if prepared.in_order is not None:
        parameters = [prepared.in_order(row) for row in parameters]
    return int(tx.connection.exec_driver_sql(prepared.sql, parameters).rowcount)


@lru_cache(maxsize=512)
def _prepare(statement: Insert | Update, dialect: Dialect, keys: tuple[str, ...]) -> _Prepared:
    compiled: Any = statement.compile(dialect=dialect, column_keys=list(keys), for_executemany=True)
    names = set(keys)
    constants = {name: value for name, value in compiled.params.items() if name not in names}
    converted = []
    for name, bind in compiled.binds.items():
        convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
        if convert is None:
            continue
        if name in constants:
            constants[name] = convert(constants[name])
        else:
            converted.append((name, convert))
    order = compiled.positiontup
    in_order: Callable[[dict[str, Any]], Any] | None = None
    if order is not None:
        in_order = itemgetter(*order) if len(order) > 1 else lambda row: (row[order[0]],)
    return _Prepared(str(compiled), in_order, constants, tuple(converted))
