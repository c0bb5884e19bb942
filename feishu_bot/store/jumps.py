"""A jump of the machine's clock, where the database's time is this machine's: what waits is moved along with it.

SQLite has no time of its own. When the wall clock is set by minutes, leases would end early or late, and messages
and parts that wait for an instant would wait for minutes more. How far the wall clock is from the monotonic one,
which all processes of the machine share and which never jumps, is kept in the database: whoever first finds it
changed moves everything, in one transaction.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import ColumnElement, Table, case, delete, select, update

from feishu_bot.store.engine import insert_set
from feishu_bot.store.schema import OPEN, UNSENT, controls, inbox, lanes, outbox, processes

if TYPE_CHECKING:
    from sqlalchemy import Connection

log = logging.getLogger(__name__)

LEAST_MS: Final = 2000  # clocks are also moved slowly; that is followed without a word
_NOTED_MS: Final = 100
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")

_KNOWN = select(controls.c.name, controls.c.at).where(controls.c.kind == "clock")
_MOVED: Final[tuple[tuple[Table, tuple[str, ...], ColumnElement[bool] | None], ...]] = (
    (lanes, ("ready_at", "lease_until", "send_ready_at", "send_until"), None),
    (inbox, ("received_at",), inbox.c.state == OPEN),
    (
        outbox,
        ("not_before", "first_attempt_at", "unknown_at", "created_at"),
        outbox.c.state.in_(UNSENT),
    ),
    (processes, ("started_at", "heartbeat_at"), None),
    (controls, ("at",), controls.c.kind.in_(["alert", "warned"])),
)


def move_along(connection: Connection, now_ms: int, monotonic_ms: int) -> int:
    """Move every instant that something waits for by as much as the clock has jumped; return that (ms).

    Call it in a writing transaction, before the time is used in it.
    """
    boot = _boot()
    if boot is None:
        return 0
    offset = now_ms - monotonic_ms
    known = {row.name: row.at for row in connection.execute(_KNOWN)}
    jump: int = offset - known.get(boot, offset)
    if boot not in known:
        connection.execute(delete(controls).where(controls.c.kind == "clock"))
    if boot not in known or abs(jump) > _NOTED_MS:
        row = {"kind": "clock", "name": boot, "value": "{}", "at": offset}
        connection.execute(insert_set("sqlite", controls, ("kind", "name"), ("value", "at")), row)
    if abs(jump) <= LEAST_MS:
        return 0
    for table, columns, condition in _MOVED:
        # Zero stands for no instant, and null stays null.
        moved = {
            name: case((table.c[name] > 0, table.c[name] + jump), else_=table.c[name]) for name in columns
        }
        statement = update(table).values(moved)
        connection.execute(statement if condition is None else statement.where(condition))
    log.warning(
        "clock has jumped", extra={"seconds": round(jump / 1000, 1), "reason": "waiting work moved along"}
    )
    return jump


def _boot() -> str | None:
    """Return whose monotonic clock this is: of a run of the machine, and of a time namespace.

    None where that is not known (no Linux). Where several share a file, none of them moves anything.
    """
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None
    try:
        return f"{boot}/{_TIME_NAMESPACE.readlink().name}"
    except OSError:
        return boot
