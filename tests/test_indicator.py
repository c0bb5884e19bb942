from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import pytest

from feishu_bot.errors import RetryLater
from feishu_bot.indicator import Indicator
from feishu_bot.model import InboundMessage


class Chat:
    """Stands for a platform: what is shown, and failures where the test wants them."""

    account = "feishu"
    shows_typing = True

    def __init__(
        self, *, fails_to_show: Exception | None = None, fails_to_hide: Exception | None = None
    ) -> None:
        self.shown: list[str] = []
        self.hidden: list[str] = []
        self.asked = asyncio.Event()
        self.may_show = asyncio.Event()
        self.may_show.set()
        self._fails_to_show = fails_to_show
        self._fails_to_hide = fails_to_hide

    async def show_typing(self, target) -> str:
        self.asked.set()
        await self.may_show.wait()
        if self._fails_to_show is not None:
            raise self._fails_to_show
        self.shown.append(target.reply_to)
        return f"sign on {target.reply_to}"

    async def hide_typing(self, target, shown) -> None:
        if self._fails_to_hide is not None:
            raise self._fails_to_hide
        self.hidden.append(shown)


QUESTION = InboundMessage("feishu", "om:1", message_id="1")


async def test_what_takes_a_while_is_shown_and_taken_back():
    chat, indicator = Chat(), Indicator(after_s=0.0)
    with indicator.watch(chat, QUESTION):
        await chat.asked.wait()
    await indicator.stop()
    assert (chat.shown, chat.hidden) == (["1"], ["sign on 1"])


async def test_what_is_quick_is_not_shown():
    chat, indicator = Chat(), Indicator(after_s=3600.0)
    with indicator.watch(chat, QUESTION):
        await asyncio.sleep(0)
    await indicator.stop()
    assert (chat.shown, chat.hidden) == ([], [])


async def test_a_sign_that_comes_after_the_end_is_taken_back_too():
    chat, indicator = Chat(), Indicator(after_s=0.0)
    chat.may_show.clear()
    with indicator.watch(chat, QUESTION):
        await chat.asked.wait()
    chat.may_show.set()
    await indicator.stop()
    assert chat.hidden == ["sign on 1"]


async def test_it_is_taken_back_after_a_failure_too():
    chat, indicator = Chat(), Indicator(after_s=0.0)
    with suppress(ValueError), indicator.watch(chat, QUESTION):
        await chat.asked.wait()
        raise ValueError
    await indicator.stop()
    assert chat.hidden == ["sign on 1"]


@pytest.mark.parametrize("failure", ["fails_to_show", "fails_to_hide"])
async def test_a_refusal_of_the_platform_is_nobodys_concern(failure, caplog):
    caplog.set_level(logging.INFO, logger="feishu_bot")
    chat, indicator = Chat(**{failure: RetryLater("no")}), Indicator(after_s=0.0)
    with indicator.watch(chat, QUESTION):
        await chat.asked.wait()
    await indicator.stop()
    assert caplog.records == []


async def test_a_fault_in_the_platforms_own_code_is_reported_and_disturbs_nobody(caplog):
    chat, indicator = Chat(fails_to_show=KeyError("oops")), Indicator(after_s=0.0)
    with indicator.watch(chat, QUESTION):
        await chat.asked.wait()
    await indicator.stop()
    assert [(r.message, r.levelname) for r in caplog.records] == [("typing failed", "ERROR")]


async def test_platforms_that_cannot_show_it_are_left_alone():
    chat, indicator = Chat(), Indicator(after_s=0.0)
    chat.shows_typing = False
    for platform in (chat, None):
        with indicator.watch(platform, QUESTION):
            await asyncio.sleep(0.001)
    assert not chat.asked.is_set()


class Writer:
    """Stands for a platform that shows an answer while it is written, and takes a while to begin."""

    account, shows_typing, shows_both = "feishu", False, False

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.asked, self.may_show = asyncio.Event(), asyncio.Event()

    def shows_text(self, _target) -> float:
        return 0.0

    async def show_text(self, _target, text) -> str:
        self.texts.append(text)
        self.asked.set()
        await self.may_show.wait()
        return "card"


async def test_what_begins_to_be_shown_after_the_end_is_not_what_the_answer_finishes():
    chat, indicator = Writer(), Indicator(after_s=0.0)
    with indicator.watch(chat, QUESTION, live=True, inbox_id=7) as seen:
        seen.tell("hello")
        await chat.asked.wait()
    chat.may_show.set()
    await indicator.stop()
    assert (chat.texts, seen.stream) == (["hello"], None)


async def test_an_answer_that_is_quick_starts_no_task_and_leaves_no_timer():
    chat, indicator = Writer(), Indicator(after_s=3600.0)
    before = asyncio.all_tasks()
    for number in range(100):
        with indicator.watch(chat, QUESTION, live=True, inbox_id=number) as seen:
            seen.tell("hello")
    assert asyncio.all_tasks() == before
    assert len(asyncio.get_running_loop()._scheduled) <= 1
