from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feishu_bot.split import split_text

LINES = st.sampled_from(
    [
        "",
        "word",
        "two words",
        "```",
        "```python",
        "~~~",
        "````",
        "```js extra info",
        "    ```",
        "a。b！c",
        "x" * 50,
        "```a```",
        "é" * 9,
        "𠮷𠮷",
    ]
)


def words(text):
    """Return what a text says, without blanks and fences."""
    return re.sub(r"\s|[`~]{3,}[^\n]*", "", text)


@settings(max_examples=400, deadline=None)
@given(st.lists(LINES, max_size=25), st.integers(20, 90), st.one_of(st.none(), st.integers(40, 120)))
@example(["```" + "p" * 40, "x"] * 4, 20, None)
@example(["`" * 30, "x" * 30], 20, None)
@example(["```python", *["x" * 15] * 9, "```"], 20, None)
def test_every_part_keeps_to_the_limits_and_nothing_is_lost(lines, max_chars, max_bytes):
    text = "\n".join(lines)
    parts = split_text(text, max_chars=max_chars, max_bytes=max_bytes)
    assert all(len(part) <= max_chars for part in parts)
    assert all(max_bytes is None or len(part.encode()) <= max_bytes for part in parts)
    assert all(part.strip() for part in parts) or not text.strip()
    plain = "".join(character for character in text if character not in "`~ \n")
    assert all(character in "".join(parts) for character in plain)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abc d。é\n", max_size=300), st.integers(20, 60))
def test_the_parts_of_a_plain_text_say_what_it_says(text, max_chars):
    assert words("".join(split_text(text, max_chars=max_chars))) == words(text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(100, 200),
)
def test_a_code_block_that_fits_one_part_is_never_cut(blocks, prose, max_chars):
    texts = []
    for n, size in enumerate(blocks):
        texts.append("word " * prose)
        texts.append("```python\n" + "x\n" * (size // 2) + f"# {n}\n```")
    parts = split_text("\n\n".join(texts), max_chars=max_chars)
    for block in texts[1::2]:
        assert len(block) <= max_chars
        assert any(block in part for part in parts)


@pytest.mark.parametrize("fence", ["```python", "~~~", "````md"])
def test_a_code_block_that_is_too_large_is_closed_and_opened_again_between_its_lines(fence):
    lines = [f"line {n}" for n in range(40)]
    mark = fence.rstrip("pythonmd")
    text = "\n".join(["before", fence, *lines, mark, "after"])
    parts = split_text(text, max_chars=80)
    assert len(parts) > 3
    inside = [part for part in parts if "line" in part]
    assert all(part.count(mark) == 2 for part in inside)
    assert all(part.startswith(fence) for part in inside[1:])
    assert [line for part in parts for line in part.split("\n") if line.startswith("line")] == lines
    assert parts[-1].endswith("after")
    assert not any(f"{fence}\n{mark}" in part for part in parts), "no empty block"


def test_a_block_that_is_never_closed_is_closed_in_each_part_but_the_last():
    parts = split_text("```\n" + "code\n" * 30, max_chars=50)
    assert all(part.count("```") == 2 for part in parts[:-1])
    assert all(part.startswith("```") for part in parts)


def test_a_fence_inside_a_longer_fence_does_not_close_it():
    text = "````\n```\ninner\n```\n````\n" + "word " * 20
    assert split_text(text, max_chars=60)[0] == "````\n```\ninner\n```\n````"


def test_code_on_one_line_is_no_block():
    text = "```one``` " + "word " * 30
    assert "".join(split_text(text, max_chars=50)).count("```") == 2


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One paragraph of it.\n\nAnother one that is long. And longer. " + "x" * 50, "One paragraph of it."),
        ("A line that ends here\nand goes on. A sentence. And " + "x" * 60, "A line that ends here"),
        ("没有空格的中文句子。第二个中文句子！" * 5, "没有空格的中文句子。第二个中文句子！" * 3),
        ("words and words and words and words and words and wordswordswords", "words and words and words and words and words and"),
    ],
)  # fmt: skip
def test_it_is_cut_where_a_reader_would_cut(text, first):
    assert split_text(text, max_chars=55)[0] == first


def test_a_word_without_end_is_cut_at_the_limit():
    assert split_text("x" * 45, max_chars=20) == ["x" * 20, "x" * 20, "x" * 5]


def test_bytes_never_cut_a_character():
    parts = split_text("𠮷" * 30, max_chars=100, max_bytes=42)
    assert parts == ["𠮷" * 10] * 3


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_nothing_is_nothing_or_one_part(text):
    assert len(split_text(text, max_chars=20)) == bool(text)
