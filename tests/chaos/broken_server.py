"""The command line with exactly one promise broken: what the chaos driver has to find.

``broken_server.py fence|early|uuid run --config FILE``. A patch in the process itself, and nowhere else: the program has
no such switch.
"""

from __future__ import annotations

import asyncio
import secrets
import sys

from sqlalchemy import update

from feishu_bot import cli
from feishu_bot.intake import Intake
from feishu_bot.model import Outgoing
from feishu_bot.store import commit
from feishu_bot.store.schema import inbox
from feishu_bot.store.work import Recorded


def fence() -> None:
    """An answer is stored whoever holds the lane by now, and whatever has become of the message."""
    commit.holds = lambda row, _lease: row is not None
    (number, _still_open) = commit._END.whereclause.clauses
    commit._END = update(inbox).where(number).values(commit._END._values)


def early() -> None:
    """An event is acknowledged before it is on disk."""

    in_time = Intake.record
    tasks = set()

    async def record(self, messages):
        tasks.add(asyncio.create_task(in_time(self, messages)))
        return [Recorded.NEW] * len(messages)

    Intake.record = record


def uuid() -> None:
    """Each attempt to send has an idempotency key of its own."""
    Outgoing.idempotency_key = property(lambda _self: secrets.token_hex(16))


BREAKS = {"fence": fence, "early": early, "uuid": uuid}

if __name__ == "__main__":
    BREAKS[sys.argv.pop(1)]()
    cli.main()
