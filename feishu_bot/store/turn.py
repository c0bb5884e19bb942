"""Whose turn it is to write to a SQLite file: processes stand in line instead of looking in now and then.

SQLite itself sleeps longer and longer while another process writes, up to a tenth of a second. With several that write
all the time the file is at rest for most of it, and who has just written writes again before those who sleep: of four
processes one then waited for nearly a second. Waiting for a lock of the kernel's, each is woken when its turn comes.

It is an aid, no guarantee: that only one writes is SQLite's own affair, and whoever does not stand in line (a command,
the library, a system without such locks) waits as SQLite does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

try:
    import fcntl
except ModuleNotFoundError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy import Engine

SUFFIX = "-turn"  # of the file beside the database; empty, and no harm is done when it is removed


class Turn:
    """Entered, it is this thread's turn to write. A process that dies gives its turn up."""

    def __init__(self, engine: Engine) -> None:
        name = engine.url.database
        is_file = engine.dialect.name == "sqlite" and name and not name.startswith((":", "file:"))
        self._path = f"{name}{SUFFIX}" if is_file and fcntl is not None else None
        self._fd: int | None = None

    def __enter__(self) -> None:
        if self._path is None:
            return
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError:  # no room for it, or a file system without locks
            self.close()
            self._path = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Stand in no line any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
