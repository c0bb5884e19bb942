"""What a model thinks aloud is kept out of its answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.agent import Agent
from feishu_bot.ai.models import make_model
from feishu_bot.ai.thoughts import Thoughts
from feishu_bot.config import AISettings
from feishu_bot.testing.model import Behaviour, FakeModelServer


def answer_of(*pieces):
    thoughts = Thoughts()
    return "".join([*map(thoughts.feed, pieces), thoughts.finish()])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>so</think>\n\nYes.", "Yes."),
        ("\n<thinking>a < b </think> c</thinking> Yes.\n", "Yes.\n"),
        ("<think>one</think><think>two</think>Yes.", "Yes."),
        ("<think></think>Yes.", "Yes."),
        ("<think>never closed", ""),
        ("<think>so</think>", ""),
        ("Use <think>x</think> tags.", "Use <think>x</think> tags."),
        ("  indented", "  indented"),
        ("<thin", "<thin"),
        ("<b>bold</b>", "<b>bold</b>"),
        ("", ""),
        ("   ", "   "),
    ],
)
def test_blocks_at_the_beginning_are_left_out_and_nothing_else(text, answer):
    assert answer_of(text) == answer
    assert answer_of(*text) == answer


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "a", " ", "\n", "</", "<"])),
    st.lists(st.integers(1, 5)),
)
def test_an_answer_is_the_same_however_it_is_cut(words, sizes):
    text, pieces, at = "".join(words), [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    assert answer_of(*pieces, text[at:]) == answer_of(text)


async def _grant(**_):
    pass


@pytest.mark.parametrize("kind", ["answer", "document"])
async def test_neither_reasoning_nor_thoughts_reach_the_user(kind):
    async with FakeModelServer() as server:
        settings = AISettings(model="fake:r1", base_url=server.base_url)
        agent = Agent(settings, model=make_model(settings))
        server.script(Behaviour(kind=kind, reasoning="first of all", text="<think>hmm, 7</think>\nSeven."))
        heard = []
        answer = await agent.answer(agent.plan((), "3+4", 3), reserve=_grant, on_text=heard.append)
        assert answer.text == "".join(heard) == "Seven."
        assert answer.calls[0].output_tokens == server.output_tokens
        await agent.close()
