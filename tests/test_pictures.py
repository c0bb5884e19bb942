"""The pictures in the documents: each is there, shown somewhere, told in words, and small."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
MAX_BYTES = 150_000
MAX_BYTES_OF_ALL = 1_500_000


def test_every_picture_is_there_and_shown_and_told_in_words():
    shown = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for words, place in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert len(words) > 10, f"{page.name}: {place} has no words"
            shown.add((page.parent / place).resolve())
    assert shown == {file.resolve() for file in FOLDER.iterdir()}


def test_the_pictures_are_small():
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert {name for name, size in sizes.items() if size > MAX_BYTES} == set()
    assert sum(sizes.values()) < MAX_BYTES_OF_ALL
