"""Many short waits, one timer."""

from __future__ import annotations

import asyncio

import pytest

from feishu_bot.deadlines import Deadlines


async def test_a_wait_that_ends_in_time_is_left_alone():
    deadlines = Deadlines(5)
    with deadlines.guard():
        await asyncio.sleep(0)


async def test_a_wait_that_is_too_long_ends_with_a_timeout():
    deadlines = Deadlines(0.01)
    with pytest.raises(TimeoutError), deadlines.guard():
        await asyncio.Event().wait()


async def test_of_many_waits_only_those_that_are_too_long_end():
    deadlines = Deadlines(0.05)
    event = asyncio.Event()

    async def wait(*, release: bool) -> str:
        try:
            with deadlines.guard():
                if release:
                    await asyncio.sleep(0)
                else:
                    await event.wait()
        except TimeoutError:
            return "late"
        return "in time"

    found = await asyncio.gather(*(wait(release=n % 2 == 0) for n in range(10)))
    assert found == ["in time", "late"] * 5


async def test_a_later_wait_is_bounded_too_after_an_earlier_one_has_ended():
    deadlines = Deadlines(0.02)
    with deadlines.guard():
        await asyncio.sleep(0.005)
    with pytest.raises(TimeoutError), deadlines.guard():
        await asyncio.Event().wait()


async def test_a_cancellation_from_outside_stays_a_cancellation():
    deadlines = Deadlines(5)

    async def wait() -> None:
        with deadlines.guard():
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_the_task_goes_on_as_if_never_cancelled_after_a_timeout():
    deadlines = Deadlines(0.01)
    try:
        with deadlines.guard():
            await asyncio.Event().wait()
    except TimeoutError:
        pass
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
