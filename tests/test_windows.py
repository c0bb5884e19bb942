from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta
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


# ---------------------------------------------------------------------------------------------- property

ZONES = [  # with half hours, changes at midnight, a day that was left out, and a change that was decided late
    ZoneInfo(name)
    for name in (
        *("Asia/Shanghai", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"),
        *("America/Sao_Paulo", "Africa/Cairo", "Pacific/Apia", "Asia/Gaza", "America/St_Johns", "UTC"),
    )
]
CALENDAR = ["day", "week", "month"]
INSTANTS = st.integers(946_684_800_000, 4_102_444_800_000)  # 2000 to 2100


def local(instant_ms, zone):
    return datetime.fromtimestamp(instant_ms / 1000, UTC).astimezone(zone)


@given(st.sampled_from(CALENDAR), INSTANTS, st.sampled_from(ZONES))
def test_all_instants_of_a_calendar_window_have_its_local_date(window, now, zone):
    start, end = window_bounds(window, now, zone)
    date = {"day": lambda at: at.date(), "week": lambda at: at.isocalendar()[:2], "month": lambda at: (at.year, at.month)}[window]  # fmt: skip
    expected = date(local(now, zone))
    assert date(local(start, zone)) == expected == date(local(end - 1, zone))
    assert date(local(start - 1, zone)) != expected != date(local(end, zone))


@given(st.sampled_from(["minute", "hour", *CALENDAR]), INSTANTS, INSTANTS, st.sampled_from(ZONES))
def test_windows_follow_the_order_of_instants(window, one, other, zone):
    one, other = sorted((one, other))
    first, second = window_bounds(window, one, zone), window_bounds(window, other, zone)
    assert first == second or first[1] <= second[0]


@given(st.integers(2000, 2099), st.integers(1, 12), st.sampled_from(ZONES))
def test_a_month_has_as_many_days_as_the_calendar_says(year, month, zone):
    now = int(datetime(year, month, 15, 12, tzinfo=zone).timestamp() * 1000)
    start, end = window_bounds("month", now, zone)
    days = 0
    while start < end:
        start = window_bounds("day", start, zone)[1]
        days += 1
    # Samoa had no 30 December 2011.
    expected = calendar.monthrange(year, month)[1] - ((zone.key, year, month) == ("Pacific/Apia", 2011, 12))
    assert (days, start) == (expected, end)


@given(INSTANTS, st.sampled_from(ZONES))
def test_a_week_begins_on_a_monday_and_is_seven_days_long(now, zone):
    start, end = window_bounds("week", now, zone)
    assert local(start, zone).weekday() == 0
    assert local(end, zone).date() - local(start, zone).date() == timedelta(days=7)
