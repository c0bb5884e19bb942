"""Which turns are sent to the model."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.history import choose_history
from feishu_bot.ai.tokens import TOKENS_PER_MESSAGE

BIG = 10**9


def turns(n, tokens=10):
    return [row for i in range(n) for row in (("user", f"q{i}", tokens), ("assistant", f"a{i}", tokens))]


def contents(history):
    return [message.content for message in history.messages]


def test_the_newest_turns_are_taken_oldest_first():
    history = choose_history(turns(5), max_turns=2, max_tokens=BIG)
    assert contents(history) == ["q3", "a3", "q4", "a4"]
    assert history.counts == (10, 10, 10, 10)
    assert history.tokens == 40


def test_a_turn_that_does_not_fit_whole_is_left_out_whole():
    assert contents(choose_history(turns(3), max_turns=9, max_tokens=59)) == ["q1", "a1", "q2", "a2"]
    assert contents(choose_history(turns(3), max_turns=9, max_tokens=60)) == [
        "q0",
        "a0",
        "q1",
        "a1",
        "q2",
        "a2",
    ]


def test_no_older_turn_is_taken_over_a_newer_one_that_does_not_fit():
    rows = [("user", "small", 1), ("user", "huge", 500), ("user", "new", 1)]
    assert contents(choose_history(rows, max_turns=9, max_tokens=100)) == ["new"]


def test_the_room_in_the_window_counts_the_framing_too():
    rows = turns(2)
    whole = 40 + 4 * TOKENS_PER_MESSAGE
    assert len(choose_history(rows, max_turns=9, max_tokens=BIG, room=whole).messages) == 4
    assert len(choose_history(rows, max_turns=9, max_tokens=BIG, room=whole - 1).messages) == 2
    assert choose_history(rows, max_turns=9, max_tokens=BIG, room=-5).messages == ()


def test_no_turns_are_sent_when_none_are_allowed():
    assert choose_history(turns(2), max_turns=0, max_tokens=BIG).messages == ()
    assert choose_history([], max_turns=5, max_tokens=BIG).tokens == 0


def test_an_unanswered_question_is_a_turn():
    rows = [("user", "one", 1), ("user", "two", 1), ("assistant", "2", 1)]
    assert contents(choose_history(rows, max_turns=1, max_tokens=BIG)) == ["two", "2"]
    assert contents(choose_history(rows, max_turns=2, max_tokens=BIG)) == ["one", "two", "2"]


def test_rows_before_the_first_question_belong_to_no_turn():
    rows = [("system", "s", 1), ("assistant", "hi", 1), *turns(1)]
    assert contents(choose_history(rows, max_turns=9, max_tokens=BIG)) == ["q0", "a0"]


def test_a_tool_row_is_sent_with_its_call_and_left_out_without():
    call = [("assistant", "calls", 5), ("tool", "r1", 5), ("tool", "r2", 5), ("assistant", "so", 5)]
    rows = [("user", "q", 5), ("tool", "orphan", 100), *call]
    history = choose_history(rows, max_turns=9, max_tokens=25)
    assert contents(history) == ["q", "calls", "r1", "r2", "so"]
    assert [message.role for message in history.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "tool", "system"]), st.text(max_size=3), st.integers(0, 50)
    ),
    max_size=40,
)


@given(ROWS, st.integers(0, 8), st.integers(0, 400), st.none() | st.integers(-10, 500))
def test_whatever_the_rows_the_choice_is_within_every_limit_and_begins_with_a_question(
    rows, most, tokens, room
):
    history = choose_history(rows, max_turns=most, max_tokens=tokens, room=room)
    roles = [message.role for message in history.messages]
    assert history.tokens <= tokens
    assert roles.count("user") <= most
    assert not roles or roles[0] == "user"
    if room is not None and roles:
        assert history.tokens + TOKENS_PER_MESSAGE * len(roles) <= room
    for before, role in itertools.pairwise(roles):
        assert role != "tool" or before in {"assistant", "tool"}


@given(ROWS)
def test_without_limits_everything_from_the_first_question_on_is_sent(rows):
    rows = [row for row in rows if row[0] != "tool"]
    first = next((i for i, row in enumerate(rows) if row[0] == "user"), len(rows))
    history = choose_history(rows, max_turns=BIG, max_tokens=BIG)
    assert [(m.role, m.content) for m in history.messages] == [row[:2] for row in rows[first:]]
    assert list(history.counts) == [row[2] for row in rows[first:]]
