"""The servers of a run: groups of processes, each as on a machine of its own if the system lets it be."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

import feishu_bot
from feishu_bot.config import process_variables
from feishu_bot.errors import BotError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READY_S: Final = 90.0  # how long a group may take to serve
STOP_S: Final = 60.0
_PATIENCE_S: Final = 10.0  # for a worker to be there
_AGAIN_S: Final = 0.3  # before a group that has ended is started again
_KEPT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")


class Network:
    """A network namespace with a cable to this one, for a group that is to be like another machine."""

    def __init__(self, number: int) -> None:
        """Make it. Raises BotError where that is not permitted."""
        self.name = f"chaos-{os.getpid()}-{number}"
        block = f"10.203.{os.getpid() % 250}.{4 * number}"
        base, _, last = block.rpartition(".")
        self.here, self.there = f"{base}.{int(last) + 1}", f"{base}.{int(last) + 2}"
        near, far = f"ch{os.getpid() % 1_000_000}a{number}", f"ch{os.getpid() % 1_000_000}b{number}"
        try:
            _ip("netns", "add", self.name)
            _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
            _ip("addr", "add", f"{self.here}/30", "dev", near)
            _ip("link", "set", near, "up")
            _ip("-n", self.name, "addr", "add", f"{self.there}/30", "dev", far)
            _ip("-n", self.name, "link", "set", far, "up")
            _ip("-n", self.name, "link", "set", "lo", "up")
            _run(*self.enter, "true")
        except BotError:
            self.close()
            raise

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command is put behind so that it runs there, also with processes and a host name of its own."""
        apart = ("unshare", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child")
        return (_program("ip"), "netns", "exec", self.name, *apart)

    def close(self) -> None:
        """Remove it."""
        with suppress(BotError):
            _ip("netns", "del", self.name)


def why_not_apart() -> str | None:
    """Return why groups cannot have namespaces of their own here; None if they can."""
    try:
        Network(63).close()
    except BotError as error:
        return str(error)
    return None


def _ip(*arguments: str) -> None:
    _run(_program("ip"), *arguments)


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise BotError(f"there is no program {name!r}")
    return found


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603  # programs of the system, arguments of ours
    except OSError as error:
        raise BotError(f"{Path(command[0]).name}: {error.strerror}") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise BotError(f"{Path(command[0]).name}: {words[-1] if words else 'failed'}")


class Group:
    """Server processes that share a port, and are started again when they end, as by a service manager.

    ``deaths`` holds the ends that nobody has brought about.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        config: Mapping[str, Any],
        *,
        command: Sequence[str],
        options: Sequence[str] = (),
        network: Network | None = None,
    ) -> None:
        self.number = number
        self.log = folder / f"server-{number}.log"
        self.file = folder / f"server-{number}.yaml"
        self.network = network
        self.deaths: list[str] = []
        self.url = f"http://{config['server']['host']}:{config['server']['port']}"
        self.file.write_bytes(orjson.dumps(dict(config), option=orjson.OPT_INDENT_2))
        self._folder = folder
        self._command = (*command, "run", "--config", str(self.file), *options)
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._struck = False
        self._stopping = False

    async def start(self) -> None:
        """Start it and keep it started."""
        await self._launch()
        self._watcher = asyncio.create_task(self._watch())

    async def _launch(self) -> None:
        inside = () if self.network is None else self.network.enter
        self._struck = False
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *inside,
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=environment(self._folder),
                start_new_session=True,  # an interrupt at the terminal is for the driver
            )

    async def _watch(self) -> None:
        while self._process is not None:
            code = await self._process.wait()
            self._kill_all()  # what has lost its parent goes with it
            if self._stopping:
                return
            if not self._struck:
                self.deaths.append(f"group {self.number} ended with exit code {code}")
            await asyncio.sleep(_AGAIN_S)
            await self._launch()

    async def ready(self) -> None:
        """Return when it serves. Raises BotError with the end of its log when it does not."""
        end = time.monotonic() + READY_S
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < end and len(self.deaths) < 3:  # noqa: PLR2004  # it will not come up
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(f"{self.url}/readyz", timeout=aiohttp.ClientTimeout(2)) as response:
                        if response.ok:
                            return
                await asyncio.sleep(0.05)
        words = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise BotError(f"the server does not start: {words[-1] if words else 'it says nothing'}")

    # -------------------------------------------------------------------------------------------- accidents

    def workers(self) -> list[int]:
        """Return the processes that serve now."""
        parent = self._parent()
        return [] if parent is None else _children(parent)

    def _parent(self) -> int | None:
        """Return the process that was started with ``run``."""
        if self._process is None or self._process.returncode is not None:
            return None
        if self.network is None:
            return self._process.pid
        return next(iter(_children(self._process.pid)), None)

    async def kill_one(self, chosen: float) -> bool:
        """Kill a worker, as soon as there is one; False if none comes."""
        end = time.monotonic() + _PATIENCE_S
        while not (found := self.workers()):
            if time.monotonic() > end or self._stopping:
                return False
            await asyncio.sleep(0.05)
        return _signal(found[int(chosen * len(found))], signal.SIGKILL)

    def kill(self) -> bool:
        """Kill all of its processes, as a power cut does."""
        self._struck = True
        return self._kill_all()

    def _kill_all(self) -> bool:
        if self._process is None:
            return False
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
            return True
        return False

    async def stall(self, chosen: float, seconds: float) -> bool:
        """Have a worker sleep; it goes on whatever happens here."""
        found = self.workers()
        if not found:
            return False
        pid = found[int(chosen * len(found))]
        try:
            stopped = _signal(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
        finally:
            _signal(pid, signal.SIGCONT)
        return stopped

    # ------------------------------------------------------------------------------------------------ end

    async def stop(self) -> int | None:
        """Ask it to stop; return its exit code, None if it had to be killed."""
        self._stopping = True
        parent = self._parent()
        if parent is not None:
            _signal(parent, signal.SIGTERM)
        if self._watcher is None or self._process is None:
            return None
        try:
            await asyncio.wait_for(asyncio.shield(self._watcher), STOP_S)
        except TimeoutError:
            self._kill_all()
            return None
        return self._process.returncode

    async def close(self) -> None:
        """End whatever is left of it."""
        self._stopping = True
        if self._watcher is not None:
            self._kill_all()
            await asyncio.wait([self._watcher], timeout=STOP_S)
            self._watcher.cancel()

    def complaints(self) -> list[str]:
        """Return what its log says of faults in the program: events that came with a stack."""
        found: list[str] = []
        with suppress(OSError), self.log.open("rb") as lines:
            found += [_event(line) for line in lines if b'"exception"' in line or line.startswith(b"Trace")]
        return found


def _event(line: bytes) -> str:
    try:
        said = orjson.loads(line)
    except ValueError:
        return line.decode(errors="replace").strip()
    last = str(said.get("exception", "")).strip().splitlines()
    return f"{said.get('event')}: {last[-1] if last else ''}"


async def run_command(command: Sequence[str], *, folder: Path) -> None:
    """Run one of the operator's commands beside the servers. Raises BotError with its last words if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
        env=environment(folder),
        start_new_session=True,
    )
    output, _ = await process.communicate()
    words = output.decode(errors="replace").strip()
    if process.returncode:
        raise BotError(f"{command[-1]}: {words.splitlines()[-1] if words else process.returncode}")


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of our processes: none that the program reads, so that nothing leads to other data.

    What a killed process leaves in its folder for temporary files goes with ``folder``.
    """
    ours = {name: value for name, value in process_variables().items() if name in _KEPT}
    return {**ours, "TMPDIR": str(folder), "PYTHONPATH": str(Path(feishu_bot.__file__).parents[1])}


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[int]:
    """Return the children of a process, oldest first."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if Path("/proc/self").exists():
        with suppress(OSError):
            return [int(child) for child in listed.read_text(encoding="ascii").split()]
        return []
    done = subprocess.run([_program("pgrep"), "-P", str(pid)], capture_output=True, check=False)  # noqa: S603  # as above
    return [int(child) for child in done.stdout.split()]
