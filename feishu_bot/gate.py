"""When the server says "later" before it acknowledges: too much waits, or the disk is nearly full."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from feishu_bot.config import ServerSettings
    from feishu_bot.store.leases import Depth
    from feishu_bot.store.store import Store

_DISK_S: Final = 5.0  # how often the disk is looked at
_MIB: Final = 1024 * 1024


class Gate:
    """Answers in a microsecond whether new messages can be taken."""

    def __init__(
        self,
        settings: ServerSettings,
        store: Store,
        *,
        depth: Callable[[], Depth | None],
        folder: Path | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._depth = depth
        self._folder = folder  # where the SQLite file lies; None for a database server
        self._monotonic = monotonic
        self._next_look = 0.0
        self._free_mb: float | None = None
        self.draining = False

    def configure(self, settings: ServerSettings) -> None:
        """Go on with other limits."""
        self._settings = settings

    def closed(self) -> str | None:
        """Return why nothing can be taken now, or None."""
        if self.draining:
            return "draining"
        problem = self._store.problem()
        if problem is not None:
            return problem
        depth = self._depth()
        if depth is not None and depth.waiting > self._settings.max_waiting:
            return f"{depth.waiting} messages wait (server.max_waiting is {self._settings.max_waiting})"
        free = self.free_mb()
        if free is not None and free < self._settings.min_free_mb:
            return f"{free:.0f} MB of disk are free (server.min_free_mb is {self._settings.min_free_mb})"
        return None

    def free_mb(self) -> float | None:
        """Return the free disk where the database lies, in MiB; None where that is not our concern."""
        if self._folder is None:
            return None
        now = self._monotonic()
        if now >= self._next_look:
            self._next_look = now + _DISK_S
            try:
                self._free_mb = shutil.disk_usage(self._folder).free / _MIB
            except OSError:  # the folder is gone or out of reach: writing will tell
                self._free_mb = None
        return self._free_mb

    def degraded(self, now_ms: int) -> list[str]:
        """Return what the operator should know although messages are still taken."""
        found = []
        depth = self._depth()
        if depth is not None and depth.oldest_at is not None:
            age_s = (now_ms - depth.oldest_at) / 1000
            if age_s > self._settings.max_waiting_age_s:
                found.append(f"the oldest message has waited {age_s:.0f} s")
        closed = self.closed()
        if closed is not None:
            found.append(closed)
        failing = self._store.failing()
        if failing is not None and failing != closed:
            found.append(f"the database could not be written: {failing}")
        return found
