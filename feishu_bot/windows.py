"""Calendar windows of budgets: where one begins and ends, in the operator's time zone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

Window = Literal["minute", "hour", "day", "week", "month", "total"]


def window_bounds(window: Window, now_ms: int, zone: ZoneInfo) -> tuple[int, int | None]:
    """Return the first and the end instant (ms, end exclusive) of the window that holds ``now_ms``.

    Weeks begin on Monday. Minutes and hours are steps of real time (an hour that a clock change repeats counts as
    two windows); days and longer follow the local calendar, so a day may have 23 or 25 hours. ``total``: 0, None.
    """
    if window == "total":
        return 0, None
    now = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(zone)
    if window in {"minute", "hour"}:
        length = 60_000 if window == "minute" else 3_600_000
        # Zones are whole minutes from UTC, not whole hours: count hours from the local full hour.
        offset_ms = int((now.utcoffset() or timedelta()).total_seconds() * 1000)
        start = (now_ms + offset_ms) // length * length - offset_ms
        return start, start + length
    day = now.date()
    if window == "day":
        first, last = day, day + timedelta(days=1)
    elif window == "week":
        first = day - timedelta(days=day.weekday())
        last = first + timedelta(days=7)
    else:
        first = day.replace(day=1)
        last = (first + timedelta(days=32)).replace(day=1)
    return _local_midnight_ms(first.year, first.month, first.day, zone), _local_midnight_ms(
        last.year, last.month, last.day, zone
    )


def _local_midnight_ms(year: int, month: int, day: int, zone: ZoneInfo) -> int:
    return int(datetime(year, month, day, tzinfo=zone).timestamp() * 1000)
