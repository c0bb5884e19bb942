"""What everyday calls take with 10 million messages in the database, made once under ``data/bench``.

SQLite, and PostgreSQL too where a server answers on this machine: there a database ``feishu_bot_scale_N`` stays. The
library's turn is measured beside the same turn in an empty database of the same kind; a query's time stands beside
one ``SELECT 1`` there and then.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from sqlalchemy import make_url, text

from benchmarks import population
from benchmarks.databases import create_database, empty, local_url
from benchmarks.durable_echo import echo_server, make_bodies
from benchmarks.library import ours, seconds_each
from benchmarks.load import write_requests
from benchmarks.processes import ROOT, run_load
from benchmarks.server import start_server
from benchmarks.verdict import show
from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.store import backup, ledger
from feishu_bot.store.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.population import Population

TURN_FLOOR, TURN_GOAL = 1.5, 1.15  # times the turn in an empty database
QUERY_FLOOR, QUERY_GOAL = 1.0, 0.2  # s
START_FLOOR, START_GOAL = 3.0, 1.5  # s
TURNS, ROUNDS = 25, 8  # for each run: short and by turns, so that both meet the same disk
BACKED_UP_AT_MOST = 1_000_000  # messages; more than that takes minutes and is asked for with --backup
REMOVED = 0.001  # of the conversations, by the cleanup
CLEANED = 0.1  # of the conversations, by the cleanup beside traffic; each run removes as many again
RATE, BESIDE_S = 100.0, 20.0  # messages per second offered beside cleanup and backup, and for how long
BESIDE_FLOOR, BESIDE_GOAL = 5.0, 2.0  # times the acknowledgement when quiet
_MAINTENANCE = """
ai: {{conversation_persistence: {{db_url: "{db_url}"}}}}
platforms: {{web: {{enabled: false}}}}
"""


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
        local = local_url(f"feishu_bot_scale_{arguments.messages}")
        if local is None:
            sys.stdout.write("NOT MEASURED: PostgreSQL (no server on 127.0.0.1:5432 takes us)\n")
        else:
            db_urls.append(local)
    for db_url in db_urls:
        measure(db_url, arguments)


def measure(db_url: str, arguments: argparse.Namespace) -> None:
    """Fill one database and print its figures."""
    kind = make_url(db_url).get_backend_name()
    if kind == "postgresql":
        create_database(db_url)
    start = time.perf_counter()
    people = population.make(db_url, arguments.messages)
    sys.stdout.write(
        f"{kind}: {people.count} messages, {people.conversations_of(people.groups)} conversations "
        f"(there after {time.perf_counter() - start:.0f} s)\n"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, empty(db_url, Path(name)) as empty_url:
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
    _beside_traffic(db_url, people, arguments.folder)
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
        days = _days_of(db_url, people, REMOVED)
        start = time.perf_counter()
        removed = manager.cleanup_old_conversations(days=days)
        seconds = time.perf_counter() - start
        gone = before["total_messages"] - manager.get_stats()["total_messages"]
    rate = f"{gone / seconds:.0f} messages/s" if removed else "nothing to remove"
    sys.stdout.write(f"cleanup: {removed} conversations, {gone} messages in {seconds:.1f} s, {rate}\n")


def _beside_traffic(db_url: str, people: Population, folder: Path) -> None:
    """Show how late messages are acknowledged while a cleanup, and a backup, are at work."""
    bodies = [make_bodies(int(RATE * BESIDE_S), f"{time.time_ns()}-{n}") for n in range(3)]
    with tempfile.TemporaryDirectory(dir=folder) as name, echo_server(Path(name), db_url) as (_, port, _):
        config, requests = Path(name, "maintenance.yaml"), Path(name, "requests")
        config.write_text(_MAINTENANCE.format(db_url=db_url), encoding="utf-8")
        days = _days_of(db_url, people, CLEANED)
        quiet = 0.0
        for what, order in (
            ("", None),
            (f"a cleanup of {CLEANED:.0%}", ["cleanup", "--days", str(days)]),
            ("a backup", ["backup", "--to", name]),
        ):
            write_requests(requests, "127.0.0.1", "/webhook/feishu", bodies.pop())
            arguments = (
                []
                if order is None
                else [sys.executable, str(ROOT / "bot.py"), *order, "--config", str(config)]
            )
            work = subprocess.Popen(arguments, stdout=subprocess.DEVNULL) if arguments else None
            late = run_load(requests, port, rate=RATE)["p99_ms"]
            if work is None:
                quiet = late
                continue
            lasted = "it went on for longer" if work.poll() is None else "it ended before"
            work.terminate()
            work.wait()
            show(
                f"acknowledgement p99 beside {what}, at {RATE:g} messages/s / when quiet",
                late / quiet,
                BESIDE_FLOOR,
                BESIDE_GOAL,
                "",
                raw=f"{late:.1f} ms and {quiet:.1f} ms; {lasted}",
            )


def _days_of(db_url: str, people: Population, part: float) -> int:
    """Return after how many days a part of the conversations is removed."""
    with PersistentConversationManager(db_url=db_url) as manager, manager.get_session() as session:
        statement = text(
            "SELECT last_activity FROM conversations ORDER BY last_activity LIMIT 1 OFFSET :most"
        )
        most = int(people.conversations_of(people.groups) * part)
        oldest = datetime.fromisoformat(str(session.execute(statement, {"most": most}).scalar_one()))
    return (datetime.now(UTC) - (oldest if oldest.tzinfo else oldest.replace(tzinfo=UTC))).days


def _backup(db_url: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        start = time.perf_counter()
        made, _ = backup.backup(db_url, Path(name), now=datetime.now(UTC), program="benchmark")
        seconds = time.perf_counter() - start
    sys.stdout.write(f"backup, read back: {made.size / 1e6:.0f} MB in {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
