"""Cutting a long answer into parts that a platform takes, where a reader would cut it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_FENCE_LINE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
# Best first: between paragraphs, lines, sentences, words.
_CUTS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"[。！？…；]|[.!?;](?=\s)"),
    re.compile(r"\s"),
)


@dataclass(frozen=True, slots=True)
class _Limits:
    """What one part may hold."""

    chars: int
    bytes: int | None

    def hold(self, text: str) -> bool:
        return len(text) <= self.chars and (self.bytes is None or _size(text) <= self.bytes)

    def less(self, text: str) -> _Limits:
        """Return what is left beside ``text``."""
        return _Limits(self.chars - len(text), None if self.bytes is None else self.bytes - _size(text))

    def fit(self, text: str) -> int:
        """Return how many characters of ``text`` go into one part; at least one."""
        count = min(len(text), max(1, self.chars))
        if self.bytes is not None:
            encoded = text[:count].encode("utf-8", "replace")
            if len(encoded) > self.bytes:
                count = len(encoded[: max(4, self.bytes)].decode("utf-8", "ignore"))
        return max(1, count)


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of code between fences: where it stands, and how it is opened and closed."""

    start: int
    end: int
    opening: str
    mark: str


def split_text(text: str, *, max_chars: int, max_bytes: int | None = None) -> list[str]:
    """Return ``text`` in parts of at most ``max_chars`` characters and ``max_bytes`` of UTF-8 each.

    Cut at a paragraph, else a line, else a sentence, else a blank; never inside a code block that one part can
    hold. A larger one is cut between its lines, closed at the end of one part and opened again, with its language,
    at the start of the next.
    """
    limits = _Limits(max_chars, max_bytes)
    parts: list[str] = []
    rest, opened = text, ""  # ``opened``: the line that opens a block anew
    while rest:
        head = f"{opened}\n" if opened else ""
        if limits.hold(head + rest):
            parts.append(head + rest)
            break
        piece, rest, opened = _next(head, rest, limits)
        if piece.strip():
            parts.append(piece)
    return parts


def _next(head: str, rest: str, limits: _Limits) -> tuple[str, str, str]:
    """Return the next part, what is left, and the line that opens a block again that was cut."""
    text = head + rest
    cut = _cut(text, limits.fit(text))
    block = next((b for b in _blocks(text, cut) if b.start < cut < b.end), None)
    if (
        block is not None
        and text[: block.start].strip()
        and limits.hold(text[block.start : block.end].rstrip())
    ):
        cut, block = block.start, None
    if block is None:
        return text[:cut].rstrip(), text[cut:].lstrip("\n"), ""
    closing = f"\n{block.mark}"
    room = limits.less(closing)
    inside = text.rfind("\n", 0, room.fit(text) + 1)
    first = block.start + len(block.opening)
    if inside <= first:  # not one line of it fits: between its words, or its letters
        inside = room.fit(text)
    if (
        inside <= first or room.chars < len(block.opening) * 2
    ):  # hardly more than its own fence fits: plain text
        return text[:cut].rstrip(), text[cut:].lstrip("\n"), ""
    left = text[inside:].removeprefix("\n")
    if left.lstrip(" ").startswith(block.mark) and not left[: block.end - inside].strip().strip(
        block.mark[0]
    ):
        return text[:inside] + closing, left.partition("\n")[2].lstrip("\n"), ""  # only its own end was left
    return text[:inside] + closing, left, block.opening


def _blocks(text: str, until: int) -> Iterator[_Block]:
    """Yield the fenced blocks that begin before ``until`` (CommonMark, 4.5); one never closed goes on to the end."""
    opening: re.Match[str] | None = None
    for line in _FENCE_LINE.finditer(text):
        mark, info = line[1], line[2].strip()
        if opening is None:
            if line.start() >= until:
                return
            if "`" not in info or mark[0] != "`":
                opening = line
        elif not info and mark[0] == opening[1][0] and len(mark) >= len(opening[1]):
            yield _Block(opening.start(), line.end(), opening[0], opening[1])
            opening = None
    if opening is not None:
        yield _Block(opening.start(), len(text), opening[0], opening[1])


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def fit_text(
    text: str,
    *,
    max_chars: int,
    platform_chars: int | None = None,
    max_bytes: int | None = None,
    max_parts: int | None = None,
    ending: str = "…",
) -> list[str]:
    """Return ``text`` in parts as ``split_text`` does, but never in more than ``max_parts``.

    ``max_chars`` is what the operator likes to see, ``platform_chars`` what the platform takes. Where the first
    makes too many parts, the second alone holds; what is too long even then ends with ``ending``.
    """
    chars = min(max_chars, platform_chars or max_chars)
    parts = split_text(text, max_chars=chars, max_bytes=max_bytes)
    if max_parts is None or len(parts) <= max_parts:
        return parts
    chars = platform_chars or max_chars
    parts = split_text(text, max_chars=chars, max_bytes=max_bytes)
    if len(parts) <= max_parts:
        return parts
    ending = "\n\n" + ending
    last = split_text(
        parts[max_parts - 1],
        max_chars=chars - len(ending),
        max_bytes=None if max_bytes is None else max_bytes - len(ending.encode()),
    )
    return [*parts[: max_parts - 1], last[0] + ending]


def _cut(text: str, limit: int) -> int:
    window = text[:limit]
    for pattern in _CUTS:
        best = 0
        for match in pattern.finditer(window):
            best = match.end()
        # A cut in the first third would waste most of the part.
        if best > limit // 3:
            return best
    return limit
