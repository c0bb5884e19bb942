"""The durable echo on PostgreSQL beside the same on SQLite, by turns, on one machine."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.databases import local_postgresql
from benchmarks.durable_echo import durable_rate, make_bodies
from benchmarks.load import write_requests
from benchmarks.verdict import show_at_least, spread

FLOOR, GOAL = 0.5, 0.8  # of the rate on SQLite


def main(argv: list[str] | None = None) -> None:
    """Run the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args(argv)
    ratios = []
    for number in range(arguments.runs):
        with (
            tempfile.TemporaryDirectory() as name,
            local_postgresql("feishu_bot_echo") as db_url,
        ):
            if db_url is None:
                sys.stdout.write("NOT MEASURED: PostgreSQL (no server on 127.0.0.1:5432 takes us)\n")
                return
            folder = Path(name)
            file = folder / "requests"
            bodies = make_bodies(arguments.messages, f"p{number}")
            write_requests(file, "127.0.0.1", "/webhook/feishu", bodies)
            urls = {"sqlite": f"sqlite:///{folder / 'bot.db'}", "postgresql": db_url}
            found = {
                kind: durable_rate(folder, file, arguments.messages, url, profile=None)
                for kind, url in urls.items()
            }
        ratios.append(found["postgresql"]["rate"] / found["sqlite"]["rate"])
        raw = "  ".join(
            f"{kind} {row['rate']:.0f}/s, {row['cpu_ms']:.2f} ms CPU" for kind, row in found.items()
        )
        sys.stdout.write(f"  run {number + 1}: {raw}  ratio {ratios[-1]:.2f}\n")
        sys.stdout.flush()
    show_at_least(
        "durable echo on PostgreSQL / on SQLite",
        statistics.median(ratios),
        FLOOR,
        GOAL,
        "",
        raw=spread(ratios),
    )


if __name__ == "__main__":
    main()
