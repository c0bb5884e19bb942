"""No window of time sees more calls than a platform allows."""

from __future__ import annotations

import pytest

from feishu_bot.pace import Pace


class Time:
    """A clock that sleeping moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def instants(pace: Pace, time: Time, calls: int, name: str = "") -> list[float]:
    found = []
    for _ in range(calls):
        await pace.wait(name)
        found.append(round(time.now - 100.0, 6))
    return found


async def test_what_is_allowed_at_once_goes_at_once_and_the_rest_when_the_first_is_old_enough():
    time = Time()
    pace = Pace(5, 1.0, clock=time, sleep=time.sleep)
    assert await instants(pace, time, 12) == [0] * 5 + [1] * 5 + [2] * 2


async def test_no_window_sees_more_calls_than_allowed_however_they_are_spread():
    time = Time()
    pace = Pace(3, 1.0, clock=time, sleep=time.sleep)
    made = []
    for pause in [0, 0.4, 0.4, 0, 0.1, 0.9, 0, 0, 0, 0.3, 0]:
        time.now += pause
        await pace.wait()
        made.append(time.now)
    for first, fourth in zip(made, made[3:], strict=False):
        assert fourth - first >= 1.0 - 1e-9


@pytest.mark.parametrize(
    ("sharers", "expected"), [(2, [0, 0, 1, 1, 2]), (5, [0, 1, 2, 3, 4]), (10, [0, 2, 4, 6, 8])]
)
async def test_processes_that_share_a_rate_stay_below_it_together(sharers, expected):
    time = Time()
    pace = Pace(5, 1.0, sharers=lambda: sharers, clock=time, sleep=time.sleep)
    assert await instants(pace, time, 5) == expected


async def test_each_name_has_a_pace_of_its_own():
    time = Time()
    pace = Pace(1, 1.0, clock=time, sleep=time.sleep)
    assert await instants(pace, time, 2, "a") == [0, 1]
    assert await instants(pace, time, 2, "b") == [1, 2]


async def test_names_at_rest_are_forgotten_and_those_at_work_are_not():
    time = Time()
    pace = Pace(1, 1.0, clock=time, sleep=time.sleep)
    for n in range(2000):
        await pace.wait(str(n))
    time.now += 10
    await pace.wait("busy")
    await pace.wait("new")
    assert len(pace._slots) == 2
    start = time.now
    await pace.wait("busy")
    assert time.now - start == pytest.approx(1.0)
