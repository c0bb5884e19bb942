"""What more processes bring, what PostgreSQL costs, what a noisy chat and a dying process cost the others.

Prints the tables of ``docs/scaling.md``. The load, the fake platform, the database server and the workers share this
machine's processors, so a rate stops growing where they are used up: the processor time of a message, which is printed
beside it, is what a larger machine is reckoned by. Every rate has beside it a bare aiohttp handler under the same load.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import make_url

from benchmarks.durable_echo import (
    KEY,
    TOKEN,
    USERS,
    bare_rate,
    echo_server,
    make_bodies,
    wait_until_answered,
)
from benchmarks.load import write_requests
from benchmarks.processes import children, cpu_seconds, cpu_seconds_of, get_json, run_load, start_load
from feishu_bot.testing.feishu import sign_and_encrypt, text_event

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCAL_POSTGRESQL = (
    "postgresql://postgres@127.0.0.1:5432/postgres",
    "postgresql://root@127.0.0.1:5432/postgres",
)
WORKERS = (1, 2, 4)
QUIET_CHATS = 1000
BUSY_MEMBERS = 50
KEEP = 100_000


@dataclass(frozen=True, slots=True)
class Database:
    """An empty database and how to ask its server about it."""

    kind: str
    url: str
    admin: str | None = None

    def size(self) -> int:
        """Return the bytes that it takes on disk."""
        if self.admin is None:
            path = Path(self.url.removeprefix("sqlite:///"))
            return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
        return int(self._ask("SELECT pg_database_size(datname) FROM pg_database WHERE datname = %s"))

    def transactions(self) -> int | None:
        """Return how many transactions it has committed; None where nobody counts them."""
        if self.admin is None:
            return None
        return int(self._ask("SELECT xact_commit FROM pg_stat_database WHERE datname = %s"))

    def server_cpu_s(self) -> float:
        """Return the processor time of its connections' processes since they were made, if they run here."""
        if self.admin is None:
            return 0.0
        pids = self._ask("SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = %s") or []
        return sum(cpu_seconds_of(pid) for pid in pids)

    def _ask(self, question: str) -> Any:
        with psycopg.connect(self.admin or "", autocommit=True) as connection:
            row = connection.execute(question.encode(), [make_url(self.url).database]).fetchone()
        return None if row is None else row[0]


@contextmanager
def database(kind: str, folder: Path, admin: str | None) -> Iterator[Database]:
    """Yield an empty database that is removed afterwards."""
    if kind == "sqlite":
        yield Database(kind, f"sqlite:///{folder / 'bot.db'}")
        return
    name = f"feishu_bot_scaling_{os.getpid()}"
    with psycopg.connect(admin or "", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'".encode())
    try:
        yield Database(kind, make_url(admin or "").set(database=name).render_as_string(False), admin)
    finally:
        with psycopg.connect(admin or "", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())


def find_postgresql() -> str | None:
    """Return the URL of a local server that lets us in, or None."""
    for url in LOCAL_POSTGRESQL:
        try:
            psycopg.connect(url, connect_timeout=3).close()
        except psycopg.Error:
            continue
        return url
    return None


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def reply_ms(platform: int, salt: str, count: int, *, began_at: float, rate: float) -> dict[int, float]:
    """Return for each message the milliseconds from the instant it was offered to its visible reply."""
    shown = {m["reply_to"]: m["at"] for m in get_json(f"http://127.0.0.1:{platform}/_visible")["messages"]}
    return {n: (shown[f"om_{salt}_{n}"] - began_at - n / rate) * 1000 for n in range(count)}


# ------------------------------------------------------------------------------------ one, two, four processes


def measure(kind: str, workers: int, arguments: argparse.Namespace, round_: int) -> dict[str, float]:
    """Return the figures of one kind of database and one number of processes."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, database(kind, Path(name), arguments.postgresql) as base:
        folder, salt = Path(name), f"{kind[0]}{workers}x{round_}"
        closed, offered = folder / "closed", folder / "offered"
        write_requests(closed, "127.0.0.1", "/webhook/feishu", make_bodies(arguments.messages, salt))
        count = int(arguments.rate * arguments.seconds)
        write_requests(offered, "127.0.0.1", "/webhook/feishu", make_bodies(count, salt + "o"))
        with echo_server(folder, base.url, workers=workers, keep=KEEP) as (server, port, platform):
            before, used, there = base.size(), cpu_seconds(server), base.server_cpu_s()
            start = time.perf_counter()
            run_load(closed, port)
            wait_until_answered(platform, arguments.messages)
            found["rate"] = arguments.messages / (time.perf_counter() - start)
            found["cpu_ms"] = (cpu_seconds(server) - used) / arguments.messages * 1000
            found["server_cpu_ms"] = (base.server_cpu_s() - there) / arguments.messages * 1000
            sent = run_load(offered, port, rate=arguments.rate)
            wait_until_answered(platform, arguments.messages + count)
            late = reply_ms(platform, salt + "o", count, began_at=sent["began_at"], rate=arguments.rate)
        every = arguments.messages + count
        found |= {"ack_p50": sent["p50_ms"], "ack_p99": sent["p99_ms"]}
        found["reply_p50"] = percentile(list(late.values()), 0.5)
        found["reply_p99"] = percentile(list(late.values()), 0.99)
        found["bytes"] = (base.size() - before) / every
        transactions = base.transactions()
        if transactions is not None:
            found["transactions"] = transactions / every
        found["bare"] = bare_rate(folder, closed, arguments.messages)
    return found


def processes_table(arguments: argparse.Namespace, kinds: list[str]) -> None:
    """Print throughput and latency with one, two and four processes."""
    _say(
        f"\nThroughput (closed loop, 64 connections) and latency (at {arguments.rate:g} messages/s offered)\n\n"
        "| database | processes | messages/s | against one process | of a bare handler | CPU ms each | "
        "acknowledged p50 / p99 ms | visible reply p50 / p99 ms | bytes each | the database server's CPU ms, transactions each |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    shapes = [(kind, workers) for kind in kinds for workers in arguments.workers]
    found: dict[tuple[str, int], list[dict[str, float]]] = {shape: [] for shape in shapes}
    for n in range(arguments.runs):
        for kind, workers in shapes:
            found[kind, workers].append(measure(kind, workers, arguments, n))
    for kind, workers in shapes:
        rounds = found[kind, workers]
        row = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        single = found[kind, arguments.workers[0]]
        gain = statistics.median(ours["rate"] / one["rate"] for ours, one in zip(rounds, single, strict=True))
        bare = statistics.median(each["rate"] / each["bare"] for each in rounds)
        server = "–"
        if "transactions" in row:
            server = f"{row['server_cpu_ms']:.2f}, {row['transactions']:.2f}"
        _say(
            f"| {kind} | {workers} | {row['rate']:.0f} | {gain:.2f} × | {bare:.3f} | {row['cpu_ms']:.2f} "
            f"| {row['ack_p50']:.1f} / {row['ack_p99']:.1f} | {row['reply_p50']:.1f} / {row['reply_p99']:.1f} "
            f"| {row['bytes']:.0f} | {server} |\n"
        )


# ---------------------------------------------------------------------------------------------- a noisy chat


def busy_bodies(count: int) -> list[tuple[dict[str, str], bytes]]:
    """Return messages of many members of one group."""
    bodies = []
    for n in range(count):
        event = text_event(
            f"busy {n}",
            message_id=f"om_busy_{n}",
            open_id=f"ou_busy_{n % BUSY_MEMBERS}",
            chat_type="group",
            chat_id="oc_busy",
            mention_bot=True,
            token=TOKEN,
        )
        headers, body = sign_and_encrypt(event, encrypt_key=KEY)
        bodies.append(({"Content-Type": "application/json", **headers}, body))
    return bodies


def fairness_table(arguments: argparse.Namespace, kinds: list[str]) -> None:
    """Print what a chat that speaks as fast as it can costs a thousand that speak now and then."""
    _say(
        f"\n{QUIET_CHATS} quiet chats, {arguments.rate:g} messages/s in all, without and with one group that speaks "
        "as fast as it is acknowledged\n\n"
        "| database | processes | quiet alone, visible reply p50 / p99 ms | beside the busy one | of which the busy one's messages/s |\n"
        "|---|---|---|---|---|\n"
    )
    for kind in kinds:
        for workers in arguments.workers[:2]:
            cells, busy = [], 0.0
            for noisy in (False, True):
                with (
                    tempfile.TemporaryDirectory() as name,
                    database(kind, Path(name), arguments.postgresql) as base,
                ):
                    values, rate = _quiet_beside(Path(name), base, workers, arguments, noisy=noisy)
                busy = max(busy, rate)
                cells.append(f"{percentile(values, 0.5):.1f} / {percentile(values, 0.99):.1f}")
            _say(f"| {kind} | {workers} | {cells[0]} | {cells[1]} | {busy:.0f} |\n")


def _quiet_beside(
    folder: Path, base: Database, workers: int, arguments: argparse.Namespace, *, noisy: bool
) -> tuple[list[float], float]:
    count, salt = min(QUIET_CHATS, int(arguments.rate * arguments.seconds)), "quiet"
    quiet, loud = folder / "quiet", folder / "loud"
    bodies = []
    for n in range(count):
        event = text_event(
            "quiet",
            message_id=f"om_{salt}_{n}",
            open_id=f"ou_quiet_{n}",
            chat_id=f"oc_quiet_{n}",
            token=TOKEN,
        )
        headers, body = sign_and_encrypt(event, encrypt_key=KEY)
        bodies.append(({"Content-Type": "application/json", **headers}, body))
    write_requests(quiet, "127.0.0.1", "/webhook/feishu", bodies)
    write_requests(loud, "127.0.0.1", "/webhook/feishu", busy_bodies(arguments.messages if noisy else 0))
    with echo_server(folder, base.url, workers=workers, keep=KEEP) as (_, port, platform):
        if not noisy:
            sent = run_load(quiet, port, rate=arguments.rate)
            wait_until_answered(platform, count)
            late = reply_ms(platform, salt, count, began_at=sent["began_at"], rate=arguments.rate)
            return list(late.values()), 0.0
        with start_load(loud, port, connections=16, repeat=True) as load:
            sent = run_load(quiet, port, rate=arguments.rate, repeat=True)
            busy = load.result()
        wait_until_answered(platform, count + arguments.messages)
        late = reply_ms(platform, salt, count, began_at=sent["began_at"], rate=arguments.rate)
        # Only those that were offered while the busy chat spoke.
        together = [value for n, value in late.items() if n / arguments.rate < busy["seconds"]]
        return together or list(late.values()), arguments.messages / busy["seconds"]


# ------------------------------------------------------------------------------------------ a process that dies


def death_table(arguments: argparse.Namespace, kinds: list[str]) -> None:
    """Print what a worker that is killed costs the others."""
    _say(
        f"\nOne of four workers is killed at {arguments.rate:g} messages/s offered; what was not acknowledged is repeated\n\n"
        "| database | requests repeated | visible reply p99 ms before | longest after | seconds until replies are as before | lost |\n"
        "|---|---|---|---|---|---|\n"
    )
    for kind in kinds:
        with tempfile.TemporaryDirectory() as name, database(kind, Path(name), arguments.postgresql) as base:
            folder, salt = Path(name), "d"
            count = int(arguments.rate * (arguments.seconds + 8))
            file = folder / "requests"
            write_requests(file, "127.0.0.1", "/webhook/feishu", make_bodies(count, salt))
            with echo_server(folder, base.url, workers=4, keep=KEEP) as (server, port, platform):
                with start_load(file, port, rate=arguments.rate, repeat=True) as load:
                    time.sleep(arguments.seconds)
                    killed_at = time.time()
                    os.kill(children(server.pid)[0], signal.SIGKILL)
                    sent = load.result()
                wait_until_answered(platform, count)
                late = reply_ms(platform, salt, count, began_at=sent["began_at"], rate=arguments.rate)
        offered = {n: sent["began_at"] + n / arguments.rate for n in late}
        before = [value for n, value in late.items() if offered[n] + value / 1000 < killed_at]
        usual = percentile(before, 0.99)
        after = {n: value for n, value in late.items() if offered[n] + value / 1000 >= killed_at}
        slow = [offered[n] + value / 1000 for n, value in after.items() if value > 2 * usual]
        recovered = max(slow, default=killed_at) - killed_at
        _say(
            f"| {kind} | {sent['repeated']:.0f} | {usual:.1f} | {max(after.values()):.0f} "
            f"| {recovered:.2f} | {count - len(late)} |\n"
        )


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> None:
    """Run the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=3000, help="messages of each closed loop")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=150.0, help="messages per second offered")
    parser.add_argument("--seconds", type=float, default=7.0, help="how long they are offered")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--postgresql", default=find_postgresql(), help="a server's URL; may make databases")
    parser.add_argument("--only", choices=["processes", "fairness", "death"], default=None)
    arguments = parser.parse_args(argv)
    kinds = ["sqlite"] + (["postgresql"] if arguments.postgresql else [])
    if not arguments.postgresql:
        _say("NOT MEASURED: PostgreSQL (no server on 127.0.0.1:5432 lets us in)\n")
    load1 = os.getloadavg()[0]
    _say(f"{os.cpu_count()} processors, load {load1:.1f} before; {USERS} people\n")
    tables = {"processes": processes_table, "fairness": fairness_table, "death": death_table}
    for name, table in tables.items():
        if arguments.only in {None, name}:
            table(arguments, kinds)


if __name__ == "__main__":
    main()
