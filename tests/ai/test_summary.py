"""When a summary is due, and of what it tells."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.ai.summary import due_summary


def rows(turns, first=1):
    seq = iter(range(first, 10_000))
    return [(role, f"{role} {n}", 1, next(seq)) for n in range(turns) for role in ("user", "assistant")]


def test_nothing_is_due_while_everything_fits_or_is_told_of_already():
    assert due_summary(rows(5), 0, before=None, summarized_to=0) is None
    assert due_summary([], 0, before=None, summarized_to=0) is None
    assert due_summary(rows(5), 4, before="so far", summarized_to=4) is None
    assert due_summary(rows(5), 4, before="so far", summarized_to=7) is None


def test_what_has_fallen_out_is_told_of_with_the_older_half_of_the_window():
    due = due_summary(rows(6), 2, before=None, summarized_to=0)
    assert (due.before, due.upto, [row[3] for row in due.rows]) == (None, 6, [1, 2, 3, 4, 5, 6])
    again = due_summary(rows(8), 8, before="so far", summarized_to=6)
    assert (again.upto, [row[3] for row in again.rows]) == (12, [7, 8, 9, 10, 11, 12])


def test_the_model_is_asked_with_the_summary_before_and_no_results_of_tools():
    told = [*rows(1), ("tool", "{}", 1, 3), ("assistant", "", 1, 4), *rows(1, first=5)]
    due = due_summary(told, 4, before="They met.", summarized_to=0)
    system, user = due.messages()
    assert system.role == "system"
    assert user.content == "[summary so far]\nThey met.\n[user] user 0\n[assistant] assistant 0"


@given(st.integers(0, 30), st.integers(0, 60), st.integers(0, 60))
def test_a_summary_never_tells_of_the_newest_turn_nor_twice_of_one_message(turns, start, known):
    told = rows(turns)
    due = due_summary(told, min(2 * (start // 2), len(told)), before=None, summarized_to=known)
    if due is not None:
        assert known < due.rows[0][3] <= due.rows[-1][3] == due.upto
        assert due.upto % 2 == 0
        if 2 * (start // 2) < len(told):
            assert due.upto < told[-1][3]
