"""Whose turn it is: lanes that are ready, taken from each chat in turn, and from no chat more than its share."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def chat_of(lane_key: str) -> str:
    """Return what shares a turn: all lanes of one group; any other lane is alone."""
    # in:account:type:chat:sender and thread:account:chat:thread; colons inside of the parts are escaped.
    return lane_key.rpartition(":")[0] if lane_key.startswith(("in:", "thread:")) else lane_key


class Turns:
    """Lanes in the order in which they are to be worked on.

    A group whose members all speak at once has a lane for each. Taken by age alone they would stand before
    everybody else's; so each chat gives one lane a round, and at most ``share`` of one chat's are at work at once.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._ready: dict[str, dict[str, None]] = {}  # chat -> its lanes, both in their order
        self._full: dict[str, dict[str, None]] = {}  # the same, of chats that have their share at work
        self._active: Counter[str] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        """Whether a lane could be taken now."""
        return bool(self._ready)

    def add(self, lane_key: str) -> bool:
        """Put a lane behind those that wait; False if it waits already."""
        chat = chat_of(lane_key)
        where = self._full if self._active.get(chat, 0) >= self._share else self._ready
        waiting = where.setdefault(chat, {})
        if lane_key in waiting:
            return False
        waiting[lane_key] = None
        self._count += 1
        return True

    def take(self, most: int) -> list[str]:
        """Take lanes out, one of each chat in turn. Each counts as at work until ``done`` is told."""
        taken: list[str] = []
        while self._ready and len(taken) < most:
            chat = next(iter(self._ready))
            waiting = self._ready.pop(chat)
            lane = next(iter(waiting))
            del waiting[lane]
            taken.append(lane)
            self._active[chat] += 1
            if not waiting:
                continue
            where = self._full if self._active[chat] >= self._share else self._ready
            where[chat] = waiting
        self._count -= len(taken)
        return taken

    def done(self, lane_keys: Iterable[str]) -> None:
        """Say that lanes that were taken are no longer at work."""
        for lane in lane_keys:
            chat = chat_of(lane)
            self._active[chat] -= 1
            if not self._active[chat]:
                del self._active[chat]
            waiting = self._full.pop(chat, None)
            if waiting is not None:
                self._ready[chat] = waiting
