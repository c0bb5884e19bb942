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

from benchmarks.verdict import verdict
from feishu_bot.ai.conversation_store import PersistentConversationManager

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """Run the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--db-url", default=None, help="another empty database instead of SQLite")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        db_url = arguments.db_url or f"sqlite:///{folder / 'library.db'}"
        with PersistentConversationManager(db_url=db_url) as manager:
            short = manager.get_or_create("bench:private:short", "bench").id
            long = manager.get_or_create("bench:private:long", "bench").id
            turn, plain_turn = ours(manager, short), plain(folder / "plain.db")
            ratios, rows = [], []
            for _ in range(arguments.runs):  # in turn, so that both meet the same disk
                rows.append((seconds_each(turn, TURNS), seconds_each(plain_turn, TURNS)))
                ratios.append(rows[-1][0] / rows[-1][1])
            ratio = statistics.median(ratios)
            sys.stdout.write(
                f"  library {statistics.median(r[0] for r in rows) * 1000:.2f} ms, plain sqlite3 "
                f"{statistics.median(r[1] for r in rows) * 1000:.2f} ms a turn\n"
                f"library turn / plain sqlite3: {ratio:.2f} (floor {FLOOR}, goal {GOAL}; spread "
                f"{min(ratios):.2f}–{max(ratios):.2f}): {verdict(ratio, FLOOR, GOAL)}\n"
            )
            _fill(manager, long, LONG)
            long_turn = ours(manager, long)
            pairs = [
                seconds_each(long_turn, TURNS) / seconds_each(turn, TURNS) for _ in range(arguments.runs)
            ]
            grown = statistics.median(pairs)
            sys.stdout.write(
                f"turn with {LONG} messages in the conversation / in a short one: {grown:.2f} (floor {LONG_FLOOR}, "
                f"goal {LONG_GOAL}): {verdict(grown, LONG_FLOOR, LONG_GOAL)}\n"
            )
            history = seconds_each(lambda: manager.load_history(long, max_turns=10), TURNS) * 1000
            sys.stdout.write(
                f"20 messages of history from the database: {history:.2f} ms (floor 10, goal 2): "
                f"{verdict(history, 10, 2)}\n"
            )
            statistics_ms = seconds_each(manager.get_stats, 20) * 1000
            sys.stdout.write(f"get_stats() with {LONG} messages: {statistics_ms:.2f} ms\n")


if __name__ == "__main__":
    main()
