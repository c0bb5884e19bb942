"""The library's turn (save user, load 20, save assistant) beside the same turn in the stores of three agent frameworks.

Each is installed into a throw-away environment of its own, which is gone afterwards; nothing of it becomes part of the
product. One that cannot be installed, or does not run, is NOT MEASURED. All write to SQLite files on one disk, by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.library import ANSWER, QUESTION, ours, seconds_each
from feishu_bot.ai.conversation_store import PersistentConversationManager

TURNS: Final = 100
ROUNDS: Final = 3
INSTALL_S: Final = 900
TURN_S: Final = 300

_MEASURE = f"""
import asyncio, json, sys, time
from pathlib import Path
QUESTION, ANSWER, TURNS = {QUESTION!r}, {ANSWER!r}, {TURNS}
path = Path(sys.argv[1])

async def measured(turn):
    for _ in range(10):
        await turn()
    start = time.perf_counter()
    for _ in range(TURNS):
        await turn()
    print(json.dumps((time.perf_counter() - start) / TURNS))
"""


class Peer(NamedTuple):
    """A framework: what to install, and a program that measures its store."""

    name: str
    requirements: tuple[str, ...]
    program: str


PEERS: Final = (
    Peer(
        "OpenAI Agents SDK, SQLiteSession",
        ("openai-agents",),
        """
from agents import SQLiteSession
session = SQLiteSession("bench", str(path))

async def turn():
    await session.add_items([{"role": "user", "content": QUESTION}])
    await session.get_items(limit=20)
    await session.add_items([{"role": "assistant", "content": ANSWER}])

asyncio.run(measured(turn))
""",
    ),
    Peer(
        "LangChain, SQLChatMessageHistory",
        ("langchain-community", "sqlalchemy[asyncio]"),
        """
from langchain_community.chat_message_histories import SQLChatMessageHistory
history = SQLChatMessageHistory(session_id="bench", connection=f"sqlite:///{path}")

async def turn():
    history.add_user_message(QUESTION)
    history.messages[-20:]
    history.add_ai_message(ANSWER)

asyncio.run(measured(turn))
""",
    ),
    Peer(
        "Google ADK, DatabaseSessionService",
        ("google-adk", "aiosqlite", "sqlalchemy[asyncio]"),
        """
from google.adk.events import Event
from google.adk.sessions import DatabaseSessionService
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types

async def main():
    service = DatabaseSessionService(db_url=f"sqlite+aiosqlite:///{path}")
    session = await service.create_session(app_name="bench", user_id="ann")

    async def turn():
        nonlocal session
        await say("user", QUESTION)
        session = await service.get_session(
            app_name="bench", user_id="ann", session_id=session.id, config=GetSessionConfig(num_recent_events=20)
        )
        await say("model", ANSWER)

    async def say(role, words):
        content = types.Content(role=role, parts=[types.Part(text=words)])
        await service.append_event(session, Event(author=role, content=content))

    await measured(turn)

asyncio.run(main())
""",
    ),
)


def main(argv: list[str] | None = None) -> None:
    """Run the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        for peer in PEERS:
            _beside(peer, Path(name), arguments.rounds)


def _beside(peer: Peer, folder: Path, rounds: int) -> None:
    """Measure one peer and the library by turns, so that both meet the same disk."""
    python = install(peer.name, peer.requirements, folder)
    if python is None:
        return
    rows = []
    for number in range(rounds):
        theirs = _run(peer, python, folder / f"{number}-{peer.requirements[0]}.db")
        if theirs is None:
            return
        with PersistentConversationManager(f"sqlite:///{folder / f'{number}-own.db'}") as manager:
            turn = ours(manager, manager.get_or_create("bench:private:turn", "bench").id)
            seconds_each(turn, 10)
            rows.append((seconds_each(turn, TURNS), theirs))
    mine, theirs = (statistics.median(row[n] for row in rows) * 1000 for n in (0, 1))
    ratio = statistics.median(their / my for my, their in rows)
    sys.stdout.write(
        f"{peer.name}: {theirs:.2f} ms a turn, the library beside it {mine:.2f} ms, {ratio:.1f} times as long\n"
    )
    sys.stdout.flush()


def install(name: str, requirements: tuple[str, ...], folder: Path) -> Path | None:
    """Return the Python of an environment with these packages, None (and said so) if it cannot be made."""
    environment = folder / requirements[0].partition("[")[0]
    python = environment / "bin" / "python"
    steps = (
        [sys.executable, "-m", "venv", str(environment)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
    )
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True, check=False, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            return _not_measured(name, f"not installed within {INSTALL_S} s")
        if done.returncode:
            return _not_measured(name, f"not installed: {_last_line(done.stderr)}")
    return python


def _run(peer: Peer, python: Path, file: Path) -> float | None:
    try:
        done = subprocess.run(
            [str(python), "-c", _MEASURE + peer.program, str(file)],
            capture_output=True,
            text=True,
            check=False,
            timeout=TURN_S,
            cwd=file.parent,
        )
    except subprocess.TimeoutExpired:
        return _not_measured(peer.name, f"{TURNS} turns took more than {TURN_S} s")
    if done.returncode:
        return _not_measured(peer.name, _last_line(done.stderr))
    return float(json.loads(done.stdout.splitlines()[-1]))


def _not_measured(name: str, reason: str) -> None:
    sys.stdout.write(f"NOT MEASURED: {name} ({reason})\n")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "no reason given"


if __name__ == "__main__":
    main()
