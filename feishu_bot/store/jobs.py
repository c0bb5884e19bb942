"""Runs of scheduled jobs: whoever inserts (job, fire time) runs it, in whatever process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Select, bindparam, delete, func, select, update

from feishu_bot.store.engine import insert_ignore
from feishu_bot.store.leases import STALE_MS, Owner
from feishu_bot.store.schema import job_runs, processes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from feishu_bot.store.work import Transaction

GIVEN_UP_MS = 3_600_000  # a run whose machine has been silent for so long will not end any more
KEPT_MS = 90 * 24 * 3_600_000
_FROM_HERE_ON = ""  # the node of a row that is no run: what fired before it is not missed


@dataclass(frozen=True, slots=True)
class JobRun:
    """One run of a job; instants in ms. ``finished_at`` None: it runs, or its process died."""

    job: str
    fire_time: int
    node: str
    started_at: int
    finished_at: int | None
    error: str | None


_COLUMNS = (
    job_runs.c.job,
    job_runs.c.fire_time,
    job_runs.c.node,
    job_runs.c.started_at,
    job_runs.c.finished_at,
    job_runs.c.error,
)
_THIS = (job_runs.c.job == bindparam("j")) & (job_runs.c.fire_time == bindparam("f"))
_LOCK = select(*_COLUMNS).where(_THIS).with_for_update()
_NEWER = (
    select(job_runs.c.job)
    .where(job_runs.c.job == bindparam("j"), job_runs.c.fire_time > bindparam("f"))
    .limit(1)
)
_TAKE_OVER = (
    update(job_runs)
    .where(_THIS, job_runs.c.finished_at.is_(None))
    .values(node=bindparam("new_node"), started_at=bindparam("now"), error=bindparam("new_error"))
)
_FINISH = (
    update(job_runs)
    .where(_THIS, job_runs.c.finished_at.is_(None))
    .values(finished_at=bindparam("now"), error=bindparam("new_error"))
)
_NEWEST = select(job_runs.c.job, func.max(job_runs.c.fire_time).label("newest")).group_by(job_runs.c.job)
_HEARTBEAT = select(processes.c.heartbeat_at).where(processes.c.owner == bindparam("o"))


def claim_name(owner: Owner, token: str) -> str:
    """Return the ``node`` of one claim: whose it is, and a token used for no other claim."""
    return f"{owner}#{token}"


def owner_of(node: str) -> Owner:
    """Return whose claim this is."""
    return Owner.parse(node.rpartition("#")[0])


def introduce(tx: Transaction, first_fires: Mapping[str, int]) -> None:
    """Note for jobs never heard of that nothing was missed up to these fire times."""
    known = set(
        tx.connection.execute(
            select(job_runs.c.job).where(job_runs.c.job.in_(list(first_fires))).distinct()
        ).scalars()
    )
    for job, fire_time in sorted(first_fires.items()):
        if job not in known:
            _insert(tx, job, fire_time, _FROM_HERE_ON, finished_at=tx.now_ms)


def _insert(tx: Transaction, job: str, fire_time: int, node: str, *, finished_at: int | None = None) -> None:
    row = {
        "job": job,
        "fire_time": fire_time,
        "node": node,
        "started_at": tx.now_ms,
        "finished_at": finished_at,
        "error": None,
    }
    tx.connection.execute(insert_ignore(tx.kind, job_runs, ("job", "fire_time")), row)


def claim(tx: Transaction, job: str, fire_time: int, node: str, *, host: str) -> bool:
    """Say whether ``node`` (see ``claim_name``) is the one to run this; run again, it says the same.

    A run that its process cannot finish any more may be claimed again, once: what kills its process every time must
    not do so for ever. A fire time older than one that has been claimed is past.
    """
    if tx.connection.execute(_NEWER, {"j": job, "f": fire_time}).first() is not None:
        return False
    _insert(tx, job, fire_time, node)
    row = tx.connection.execute(_LOCK, {"j": job, "f": fire_time}).one()
    if row.node == node:
        return True
    if (
        row.finished_at is not None
        or row.error is not None
        or not _is_given_up(tx, row.node, row.started_at, host)
    ):
        return False
    values = {"new_node": node, "now": tx.now_ms, "new_error": "its process died; begun a second time"}
    tx.connection.execute(_TAKE_OVER, {"j": job, "f": fire_time, **values})
    return True


def _is_given_up(tx: Transaction, node: str, started_at: int, host: str) -> bool:
    owner = owner_of(node)
    if owner.is_gone(host):
        return True
    heartbeat = tx.connection.execute(_HEARTBEAT, {"o": str(owner)}).scalar()
    if heartbeat is None:  # it took itself off the list, or was taken off
        return True
    # A machine that is cut off may still be at work: it gets an hour. One that is heard of works, however long.
    return heartbeat < tx.now_ms - STALE_MS and started_at < tx.now_ms - GIVEN_UP_MS


def finish(tx: Transaction, job: str, fire_time: int, node: str, error: str | None) -> bool:
    """Record how a run ended; False when another node has taken it over. ``error`` None: it did its work."""
    row = tx.connection.execute(_LOCK, {"j": job, "f": fire_time}).one_or_none()
    if row is None or row.node != node:
        return False
    values = {"j": job, "f": fire_time, "now": tx.now_ms, "new_error": error[:500] if error else None}
    tx.connection.execute(_FINISH, values)
    return True


def newest(tx: Transaction) -> dict[str, JobRun]:
    """Return the newest row of each job, also of those that were only introduced."""
    return _newest(tx, _NEWEST)


def last_runs(tx: Transaction) -> dict[str, JobRun]:
    """Return the last run of each job that has ever run."""
    return _newest(tx, _NEWEST.where(job_runs.c.node != _FROM_HERE_ON))


def first_and_last_good(tx: Transaction, job: str) -> tuple[int | None, JobRun | None]:
    """Return when a job was first heard of (ms) and its last run without an error; None where there is none."""
    first = tx.connection.execute(
        select(func.min(job_runs.c.started_at)).where(job_runs.c.job == job)
    ).scalar()
    good = (
        select(*_COLUMNS)
        .where(
            job_runs.c.job == job,
            job_runs.c.node != _FROM_HERE_ON,
            job_runs.c.finished_at.is_not(None),
            job_runs.c.error.is_(None),
        )
        .order_by(job_runs.c.fire_time.desc())
        .limit(1)
    )
    row = tx.connection.execute(good).one_or_none()
    return first, None if row is None else JobRun(*row)


def _newest(tx: Transaction, newest_of_jobs: Select[tuple[str, int]]) -> dict[str, JobRun]:
    of_jobs = newest_of_jobs.subquery()
    same = (job_runs.c.job == of_jobs.c.job) & (job_runs.c.fire_time == of_jobs.c.newest)
    rows = tx.connection.execute(select(*_COLUMNS).join_from(job_runs, of_jobs, same))
    return {row.job: JobRun(*row) for row in rows}


def prune(tx: Transaction) -> int:
    """Remove runs of more than 90 days ago and return how many; the newest row of each job stays."""
    removed = 0
    for job, run in sorted(newest(tx).items()):
        before = min(run.fire_time, tx.now_ms - KEPT_MS)
        old = delete(job_runs).where(job_runs.c.job == job, job_runs.c.fire_time < before)
        removed += tx.connection.execute(old).rowcount
    return removed
