"""What model calls have used, for people who read it: by person, chat, platform, model, tenant, or day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import case, func, literal, select, union_all

from feishu_bot.store.schema import usage, usage_hours, usage_names
from feishu_bot.store.sums import AMOUNTS, CHAT, HOUR_S, NOBODY, NUMBERS, USER, hour_of
from feishu_bot.windows import window_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from zoneinfo import ZoneInfo

    from sqlalchemy import ColumnElement, Row, Select, Table

    from feishu_bot.store.work import Transaction

USAGE_BY: Final = ("user", "chat", "platform", "model", "day", "tenant")

_HOUR: Final = timedelta(seconds=HOUR_S)
_LAST: Final = datetime(9999, 12, 31, tzinfo=UTC)  # no hour is reckoned behind it
_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_u, _h, _n = usage.c, usage_hours.c, usage_names.c
_CALL = (
    literal(1).label("calls"),
    *AMOUNTS[:-1],
    case((_u.cost_micro_usd.is_(None), 0), else_=1).label("priced"),
    func.coalesce(_u.cost_micro_usd, 0).label("cost_micro_usd"),
)


class _Range:
    """From one instant to before another, of one tenant or all."""

    def __init__(self, since: datetime | None, until: datetime | None, tenant_id: str | None) -> None:
        self.since, self.until = (None if end is None else min(end, _LAST) for end in (since, until))
        self.tenant_id = tenant_id

    @property
    def whole(self) -> bool:
        return self.since is None and self.until is None

    def calls(self, *more: ColumnElement[bool]) -> list[ColumnElement[bool]]:
        """Select rows of the ledger."""
        conditions = list(more)
        if self.since is not None:
            conditions.append(_u.at >= self.since)
        if self.until is not None:
            conditions.append(_u.at < self.until)
        if self.tenant_id is not None:
            conditions.append(_u.tenant_id == self.tenant_id)
        return conditions

    def sums(self, table: Table, *more: ColumnElement[bool]) -> list[ColumnElement[bool]]:
        """Select rows of sums."""
        return [*more, *([] if self.tenant_id is None else [table.c.tenant_id == self.tenant_id])]

    def hours(self) -> tuple[int | None, int | None]:
        """Return the first full hour, and the one behind the last."""
        first = None if self.since is None else -((_EPOCH - self.since) // _HOUR)
        last = None if self.until is None else (self.until - _EPOCH) // _HOUR
        return first, last

    def edges(self) -> list[_Range]:
        """Return what lies before the first and behind the last full hour."""
        first, last = self.hours()
        if first is not None and last is not None and first >= last:
            return [self]
        found = []
        if self.since is not None and first is not None and (inner := _EPOCH + first * _HOUR) > self.since:
            found.append(_Range(self.since, inner, self.tenant_id))
        if self.until is not None and last is not None and (inner := _EPOCH + last * _HOUR) < self.until:
            found.append(_Range(inner, self.until, self.tenant_id))
        return found


def usage_total(
    tx: Transaction,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tenant_id: str | None = None,
) -> dict[str, Any]:
    """Return calls, tokens and cost from one instant to before another; a cost of None is not known."""
    found = _by_hours(tx, literal(0), literal(0), _Range(since, until, tenant_id))
    return _sums(found[0][1:] if found else [0] * len(NUMBERS))


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
    """Return the same per ``by`` (one of ``USAGE_BY``), the most tokens first; days newest first.

    A day is one of ``zone``, with 23 or 25 hours where its clocks change. None stands for persons who were forgotten.
    The ledger is not changed by clear, delete or cleanup.
    """
    chosen = _Range(since, until, tenant_id)
    if by == "day":
        return _by_day(tx, zone, chosen, limit)
    if by in {"user", "chat"}:
        found = _by_name(tx, USER if by == "user" else CHAT, chosen, limit)
    else:
        names = {
            "platform": (_h.platform, _u.platform),
            "model": (_h.model, _u.model),
            "tenant": (_h.tenant_id, _u.tenant_id),
        }
        found = _by_hours(tx, *names[by], chosen, limit=limit)
    return [{by: row[0] or None} | _sums(row[1:]) for row in found]


def usage_days_by(
    tx: Transaction, by: str, zone: ZoneInfo, *, since: datetime, most: int = 8
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the same per day of ``zone`` and user, platform or model: those ``most`` with the most tokens.

    The keys are ``("2026-03-01", name)``. An hour belongs to the day in which it begins.
    """
    names = [row[by] or "" for row in usage_by(tx, by, zone, since=since, limit=most)]
    chosen = _Range(since, None, None)
    if by == "user":
        hour, name = hour_of(tx.kind).label("hour"), func.coalesce(_u.user_id, NOBODY).label("name")
        parts = [select(hour, name, *_CALL).where(*chosen.calls(name.in_(names)))]
    else:
        of_hour, of_call = {"platform": (_h.platform, _u.platform), "model": (_h.model, _u.model)}[by]
        calls = select(hour_of(tx.kind).label("hour"), of_call.label("name"), *_CALL)
        first, _ = chosen.hours()
        parts = [
            select(_h.hour.label("hour"), of_hour.label("name"), *[_h[n] for n in NUMBERS]).where(
                _h.hour >= first, of_hour.in_(names)
            ),
            calls.where(*chosen.calls(_u.fresh == 1, of_call.in_(names))),
        ]
        parts += [calls.where(*edge.calls(_u.fresh.is_(None), of_call.in_(names))) for edge in chosen.edges()]
    rows = union_all(*parts).subquery()
    sums = [func.sum(rows.c[n]) for n in NUMBERS]
    statement = select(rows.c.hour, rows.c.name, *sums).group_by(rows.c.hour, rows.c.name)
    found: dict[tuple[str, str], list[int]] = {}
    for at, name, *numbers in tx.connection.execute(statement):
        day = datetime.fromtimestamp(int(at) * HOUR_S, zone).date().isoformat()
        before = found.get((day, name), [0] * len(NUMBERS))
        found[day, name] = [a + int(b or 0) for a, b in zip(before, numbers, strict=True)]
    return {key: _sums(numbers) for key, numbers in found.items()}


def _sums(numbers: Sequence[Any]) -> dict[str, Any]:
    """Return ``NUMBERS`` as they are told. The ledger counts millionths of a dollar, so that sums are exact."""
    calls, tokens_in, tokens_out, cached, reasoning, priced, cost = [int(number or 0) for number in numbers]
    return {
        "calls": calls,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
        "cached_tokens": cached,
        "reasoning_tokens": reasoning,
        "cost_usd": cost / 1_000_000 if priced else None,
    }


def _by_hours(
    tx: Transaction,
    of_hour: ColumnElement[Any],
    of_call: ColumnElement[Any],
    chosen: _Range,
    *,
    limit: int | None = None,
) -> Sequence[Row[*tuple[Any, ...]]]:
    """Add up the full hours of the range, what is fresh, and what lies at its edges."""
    first, last = chosen.hours()
    full = [] if first is None else [_h.hour >= first]
    full += [] if last is None else [_h.hour < last]
    parts = [
        select(of_hour.label("name"), *[_h[n] for n in NUMBERS]).where(*chosen.sums(usage_hours, *full)),
        select(of_call.label("name"), *_CALL).where(*chosen.calls(_u.fresh == 1)),
    ]
    parts += [
        select(of_call.label("name"), *_CALL).where(*edge.calls(_u.fresh.is_(None)))
        for edge in chosen.edges()
    ]
    return _add_up(tx, parts, limit)


def _by_name(tx: Transaction, kind: str, chosen: _Range, limit: int) -> Sequence[Row[*tuple[Any, ...]]]:
    """Add up users or chats: all there ever was from their sums, a range from the ledger itself."""
    # Else SQLite follows the index of users through the whole ledger, looking at each row where it lies.
    name = func.coalesce(_u.user_id if kind == USER else _u.chat_id, NOBODY).label("name")
    calls = select(name, *_CALL)
    if not chosen.whole:
        return _add_up(tx, [calls.where(*chosen.calls())], limit)
    known = select(_n.name, *[_n[n] for n in NUMBERS])
    fresh = calls.where(*chosen.calls(_u.fresh == 1))
    return _add_up(tx, [known.where(*chosen.sums(usage_names, _n.kind == kind)), fresh], limit)


def _add_up(
    tx: Transaction, parts: Sequence[Select[Any]], limit: int | None
) -> Sequence[Row[*tuple[Any, ...]]]:
    # In one statement, which sees one instant: a row is fresh or in the sums, never both or neither.
    rows = union_all(*parts).subquery()
    numbers = [func.sum(rows.c[n]) for n in NUMBERS]
    statement = select(rows.c.name, *numbers).group_by(rows.c.name)
    if limit is not None:
        statement = statement.order_by((numbers[1] + numbers[2]).desc(), rows.c.name).limit(limit)
    return tx.connection.execute(statement).all()


def _by_day(tx: Transaction, zone: ZoneInfo, chosen: _Range, limit: int) -> list[dict[str, Any]]:
    per_hour = {int(row[0]): row[1:] for row in _by_hours(tx, _h.hour, hour_of(tx.kind), chosen)}
    hours = sorted(per_hour)
    found: list[dict[str, Any]] = []
    while hours and len(found) < limit:
        start_ms, _ = window_bounds("day", hours[-1] * HOUR_S * 1000, zone)
        first, rest = divmod(start_ms, HOUR_S * 1000)
        start = datetime.fromtimestamp(start_ms / 1000, UTC)
        day = {"day": start.astimezone(zone).date().isoformat()}
        if rest:  # a zone whose days do not begin with an hour of UTC
            return _by_split_day(tx, zone, chosen, limit)
        numbers = [0] * len(NUMBERS)
        while hours and hours[-1] >= first:
            numbers = [a + b for a, b in zip(numbers, per_hour[hours.pop()], strict=True)]
        found.append(day | _sums(numbers))
    return found


def _by_split_day(tx: Transaction, zone: ZoneInfo, chosen: _Range, limit: int) -> list[dict[str, Any]]:
    """Do the same where days begin within an hour: day by day, each with the rows at its edges."""
    found: list[dict[str, Any]] = []
    before = chosen.until
    while len(found) < limit:
        left = _Range(chosen.since, before, chosen.tenant_id)
        at = tx.connection.execute(select(func.max(_u.at)).where(*left.calls())).scalar_one()
        if at is None:
            break
        start_ms, _ = window_bounds("day", int(at.timestamp() * 1000), zone)
        start = datetime.fromtimestamp(start_ms / 1000, UTC)
        first = start if chosen.since is None else max(start, chosen.since)
        day = {"day": start.astimezone(zone).date().isoformat()}
        found.append(day | usage_total(tx, since=first, until=before, tenant_id=chosen.tenant_id))
        before = start
    return found
