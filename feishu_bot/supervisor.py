"""The parent of several workers on one machine: starts them, replaces those that die, stops them together.

It serves nothing itself and holds no thread, so that it can fork at any time; a worker is a copy of it, made in a
tenth of a second, with everything imported. What the workers share is a port and the database.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from feishu_bot import event_loop
from feishu_bot.ai.tokens import warm
from feishu_bot.app import App
from feishu_bot.errors import BotError, ConfigError
from feishu_bot.log import bind
from feishu_bot.metrics import add_up
from feishu_bot.operation import Process
from feishu_bot.peers import Peers
from feishu_bot.store.work import LEASE_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import NoReturn

    from feishu_bot.config import Loaded
    from feishu_bot.log import RecentErrors, RecentLines

log = logging.getLogger(__name__)

AT_ONCE_S: Final = 2.0  # a worker that lived no longer than this after it was ready died at once
MAX_DEATHS: Final = 5  # of one worker, each at once, one after the other
FIRST_PAUSE_S: Final = 0.25  # before a worker that died at once is replaced; doubled each time
STOP_S: Final = 90.0  # more than a worker takes to stop; then it is killed
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_CHUNK: Final = 65536
_FOLDER: Final = "feishu-bot-workers-"
_LOCK: Final = "lock"


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker that runs. ``channel`` brings its words, and ends when either side dies."""

    slot: int
    pid: int
    channel: socket.socket
    started: float
    ready_at: float | None = None
    failed: str | None = None
    rest: bytes = b""


@dataclass(slots=True)
class _Slot:
    """The place of a worker, whoever fills it. ``due``: when the next one is to be started."""

    due: float | None = 0.0
    deaths: int = 0
    last_words: str = ""
    owner: str | None = None  # of leases: the worker that was the last to serve here


@dataclass(slots=True)
class _State:
    workers: dict[int, _Worker] = field(default_factory=dict)  # by pid
    stopping_since: float | None = None
    gave_up: str | None = None
    killed: bool = False
    was_ready: bool = False
    announced: bool = False


class Supervisor:
    """Runs ``count`` workers until a signal or until they cannot be kept alive.

    ``reread`` reads the configuration again and raises ConfigError. ``ready`` is told the URL once all serve.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        reread: Callable[[], Loaded],
        errors: RecentErrors | None = None,
        lines: RecentLines | None = None,
        ready: Callable[[str], None] = lambda _url: None,
        lease_ms: int = LEASE_MS,
    ) -> None:
        self._loaded = loaded
        self._reread = reread
        self._errors = errors
        self._lines = lines
        self._ready = ready
        self._lease_ms = lease_ms
        self._count = loaded.settings.server.workers
        self._slots = [_Slot() for _ in range(self._count)]
        self._state = _State()
        self._address: list[_Address] = []
        self._folder = Path()
        self._peers = Peers(self._folder, self._count)
        self._wake: tuple[socket.socket, socket.socket] | None = None

    def run(self) -> int:
        """Return 0 after a stop by signal, 1 if a second one cut it short. Raises BotError with the reason when the workers die again and again.

        Raises OSError for a port in use.
        """
        with ExitStack() as stack:
            self._address = list(
                reserve(self._loaded.settings.server.host, self._loaded.settings.server.port)
            )
            for address in self._address:
                stack.callback(address.close)
            self._folder = stack.enter_context(shared_folder())
            self._peers = Peers(self._folder, self._count)
            stack.enter_context(self._signals())
            warm(self._loaded.settings.ai.model)  # once, in memory that the workers share
            gc.freeze()
            log.info("workers starting", extra={"workers": self._count, "port": self._address[0].port})
            while not self._is_over():
                self._step()
        if self._state.gave_up is not None:
            raise BotError(self._state.gave_up)
        log.info("workers stopped")
        return int(self._state.killed)

    # --------------------------------------------------------------------------------------------- the loop

    def _is_over(self) -> bool:
        return self._state.stopping_since is not None and not self._state.workers

    def _step(self) -> None:
        now = time.monotonic()
        for number, slot in enumerate(self._slots):
            if self._state.stopping_since is None and slot.due is not None and slot.due <= now:
                self._start(number)
        if self._wake is None:
            raise AssertionError("signals are set up before the loop")
        channels = {worker.channel: worker for worker in self._state.workers.values()}
        readable, _, _ = select.select([self._wake[0], *channels], [], [], self._timeout(now))
        for source in readable:
            if source is not self._wake[0]:
                self._listen(channels[source])
        if self._wake[0] in readable:
            for number in self._wake[0].recv(_CHUNK):
                self._on_signal(number)
        self._reap()
        since = self._state.stopping_since
        if since is not None and time.monotonic() - since > STOP_S:
            self._signal_all(signal.SIGKILL)

    def _timeout(self, now: float) -> float | None:
        if self._state.stopping_since is not None:
            return 1.0
        due = [slot.due for slot in self._slots if slot.due is not None]
        return max(0.0, min(due) - now) if due else None

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            try:
                self._loaded = self._reread()  # for workers that are started from now on
            except ConfigError as error:
                log.error("configuration refused", extra={"reason": "; ".join(error.mistakes)})  # noqa: TRY400  # no fault of ours
            else:
                self._signal_all(signal.SIGHUP)
        elif number in {signal.SIGTERM, signal.SIGINT}:
            if self._state.stopping_since is not None:
                log.warning("stopped at once by a second signal")
                self._state.killed = True
                self._signal_all(signal.SIGKILL)
            else:
                self._stop()

    def _stop(self) -> None:
        log.info("workers stopping")
        self._state.stopping_since = time.monotonic()
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for pid in self._state.workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # -------------------------------------------------------------------------------------------- workers

    def _start(self, number: int) -> None:
        """Fork a worker; the child does not return from here."""
        ours, its = socket.socketpair()
        self._peers.expect(number)
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal for the child must not be written into the parent's pipe.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become_worker(number, its, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
        ours.setblocking(False)
        self._slots[number].due = None
        self._state.workers[pid] = _Worker(number, pid, ours, time.monotonic())

    def _become_worker(
        self, number: int, channel: socket.socket, mask: set[int | signal.Signals]
    ) -> NoReturn:
        """Be a worker from here on, and end without what the parent has to clear up."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Ctrl-C and a service manager's stop reach the whole group; the parent tells us when it is meant.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server follows it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for other in self._state.workers.values():
                other.channel.close()
            for end in self._wake or ():
                end.close()
            process = Process(
                reread=self._reread,
                errors=self._errors,
                lines=self._lines,
                origins=self._loaded.origins,
                peers=Peers(self._folder, self._count, number),
                listening=lambda: [address.listening() for address in self._address],
                supervised=True,
                replaces=self._slots[number].owner,
                lease_ms=self._lease_ms,
            )
            with bind(worker=number):
                code = _work(self._loaded, process, channel)
        except BaseException:
            log.critical("worker failed", exc_info=True)
            raise
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _listen(self, worker: _Worker) -> None:
        """Take a worker's words: that it is ready, or why it could not start."""
        try:
            data = worker.channel.recv(_CHUNK)
        except (BlockingIOError, ConnectionResetError):
            data = b""
        *lines, worker.rest = (worker.rest + data).split(b"\n")
        for line in lines:
            words = orjson.loads(line)
            worker.failed = words.get("failed", worker.failed)
            if "ready" in words:
                worker.ready_at = time.monotonic()
                self._slots[worker.slot].owner = words["owner"]
                self._state.was_ready = True
                self._announce(words["ready"])

    def _announce(self, url: str) -> None:
        if self._state.announced or any(w.ready_at is None for w in self._state.workers.values()):
            return
        if len(self._state.workers) == self._count:
            self._state.announced = True
            log.info("workers ready", extra={"workers": self._count, "url": url})
            self._ready(url)

    def _reap(self) -> None:
        for pid, worker in list(self._state.workers.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._listen(worker)
                worker.channel.close()
                del self._state.workers[pid]
                self._peers.bury(worker.slot, _without_gauges)
                if self._state.stopping_since is None:
                    self._replace(worker, os.waitstatus_to_exitcode(status))

    def _replace(self, worker: _Worker, code: int) -> None:
        """Have a worker that died replaced: at once, or after a pause if it did not live."""
        now, slot = time.monotonic(), self._slots[worker.slot]
        reason = worker.failed or (
            f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        )
        at_once = worker.ready_at is None or now - worker.ready_at < AT_ONCE_S
        slot.deaths = slot.deaths + 1 if at_once else 0
        slot.last_words = reason
        pause_s = FIRST_PAUSE_S * 2 ** (slot.deaths - 1) if at_once else 0.0
        slot.due = now + pause_s
        log.error(
            "worker died",
            extra={"worker": worker.slot, "pid": worker.pid, "reason": reason, "replaced_in_s": pause_s},
        )
        if (worker.failed is not None and not self._state.was_ready) or slot.deaths >= MAX_DEATHS:
            times = f"died {slot.deaths} times at once" if slot.deaths > 1 else "could not start"
            self._state.gave_up = f"worker {worker.slot} {times}: {reason}"
            self._stop()

    # ------------------------------------------------------------------------------------------- signals

    def _signals(self) -> _SignalPipe:
        pipe = _SignalPipe()
        self._wake = pipe.ends
        return pipe


class _SignalPipe:
    """While it is entered, signals are not acted on but can be read from the first of ``ends``."""

    def __init__(self) -> None:
        self.ends = socket.socketpair()
        self._before: dict[int, object] = {}
        self._fd = -1

    def __enter__(self) -> None:
        for end in self.ends:
            end.setblocking(False)
        self._fd = signal.set_wakeup_fd(self.ends[1].fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, lambda *_: None)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # what signal.signal has returned
        signal.set_wakeup_fd(self._fd)
        for end in self.ends:
            end.close()


def _without_gauges(counts: list[list[object]]) -> list[object]:
    """Return the sums of what ended workers had counted; what they were doing is over."""
    return [family for family in add_up(counts) if family[1] != "gauge"]


# --------------------------------------------------------------------------------------- what workers share


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a new folder for what workers tell each other; those that killed supervisors have left are removed.

    Whoever uses a folder holds the lock in it, by descent: the supervisor, and workers that are left without one.
    """
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=_FOLDER, ignore_cleanup_errors=True) as name:
        unlocked = Path(name, "new")
        with unlocked.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unlocked.rename(Path(name, _LOCK))  # under this name it is free only when all have ended
            yield Path(name)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError):  # somebody else's, being made, or in use
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


# -------------------------------------------------------------------------------------------------- a worker


def _work(loaded: Loaded, process: Process, channel: socket.socket) -> int:
    """Be one worker; return its exit code."""

    def say(**words: object) -> None:
        with suppress(OSError):
            channel.sendall(orjson.dumps(words) + b"\n")

    def tell_ready(app: App) -> None:
        say(ready=f"http://{app.settings.server.host}:{app.port}/", owner=str(app.store.owner))

    async def serve() -> None:
        stopping = asyncio.Event()
        channel.setblocking(True)
        asyncio.get_running_loop().add_reader(channel, partial(_orphaned, channel, stopping))
        await App(loaded.settings, process).run(ready=tell_ready, stopping=stopping)

    try:
        event_loop.run(serve())
    except ConfigError as error:
        say(failed="; ".join(error.mistakes))
        return 2
    except (BotError, OSError) as error:
        say(failed=str(error))
        return 1
    return 0


def _orphaned(channel: socket.socket, stopping: asyncio.Event) -> None:
    """Stop when the parent is gone: nobody would replace this worker, and another parent wants the port."""
    if not channel.recv(_CHUNK):
        asyncio.get_running_loop().remove_reader(channel)
        log.warning("supervisor gone")
        stopping.set()


# ---------------------------------------------------------------------------------------------- the address


class _Address:
    """One address to listen on, held by the parent so that the port stays ours."""

    def __init__(self, family: socket.AddressFamily, address: tuple[object, ...]) -> None:
        _refuse_in_use(family, address)
        self._family = family
        self._held = _bound(family, address)
        self._at = self._held.getsockname()
        if not hasattr(socket, "SO_REUSEPORT"):
            self._held.listen()

    @property
    def port(self) -> int:
        return int(self._at[1])

    def listening(self) -> socket.socket:
        """Return a worker's own socket; where the system cannot share ports so, the parent's."""
        return _bound(self._family, self._at) if hasattr(socket, "SO_REUSEPORT") else self._held

    def close(self) -> None:
        self._held.close()


def _bound(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(address)
    made.set_inheritable(True)
    return made


def _refuse_in_use(family: socket.AddressFamily, address: tuple[object, ...]) -> None:
    """Raise OSError for a port that somebody listens on: a shared one would be taken without a word."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot listen on {address[0]}:{address[1]}: {error.strerror}"
            ) from None


def reserve(host: str, port: int) -> Iterator[_Address]:
    """Yield the addresses that ``host`` stands for, all on one port. Raises OSError for a port in use."""
    found: Sequence[tuple[socket.AddressFamily, tuple[object, ...]]] = [
        (family, address)
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    ]
    for family, address in dict.fromkeys(found):
        made = _Address(family, (address[0], port, *address[2:]))
        port = made.port
        yield made
