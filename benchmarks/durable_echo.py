"""Encrypted Feishu webhook in → verified → recorded → answered → reply accepted by a fake platform, per second.

Beside it, in turn: a bare aiohttp handler that parses the same bodies and does nothing else. The load, the fake
platform and the server are three processes; SQLite with ``synchronous=FULL``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.load import write_requests
from benchmarks.processes import (
    ROOT,
    cpu_seconds,
    free_port,
    get_json,
    process,
    run_load,
    wait_until_ready,
)
from feishu_bot.testing.feishu import sign_and_encrypt, text_event

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

FLOOR, GOAL = 0.05, 0.1
USERS = 400
KEY, TOKEN = "benchmark-encrypt-key", "benchmark-token"

_CONFIG = """
server: {{port: {port}, workers: {workers}, min_free_mb: 0}}
ai: {{conversation_persistence: {{db_url: "{db_url}"}}{ai}}}
plugins: {{enabled: []}}
platforms:
  feishu:
    enabled: true
    app_id: cli_benchmark
    app_secret: benchmark
    encrypt_key: {key}
    messages_per_s: null
    messages_per_chat_per_s: null
    verification_token: {token}
    base_url: http://127.0.0.1:{platform}
"""


def make_bodies(count: int, salt: str) -> list[tuple[dict[str, str], bytes]]:
    """Return signed messages of many users, each with an id of its own."""
    bodies = []
    for n in range(count):
        event = text_event(
            f"第 {n} 条消息：今天的天气怎么样？",
            message_id=f"om_{salt}_{n}",
            open_id=f"ou_user_{n % USERS}",
            chat_id=f"oc_chat_{n % USERS}",
            token=TOKEN,
        )
        headers, body = sign_and_encrypt(event, encrypt_key=KEY)
        bodies.append(({"Content-Type": "application/json", **headers}, body))
    return bodies


@contextmanager
def echo_server(
    folder: Path,
    db_url: str,
    *,
    profile: Path | None = None,
    workers: int = 1,
    keep: int = 10,
    ai: str = "",
    more: str = "",
    program: Sequence[str] = (str(ROOT / "bot.py"),),
) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Run a fake platform and the server that answers there; yield the server, its port and the platform's."""
    port, platform = free_port(), free_port()
    config = folder / "config.yaml"
    config.write_text(
        _CONFIG.format(
            port=port, platform=platform, key=KEY, token=TOKEN, db_url=db_url, workers=workers, ai=ai
        )
        + more,
        encoding="utf-8",
    )
    fake = ["-m", "feishu_bot.testing.feishu", "--port", str(platform), "--keep", str(keep)]
    run = [*program, "run", "--config", str(config)]
    if profile is not None:
        run = ["-m", "cProfile", "-o", str(profile), *run]
    with process(fake, platform, folder / "fake.log"), process(run, port, folder / "server.log") as server:
        wait_until_ready(port)
        yield server, port, platform


def wait_until_answered(platform: int, count: int) -> None:
    """Wait until the platform has accepted so many replies."""
    deadline = time.monotonic() + 120
    while get_json(f"http://127.0.0.1:{platform}/_visible")["accepted"] < count:
        if time.monotonic() > deadline:
            raise RuntimeError("not everything was answered within 120 s")
        time.sleep(0.01)


def durable_rate(
    folder: Path, file: Path, count: int, db_url: str, *, profile: Path | None
) -> dict[str, float]:
    """Return messages per second from the first request to the last accepted reply."""
    with echo_server(folder, db_url, profile=profile) as (server, port, platform):
        used = cpu_seconds(server)
        start = time.perf_counter()
        sent = run_load(file, port)
        wait_until_answered(platform, count)
        seconds = time.perf_counter() - start
        used = cpu_seconds(server) - used
    return {
        "rate": count / seconds,
        "cpu_ms": used / count * 1000,
        "ack_p99_ms": sent["p99_ms"],
        "answered": sent["answered"],
    }


def bare_rate(folder: Path, file: Path, count: int) -> float:
    """Return requests per second of the bare handler."""
    port = free_port()
    with process(["-m", "benchmarks.bare", str(port)], port, folder / "bare.log"):
        return count / run_load(file, port)["seconds"]


def main(argv: list[str] | None = None) -> float:
    """Run the figure and return the ratio's median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--db-url", default=None, help="another empty database instead of SQLite")
    parser.add_argument("--profile", type=Path, default=None, help="write a profile of the server")
    arguments = parser.parse_args(argv)
    ratios = []
    for number in range(arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = folder / "requests"
            write_requests(
                file, "127.0.0.1", "/webhook/feishu", make_bodies(arguments.messages, f"r{number}")
            )
            db_url = arguments.db_url or f"sqlite:///{folder / 'bot.db'}"
            durable = durable_rate(folder, file, arguments.messages, db_url, profile=arguments.profile)
            bare = bare_rate(folder, file, arguments.messages)
        ratios.append(durable["rate"] / bare)
        sys.stdout.write(
            f"  run {number + 1}: durable {durable['rate']:.0f}/s  bare {bare:.0f}/s  "
            f"ratio {ratios[-1]:.3f}  server {durable['cpu_ms']:.2f} ms CPU each  acknowledged p99 {durable['ack_p99_ms']:.0f} ms (closed loop)\n"
        )
    ratio = statistics.median(ratios)
    verdict = "goal reached" if ratio >= GOAL else "floor reached" if ratio >= FLOOR else "BELOW THE FLOOR"
    sys.stdout.write(
        f"durable echo / bare aiohttp: {ratio:.3f} (floor {FLOOR}, goal {GOAL}; "
        f"spread {min(ratios):.3f}–{max(ratios):.3f}): {verdict}\n"
    )
    return ratio


if __name__ == "__main__":
    main()
