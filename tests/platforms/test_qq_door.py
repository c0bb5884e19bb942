"""What only QQ does, through a running server: two copies of a message, windows, five replies."""

from __future__ import annotations

import time
from typing import Any

import pytest

from feishu_bot.platforms.qq import QQ
from feishu_bot.testing.qq import full_group_event, group_event, make_event, private_event
from tests.platforms.contract import Found, served, until, until_rows
from tests.platforms.samples.qq import samples


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def opened(folder: Any, **chat: Any):
    return served(Found(QQ, samples), samples(time.time()), folder, **chat)


async def say(door: Any, *events: Any) -> None:
    for event in events:
        assert await door.post(samples(time.time()).prove(event)) == 200


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize("require_at", [True, False])
async def test_a_group_message_that_comes_in_two_copies_is_answered_once(folder, plain_first, require_at):
    copies = [full_group_event("hello", message_id="m1"), group_event("hello", message_id="m1")]
    async with opened(folder, require_at_in_groups=require_at) as (door, peer):
        await say(door, *copies[:: 1 if plain_first else -1])
        await say(door, private_event("the end"))
        await until(lambda: "the end" in peer.texts() and "hello" in peer.texts(), "both answers")
        await until_rows(door, {"answered", "ignored"})
        assert peer.texts().count("hello") == 1
        assert len(await door.parts()) == 2


async def test_a_message_whose_window_has_closed_ends_expired_and_nothing_is_sent(folder):
    async with opened(folder) as (door, peer):
        await say(door, group_event("too late", at=time.time() - 301))
        await until_rows(door, {"expired"})
        await say(door, private_event("late, but in time", at=time.time() - 3000))
        await until(peer.texts, "the answer")
        assert peer.texts() == ["late, but in time"]


@pytest.mark.parametrize(("make", "parts"), [(group_event, 4), (private_event, 3)])
async def test_a_long_answer_leaves_replies_for_a_note_and_in_private_for_typing(folder, make, parts):
    question = "\n\n".join(f"Paragraph {n} " + "words " * 60 for n in range(80))
    async with opened(folder, max_input_tokens=100_000, language="en") as (door, peer):
        await say(door, make(question))
        await until(lambda: len(peer.texts()) == parts, "all parts")
        assert peer.texts()[0].startswith("Paragraph 0 ")
        assert peer.texts()[-1].endswith("(The answer is too long to be shown in full here.)")
        await say(door, private_event("the end"))
        await until(lambda: peer.texts()[-1] == "the end", "the next answer")
        assert len(peer.texts()) == parts + 1


async def test_a_reply_that_the_platform_finds_too_late_is_expired_and_not_repeated(folder):
    async with opened(folder) as (door, peer):
        peer.fake.know_message("old", time.time() - 4000)
        await say(door, private_event("hello", message_id="old"))
        await until_rows(door, {"answered"})
        await say(door, private_event("the end"))
        await until(peer.texts, "the next answer")
        assert peer.texts() == ["the end"]
        first, _ = await door.parts()
        assert first.state == "expired"


async def test_events_that_nobody_said_are_kept_without_an_answer(folder):
    async with opened(folder) as (door, peer):
        await say(
            door, make_event({"group_openid": "G", "op_member_openid": "M"}, event_type="GROUP_MSG_REJECT")
        )
        await until_rows(door, {"ignored"})
        assert len(await door.rows()) == 1
        assert peer.texts() == []
