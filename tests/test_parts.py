from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feishu_bot.split import fit_text

PARAGRAPHS = "\n\n".join(f"Paragraph {n} " + "word " * 30 for n in range(12))


def test_an_answer_that_fits_is_cut_as_the_operator_likes_it():
    parts = fit_text("one one one\n\ntwo two", max_chars=17, platform_chars=100, max_parts=2)
    assert parts == ["one one one", "two two"]


def test_a_platform_without_a_number_of_parts_gets_them_all():
    assert len(fit_text(PARAGRAPHS, max_chars=200, platform_chars=1000)) > 8


def test_too_many_parts_are_merged_up_to_what_the_platform_takes_in_one():
    parts = fit_text(PARAGRAPHS, max_chars=200, platform_chars=1000, max_parts=4)
    assert 1 < len(parts) <= 4
    assert "Paragraph 0" in parts[0]
    assert "Paragraph 11" in parts[-1]
    assert max(map(len, parts)) > 200


def test_an_answer_that_is_too_long_even_then_says_at_its_end_that_it_was_shortened():
    parts = fit_text(PARAGRAPHS, max_chars=200, platform_chars=300, max_parts=3, ending="(cut)")
    assert len(parts) == 3
    assert parts[-1].endswith("\n\n(cut)")
    assert all(len(part) <= 300 for part in parts)


def test_a_block_of_code_is_closed_before_the_words_that_it_was_shortened():
    parts = fit_text("```py\n" + "x = 1\n" * 400 + "```", max_chars=300, max_parts=2, ending="(cut)")
    assert parts[-1].endswith("\n```\n\n(cut)")
    assert all(part.count("```") == 2 for part in parts)


@pytest.mark.parametrize("max_parts", [1, 2, 4])
@given(text=st.text(alphabet="ab。\n`. 中", max_size=900))
def test_no_text_makes_more_or_longer_parts_than_the_platform_takes(max_parts, text):
    parts = fit_text(
        text, max_chars=40, platform_chars=90, max_bytes=200, max_parts=max_parts, ending="(cut)"
    )
    assert len(parts) <= max_parts
    assert all(len(part) <= 90 and len(part.encode()) <= 200 for part in parts)
