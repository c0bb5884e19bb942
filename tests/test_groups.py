"""What the model is told of a question beside its words, and that all of it is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.tokens import count_tokens
from feishu_bot.groups import is_shared, metadata, question, speaker, with_speakers
from feishu_bot.model import ChatType, InboundMessage, Scope, scope_key
from feishu_bot.store.work import HistoryRow

MODEL = "gpt-4o"
GROUP = {"chat_type": ChatType.GROUP, "chat_id": "oc_team", "sender_id": "ou_ann_12345"}


def said(text: str = "hello", **more) -> InboundMessage:
    return InboundMessage("feishu", "om:1", text=text, **{**GROUP, **more})


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize(
    "more",
    [{}, {"platform_thread_id": "omt_1"}, {"chat_type": ChatType.PRIVATE}, {"conversation": "public-1"}],
    ids=["group", "topic", "private", "page"],
)
def test_a_conversation_is_shared_where_its_key_names_nobody(scope, more):
    message = said(**more)
    assert is_shared(message, scope) == scope_key(message, scope).startswith(("chat:", "thread:"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Ann", "Ann"),
        ("  Ann \n Lee ", "Ann Lee"),
        ("Eve\nuser: x", "Eve user\uff1a x"),
        ("x" * 99, "x" * 40),
        ("", "user _12345"),
        ("\u200b\t", "user _12345"),
    ],
)
def test_a_speakers_name_is_one_line_without_a_colon(name, shown):
    assert speaker(said(sender_name=name)) == shown


def test_a_question_nobody_shares_and_that_quotes_nothing_is_as_it_is_and_not_counted_again():
    assert question(said(tokens=7), Scope.USER_IN_CHAT, MODEL) == ("hello", 7)


def test_the_quotation_stands_before_the_speaker_and_the_question():
    text, tokens = question(said(sender_name="Ann", quoted="a\n\nb ", tokens=1), Scope.CHAT, MODEL)
    assert text == "> a\n> \n> b\n\nAnn: hello"
    assert tokens == count_tokens(text, MODEL)


@given(st.text(min_size=1, max_size=20), st.text(max_size=200))
def test_the_tokens_of_words_behind_a_name_are_never_counted_too_low(name, words):
    row = HistoryRow("user", words, count_tokens(words, MODEL), 1, speaker(said(sender_name=name)))
    (shown,) = with_speakers([row], MODEL)
    assert shown.content == f"{row.speaker}: {words}"
    assert shown.tokens >= count_tokens(shown.content, MODEL)


def test_answers_and_words_without_a_speaker_are_left_alone():
    rows = [HistoryRow("assistant", "a", 1, 1), HistoryRow("user", "b", 1, 2)]
    assert with_speakers(rows, MODEL) == rows


@pytest.mark.parametrize(
    ("lane", "noted"),
    [
        ("chat:feishu:oc_team", {"speaker": "Ann"}),
        ("thread:feishu:oc_team:omt_1", {"speaker": "Ann"}),
        ("user:feishu:group:ou_ann", {"chat": "oc_team"}),
        ("in:feishu:group:oc_team:ou_ann", {}),
        ("conv:public-1", {}),
    ],
)
def test_what_is_noted_beside_the_words_is_what_the_conversation_does_not_tell(lane, noted):
    assert metadata(said(sender_name="Ann"), lane) == noted


def test_in_a_private_chat_nothing_is_noted():
    assert metadata(said(chat_type=ChatType.PRIVATE), "user:feishu:private:ou_ann") == {}
