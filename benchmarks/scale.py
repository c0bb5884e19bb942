"""What everyday calls take with 10 million messages in the database, made once under ``data/bench``.

SQLite, and PostgreSQL too where a server answers on this machine: there a database ``feishu_bot_scale_N`` stays. The
library's turn is measured beside the same turn in an empty database of the same kind; a query's time stands beside
one ``SELECT 1`` there and then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import psycopg
from sqlalchemy import make_url, text

from benchmarks import population
from benchmarks.library import ours, seconds_each
from benchmarks.processes import ROOT
from benchmarks.server import start_server
from benchmarks.verdict import show
from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.store import backup, ledger
from feishu_bot.store.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.population import Population

TURN_FLOOR, TURN_GOAL = 1.5, 1.15  # times the turn in an empty database
QUERY_FLOOR, QUERY_GOAL = 1.0, 0.2  # s
START_FLOOR, START_GOAL = 3.0, 1.5  # s
TURNS, ROUNDS = 25, 8  # for each run: short and by turns, so that both meet the same disk
BACKED_UP_AT_MOST = 1_000_000  # messages; more than that takes minutes and is asked for with --backup
REMOVED = 0.001  # of the conversations, by the cleanup
LOCAL_POSTGRESQL = "postgresql://postgres@127.0.0.1:5432/feishu_bot_scale_{count}"


def main(argv: list[str] | None = None) -> None:
    """Run the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "bench", help="for SQLite's file")
    parser.add_argument(
        "--db-url", default=None, help="only this database; it is made on its server, filled and kept"
    )
    parser.add_argument("--backup", action="store_true", help="make a backup too, however long it takes")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder.absolute() / f"scale-{arguments.messages}.db"
    db_urls = [arguments.db_url] if arguments.db_url else [f"sqlite:///{file}"]
    if arguments.db_url is None:
        local = LOCAL_POSTGRESQL.format(count=arguments.messages)
        if _answers(local):
            db_urls.append(local)
        else:
            sys.stdout.write(
                "NOT MEASURED: PostgreSQL (no server on 127.0.0.1:5432 takes the user postgres)\n"
            )
    for db_url in db_urls:
        measure(db_url, arguments)


def measure(db_url: str, arguments: argparse.Namespace) -> None:
    """Fill one database and print its figures."""
    kind = make_url(db_url).get_backend_name()
    if kind == "postgresql":
        _create_database(db_url)
    start = time.perf_counter()
    people = population.make(db_url, arguments.messages)
    sys.stdout.write(
        f"{kind}: {people.count} messages, {people.conversations_of(people.groups)} conversations "
        f"(there after {time.perf_counter() - start:.0f} s)\n"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, _empty(db_url, Path(name)) as empty_url:
        _turn(db_url, empty_url, arguments.runs)
        _queries(db_url, people, arguments.runs)
        starts = [start_server(Path(name), db_url)[0] for _ in range(3)]
        fresh = [start_server(Path(name), f"sqlite:///{name}/fresh.db")[0]]
    show(
        "ready to serve after start",
        statistics.median(starts),
        START_FLOOR,
        START_GOAL,
        "s",
        raw=f"spread {min(starts):.2f}–{max(starts):.2f}; on a fresh SQLite file {fresh[0]:.2f} s",
    )
    _cleanup(db_url, people)
    if arguments.backup or arguments.messages <= BACKED_UP_AT_MOST:
        _backup(db_url, arguments.folder)


def _turn(db_url: str, empty_url: str, runs: int) -> None:
    with (
        PersistentConversationManager(db_url=db_url) as big,
        PersistentConversationManager(db_url=empty_url) as empty,
    ):
        where = [
            (manager, manager.get_or_create("bench:private:turn", "bench").id) for manager in (big, empty)
        ]
        turns = [ours(manager, conversation_id) for manager, conversation_id in where]
        for turn in turns:
            seconds_each(turn, 20)
        rows = [(seconds_each(turns[0], TURNS), seconds_each(turns[1], TURNS)) for _ in range(runs * ROUNDS)]
        ratios = [full / alone for full, alone in rows]
        show(
            "library turn / in an empty database",
            statistics.median(ratios),
            TURN_FLOOR,
            TURN_GOAL,
            "",
            raw=f"spread {min(ratios):.2f}–{max(ratios):.2f}; {statistics.median(r[0] for r in rows) * 1000:.2f} ms "
            f"and {statistics.median(r[1] for r in rows) * 1000:.2f} ms",
        )
        for manager, conversation_id in where:
            manager.delete_conversation(conversation_id)


def _queries(db_url: str, people: Population, runs: int) -> None:
    month = people.end - timedelta(days=30)
    zone = ZoneInfo("Asia/Shanghai")
    database = Transactions(db_url)
    try:
        with PersistentConversationManager(db_url=db_url) as manager:
            read = database.read
            calls: list[tuple[str, Callable[[], object]]] = [
                ("get_stats()", manager.get_stats),
                ("usage", lambda: read(ledger.usage_total)),
                ("usage of 30 days", lambda: read(lambda tx: ledger.usage_total(tx, since=month))),
            ]
            calls += [
                (
                    f"usage of 30 days by {by}",
                    lambda by=by: read(lambda tx: ledger.usage_by(tx, by, zone, since=month, limit=1000)),  # type: ignore[misc]
                )
                for by in ("user", "day")
            ]
            calls.append(("usage by user", lambda: read(lambda tx: ledger.usage_by(tx, "user", zone))))
            calls += [
                (f"search, {what} ({word})", lambda word=word: manager.search_messages(word))  # type: ignore[misc]
                for what, word in (
                    ("a common word", population.COMMON_WORD),
                    ("a rare word", population.RARE_WORD),
                    ("two CJK characters", population.COMMON_PAIR),
                    ("one CJK character", population.COMMON_CHARACTER),
                )
            ]
            least = seconds_each(lambda: read(lambda tx: tx.connection.execute(text("SELECT 1")).all()), 100)
            for what, call in calls:
                times = [seconds_each(call, 1) for _ in range(runs)]
                show(
                    what,
                    statistics.median(times),
                    QUERY_FLOOR,
                    QUERY_GOAL,
                    "s",
                    raw=f"first {times[0]:.3f}, spread {min(times):.3f}–{max(times):.3f}; "
                    f"{statistics.median(times) / least:.0f} times SELECT 1",
                )
    finally:
        database.close()


def _cleanup(db_url: str, people: Population) -> None:
    """Remove the conversations that were idle longest, a bounded part of all, and show how quickly that goes."""
    with PersistentConversationManager(db_url=db_url) as manager:
        before = manager.get_stats()
        with manager.get_session() as session:
            most = int(people.conversations_of(people.groups) * REMOVED)
            instant = session.execute(
                text("SELECT last_activity FROM conversations ORDER BY last_activity LIMIT 1 OFFSET :most"),
                {"most": most},
            ).scalar_one()
        oldest = datetime.fromisoformat(str(instant))
        oldest = oldest if oldest.tzinfo else oldest.replace(tzinfo=UTC)
        days = (datetime.now(UTC) - oldest).days
        start = time.perf_counter()
        removed = manager.cleanup_old_conversations(days=days)
        seconds = time.perf_counter() - start
        gone = before["total_messages"] - manager.get_stats()["total_messages"]
    rate = f"{gone / seconds:.0f} messages/s" if removed else "nothing to remove"
    sys.stdout.write(f"cleanup: {removed} conversations, {gone} messages in {seconds:.1f} s, {rate}\n")


def _backup(db_url: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        start = time.perf_counter()
        made, _ = backup.backup(db_url, Path(name), now=datetime.now(UTC), program="benchmark")
        seconds = time.perf_counter() - start
    sys.stdout.write(f"backup, read back: {made.size / 1e6:.0f} MB in {seconds:.1f} s\n")


# --------------------------------------------------------------------------------------------- databases


@contextmanager
def _empty(db_url: str, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty database of the same kind, on the same disk, gone afterwards."""
    url = make_url(db_url)
    if url.get_backend_name() == "sqlite":
        yield f"sqlite:///{folder / 'empty.db'}"
        return
    name = f"{url.database}_empty"
    empty_url = url.set(database=name).render_as_string(hide_password=False)
    with _server(db_url) as server:
        server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
    _create_database(empty_url)
    try:
        yield empty_url
    finally:
        with _server(db_url) as server:
            server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())


def _create_database(db_url: str) -> None:
    """Make the database that the URL names where there is none."""
    name = make_url(db_url).database
    with _server(db_url) as server:
        if server.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            server.execute(f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'UTF8'".encode())


@contextmanager
def _server(db_url: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    url = make_url(db_url).set(drivername="postgresql", database="postgres")
    with psycopg.connect(
        url.render_as_string(hide_password=False), autocommit=True, connect_timeout=3
    ) as connection:
        yield connection


def _answers(db_url: str) -> bool:
    try:
        with _server(db_url):
            return True
    except psycopg.Error:
        return False


if __name__ == "__main__":
    main()
