"""Replacing all rows of a MariaDB database at one instant.

Its DDL has no transactions, and one transaction over all rows would be as slow to undo as to do. So tables are
filled beside the old ones, and one statement renames all of them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError

from feishu_bot.store.archive import TableHeader
from feishu_bot.store.engine import capabilities
from feishu_bot.store.loader import check_columns, insert_rows, with_terms
from feishu_bot.store.schema import metadata
from feishu_bot.store.snapshot import kept_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from feishu_bot.store.loader import Batches, Source

_FRESH, _OLD = "restore_", "replaced_"


def replace_rows(connection: Connection, source: Source) -> None:
    """Put these rows in the place of all there are. The old ones stay as they are until all is ready.

    Call it under ``migrations.alone``. Raises errors of the driver, and BackupDamaged.
    """
    run = connection.exec_driver_sql
    remove_leftovers(connection)
    names = [table.name for table in kept_tables()]
    keys = _foreign_keys(connection, names)
    try:
        _make_beside(connection, names, keys)
        _fill_beside(connection, source)
    except BaseException:
        with suppress(DBAPIError):  # what went wrong before says more
            remove_leftovers(connection)
        raise
    # One statement: at any instant all tables are the old ones, or all are the new ones.
    moves = [f"`{n}` TO `{_OLD}{n}`, `{_FRESH}{n}` TO `{n}`" for n in names]
    run(f"RENAME TABLE {', '.join(moves)}")
    run("DELETE FROM processes")
    run("DELETE FROM controls")
    remove_leftovers(connection)
    _rename_foreign_keys(connection, keys)
    run(f"ANALYZE TABLE {', '.join(f'`{n}`' for n in names)}").close()


@dataclass(frozen=True, slots=True)
class _ForeignKey:
    """A reference; its name is unique in a MariaDB database, so that of the table beside gets another."""

    table: str
    name: str
    columns: str
    referred: str
    referred_columns: str
    rule: str

    def sql(self, name: str, prefix: str = "") -> str:
        return (
            f"ADD CONSTRAINT `{name}` FOREIGN KEY ({self.columns}) "
            f"REFERENCES `{prefix}{self.referred}` ({self.referred_columns}) {self.rule}"
        )


def _foreign_keys(connection: Connection, names: Sequence[str]) -> list[_ForeignKey]:
    inspector = inspect(connection)
    found = []
    for name in names:
        for key in inspector.get_foreign_keys(name):
            rule = " ".join(f"{on.upper()} {does}" for on, does in key["options"].items())
            columns, referred = (
                ", ".join(f"`{c}`" for c in key[k]) for k in ("constrained_columns", "referred_columns")
            )
            rule = rule.replace("ONDELETE", "ON DELETE").replace("ONUPDATE", "ON UPDATE")
            found.append(_ForeignKey(name, key["name"] or "", columns, key["referred_table"], referred, rule))
    return found


def _make_beside(connection: Connection, names: Sequence[str], keys: Sequence[_ForeignKey]) -> None:
    run = connection.exec_driver_sql
    for name in names:
        run(f"CREATE TABLE `{_FRESH}{name}` LIKE `{name}`")
    for key in keys:
        run(f"ALTER TABLE `{_FRESH}{key.table}` {key.sql(_other_name(key), _FRESH)}")


def _other_name(key: _ForeignKey) -> str:
    """Return a name that the reference in use does not bear; after a restore that was cut off it may bear ours."""
    return key.name.removeprefix(_FRESH) if key.name.startswith(_FRESH) else _FRESH + key.name


def _fill_beside(connection: Connection, source: Source) -> None:
    driver: Any = connection.connection.driver_connection
    quote = connection.dialect.identifier_preparer.quote_identifier
    for found, rows in source():
        check_columns(found, [column["name"] for column in inspect(connection).get_columns(found.name)])
        table, batches = with_terms("mariadb", found, rows)
        beside = TableHeader(_FRESH + table.name, table.columns)
        insert_rows(driver, "%s", quote, beside, _committed(driver, batches))
        if table.next_id is not None:
            connection.exec_driver_sql(f"ALTER TABLE `{beside.name}` AUTO_INCREMENT = {table.next_id}")


def _committed(driver: Any, batches: Batches) -> Batches:
    for batch in batches:
        yield batch
        driver.commit()


def _rename_foreign_keys(connection: Connection, keys: Sequence[_ForeignKey]) -> None:
    run = connection.exec_driver_sql
    run("SET SESSION foreign_key_checks = 0")  # the rows have been checked: nothing is read again
    for key in keys:
        own = key.name.removeprefix(_FRESH)
        if _other_name(key) != own:
            run(f"ALTER TABLE `{key.table}` DROP FOREIGN KEY `{_other_name(key)}`, {key.sql(own)}")
    run("SET SESSION foreign_key_checks = 1")


def remove_leftovers(connection: Connection) -> list[str]:
    """Drop what a restore that was cut off has left beside the tables; return the names."""
    if capabilities(connection).kind != "mariadb":
        return []
    ours = {prefix + table.name for table in metadata.sorted_tables for prefix in (_FRESH, _OLD)}
    names = sorted(ours & set(inspect(connection).get_table_names()))
    if names:
        connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
        connection.exec_driver_sql(f"DROP TABLE {', '.join(f'`{n}`' for n in names)}")
        connection.exec_driver_sql("SET SESSION foreign_key_checks = 1")
    return names
