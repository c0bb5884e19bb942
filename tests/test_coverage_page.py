"""The page that says what became of each row of the seeds."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "coverage.md"
LAST_ROWS = {0: 62, 1: 53, 2: 73, 3: 85, 4: 58}  # of each seed, counted from 1
ROW = re.compile(r"^\| (\d\.\d\d) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
OUTCOMES = ("works: ", "otherwise: ", "declined: ", "not yet: ", "not proved: ")


@functools.cache
def names_of(path):
    """Return the names of the tests in a file; none where there is no such file."""
    file = ROOT / path
    tree = ast.parse(file.read_text() if file.is_file() else "")
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.fixture(scope="module")
def rows():
    return ROW.findall(PAGE.read_text())


def test_every_row_of_every_seed_stands_once_on_the_page(rows):
    expected = [f"{seed}.{row:02}" for seed, last in LAST_ROWS.items() for row in range(1, last + 1)]
    assert Counter(number for number, *_ in rows) == Counter(expected)
    assert len(re.findall(r"^\| \d\.\d", PAGE.read_text(), re.MULTILINE)) == len(expected)


def test_every_row_has_an_outcome_that_the_page_explains(rows):
    assert [row for row in rows if row[2] != "works" and not row[2].startswith(OUTCOMES)] == []


def test_every_test_that_the_page_names_exists(rows):
    named = TEST.findall(PAGE.read_text())
    assert len(named) == PAGE.read_text().count("::test_")
    assert {f"{path}::{name}" for path, name in named if name not in names_of(path)} == set()


def test_every_proof_is_a_test_or_a_page_that_exists_or_none(rows):
    for number, _, _, proof in rows:
        links = re.fullmatch(r"\[[^\]]+\]\(([^)]+)\)", proof)
        if links is not None:
            assert (PAGE.parent / links[1]).is_file(), number
        else:
            assert proof == "–" or all(TEST.fullmatch(one) for one in proof.split("<br>")), number
