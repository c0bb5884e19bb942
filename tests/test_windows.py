from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.windows import window_bounds

SHANGHAI, BERLIN, KATHMANDU = map(ZoneInfo, ("Asia/Shanghai", "Europe/Berlin", "Asia/Kathmandu"))


def ms(text, zone):
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp() * 1000)


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        ("minute", "2026-03-04T15:37:00", "2026-03-04T15:38:00"),
        ("hour", "2026-03-04T15:00:00", "2026-03-04T16:00:00"),
        ("day", "2026-03-04T00:00:00", "2026-03-05T00:00:00"),
        ("week", "2026-03-02T00:00:00", "2026-03-09T00:00:00"),
        ("month", "2026-03-01T00:00:00", "2026-04-01T00:00:00"),
    ],
)
@pytest.mark.parametrize("zone", [SHANGHAI, BERLIN, KATHMANDU], ids=str)
def test_a_window_begins_and_ends_by_the_local_calendar(window, start, end, zone):
    now = ms("2026-03-04T15:37:12.345", zone)
    assert window_bounds(window, now, zone) == (ms(start, zone), ms(end, zone))


def test_the_whole_time_has_no_end():
    assert window_bounds("total", 5, SHANGHAI) == (0, None)


def test_a_day_with_a_change_of_the_clock_has_23_or_25_hours():
    for day, hours in (("2026-03-29", 23), ("2026-10-25", 25)):
        start, end = window_bounds("day", ms(f"{day}T12:00:00", BERLIN), BERLIN)
        assert end - start == hours * 3_600_000


def test_the_hour_that_a_change_of_the_clock_repeats_is_two_windows():
    first = int(datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp() * 1000)  # 02:30 summer time
    assert window_bounds("hour", first, BERLIN)[1] == window_bounds("hour", first + 3_600_000, BERLIN)[0]


@given(
    st.sampled_from(["minute", "hour", "day", "week", "month"]),
    st.integers(0, 4 * 10**12),
    st.sampled_from([SHANGHAI, BERLIN, KATHMANDU, ZoneInfo("UTC"), ZoneInfo("America/St_Johns")]),
)
def test_each_instant_is_in_exactly_one_window_and_windows_touch(window, now, zone):
    start, end = window_bounds(window, now, zone)
    assert start <= now < end
    assert window_bounds(window, start, zone) == (start, end)
    assert window_bounds(window, end - 1, zone) == (start, end)
    assert window_bounds(window, end, zone)[0] == end
