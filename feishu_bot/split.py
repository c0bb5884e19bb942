"""Cutting a long answer into parts that a platform takes, where a reader would cut it."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)(.*)$", re.MULTILINE)
# Best first: between paragraphs, lines, sentences, words.
_CUTS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"[。！？…；]|[.!?;](?=\s)"),
    re.compile(r"\s"),
)


def split_text(text: str, *, max_chars: int, max_bytes: int | None = None) -> list[str]:
    """Return ``text`` in parts of at most ``max_chars`` characters and ``max_bytes`` of UTF-8 each.

    Cut at a paragraph, else a line, else a sentence, else a blank. A code block that must be cut is closed at the
    end of one part and opened again, with its language, at the start of the next.
    """
    parts: list[str] = []
    rest = text
    fence = ""
    while rest:
        room = max_chars - len(fence) - 1 if fence else max_chars
        limit = _fit(rest, room, max_bytes - len(fence.encode()) - 1 if fence and max_bytes else max_bytes)
        if limit >= len(rest):
            parts.append(_reopen(fence, rest))
            break
        closing = 4  # room for the line that closes a fence
        cut = _cut(rest, max(1, limit - closing))
        piece, rest = rest[:cut], rest[cut:]
        open_fence = _open_fence(fence, piece)
        whole = _reopen(fence, piece.rstrip() if not open_fence else piece.rstrip("\n"))
        if open_fence:
            whole += "\n" + re.match(r"[`~]+", open_fence)[0]  # type: ignore[index]  # a fence begins so
        elif not fence:
            rest = rest.lstrip("\n")
        if whole.strip():
            parts.append(whole)
        fence = open_fence
    return parts


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


def _fit(text: str, max_chars: int, max_bytes: int | None) -> int:
    """Return how many characters of ``text`` fit both limits; at least one."""
    count = min(len(text), max(1, max_chars))
    if max_bytes is not None:
        encoded = text[:count].encode("utf-8", "replace")
        if len(encoded) > max_bytes:
            count = len(encoded[: max(4, max_bytes)].decode("utf-8", "ignore"))
    return max(1, count)


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


def _open_fence(fence: str, piece: str) -> str:
    """Return the fence line that is still open after ``piece``, "" if none is."""
    current = fence
    for match in _FENCE.finditer(piece):
        mark = match[1]
        if not current:
            current = mark + match[2].strip()
        elif not match[2].strip() and mark[0] == current[0]:
            current = ""
    return current


def _reopen(fence: str, piece: str) -> str:
    return f"{fence}\n{piece}" if fence else piece
