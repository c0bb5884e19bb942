"""Starting and stopping the processes of a benchmark."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
START_S = 20.0  # how long a process may take to listen


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(
    arguments: list[str], port: int, log: Path, *, python: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python, ours or another, with these arguments until the block ends; enter when the port is listened on."""
    environment = dict(os.environ) if python else {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as stream:
        child = subprocess.Popen(
            [str(python or sys.executable), *arguments],
            stdout=stream,
            stderr=stream,
            env=environment,
            cwd=log.parent,
        )
        try:
            _wait(port, child, log)
            yield child
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if child.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"did not start: {log.read_text(errors='replace')[-2000:]}")


def wait_until_ready(port: int) -> None:
    """Wait until a server serves, which is more than listening: its database is open."""
    deadline = time.monotonic() + START_S
    while get_json(f"http://127.0.0.1:{port}/readyz").get("status") == "unavailable":
        if time.monotonic() > deadline:
            raise RuntimeError("listens, but does not become ready")
        time.sleep(0.01)


def cpu_seconds(child: subprocess.Popen[bytes]) -> float:
    """Return the processor time of a process and its workers; 0.0 where the system does not tell (no /proc)."""
    return sum(cpu_seconds_of(pid) for pid in (child.pid, *children(child.pid)))


def cpu_seconds_of(pid: int) -> float:
    """Return the processor time that one process has used; 0.0 where nobody tells, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    try:
        return [int(name) for name in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        return []


def resident_mb(child: subprocess.Popen[bytes]) -> float:
    """Return the memory that a process holds; 0.0 where the system does not tell (no /proc)."""
    try:
        status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def get_json(url: str) -> Any:
    """Fetch JSON from loopback, whatever the status."""
    try:
        with urlopen(url, timeout=10) as response:
            return json.load(response)
    except HTTPError as error:
        with error:
            return json.load(error)


def run_load(
    file: Path, port: int, *, connections: int = 64, rate: float | None = None, repeat: bool = False
) -> dict[str, float]:
    """Send a file of requests from a process of its own."""
    with start_load(file, port, connections=connections, rate=rate, repeat=repeat) as load:
        return load.result()


class Load:
    """Requests that are being sent."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def result(self) -> dict[str, float]:
        """Return what became of them, once all are sent."""
        output, _ = self._process.communicate(timeout=600)
        if self._process.returncode:
            raise RuntimeError(f"the load ended with exit code {self._process.returncode}")
        found: dict[str, float] = json.loads(output)
        return found


@contextmanager
def start_load(
    file: Path, port: int, *, connections: int = 64, rate: float | None = None, repeat: bool = False
) -> Iterator[Load]:
    """Begin to send a file of requests from a process of its own; ``repeat`` what was not answered 200."""
    arguments = ["-m", "benchmarks.load", "--port", str(port), "--connections", str(connections)]
    if rate is not None:
        arguments += ["--rate", str(rate)]
    if repeat:
        arguments += ["--repeat"]
    with subprocess.Popen(
        [sys.executable, *arguments, str(file)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        try:
            yield Load(process)
        finally:
            process.kill()
