"""Statements of the library's hot path: written with SQLAlchemy as all others, compiled once, run by the driver.

An execution by SQLAlchemy costs 30 microseconds or more beside what the database does, which is as much again as
SQLite needs for all of it; here it is about 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.exc import DBAPIError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection, Insert, Select, TextClause, Update
    from sqlalchemy.engine import Dialect


class _Form(NamedTuple):
    """A statement for one kind of database."""

    sql: str
    constants: dict[str, Any]  # what stands in the statement itself, already as the driver wants it
    converters: tuple[tuple[str, Callable[[Any], Any]], ...]  # of what is handed in
    order: tuple[str, ...] | None  # of the values, for drivers that take them by place
    results: tuple[Callable[[Any], Any] | None, ...]
    convert: bool  # whether any result needs it


class Prepared:
    """A statement with named values and none of variable length (no ``IN``).

    ``as_stored``: results are what the driver hands out, not yet of the columns' types.
    """

    def __init__(
        self, statement: Select[Any] | Insert | Update | TextClause, *, as_stored: bool = False
    ) -> None:
        self._statement = statement
        self._as_stored = as_stored
        self._forms: dict[str, _Form] = {}

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run the statement and return its rows; [] for one that returns none. Raises DBAPIError."""
        if connection.engine.echo:  # whoever wants to see the statements gets them the long way
            result = connection.execute(self._statement, values)
            return [tuple(row) for row in result] if result.returns_rows else []
        form = self._forms.get(connection.dialect.name)
        if form is None:
            form = self._forms[connection.dialect.name] = self._compile(connection.dialect)
        bound = {**form.constants, **values}
        for name, convert in form.converters:
            bound[name] = convert(bound[name])
        given = bound if form.order is None else [bound[name] for name in form.order]
        rows = run(connection, form.sql, given, fetch=bool(form.results))
        if form.convert:
            return [
                tuple([v if f is None else f(v) for v, f in zip(row, form.results, strict=True)])
                for row in rows
            ]
        return rows

    def _compile(self, dialect: Dialect) -> _Form:
        compiled = self._statement.compile(dialect=dialect)
        processors: Any = compiled._bind_processors  # noqa: SLF001  # there is no public way to what execution uses
        constants = {
            name: processors[name](value) if name in processors else value
            for name, value in compiled.params.items()
            if value is not None
        }
        asked = [name for name in compiled.params if name not in constants]
        columns = [entry[3] for entry in compiled._result_columns]  # noqa: SLF001  # as above
        results = tuple([kind.dialect_impl(dialect).result_processor(dialect, None) for kind in columns])
        return _Form(
            compiled.string,
            constants,
            tuple([(name, processors[name]) for name in asked if name in processors]),
            tuple(compiled.positiontup) if compiled.positional and compiled.positiontup else None,
            results,
            any(results) and not self._as_stored,
        )


def run(connection: Connection, sql: str, values: Any = (), *, fetch: bool = False) -> list[tuple[Any, ...]]:
    """Run driver SQL on the connection's own cursor. Raises DBAPIError as SQLAlchemy would."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(sql, values)
        return cursor.fetchall() if fetch else []  # type: ignore[return-value]  # the driver's rows are tuples
    except connection.dialect.loaded_dbapi.Error as error:
        raise _wrapped(connection, sql, error) from error
    finally:
        cursor.close()


def commit(connection: Connection) -> None:
    """Commit, whether or not SQLAlchemy knows that a transaction has begun. Raises DBAPIError."""
    if connection.in_transaction():
        connection.commit()
        return
    try:
        connection.connection.commit()
    except connection.dialect.loaded_dbapi.Error as error:
        raise _wrapped(connection, "COMMIT", error) from error


def _wrapped(connection: Connection, sql: str, error: Exception) -> Exception:
    """Return the driver's error as SQLAlchemy's; a connection that broke is not used again."""
    dialect = connection.dialect
    driver: Any = connection.connection
    lost = dialect.is_disconnect(error, driver.dbapi_connection, None)  # type: ignore[arg-type]  # as SQLAlchemy calls it
    if lost:
        connection.invalidate(error)
    return DBAPIError.instance(
        sql,
        None,
        error,
        dialect.loaded_dbapi.Error,
        hide_parameters=True,
        connection_invalidated=lost,
        dialect=dialect,
    )
