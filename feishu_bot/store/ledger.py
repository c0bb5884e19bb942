"""What model calls have used, for people who read it: by person, chat, platform, model, or day of a time zone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from feishu_bot.store import statistics
from feishu_bot.store.schema import usage
from feishu_bot.windows import window_bounds

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from sqlalchemy import ColumnElement

    from feishu_bot.store.work import Transaction

_u = usage.c
_SUMS = (
    func.count(),
    func.sum(_u.input_tokens),
    func.sum(_u.output_tokens),
    func.sum(_u.cached_tokens),
    func.sum(_u.reasoning_tokens),
    func.sum(_u.cost_micro_usd),
)


def usage_total(
    tx: Transaction,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tenant_id: str | None = None,
) -> dict[str, Any]:
    """Return calls, tokens and cost from one instant to before another; a cost of None is not known."""
    statement = select(*_SUMS).where(*_within(since, until, tenant_id))
    return statistics.usage_sums(tx.connection.execute(statement).one())


def usage_by(
    tx: Transaction,
    by: str,
    zone: ZoneInfo,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tenant_id: str | None = None,
    limit: int = 1000,
) -> list[dict[str, Any]]:
    """Return the same per ``by`` (user, chat, platform, model or day), the most tokens first; days newest first.

    A day is one of ``zone``, with 23 or 25 hours where its clocks change. None stands for persons who were forgotten.
    """
    if by != "day":
        return statistics.usage_by(tx, by, since=since, until=until, tenant_id=tenant_id, limit=limit)
    found: list[dict[str, Any]] = []
    before = until
    while len(found) < limit:
        newest = select(func.max(_u.at)).where(*_within(since, before, tenant_id))
        at = tx.connection.execute(newest).scalar_one()
        if at is None:
            break
        start_ms, _ = window_bounds("day", int(at.timestamp() * 1000), zone)
        start = datetime.fromtimestamp(start_ms / 1000, UTC)
        first = start if since is None else max(start, since)
        day = {"day": start.astimezone(zone).date().isoformat()}
        found.append(day | usage_total(tx, since=first, until=before, tenant_id=tenant_id))
        before = start
    return found


def _within(
    since: datetime | None, until: datetime | None, tenant_id: str | None
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if since is not None:
        conditions.append(_u.at >= since)
    if until is not None:
        conditions.append(_u.at < until)
    if tenant_id is not None:
        conditions.append(_u.tenant_id == tenant_id)
    return conditions
