"""The scheduled backup, and what an operator has to know of the backups there are.

A backup reads and packs every row. In this process it would take the interpreter from the messages for minutes,
so a process of its own with low priority does it; that one ends with this one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from feishu_bot import __version__
from feishu_bot.errors import BotError, StoreUnavailable
from feishu_bot.schedule import Job, cron_trigger, previous_fire
from feishu_bot.store import backup as making
from feishu_bot.store import jobs
from feishu_bot.store.recovery import damage_of
from feishu_bot.store.snapshot import sqlite_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from zoneinfo import ZoneInfo

    from feishu_bot.config.settings import BackupJobSettings
    from feishu_bot.store.store import Store

log = logging.getLogger(__name__)

JOB: Final = "backup"
_LOOK_AGAIN_S: Final = 60.0  # how old what we know of the backups may be
_NICENESS: Final = 10
_STOP_S: Final = 0.8  # for the process to clear up after itself; the schedule waits a second
_PROGRAM: Final = (
    "import json, sys; request = json.loads(sys.stdin.readline()); sys.path[:] = request['path']; "
    "from feishu_bot.backups import work; work(request)"
)


def _wall_clock() -> datetime:
    return datetime.now(UTC)


class Backups:
    """The backups of one server process. ``now`` gives the time of the wall clock."""

    def __init__(
        self,
        settings: BackupJobSettings,
        store: Store,
        zone: ZoneInfo,
        *,
        now: Callable[[], datetime] = _wall_clock,
    ) -> None:
        self._settings = settings
        self._store = store
        self._now = now
        self._folder = Path(settings.directory)
        self._trigger = cron_trigger(settings.cron, zone)
        self._file = sqlite_path(store.engine)
        in_memory = store.capabilities.kind == "sqlite" and self._file is None
        self._enabled = settings.enabled and not in_memory
        self._good_at: datetime | None = None
        self._since: datetime | None = None  # when the schedule first heard of the job
        self._looked_at: float | None = None  # by the loop's clock
        self._looking: asyncio.Task[None] | None = None

    def jobs(self) -> list[Job]:
        """Return the job of the schedule, or nothing where there is nothing to back up."""
        return [Job(JOB, self._settings.cron, self.run)] if self._enabled else []

    async def refuse_damaged(self) -> None:
        """Return if the SQLite file can be relied on. Raises StoreUnavailable with the newest good backup's name."""
        if self._file is None:
            return
        reason = await asyncio.to_thread(damage_of, self._file)
        if reason is None:
            return
        good = await asyncio.to_thread(making.newest_readable, self._folder)
        what_to_do = (
            f"there is no good backup in {self._folder}"
            if good is None
            else f"the newest good backup is {good.path}: `bot.py restore {good.path} --force`"
        )
        raise StoreUnavailable(
            f"the database {self._file} is damaged ({reason}); {what_to_do}; "
            "`bot.py db recover --to FILE` saves what can be read"
        )

    # ---------------------------------------------------------------------------------------------- the job

    async def run(self) -> None:
        """Make a backup, try it out, and remove the oldest. Raises StoreUnavailable with what went wrong."""
        now = self._now()
        request = {
            "path": sys.path,
            "db_url": self._store.engine.url.render_as_string(hide_password=False),
            "folder": str(self._folder),
            "keep": self._settings.keep,
            "now": now.timestamp(),
        }
        answer = await _in_a_process(request)
        if "error" in answer:
            raise StoreUnavailable(f"no good backup was made: {answer['error']}")
        log.info(
            "backup done",
            extra={
                "path": answer["path"],
                "bytes": answer["size"],
                "rows": answer["rows"],
                "removed": answer["removed"],
                "seconds": round((self._now() - now).total_seconds(), 3),
            },
        )
        self._good_at = now

    # ------------------------------------------------------------------------------------------ what is known

    def problems(self) -> list[str]:
        """Return in a sentence that the last good backup is too old: more than two of its intervals.

        What it knows may be a minute old: it looks again beside its caller, who does not wait.
        """
        if not self._enabled:
            return []
        clock = asyncio.get_running_loop().time()
        if self._looked_at is None or clock - self._looked_at > _LOOK_AGAIN_S:
            self._looked_at = clock
            self._looking = asyncio.create_task(self._look_quietly())
        return self._problems(self._now())

    def _problems(self, now: datetime) -> list[str]:
        last = previous_fire(self._trigger, now)
        before = last and previous_fire(self._trigger, last.astimezone(UTC) - timedelta(seconds=1))
        reference = self._good_at or self._since
        if last is None or before is None or reference is None or now - reference <= 2 * (last - before):
            return []
        if self._good_at is None:
            return [f"there is no good backup in {self._folder}"]
        return [f"the last good backup is {_age(now - self._good_at)} old ({self._folder})"]

    async def look(self) -> None:
        """Learn of the backups there are, also of those that other machines have made. Raises StoreUnavailable."""
        first_at, run = await self._store.read(lambda tx: jobs.first_and_last_good(tx, JOB))
        here = await asyncio.to_thread(making.last_good_backup, self._folder)
        good = [here.created_at] if here is not None else []
        # Of a run on this machine the file itself must still be there.
        if run is not None and jobs.owner_of(run.node).host != self._store.owner.host:
            good.append(_instant(run.started_at))
        self._good_at = max(good, default=None)
        self._since = None if first_at is None else _instant(first_at)

    async def _look_quietly(self) -> None:
        try:
            await self.look()
        except (StoreUnavailable, OSError) as error:
            log.warning("backups not looked at", extra={"reason": str(error)})

    async def stop(self) -> None:
        """End a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking


def _instant(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def _age(age: timedelta) -> str:
    hours = int(age.total_seconds() // 3600)
    return f"{hours // 24} days" if hours >= 48 else f"{hours} hours"  # noqa: PLR2004  # two days


# -------------------------------------------------------------------------------------- a process of its own


async def _in_a_process(request: dict[str, Any]) -> dict[str, Any]:
    """Have ``work`` done by another process, which is stopped when this is cancelled."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROGRAM, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("pipes were asked for")
    try:
        # The pipe stays open: its end tells the other that this process is gone.
        process.stdin.write(json.dumps(request).encode() + b"\n")
        output, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
        code = await process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
        raise
    finally:
        process.stdin.close()
    if code or not output:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no output"]
        raise StoreUnavailable(f"the process that makes the backup ended with {code}: {lines[-1]}")
    answer: dict[str, Any] = json.loads(output)
    return answer


def work(request: dict[str, Any]) -> None:
    """Make the backup that a server's process asks for, and print what became of it; runs in its own process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that unfinished files are removed
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):
        os.nice(_NICENESS)
    folder = Path(request["folder"])
    now = datetime.fromtimestamp(request["now"], UTC)
    try:
        made, manifest = making.backup(request["db_url"], folder, now=now, program=__version__, trial=True)
        removed = making.rotate(folder, request["keep"])
    except (BotError, OSError) as error:
        answer: dict[str, Any] = {"error": str(error)}
    else:
        answer = {
            "path": str(made.path),
            "size": made.size,
            "rows": manifest.rows,
            "removed": len(removed),
        }
    sys.stdout.write(json.dumps(answer))


def _end_with_parent() -> None:
    # Not through sys.stdin: its lock, held by a thread that waits, would hinder the end of the process.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
