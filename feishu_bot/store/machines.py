"""Whether several machines are about to share a SQLite file, which only one may use."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from feishu_bot.store.engine import database_now_ms, normalise_url, open_engine
from feishu_bot.store.leases import STALE_MS, Owner
from feishu_bot.store.schema import processes

MOUNTS: Final = Path("/proc/self/mounts")
_NETWORK: Final = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "nfs", "nfs4"}
    | {"smb3", "smbfs"}
)
_ADVICE: Final = "several machines need PostgreSQL or MariaDB"


def problem_of(db_url: str) -> str | None:
    """Return why this database is not fit for the machines that use it; None where it is, or cannot be read.

    Makes no database. Raises StoreUnavailable for a URL that no database of ours has.
    """
    url = normalise_url(db_url)
    if url.drivername != "sqlite" or not url.database or url.database.startswith((":", "file:")):
        return None
    path = Path(url.database).expanduser()
    other = _other_machine(db_url) if path.exists() else None
    if other is not None:
        return f"another machine ({other}) uses this SQLite file; {_ADVICE}"
    return network_problem(path)


def network_problem(path: Path, mounts: str | None = None) -> str | None:
    """Return what is wrong with a SQLite file on a network's file system, None for one on a disk of this machine.

    ``mounts`` is the kernel's list, for tests.
    """
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(encoding="utf-8", errors="replace")
        except OSError:  # no Linux
            return None
    folder = path.absolute().parent
    kinds = {}
    for line in mounts.splitlines():
        _, where, kind, *_ = line.split(" ")
        kinds[Path(where.replace("\\040", " "))] = kind  # a later mount hides an earlier one
    kind = next((kinds[each] for each in (folder, *folder.parents) if each in kinds), "")
    if kind not in _NETWORK:
        return None
    return f"{path} is on a file system of the network ({kind}), where SQLite cannot keep its promises; {_ADVICE}"


def _other_machine(db_url: str) -> str | None:
    own, engine = Owner.current(), open_engine(db_url)
    try:
        with engine.execution_options(reader=True).connect() as connection:
            since = database_now_ms(connection) - STALE_MS
            alive = select(processes.c.host).where(processes.c.heartbeat_at > since)
            hosts = connection.execute(alive).scalars().all()
    except DBAPIError:  # no database of ours yet, or one that cannot be read: its start tells
        return None
    finally:
        engine.dispose()
    return next((host.split("/")[0] for host in hosts if not own.shares_machine(host)), None)
