"""``make chaos``: everything that can go wrong, on each kind of database, with the figures."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from feishu_bot.chaos import report
from feishu_bot.chaos.bases import Own, Scratch
from feishu_bot.chaos.driver import run
from feishu_bot.chaos.scenario import EVERYTHING, KILLS, Scenario
from feishu_bot.chaos.servers import why_not_apart
from feishu_bot.cli.shared import progress
from feishu_bot.errors import BotError
from feishu_bot.testing.clusters import Unavailable

if TYPE_CHECKING:
    from feishu_bot.chaos.driver import Result

KINDS: Final = ("sqlite", "postgresql", "mariadb")


def _say(words: str) -> None:
    sys.stdout.write(words + "\n")
    sys.stdout.flush()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make chaos ARGS=...", description=__doc__)
    parser.add_argument("--on", nargs="+", choices=KINDS, default=KINDS, help="kinds of databases")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, shared by the runs")
    parser.add_argument("--messages", type=int, help="end each run after so many, instead")
    parser.add_argument("--chats", type=int, default=20, help="people who write")
    parser.add_argument("--rate", type=float, default=15.0, help="messages per second")
    parser.add_argument("--workers", type=int, default=4, help="processes of a group")
    parser.add_argument("--groups", type=int, help="groups of processes; default: 2 on PostgreSQL, else 1")
    parser.add_argument("--together", action="store_true", help="without namespaces")
    parser.add_argument(
        "--faults", nargs="+", metavar="KIND", help="only these, e.g. kill 'platform feishu lost'"
    )
    parser.add_argument("--kills", action="store_true", help="only processes that are killed")
    parser.add_argument("--gap", type=float, default=1.2, help="mean seconds between two accidents")
    parser.add_argument("--lease", type=float, default=15.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=1, help="runs on each kind, with seeds that follow")
    parser.add_argument("--seed", type=int, help="repeat the accidents of an earlier run")
    parser.add_argument("--keep", action="store_true", help="keep the logs of good runs, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    return parser.parse_args(arguments)


def _scenario(options: argparse.Namespace, kind: str, seed: int, *, apart: bool) -> Scenario:
    groups = options.groups or (2 if kind == "postgresql" else 1)
    return Scenario(
        seed=seed,
        seconds=options.minutes * 60 / (len(options.on) * options.rounds),
        messages=options.messages,
        chats=options.chats,
        rate=options.rate,
        groups=groups,
        workers=options.workers,
        apart=apart and groups > 1,
        lease_s=options.lease,
        faults=options.faults or (KILLS if options.kills else EVERYTHING),
        gap_s=options.gap,
    )


def _run(scenario: Scenario, kind: str, *, keep: bool) -> Result:
    """Run once; the folder stays where somebody will want to look into it. Raises Unavailable and BotError."""
    folder = Path(tempfile.mkdtemp(prefix="feishu-bot-chaos-"))
    try:
        base = Scratch(folder) if kind == "sqlite" else Own(kind)
    except Unavailable:
        folder.rmdir()
        raise
    good = False
    try:
        with progress() as show:
            tell = (
                (lambda words: show(f"{kind}: {words}", 0, 0)) if show is not None else (lambda _words: None)
            )
            result = asyncio.run(run(scenario, base, folder, tell=tell))
        good = result.verdict.kept
    finally:
        base.close()
        if good and not keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            sys.stderr.write(f"logs and configurations are in {folder}\n")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run it; return 0 when the promise was kept everywhere, 1 when not."""
    options = parse(arguments)
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    reason = "asked for" if options.together else why_not_apart()
    if reason is not None and (options.groups or 2) > 1 and "postgresql" in options.on:
        sys.stderr.write(f"groups of processes are not in namespaces of their own: {reason}\n")
    failed = 0
    for kind in options.on:
        for number in range(options.rounds):
            scenario = _scenario(options, kind, seed + number, apart=reason is None)
            try:
                result = _run(scenario, kind, keep=options.keep)
            except Unavailable as error:
                sys.stderr.write(f"NOT TESTED: {kind} ({error})\n")
                break
            except BotError as error:
                sys.stderr.write(f"{kind}, seed {scenario.seed}: {error}\n")
                failed += 1
                continue
            failed += not result.verdict.kept
            _say(orjson.dumps(report.document(result)).decode() if options.json else report.page(result))
    return int(failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(1)
