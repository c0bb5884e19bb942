"""What a database holds and whether it is right: sizes, and everything that can be computed twice compared."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Select, and_, case, func, inspect, or_, select
from sqlalchemy.exc import OperationalError

from feishu_bot.errors import StoreUnavailable
from feishu_bot.model import End
from feishu_bot.store import migrations, sums
from feishu_bot.store.engine import capabilities, database_now_ms, open_engine
from feishu_bot.store.schema import (
    NOT_CLEARED,
    OPEN,
    SEARCH_TABLE,
    UNSENT,
    budget_windows,
    conversations,
    inbox,
    lanes,
    messages,
    metadata,
    outbox,
    reservations,
    totals,
)
from feishu_bot.store.shadow import remove_leftovers
from feishu_bot.store.snapshot import driver_errors, one_instant, sqlite_path
from feishu_bot.store.work import LEASE_MS, Amounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Engine

    from feishu_bot.store.work import WindowKey

_SHOWN = 5  # examples of what is wrong
_ENDS = [end.value for end in End]


@contextmanager
def _opened(db_url: str) -> Iterator[Engine]:
    engine = open_engine(db_url, patient=True)
    try:
        yield engine
    finally:
        engine.dispose()


# ------------------------------------------------------------------------------------------------------ check


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``wrong`` is empty, or says in a sentence what is not right."""

    name: str
    wrong: str = ""


def check(db_url: str, told: Callable[[Finding], None] | None = None) -> list[Finding]:
    """Compare everything that can be computed twice, as it is at one instant; writers do not wait.

    ``told`` gets each finding as soon as it is known. Raises StoreUnavailable, SchemaMismatch.
    """
    found: list[Finding] = []
    with _opened(db_url) as engine:
        with one_instant(engine):
            pass  # there is a database
        migrations.check(engine)
        with one_instant(engine) as connection:
            for name, look in _CHECKS.items():
                found.append(Finding(name, look(connection)))
                if told is not None:
                    told(found[-1])
    return found


def _storage(connection: Connection) -> str:
    """Ask the database itself."""
    kind, run = capabilities(connection).kind, connection.exec_driver_sql
    if kind == "sqlite":
        said = list(run(f"PRAGMA integrity_check({_SHOWN})").scalars())
        return "" if said == ["ok"] else "the file is damaged: " + "; ".join(said)
    if kind == "mariadb":
        names = ", ".join(f"`{table.name}`" for table in metadata.sorted_tables)
        rows = run(f"CHECK TABLE {names}").all()
        return "; ".join(f"{r[0]}: {r[3]}" for r in rows if r[2] in {"error", "Error"})
    invalid = run(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE NOT i.indisvalid"
    )
    broken = [f"index {name} is not valid" for name in invalid.scalars()]
    statement = "SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()"
    failures = run(statement).scalar() or 0
    return "; ".join([*broken, *([f"{failures} pages with a wrong checksum"] if failures else [])])


def _some(connection: Connection, statement: Select[Any], what: str) -> str:
    """Return how many rows a statement finds, and some of them; the first column is what they are called by."""
    count = connection.execute(select(func.count()).select_from(statement.subquery())).scalar_one()
    if not count:
        return ""
    rows = connection.execute(statement.limit(_SHOWN)).all()
    more = ", …" if count > _SHOWN else ""
    return f"{count} {what}: {', '.join(' '.join(str(v) for v in row) for row in rows)}{more}"


def _references(connection: Connection) -> str:
    statement = (
        select(messages.c.id)
        .select_from(messages.outerjoin(conversations, conversations.c.id == messages.c.conversation_id))
        .where(conversations.c.id.is_(None))
        .order_by(messages.c.id)
    )
    return _some(connection, statement, "messages without a conversation")


def _counters(connection: Connection) -> str:
    """Compare what a conversation says of its messages; one that is being removed says nothing."""
    m, c = messages.c, conversations.c
    said = (
        select(
            m.conversation_id,
            func.count().label("present"),
            func.max(m.seq).label("seq"),
            func.sum(m.tokens).label("tokens"),
        )
        .join_from(messages, conversations, c.id == m.conversation_id)
        .where(NOT_CLEARED)
        .group_by(m.conversation_id)
        .subquery()
    )
    present, seq, tokens = (func.coalesce(said.c[name], 0) for name in ("present", "seq", "tokens"))
    differs = or_(c.message_count != present, c.last_seq < seq, c.total_tokens < tokens)
    statement = (
        select(c.id)
        .select_from(conversations.outerjoin(said, said.c.conversation_id == c.id))
        .where(c.hidden_at.is_(None), differs)
        .order_by(c.id)
    )
    return _some(connection, statement, "conversations count other messages or tokens than they have")


def _ends(connection: Connection) -> str:
    """Compare accepted with the five ends and what is open: rows + removed = ends + open, for each account."""
    rows = select(
        inbox.c.account,
        func.count().label("present"),
        func.sum(case((inbox.c.state == OPEN, 1), else_=0)).label("open"),
    ).group_by(inbox.c.account)
    counted = select(
        totals.c.account,
        func.sum(case((totals.c.end.in_(_ENDS), totals.c.count), else_=0)).label("ended"),
        func.sum(case((totals.c.end == "removed", totals.c.count), else_=0)).label("removed"),
    ).group_by(totals.c.account)
    here = {r.account: (int(r.present), int(r.open)) for r in connection.execute(rows)}
    told = {r.account: (int(r.ended), int(r.removed)) for r in connection.execute(counted)}
    wrong = []
    for account in sorted(here.keys() | told.keys()):
        present, still_open = here.get(account, (0, 0))
        ended, removed = told.get(account, (0, 0))
        if present + removed != ended + still_open:
            wrong.append(
                f"{account}: {present} messages and {removed} removed, but {ended} ended and {still_open} open"
            )
    return "; ".join(wrong)


def _reservations(connection: Connection) -> str:
    statement = (
        select(reservations.c.inbox_id)
        .select_from(reservations.outerjoin(inbox, inbox.c.id == reservations.c.inbox_id))
        .where(or_(inbox.c.id.is_(None), inbox.c.state != OPEN))
        .order_by(reservations.c.inbox_id)
    )
    return _some(connection, statement, "reservations whose message is not open")


def _budgets(connection: Connection) -> str:
    """Compare what budget windows say is reserved with the reservations."""
    r, w = reservations.c, budget_windows.c
    held: dict[WindowKey, Amounts] = {}
    for row in connection.execute(select(r.tokens, r.micro_usd, r.windows)):
        for window in orjson.loads(row.windows):
            key = (window[0], window[1], window[2])
            held[key] = held.get(key, Amounts()) + Amounts(row.tokens, 1, row.micro_usd or 0)
    reserved = (w.reserved, w.reserved_requests, w.reserved_micro_usd)
    said = {
        (row.budget, row.key, row.window_start): Amounts(*tuple(row)[3:])
        for row in connection.execute(
            select(w.budget, w.key, w.window_start, *reserved).where(
                or_(*(column != 0 for column in reserved))
            )
        )
    }
    nothing = Amounts()
    wrong = [
        key for key in sorted(held.keys() | said.keys()) if held.get(key, nothing) != said.get(key, nothing)
    ]
    shown = [
        f"{key[0]} of {key[1]}: {_differing(said.get(key, nothing), held.get(key, nothing))}"
        for key in wrong[:_SHOWN]
    ]
    return f"{len(wrong)} budget windows have wrong reservations: {'; '.join(shown)}" if wrong else ""


def _differing(said: Amounts, held: Amounts) -> str:
    """Return the first amounts that differ, with their unit."""
    units = ("tokens", "calls", "millionths of a dollar")
    return next(
        f"{one} instead of {other} {unit}"
        for one, other, unit in zip(said, held, units, strict=True)
        if one != other
    )


def _sums(connection: Connection) -> str:
    """Compare the sums of the ledger with its rows."""
    wrong = sorted(sums.differences(connection, capabilities(connection).kind))
    return f"{len(wrong)} sums are not those of the ledger: {'; '.join(wrong[:_SHOWN])}" if wrong else ""


def _lanes(connection: Connection) -> str:
    """Look for messages and replies that nobody would ever take up."""
    waiting = (
        select(inbox.c.lane_key)
        .select_from(inbox.outerjoin(lanes, lanes.c.key == inbox.c.lane_key))
        .where(inbox.c.state == OPEN, or_(lanes.c.key.is_(None), lanes.c.ready_at.is_(None)))
        .distinct()
    )
    unsent = (
        select(outbox.c.lane_key)
        .select_from(outbox.outerjoin(lanes, lanes.c.key == outbox.c.lane_key))
        .where(outbox.c.state.in_(UNSENT), or_(lanes.c.key.is_(None), lanes.c.send_ready_at.is_(None)))
        .distinct()
    )
    found = (
        _some(connection, waiting, "lanes with open messages that are not ready"),
        _some(connection, unsent, "lanes with unsent replies that are not ready"),
    )
    return "; ".join(sentence for sentence in found if sentence)


def _leases(connection: Connection) -> str:
    latest = database_now_ms(connection) + 2 * LEASE_MS
    statement = (
        select(lanes.c.key)
        .where(
            or_(
                and_(lanes.c.lease_token.is_not(None), lanes.c.lease_until > latest),
                and_(lanes.c.send_token.is_not(None), lanes.c.send_until > latest),
            )
        )
        .order_by(lanes.c.key)
    )
    return _some(connection, statement, "lanes with a lease that ends later than any lease can")


_CHECKS: dict[str, Callable[[Connection], str]] = {
    "storage": _storage,
    "references": _references,
    "counters": _counters,
    "ends": _ends,
    "reservations": _reservations,
    "budgets": _budgets,
    "sums": _sums,
    "lanes": _lanes,
    "leases": _leases,
}


# ------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True, slots=True)
class TableSize:
    """Rows of a table, and its bytes with all its indexes; None where the database does not say."""

    name: str
    rows: int
    size: int | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """A database in numbers. ``free``: bytes that a vacuum gives back at least, ``log``: the write-ahead log's."""

    kind: str
    schema: str
    size: int
    free: int | None
    log: int | None
    tables: list[TableSize]


def sizes(db_url: str) -> Sizes:
    """Return rows and bytes of each table. Raises StoreUnavailable, also for a database without tables."""
    with _opened(db_url) as engine:
        with one_instant(engine) as connection:
            version = migrations.current_version(connection)
            if version is None:
                raise StoreUnavailable("the database has no tables; `bot.py db upgrade` makes them")
            kind = capabilities(connection).kind
            existing = set(inspect(connection).get_table_names())
            names = [str(table.name) for table in metadata.sorted_tables if table.name in existing]
            bytes_of = _BYTES[kind](connection)
            quote = connection.dialect.identifier_preparer.quote_identifier
            rows = {
                name: connection.exec_driver_sql(f"SELECT count(*) FROM {quote(name)}").scalar_one()
                for name in names
            }
            size, free = _WHOLE[kind](connection)
        log = None
        path = sqlite_path(engine)
        if path is not None:
            beside = path.with_name(path.name + "-wal")
            log = beside.stat().st_size if beside.exists() else 0
        tables = [TableSize(name, rows[name], bytes_of.get(name)) for name in names]
        return Sizes(kind, version, size, free, log, tables)


def _bytes_sqlite(connection: Connection) -> dict[str, int]:
    run = connection.exec_driver_sql
    try:
        pages = run("SELECT name, pgsize FROM dbstat WHERE aggregate = TRUE").all()
    except OperationalError:  # SQLite can be built without it
        return {}
    table_of = {r.name: r.tbl_name for r in run("SELECT name, tbl_name FROM sqlite_master")}
    found: dict[str, int] = {}
    for name, size in pages:
        table = table_of.get(name, name)
        # The tables of the full-text index belong to the messages, as its column does elsewhere.
        table = str(messages.name) if table.startswith(SEARCH_TABLE) else table
        found[table] = found.get(table, 0) + size
    return found


def _bytes_postgresql(connection: Connection) -> dict[str, int]:
    statement = "SELECT relname, pg_total_relation_size(oid) FROM pg_class WHERE relkind = 'r' AND pg_table_is_visible(oid)"
    return {name: int(size) for name, size in connection.exec_driver_sql(statement)}


def _bytes_mariadb(connection: Connection) -> dict[str, int]:
    statement = (
        "SELECT table_name, data_length + index_length FROM information_schema.tables "
        "WHERE table_schema = DATABASE() AND data_length IS NOT NULL"
    )
    return {name: int(size) for name, size in connection.exec_driver_sql(statement)}


def _whole_sqlite(connection: Connection) -> tuple[int, int | None]:
    size, pages, free = (
        int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
        for name in ("page_size", "page_count", "freelist_count")
    )
    return size * pages, size * free


def _whole_postgresql(connection: Connection) -> tuple[int, int | None]:
    return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()), None


def _whole_mariadb(connection: Connection) -> tuple[int, int | None]:
    statement = (
        "SELECT sum(data_length + index_length), sum(data_free) FROM information_schema.tables "
        "WHERE table_schema = DATABASE()"
    )
    size, free = connection.exec_driver_sql(statement).one()
    return int(size or 0), int(free or 0)


_BYTES = {"sqlite": _bytes_sqlite, "postgresql": _bytes_postgresql, "mariadb": _bytes_mariadb}
_WHOLE = {"sqlite": _whole_sqlite, "postgresql": _whole_postgresql, "mariadb": _whole_mariadb}


# ----------------------------------------------------------------------------------------------------- vacuum


def vacuum(db_url: str, told: Callable[[str], None] | None = None) -> tuple[int, int]:
    """Give the space of removed rows back and return the size in bytes before and after.

    On SQLite and MariaDB writers wait meanwhile; SQLite needs as much room again. ``told`` gets what is done next.
    Raises StoreUnavailable.
    """
    with _opened(db_url) as engine, driver_errors():
        with one_instant(engine) as connection:
            kind = capabilities(connection).kind
            before, _ = _WHOLE[kind](connection)
            existing = set(inspect(connection).get_table_names())
        names = [str(table.name) for table in metadata.sorted_tables if table.name in existing]
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            driver: Any = connection.connection.driver_connection  # SQLite: no BEGIN may be sent before
            for step in _vacuum_steps(connection, kind, names):
                if told is not None:
                    told(step)
                with closing(driver.cursor()) as cursor:
                    cursor.execute(step)
        with one_instant(engine) as connection:
            after, _ = _WHOLE[kind](connection)
        return before, after


def _vacuum_steps(connection: Connection, kind: str, names: list[str]) -> list[str]:
    if kind == "sqlite":
        return ["VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA optimize"]
    quote = connection.dialect.identifier_preparer.quote_identifier
    if kind == "postgresql":
        return [f"VACUUM (ANALYZE) {quote(name)}" for name in names]
    with migrations.alone(connection):  # a restore may be at work, or have been cut off
        remove_leftovers(connection)
    return [f"OPTIMIZE TABLE {quote(name)}" for name in names]
