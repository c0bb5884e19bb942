"""The other workers of this server on this machine: what they have counted, and whether they are still there.

Each writes a small file in a folder of the server's own, every second and whenever another one asks for it by a
socket there: whoever is asked for ``/metrics`` answers for all. What was shown once is in a file, so that no count
ever goes back, and a worker that hangs holds up nobody for long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

PUBLISH_S: Final = 1.0
ASK_S: Final = 0.5  # for all others to write what they have counted by now
SILENT_S: Final = 10.0  # a worker that has written nothing for so long is dead, or as good as that
_GONE: Final = "gone.json"  # what ended workers had counted


@dataclass(frozen=True, slots=True)
class Words:
    """What a worker wrote last, at an instant of the shared clock. ``counts`` are its metrics."""

    slot: int
    at: float
    counts: list[Any]


class Peers:
    """The view of one worker (``slot``), or of the supervisor, on ``count`` workers.

    ``clock`` gives seconds that are the same in all processes of the machine and never jump.
    """

    def __init__(
        self, folder: Path, count: int, slot: int = -1, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.slot = slot
        self.count = count
        self._folder = folder
        self._clock = clock
        self._counts: Callable[[], list[Any]] = list
        self._publisher: asyncio.Task[None] | None = None
        self._server: asyncio.Server | None = None

    async def start(self, counts: Callable[[], list[Any]]) -> None:
        """Tell the others from now on what this worker has counted."""
        self._counts = counts
        self._publisher = asyncio.create_task(self._publish_often(), name="publish")
        try:
            self._server = await asyncio.start_unix_server(self._answer, self._socket(self.slot))
        except OSError as error:  # such as a path that is too long for a socket
            log.warning("no socket for the other workers", extra={"reason": str(error)})

    async def stop(self) -> None:
        """Tell them for the last time."""
        if self._server is not None:
            self._server.close()
        if self._publisher is not None:
            self._publisher.cancel()
            await asyncio.gather(self._publisher, return_exceptions=True)
        self._publish()

    async def refresh(self) -> None:
        """Have every worker write what it has counted by now; one that does not answer is not waited for."""
        self._publish()
        others = [slot for slot in range(self.count) if slot != self.slot]
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_S):
                await asyncio.gather(*(self._ask(slot) for slot in others))

    async def _ask(self, slot: int) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket(slot))
        except OSError:
            return
        try:
            with suppress(OSError):
                await reader.read()
        finally:
            writer.close()

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._publish()
        writer.close()

    async def _publish_often(self) -> None:
        while True:
            self._publish()
            await asyncio.sleep(PUBLISH_S)

    def _publish(self) -> None:
        words = {"at": self._clock(), "counts": self._counts()}
        try:
            self._write(self._file(self.slot), words)
        except OSError as error:
            log.warning("counts not written", extra={"reason": str(error)})

    def ages(self) -> dict[int, float]:
        """Return for how many seconds nothing has been heard of each other worker."""
        now = self._clock()
        return {words.slot: max(0.0, now - words.at) for words in self._words()}

    def counts(self) -> list[list[Any]]:
        """Return what each other worker has counted, also those that have ended since; nothing twice."""
        # In this order: what a worker had counted is with the gone before its file is written anew.
        others = {words.slot: words for words in self._words()}
        gone = self._gone()
        alive = [
            words.counts for slot, words in others.items() if words.at > gone["buried"].get(str(slot), -1)
        ]
        return alive + ([gone["counts"]] if gone["counts"] else [])

    # ------------------------------------------------------------------------------------ the supervisor's

    def expect(self, slot: int) -> None:
        """Count from now on how long nothing is heard of a worker that is being started."""
        self._socket(slot).unlink(missing_ok=True)
        self._write(self._file(slot), {"at": self._clock(), "counts": []})

    def bury(self, slot: int, add_up: Callable[[list[list[Any]]], list[Any]]) -> None:
        """Keep what an ended worker had counted; ``add_up`` makes one of several counts."""
        words = self._read(self._file(slot))
        if words is not None and words["counts"]:
            gone = self._gone()
            counts = add_up([gone["counts"], words["counts"]])
            buried = {**gone["buried"], str(slot): words["at"]}
            self._write(self._folder / _GONE, {"counts": counts, "buried": buried})

    # ----------------------------------------------------------------------------------------------- files

    def _words(self) -> list[Words]:
        found = []
        for slot in range(self.count):
            words = self._read(self._file(slot)) if slot != self.slot else None
            if words is not None:
                found.append(Words(slot, words["at"], words["counts"]))
        return found

    def _gone(self) -> dict[str, Any]:
        return self._read(self._folder / _GONE) or {"counts": [], "buried": {}}

    def _socket(self, slot: int) -> Path:
        return self._folder / f"{slot}.sock"

    def _file(self, slot: int) -> Path:
        return self._folder / f"{slot}.json"

    @staticmethod
    def _write(file: Path, words: dict[str, Any]) -> None:
        beside = file.with_suffix(".new")
        beside.write_bytes(orjson.dumps(words))
        beside.replace(file)

    @staticmethod
    def _read(file: Path) -> dict[str, Any] | None:
        try:
            words = orjson.loads(file.read_bytes())
        except (OSError, ValueError):
            return None
        return words if isinstance(words, dict) else None
