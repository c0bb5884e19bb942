"""A library turn (save user, load 20, save assistant) beside plain ``sqlite3`` doing the same with a commit each.

Then the same turn in a conversation of 100,000 messages, and how long 20 messages of history take.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import make_url

from benchmarks.databases import local_postgresql
from benchmarks.verdict import show
from feishu_bot.ai.conversation_store import PersistentConversationManager
from feishu_bot.store import conversations
from feishu_bot.store.history import HistoryCache, Known, load_tails
from feishu_bot.store.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.store.work import Transaction

FLOOR, GOAL = 4.0, 2.5
LONG_FLOOR, LONG_GOAL = 1.5, 1.15
TURNS = 300
LONG = 100_000
QUESTION, ANSWER = "今天的天气怎么样？ What about tomorrow?", "晴，气温二十五度。 Sunny, 25 degrees." * 4


def plain(path: Path) -> Callable[[], None]:
    """Return a turn in plain sqlite3 with the same durability: WAL, synchronous=FULL, a commit each."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE conversations (id INTEGER PRIMARY KEY, count INTEGER, tokens INTEGER)")
    database.execute(
        "CREATE TABLE messages (id INTEGER PRIMARY KEY, conversation_id INTEGER, role TEXT, content TEXT, "
        "tokens INTEGER, timestamp TEXT)"
    )
    database.execute("CREATE INDEX by_conversation ON messages (conversation_id, id)")
    database.execute("INSERT INTO conversations VALUES (1, 0, 0)")

    def save(role: str, content: str, tokens: int) -> None:
        database.execute("BEGIN IMMEDIATE")
        database.execute(
            "INSERT INTO messages (conversation_id, role, content, tokens, timestamp) VALUES (1, ?, ?, ?, ?)",
            (role, content, tokens, "2026-01-01 00:00:00"),
        )
        database.execute(
            "UPDATE conversations SET count = count + 1, tokens = tokens + ? WHERE id = 1", (tokens,)
        )
        database.execute("COMMIT")

    def turn() -> None:
        save("user", QUESTION, 15)
        database.execute(
            "SELECT role, content, tokens, timestamp FROM messages WHERE conversation_id = 1 ORDER BY id DESC LIMIT 20"
        ).fetchall()
        save("assistant", ANSWER, 60)

    return turn


def ours(manager: PersistentConversationManager, conversation_id: int) -> Callable[[], None]:
    """Return a turn through the library."""

    def turn() -> None:
        manager.save_message(conversation_id, "user", QUESTION, tokens=15)
        manager.load_history(conversation_id, max_turns=10)
        manager.save_message(conversation_id, "assistant", ANSWER, tokens=60)

    return turn


def seconds_each(turn: Callable[[], object], turns: int) -> float:
    """Return the mean time of a turn in seconds."""
    start = time.perf_counter()
    for _ in range(turns):
        turn()
    return (time.perf_counter() - start) / turns


def _fill(manager: PersistentConversationManager, conversation_id: int, count: int) -> None:
    piece = [
        {"role": role, "content": text, "tokens": 10}
        for role, text in (("user", QUESTION), ("assistant", ANSWER)) * 500
    ]
    for done in range(0, count, len(piece)):
        manager.save_messages(conversation_id, piece)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r  {done} of {count} messages")
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def main(argv: list[str] | None = None) -> None:
    """Run the figures, on SQLite and on a PostgreSQL of this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--db-url", default=None, help="only this empty database")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure(arguments.db_url or f"sqlite:///{folder / 'library.db'}", folder, arguments.runs)
        if arguments.db_url is None:
            with local_postgresql("feishu_bot_library") as db_url:
                if db_url is None:
                    sys.stdout.write("NOT MEASURED: PostgreSQL (no server on 127.0.0.1:5432 takes us)\n")
                else:
                    measure(db_url, folder, arguments.runs)


def measure(db_url: str, folder: Path, runs: int) -> None:
    """Print the figures of one database."""
    kind = make_url(db_url).get_backend_name()
    with PersistentConversationManager(db_url=db_url) as manager:
        short = manager.get_or_create("bench:private:short", "bench").id
        long = manager.get_or_create("bench:private:long", "bench").id
        turn = ours(manager, short)
        seconds_each(turn, 20)
        plain_turn = plain(folder / f"plain-{kind}.db")
        # In turn, so that both meet the same disk.
        rows = [(seconds_each(turn, TURNS), seconds_each(plain_turn, TURNS)) for _ in range(runs)]
        raw = f"{_median_ms(rows, 0):.2f} ms and {_median_ms(rows, 1):.2f} ms"
        ratios = [own / theirs for own, theirs in rows]
        if kind == "sqlite":
            _show("library turn / plain sqlite3", ratios, FLOOR, GOAL, raw)
        else:  # another process answers over a socket: no floor
            sys.stdout.write(f"{kind}: library turn and plain sqlite3: {raw}\n")
        _fill(manager, long, LONG)
        long_turn = ours(manager, long)
        seconds_each(long_turn, 20)
        rows = [(seconds_each(long_turn, TURNS), seconds_each(turn, TURNS)) for _ in range(runs)]
        _show(
            f"{kind}: turn with {LONG} messages in the conversation / in a short one",
            [grown / alone for grown, alone in rows],
            LONG_FLOOR,
            LONG_GOAL,
            f"{_median_ms(rows, 0):.2f} ms and {_median_ms(rows, 1):.2f} ms",
        )
        history = seconds_each(lambda: manager.load_history(long, max_turns=10), TURNS) * 1000
        show(f"{kind}: 20 messages of history from the database", history, 10, 2, "ms")
        _cached(db_url, long)
        start = time.perf_counter()
        manager.clear_conversation(long)
        sys.stdout.write(f"{kind}: {LONG} messages cleared in {time.perf_counter() - start:.1f} s\n")


def _cached(db_url: str, conversation_id: int) -> None:
    """Print how long the server's cache takes, with the look at whether it is current."""
    database, cache = Transactions(db_url), HistoryCache()
    try:
        row = database.read(lambda tx: conversations.get(tx, conversation_id))
        state = Known(row["id"], row["version"], row["last_seq"])

        def load(tx: Transaction) -> None:
            found = load_tails(tx, [state], turns=10, cache=cache)[conversation_id]
            for callback in tx.after_commit:
                callback()
            assert len(found) >= 20  # what the figure is about

        database.read(load)
        database.read(
            lambda tx: show(
                "20 messages of history from the cache",
                seconds_each(lambda: load(tx), TURNS) * 1000,
                1,
                0.1,
                "ms",
            )
        )
    finally:
        database.close()


def _median_ms(rows: list[tuple[float, float]], column: int) -> float:
    return statistics.median(row[column] for row in rows) * 1000


def _show(what: str, ratios: list[float], floor: float, goal: float, raw: str) -> None:
    spread = f"spread {min(ratios):.2f}–{max(ratios):.2f}"
    show(what, statistics.median(ratios), floor, goal, "", raw=f"{spread}; {raw}")


if __name__ == "__main__":
    main()
