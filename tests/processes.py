"""Other processes beside a test: copies of one that has imported the store already, a hundredth of a second each.

A function of a module runs in each, with a connection to the test as its first argument. What the function raises is
on stderr, and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "hypothesis.strategies",
        "sqlalchemy.dialects.mysql.pymysql",
        "sqlalchemy.dialects.postgresql.psycopg",
        "feishu_bot.ai.conversation_store",
        "tests.transact",
    ]
)


@dataclass
class Child:
    """A running process."""

    process: ForkServerProcess
    connection: Connection

    def heard(self) -> Any:
        """Return what it says next; EOFError if it has ended without a word."""
        return self.connection.recv()

    def ended(self) -> int:
        """Return its exit code once it has ended; negative: the signal."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


@contextlib.contextmanager
def started(function: Callable[..., None], *arguments: tuple[Any, ...]) -> Iterator[list[Child]]:
    """Run ``function(connection, *arguments)`` in a process for each tuple; they are killed at the end."""
    children = [_start(function, each) for each in arguments]
    try:
        yield children
    finally:
        for child in children:
            child.process.kill()
            child.process.join()
            child.process.close()
            child.connection.close()


def _start(function: Callable[..., None], arguments: tuple[Any, ...]) -> Child:
    ours, its = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=function, args=(its, *arguments), daemon=True)
    process.start()
    its.close()
    return Child(process, ours)


def all_at_once(children: list[Child]) -> None:
    """Wait until each has said that it is ready, then let all of them go on."""
    assert [child.heard() for child in children] == ["ready"] * len(children)
    for child in children:
        child.connection.send("go")


def wait_for_all(connection: Connection) -> None:
    """In a child: say that it is ready, and return when the test lets all go on."""
    connection.send("ready")
    assert connection.recv() == "go"
