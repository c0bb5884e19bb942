"""``python -m benchmarks [NAME …]``: all figures, or those named.

``nonebot_echo`` installs its peer into a throw-away environment; ``peers``, which installs three, runs when it is named,
and so does ``scale``, which makes a database of 10 million messages first.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys

from benchmarks.processes import ROOT

FIGURES = (
    "durable_echo",
    "nonebot_echo",
    "postgresql_echo",
    "server",
    "growth",
    "crowd",
    "streaming",
    "library",
    "scaling",
    "budgets",
)
ASKED_FOR = ("peers", "scale")


def main() -> None:
    """Run the figures."""
    names = sys.argv[1:] or list(FIGURES)
    unknown = sorted(set(names) - {*FIGURES, *ASKED_FOR})
    if unknown:
        sys.exit(f"no such figure: {', '.join(unknown)}; there are {', '.join((*FIGURES, *ASKED_FOR))}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()
    sys.stdout.write(
        f"commit {commit or 'unknown'}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} before\n"
    )
    for name in names:
        sys.stdout.write(f"\n{name}\n")
        sys.stdout.flush()
        importlib.import_module(f"benchmarks.{name}").main([])


if __name__ == "__main__":
    main()
