"""What a budget that all share costs: its one row is updated by every process, with every batch.

Durable echo with two processes on PostgreSQL, with a budget of each person only, and with one of everybody beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.durable_echo import echo_server, make_bodies, wait_until_answered
from benchmarks.load import write_requests
from benchmarks.processes import run_load
from benchmarks.scaling import database, find_postgresql

FLOOR, GOAL = 0.8, 0.95  # of the rate without
_OWN = "{name: own, scope: user, window: day, limit_tokens: 1000000000}"
_SHARED = "{name: all, scope: global, window: day, limit_tokens: 1000000000000, limit_cost_usd: 1000}"


def rate(admin: str | None, kind: str, budgets: str, *, messages: int, workers: int) -> float:
    """Return messages per second from the first request to the last accepted reply."""
    with tempfile.TemporaryDirectory() as name, database(kind, Path(name), admin) as base:
        folder = Path(name)
        file = folder / "requests"
        write_requests(file, "127.0.0.1", "/webhook/feishu", make_bodies(messages, "b"))
        more = f"budgets: [{budgets}]\n"
        with echo_server(folder, base.url, workers=workers, more=more) as (_, port, platform):
            start = time.perf_counter()
            run_load(file, port)
            wait_until_answered(platform, messages)
            return messages / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> float:
    """Run the figure and return the ratio's median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sqlite", action="store_true", help="on SQLite instead")
    parser.add_argument("--postgresql", default=None, help="URL of a server; default: a local one")
    arguments = parser.parse_args(argv)
    kind = "sqlite" if arguments.sqlite else "postgresql"
    admin = None if arguments.sqlite else arguments.postgresql or find_postgresql()
    if admin is None and not arguments.sqlite:
        sys.stdout.write("NOT MEASURED: no PostgreSQL server on 127.0.0.1:5432 lets us in\n")
        return 0.0
    shape = {"messages": arguments.messages, "workers": arguments.workers}
    ratios = []
    for number in range(arguments.runs):
        without = rate(admin, kind, _OWN, **shape)
        shared = rate(admin, kind, f"{_OWN}, {_SHARED}", **shape)
        ratios.append(shared / without)
        sys.stdout.write(
            f"  run {number + 1}: without {without:.0f}/s  with {shared:.0f}/s  ratio {ratios[-1]:.3f}\n"
        )
        sys.stdout.flush()
    ratio = statistics.median(ratios)
    verdict = "goal reached" if ratio >= GOAL else "floor reached" if ratio >= FLOOR else "BELOW THE FLOOR"
    sys.stdout.write(
        f"a global budget with {arguments.workers} processes on {kind}: {ratio:.3f} of the rate without (floor {FLOOR}, "
        f"goal {GOAL}; spread {min(ratios):.3f}–{max(ratios):.3f}): {verdict}\n"
    )
    return ratio


if __name__ == "__main__":
    main()
