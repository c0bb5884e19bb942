"""Starts servers from a process that has imported the program already: a tenth of a second each, not seven.

Orders come on stdin, one JSON object a line: ``program`` (one of PROGRAMS), ``arguments``, ``folder``,
``reads``, the file it reads, and ``log`` and ``errors``, the files that get what it writes. The child's pid is printed; when it has ended, the file
``<log>.exit`` holds its exit code (negative: the signal). All children end with this process.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import argon2
import jinja2
import markdown_it
import nh3
import sqlalchemy.dialects.mysql.pymysql
import sqlalchemy.dialects.postgresql.psycopg

import feishu_bot.app
from feishu_bot import cli
from feishu_bot.ai.tokens import warm
from feishu_bot.platforms.base import platform_types
from tests.e2e import crashing_server
from tests.operation import shifted_server

# What a server imports only when it needs it: here it is there already.
LATER = (
    argon2,
    jinja2,
    markdown_it,
    nh3,
    sqlalchemy.dialects.mysql.pymysql,
    sqlalchemy.dialects.postgresql.psycopg,
)
PROGRAMS = {
    "bot": cli.main,
    "crashing_server": crashing_server.main,
    "shifted_server": shifted_server.main,
}


class Nursery:
    """The parent: forks, and writes down how each child ended."""

    def __init__(self) -> None:
        self._logs: dict[int, str] = {}

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, self._reap)
        while order := sys.stdin.readline():
            # A child that ends at once is reaped only when its log is known.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            wanted = json.loads(order)
            pid = os.fork()
            if pid == 0:
                _become(wanted)
            self._logs[pid] = wanted["log"]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            sys.stdout.write(f"{pid}\n")
            sys.stdout.flush()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pid in self._logs:
            os.kill(pid, signal.SIGKILL)

    def _reap(self, *_: object) -> None:
        while self._logs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            path = Path(self._logs.pop(pid) + ".exit")
            path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
            path.with_suffix(".new").rename(path)


def _become(wanted: dict[str, object]) -> NoReturn:
    """Be the server from here on."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.setsid()
    os.chdir(str(wanted["folder"]))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(str(wanted["reads"]), os.O_RDONLY), 0)
    os.dup2(os.open(str(wanted["log"]), flags), 1)
    os.dup2(os.open(str(wanted["errors"]), flags), 2)
    sys.argv = [str(wanted["program"]), *wanted["arguments"]]  # type: ignore[misc]
    code = 0
    try:
        PROGRAMS[str(wanted["program"])]()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End as the interpreter ends: threads are waited for, and what nobody has closed is complained about.

    But without taking all modules apart, which takes several times as long as a server's start.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    assert feishu_bot.app.App
    platform_types()
    warm("echo")
    gc.collect()
    gc.freeze()  # what is here already is no child's to look through, nor a reason to copy its memory
    Nursery().run()
