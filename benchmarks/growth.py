"""What the server's memory grows by with the messages that pass through it: megabytes, and objects, which do not lie.

The megabytes of a short run are mostly the allocator's; the number of objects after a full collection is exact. A server
that forgets what it has done holds as many after the last part as when its caches were full. ``--messages 1000000`` is the
figure itself and takes as long as so many messages take.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.durable_echo import echo_server, make_bodies, wait_until_answered
from benchmarks.load import write_requests
from benchmarks.processes import resident_mb, run_load
from benchmarks.verdict import show

FLOOR, GOAL = 40.0, 15.0  # MB over a million messages
MILLION: Final = 1_000_000
PART: Final = 5000  # messages between two counts
FIRST: Final = 3  # parts that fill the caches of 400 histories and are not counted
COUNT_S: Final = 30.0


def count_objects(pid: int, file: Path) -> int:
    """Return how many objects the server holds, which it writes into a file when it is asked."""
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + COUNT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no count within {COUNT_S:g} s")
        time.sleep(0.05)
    return int(file.read_text("ascii"))


def main(argv: list[str] | None = None) -> None:
    """Run the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=3 * PART)
    arguments = parser.parse_args(argv)
    rows: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counted = folder / "objects"
        db_url = f"sqlite:///{folder / 'bot.db'}"
        program = ["-m", "benchmarks.counted", str(counted)]
        with echo_server(folder, db_url, program=program) as (server, port, platform):
            for part in range(FIRST + arguments.messages // PART):
                file = folder / "requests"
                write_requests(file, "127.0.0.1", "/webhook/feishu", make_bodies(PART, f"g{part}"))
                run_load(file, port)
                wait_until_answered(platform, (part + 1) * PART)
                rows.append((resident_mb(server), count_objects(server.pid, counted)))
                sys.stdout.write(
                    f"  after {(part + 1) * PART} messages: {rows[-1][0]:.1f} MB, {rows[-1][1]} objects\n"
                )
                sys.stdout.flush()
    filled = rows[FIRST - 1]
    more_mb, more_objects = rows[-1][0] - filled[0], rows[-1][1] - filled[1]
    measured = (len(rows) - FIRST) * PART
    if measured >= MILLION:
        show(f"growth over {measured} messages", more_mb, FLOOR, GOAL, "MB", raw=f"{more_objects:+d} objects")
        return
    sys.stdout.write(
        f"growth over {measured} messages: {more_mb:+.1f} MB, {more_objects:+d} objects, "
        f"{more_objects / measured * MILLION:+.0f} objects for a million by the same step "
        f"(over a million: floor {FLOOR:g} MB, goal {GOAL:g} MB; --messages {MILLION})\n"
    )


if __name__ == "__main__":
    main()
