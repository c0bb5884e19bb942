"""Runs the server with a wall clock that is wrong by some seconds: ``shifted_server SECONDS --config FILE``.

Everything that asks Python for the wall clock's time gets the wrong one; the database server's clock is right.
"""

from __future__ import annotations

import sys
import time

from feishu_bot import cli


def main() -> None:
    seconds = float(sys.argv.pop(1))
    right = time.time
    time.time = lambda: right() + seconds
    sys.argv[1:1] = ["run"]
    cli.main()


if __name__ == "__main__":
    main()
