"""Lanes from each chat in turn, and from none more than its share."""

from __future__ import annotations

import pytest

from feishu_bot.turns import Turns, chat_of


def lane(chat: str, member: int) -> str:
    return f"in:feishu:group:{chat}:ou_{member}"


@pytest.mark.parametrize(
    ("key", "chat"),
    [
        ("in:feishu:group:oc_a:ou_1", "in:feishu:group:oc_a"),
        ("thread:feishu:oc_a:omt_1", "thread:feishu:oc_a"),
        ("chat:feishu:oc_a", "chat:feishu:oc_a"),
        ("user:feishu:private:ou_1", "user:feishu:private:ou_1"),
        ("conv:5b1f", "conv:5b1f"),
    ],
)
def test_the_lanes_of_one_group_share_a_turn_and_others_have_their_own(key, chat):
    assert chat_of(key) == chat


def test_a_quiet_chat_comes_second_however_many_lanes_of_a_noisy_one_are_ready_before_it():
    turns = Turns(share=1000)
    for member in range(500):
        turns.add(lane("noisy", member))
    turns.add("user:feishu:private:ou_quiet")
    assert turns.take(2) == [lane("noisy", 0), "user:feishu:private:ou_quiet"]
    assert turns.take(2) == [lane("noisy", 1), lane("noisy", 2)]
    assert len(turns) == 497


def test_a_chat_has_no_more_than_its_share_at_work_and_goes_on_when_one_is_done():
    turns = Turns(share=2)
    for member in range(4):
        turns.add(lane("noisy", member))
    assert turns.take(10) == [lane("noisy", 0), lane("noisy", 1)]
    assert not turns
    turns.add(lane("noisy", 4))
    assert turns.take(10) == []
    turns.done([lane("noisy", 0)])
    assert turns
    assert turns.take(10) == [lane("noisy", 2)]
    turns.done([lane("noisy", 1), lane("noisy", 2)])
    assert turns.take(10) == [lane("noisy", 3), lane("noisy", 4)]
    assert len(turns) == 0


def test_a_lane_waits_once_however_often_it_is_added():
    turns = Turns(share=2)
    assert turns.add("chat:feishu:oc_a")
    assert not turns.add("chat:feishu:oc_a")
    assert turns.take(10) == ["chat:feishu:oc_a"]
    assert turns.add("chat:feishu:oc_a"), "one that is at work may become ready again"
    assert turns.take(10) == ["chat:feishu:oc_a"]


def test_what_was_added_while_its_chat_had_its_share_at_work_waits_too():
    turns = Turns(share=1)
    turns.add(lane("a", 0))
    assert turns.take(10) == [lane("a", 0)]
    turns.add(lane("a", 1))
    assert turns.take(10) == []
    turns.done([lane("a", 0)])
    assert turns.take(10) == [lane("a", 1)]
