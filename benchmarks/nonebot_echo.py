"""The durable echo beside a NoneBot2 echo bot that stores nothing: the same requests, the same fake Feishu, by turns.

NoneBot2 and its Feishu adapter are installed into a throw-away environment, which is gone afterwards; nothing of them
becomes part of the product. Where they cannot be installed, the figure is NOT MEASURED.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.durable_echo import KEY, TOKEN, durable_rate, make_bodies, wait_until_answered
from benchmarks.load import write_requests
from benchmarks.peers import install
from benchmarks.processes import cpu_seconds, free_port, process, run_load
from benchmarks.verdict import show_at_least, spread

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

FLOOR, GOAL = 2.5, 5.0  # times the peer's rate
DRIVERS: Final = (
    "aiohttp",
    "httpx",
)  # its HTTP client: the faster one, which the verdict is about, and its templates' choice
FEW: Final = 200  # messages for the slow one, which makes a client for each call
REQUIREMENTS: Final = ("nonebot2[fastapi,httpx,aiohttp]", "nonebot-adapter-feishu")
APP_ID: Final = "cli_benchmark"

_PROGRAM = """
import json, sys
import nonebot
from nonebot import on_message
from nonebot.adapters.feishu import Adapter, MessageEvent

options = json.loads(sys.argv[1])
nonebot.init(host="127.0.0.1", log_level="ERROR", **options)
nonebot.get_driver().register_adapter(Adapter)
echo = on_message()

@echo.handle()
async def answer(event: MessageEvent):
    await echo.finish(event.get_message())

nonebot.run(access_log=False)
"""


@contextmanager
def peer(folder: Path, python: Path, driver: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Run a fake platform and the peer that answers there; yield the peer, its port and the platform's."""
    port, platform = free_port(), free_port()
    program = folder / "echo_bot.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    options = {
        "driver": f"~fastapi+~{driver}",
        "port": port,
        "feishu_api_base": f"http://127.0.0.1:{platform}",
        "feishu_bots": [
            {"app_id": APP_ID, "app_secret": "benchmark", "encrypt_key": KEY, "verification_token": TOKEN}
        ],
    }
    fake = ["-m", "feishu_bot.testing.feishu", "--port", str(platform), "--keep", "10"]
    with (
        process(fake, platform, folder / "fake.log"),
        process([str(program), json.dumps(options)], port, folder / "peer.log", python=python) as server,
    ):
        yield server, port, platform


def peer_rate(folder: Path, python: Path, driver: str, file: Path, count: int) -> dict[str, float]:
    """Return the peer's messages per second from the first request to the last accepted reply."""
    with peer(folder, python, driver) as (server, port, platform):
        used = cpu_seconds(server)
        start = time.perf_counter()
        sent = run_load(file, port)
        if sent["answered"] != count:
            log = (folder / "peer.log").read_text(errors="replace")[-1000:]
            raise RuntimeError(f"the peer took {sent['answered']:.0f} of {count} messages: {log}")
        wait_until_answered(platform, count)
        seconds = time.perf_counter() - start
        return {"rate": count / seconds, "cpu_ms": (cpu_seconds(server) - used) / count * 1000}


def main(argv: list[str] | None = None) -> None:
    """Run the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--python", type=Path, default=None, help="of an environment that has the peer already"
    )
    arguments = parser.parse_args(argv)
    ratios: dict[str, list[float]] = {driver: [] for driver in DRIVERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = arguments.python or install("NoneBot2 Feishu echo", REQUIREMENTS, folder)
        if python is None:
            return
        for number in range(arguments.runs):
            place = folder / str(number)
            place.mkdir()
            ours, theirs = place / "requests", place / "their-requests"
            bodies = make_bodies(arguments.messages, f"n{number}")
            write_requests(ours, "127.0.0.1", "/webhook/feishu", bodies)
            durable = durable_rate(
                place, ours, arguments.messages, f"sqlite:///{place / 'bot.db'}", profile=None
            )
            for driver in DRIVERS:
                count = arguments.messages if driver == DRIVERS[0] else min(FEW, arguments.messages)
                write_requests(theirs, "127.0.0.1", f"/feishu/{APP_ID}", bodies[:count])
                other = peer_rate(place, python, driver, theirs, count)
                ratios[driver].append(durable["rate"] / other["rate"])
                sys.stdout.write(
                    f"  run {number + 1}: durable {durable['rate']:.0f}/s, {durable['cpu_ms']:.2f} ms CPU each  "
                    f"NoneBot2 with {driver} {other['rate']:.0f}/s, {other['cpu_ms']:.2f} ms CPU each  "
                    f"ratio {ratios[driver][-1]:.2f}\n"
                )
                sys.stdout.flush()
    lacks = "the peer: not durable, not ordered, not deduplicated, signature not checked"
    fast, slow = (ratios[driver] for driver in DRIVERS)
    show_at_least(
        f"durable echo / NoneBot2 Feishu echo with {DRIVERS[0]}",
        statistics.median(fast),
        FLOOR,
        GOAL,
        "x",
        raw=f"{spread(fast)}; {lacks}",
    )
    sys.stdout.write(
        f"the same with {DRIVERS[1]}: {statistics.median(slow):.3g} x ({spread(slow)}); no floor\n"
    )


if __name__ == "__main__":
    main()
