"""The server by itself: how soon it serves after its start, what it holds when idle, how late it acknowledges.

The acknowledgement is measured at an offered rate: each request has its instant, however slow the others were.
Beside each figure, for the machine: a Python that starts and imports aiohttp, and a bare handler under the same load.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.durable_echo import echo_server, make_bodies, wait_until_answered
from benchmarks.load import write_requests
from benchmarks.processes import ROOT, free_port, process, resident_mb, run_load, wait_until_ready
from benchmarks.verdict import show

ACK_FLOOR, ACK_GOAL = 40.0, 20.0  # ms, 99th percentile
START_FLOOR, START_GOAL = 2.5, 1.2  # s
MEMORY_FLOOR, MEMORY_GOAL = 150.0, 110.0  # MB
IDLE_S = 2.0  # how long the server has been idle when its memory is read

_CONFIG = """
server: {{port: {port}}}
ai: {{model: echo, conversation_persistence: {{db_url: "{db_url}"}}}}
plugins: {{enabled: []}}
"""


def start_server(folder: Path, db_url: str, *, idle_s: float = 0.0) -> tuple[float, float]:
    """Start a server on this database and stop it; return the seconds until it served, and its MB when idle."""
    port = free_port()
    config = folder / "start.yaml"
    config.write_text(_CONFIG.format(port=port, db_url=db_url), encoding="utf-8")
    start = time.perf_counter()
    with process(
        [str(ROOT / "bot.py"), "run", "--config", str(config)], port, folder / "start.log"
    ) as server:
        wait_until_ready(port)
        seconds = time.perf_counter() - start
        time.sleep(idle_s)
        return seconds, resident_mb(server)


def bare_start() -> float:
    """Return the seconds in which Python starts and imports aiohttp."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import aiohttp.web"], check=True)
    return time.perf_counter() - start


def acknowledgement(folder: Path, rate: float, seconds: float, db_url: str, salt: str) -> tuple[float, float]:
    """Return the 99th percentiles in ms at this rate: the server, and a bare handler."""
    file = folder / "requests"
    count = int(rate * seconds)
    write_requests(file, "127.0.0.1", "/webhook/feishu", make_bodies(count, salt))
    with echo_server(folder, db_url) as (_, port, platform):
        ours = run_load(file, port, rate=rate)
        if ours["answered"] != count:
            raise RuntimeError(f"{count - ours['answered']:.0f} of {count} messages were not accepted")
        wait_until_answered(platform, count)
    bare_port = free_port()
    with process(["-m", "benchmarks.bare", str(bare_port)], bare_port, folder / "bare.log"):
        bare = run_load(file, bare_port, rate=rate)
    return ours["p99_ms"], bare["p99_ms"]


def _spread(values: list[float]) -> str:
    return f"{min(values):.3g}–{max(values):.3g}"


def main(argv: list[str] | None = None) -> None:
    """Run the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=300.0, help="messages per second offered")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each run offers them")
    arguments = parser.parse_args(argv)
    starts, python, memory, late, bare = [], [], [], [], []
    for number in range(arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            seconds, idle_mb = start_server(folder, f"sqlite:///{folder / 'fresh.db'}", idle_s=IDLE_S)
            starts.append(seconds)
            memory.append(idle_mb)
            python.append(bare_start())
            db_url = f"sqlite:///{folder / 'bot.db'}"
            ours, theirs = acknowledgement(folder, arguments.rate, arguments.seconds, db_url, f"r{number}")
            late.append(ours)
            bare.append(theirs)
    start, plain = statistics.median(starts), statistics.median(python)
    show(
        "ready to serve after start, fresh",
        start,
        START_FLOOR,
        START_GOAL,
        "s",
        raw=f"spread {_spread(starts)}; Python importing aiohttp {plain:.2f} s, ratio {start / plain:.1f}",
    )
    if any(memory):
        show(
            "memory when idle, model echo",
            statistics.median(memory),
            MEMORY_FLOOR,
            MEMORY_GOAL,
            "MB",
            raw=f"spread {_spread(memory)}",
        )
    p99, bare_p99 = statistics.median(late), statistics.median(bare)
    show(
        f"acknowledgement p99 at {arguments.rate:g} messages/s offered",
        p99,
        ACK_FLOOR,
        ACK_GOAL,
        "ms",
        raw=f"spread {_spread(late)}; bare handler {bare_p99:.2f} ms, ratio {p99 / bare_p99:.1f}",
    )


if __name__ == "__main__":
    main()
