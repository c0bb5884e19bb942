"""Who works: processes and their heartbeats, lanes that are ready, leases renewed and taken over."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, func, or_, select, update

from feishu_bot.errors import StoreUnavailable
from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.inbox import IS_OPEN
from feishu_bot.store.outbox import IS_UNSENT
from feishu_bot.store.schema import inbox, lanes, outbox, processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.store.work import Lease, Transaction

STALE_MS = 60_000  # a process without a heartbeat for so long no longer counts
FORGOTTEN_MS = 24 * 3600 * 1000  # and is taken off the list after so long


@dataclass(frozen=True, slots=True)
class Owner:
    """This process, so that its leases can be told from those of any other, also of a later one.

    ``host`` is one running kernel and process namespace: only there does a pid mean anything.
    """

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.host}|{self.pid}|{self.started}"

    @classmethod
    def current(cls) -> Owner:
        """Return the owner that this process is."""
        pid = os.getpid()
        return cls(_host(), pid, _start_time(pid) or "0")

    @classmethod
    def parse(cls, value: str) -> Owner:
        host, pid, started = value.rsplit("|", 2)
        return cls(host, int(pid), started)

    def shares_machine(self, other_host: str) -> bool:
        """Say whether ``other_host`` is this machine: another container on it, or the same after a restart."""
        name, _, rest = self.host.partition("/")
        other_name, _, other_rest = other_host.partition("/")
        boot, other_boot = rest.partition("/")[0], other_rest.partition("/")[0]
        return name == other_name or (boot == other_boot and boot != "-")

    def is_gone(self, host: str) -> bool:
        """Say whether this owner ran on ``host`` and certainly no longer does."""
        return self.host == host and _start_time(self.pid) != self.started


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13]
        namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    except OSError:  # no Linux: the name alone must do
        boot, namespace = "-", "-"
    return f"{socket.gethostname()[:64]}/{boot}/{namespace}"


def _start_time(pid: int) -> str | None:
    """Return when a process started, in the kernel's words; None if it does not run any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if Path("/proc/self").exists():
            return None
        return "0" if _answers(pid) else None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else fields[19]  # a zombie works no more


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


_REGISTERED = select(processes.c.owner, processes.c.host, processes.c.heartbeat_at)


def register(tx: Transaction, owner: Owner, version: str) -> None:
    """Enter this process. Raises StoreUnavailable when another machine uses the same SQLite file."""
    tx.connection.execute(delete(processes).where(processes.c.heartbeat_at < tx.now_ms - FORGOTTEN_MS))
    for row in tx.connection.execute(_REGISTERED).all():
        alive = row.heartbeat_at > tx.now_ms - STALE_MS
        if tx.kind == "sqlite" and alive and not owner.shares_machine(row.host):
            raise StoreUnavailable(
                f"this SQLite database is in use by another machine ({row.host.split('/')[0]}); "
                "several machines need PostgreSQL or MariaDB"
            )
    tx.connection.execute(
        insert_ignore(tx.kind, processes, ("owner",)),
        {
            "owner": str(owner),
            "host": owner.host,
            "pid": owner.pid,
            "version": version,
            "started_at": tx.now_ms,
            "heartbeat_at": tx.now_ms,
        },
    )


def unregister(tx: Transaction, owner: Owner) -> None:
    """Give back what this process holds and take it off the list: another goes on at once."""
    release_owner(tx, str(owner))


def release_owner(tx: Transaction, owner: str) -> None:
    """End every lease of ``owner`` now."""
    tx.connection.execute(
        update(lanes).where(lanes.c.lease_owner == owner, lanes.c.ready_at.is_not(None)).values(lease_until=0)
    )
    tx.connection.execute(
        update(lanes)
        .where(lanes.c.send_owner == owner, lanes.c.send_ready_at.is_not(None))
        .values(send_until=0)
    )
    tx.connection.execute(delete(processes).where(processes.c.owner == owner))


_BEAT = update(processes).where(processes.c.owner == bindparam("o")).values(heartbeat_at=bindparam("now"))
_RENEW_WORK = (
    update(lanes)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)), lanes.c.lease_owner == bindparam("o"))
    .values(lease_until=bindparam("until"))
)
_RENEW_SEND = (
    update(lanes)
    .where(lanes.c.key.in_(bindparam("keys", expanding=True)), lanes.c.send_owner == bindparam("o"))
    .values(send_until=bindparam("until"))
)


def renew(tx: Transaction, owner: str, working: Sequence[str], sending: Sequence[str]) -> None:
    """Renew the leases of lanes still worked on, and this process's heartbeat."""
    tx.connection.execute(_BEAT, {"o": owner, "now": tx.now_ms})
    until = tx.now_ms + tx.lease_ms
    if working:
        tx.connection.execute(_RENEW_WORK, {"keys": sorted(working), "o": owner, "until": until})
    if sending:
        tx.connection.execute(_RENEW_SEND, {"keys": sorted(sending), "o": owner, "until": until})


def take_over(tx: Transaction, host: str) -> list[str]:
    """End the leases of processes on this host that no longer run; return those owners."""
    holders = select(lanes.c.lease_owner).where(
        lanes.c.ready_at.is_not(None), lanes.c.lease_owner.is_not(None)
    )
    senders = select(lanes.c.send_owner).where(
        lanes.c.send_ready_at.is_not(None), lanes.c.send_owner.is_not(None)
    )
    names = set(tx.connection.execute(holders.distinct()).scalars())
    names |= set(tx.connection.execute(senders.distinct()).scalars())
    names |= {row.owner for row in tx.connection.execute(_REGISTERED)}
    gone = sorted(name for name in names if Owner.parse(name).is_gone(host))
    for name in gone:
        release_owner(tx, name)
    return gone


_READY = (
    select(lanes.c.key)
    .where(
        lanes.c.ready_at <= bindparam("now"),
        or_(lanes.c.lease_token.is_(None), lanes.c.lease_until < bindparam("now")),
    )
    .order_by(lanes.c.ready_at)
    .limit(bindparam("most"))
)
_READY_TO_SEND = (
    select(lanes.c.key)
    .where(
        lanes.c.send_ready_at <= bindparam("now"),
        or_(lanes.c.send_token.is_(None), lanes.c.send_until < bindparam("now")),
    )
    .order_by(lanes.c.send_ready_at)
    .limit(bindparam("most"))
)


def ready_lanes(tx: Transaction, most: int) -> tuple[list[str], list[str]]:
    """Return lanes with messages to begin and lanes with parts to send that nobody holds, oldest first."""
    parameters = {"now": tx.now_ms, "most": most}
    work = list(tx.connection.execute(_READY, parameters).scalars())
    send = list(tx.connection.execute(_READY_TO_SEND, parameters).scalars())
    return work, send


def waiting_lanes(tx: Transaction) -> list[str]:
    """Return lanes whose head waits for an instant to come."""
    statement = select(lanes.c.key).where(lanes.c.ready_at > tx.now_ms, lanes.c.lease_token.is_(None))
    return list(tx.connection.execute(statement.limit(10_000)).scalars())


def give_back(tx: Transaction, lease: Lease, ready_at: int) -> None:
    """Release a lane whose message was not ended; it is ready again at ``ready_at``."""
    tx.connection.execute(
        update(lanes)
        .where(
            lanes.c.key == lease.lane_key,
            lanes.c.lease_token == lease.token,
            lanes.c.lease_owner == lease.owner,
        )
        .values(lease_owner=None, lease_token=None, lease_until=0, ready_at=ready_at)
    )


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits: open messages and the arrival of the oldest (ms), unsent parts and the oldest's."""

    waiting: int
    oldest_at: int | None
    unsent: int
    oldest_unsent_at: int | None


def depth(tx: Transaction) -> Depth:
    """Count what waits; by the partial indexes, so it costs what waits and not what is stored."""
    waiting = tx.connection.execute(select(func.count(), func.min(inbox.c.received_at)).where(IS_OPEN)).one()
    unsent = tx.connection.execute(select(func.count(), func.min(outbox.c.created_at)).where(IS_UNSENT)).one()
    return Depth(waiting[0], waiting[1], unsent[0], unsent[1])
