"""What of a text can be found: its terms, the same on every database, and the literal check behind them.

An index only narrows down where to look. Whether a message is a hit is decided here, on the text itself, so that
every database gives the same answers whatever its own full-text rules are.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_SEARCHED_CHARS: Final = 100_000  # of a message; PostgreSQL takes no more terms than fit 1 MiB
MAX_WORD_CHARS: Final = 64  # of a word in the index; the literal check sees the whole of it
MAX_QUERY_TERMS: Final = 32  # that the index is asked for
MAX_QUERY_CHARS: Final = 1000

# Scripts that are written without blanks: Chinese, Japanese, Korean. After NFKC, so half-width kana and the
# compatibility forms are not listed.
_CJK: Final = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa"
    "\u30fc-\u30ff\u3105-\u312f\u3131-\u318e\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    "\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
_SYMBOL: Final = "\u00a9\u00ae\u203c\u2049\u2190-\u2bff\u3030\u303d\U0001f000-\U0001faff"  # emoji and arrows
# No underscore in a word: the databases disagree on it.
_TOKEN: Final = re.compile(f"([{_CJK}]+)|([^\\W_{_CJK}]+)|([{_SYMBOL}])")
_ASCII_WORD: Final = re.compile("[a-z0-9]+")
_WORD_CHAR: Final = re.compile(f"[^\\W_{_CJK}]")
_PIECE: Final = re.compile(r'"([^"]*)"|([^\s"]+)')
_BLANKS: Final = re.compile(r"\s+")
_QUOTES: Final = str.maketrans("“”„«»「」『』", '"""""""""')


def normalise(text: str) -> str:
    """Return the text as it is compared: compatibility forms, case and emoji variants do not differ."""
    if text.isascii():
        return text[:MAX_SEARCHED_CHARS].lower()
    folded = unicodedata.normalize("NFKC", text[:MAX_SEARCHED_CHARS]).casefold()
    return folded.replace("\ufe0f", "")[:MAX_SEARCHED_CHARS]


def terms(text: str) -> list[str]:
    """Return what an index keeps of a message, each term once.

    A run of Chinese, Japanese or Korean: its overlapping pairs of characters and its last character. A run of other
    letters and digits: one word. An emoji: itself.
    """
    folded = normalise(text)
    if folded.isascii():
        words: Iterable[str] = _ASCII_WORD.findall(folded)
        if len(folded) > MAX_WORD_CHARS:
            words = [word[:MAX_WORD_CHARS] for word in words]
        return list(dict.fromkeys(words))
    found: list[str] = []
    for run, word, symbol in _TOKEN.findall(folded):
        if run:
            found += map(operator.add, run, run[1:])
            found.append(run[-1])
        else:
            found.append(word[:MAX_WORD_CHARS] or symbol)
    return list(dict.fromkeys(found))


class QueryTerm(NamedTuple):
    """A term that every hit has; ``prefix``: or one that begins with it."""

    text: str
    prefix: bool


class _Needle(NamedTuple):
    text: str
    from_word_start: bool


class Query:
    """What somebody looks for: every word, and every phrase between quotation marks, occurs in a hit.

    Nothing else in it is syntax. A word matches from the beginning of a word; Chinese, Japanese and Korean match
    anywhere.
    """

    def __init__(self, text: str) -> None:
        self._needles = [_needle(piece) for piece in _pieces(text)]
        found: dict[QueryTerm, None] = {}
        for needle in self._needles:
            found.update(dict.fromkeys(_query_terms(needle.text)))
        exact = {term.text for term in found if not term.prefix}
        self.terms: Sequence[QueryTerm] = [t for t in found if not (t.prefix and t.text in exact)][
            :MAX_QUERY_TERMS
        ]

    def __bool__(self) -> bool:
        return bool(self._needles)

    def matches(self, content: str) -> bool:
        """Say whether the message is a hit."""
        folded = normalise(content)
        return all(_find(folded, needle) >= 0 for needle in self._needles)

    def snippet(self, content: str, *, marks: tuple[str, str] = ("«", "»"), width: int = 120) -> str:
        """Return about ``width`` characters around the first hit on one line, each hit between the marks."""
        spans = self._spans(content)
        first = spans[0][0] if spans else 0
        start = max(0, min(first - width // 4, len(content) - width))
        end = min(len(content), start + width)
        out = ["…"] if start else []
        at = start
        for left, right in spans:
            if left >= end:
                break
            right = min(right, end)  # noqa: PLW2901  # a hit may reach beyond what is shown
            if right > left >= at:
                out += [content[at:left], marks[0], content[left:right], marks[1]]
                at = right
        out.append(content[at:end])
        if end < len(content):
            out.append("…")
        return _BLANKS.sub(" ", "".join(out)).strip()

    def _spans(self, content: str) -> list[tuple[int, int]]:
        """Return where the hits lie in the text as it was written, without overlaps."""
        folded = normalise(content)
        found = sorted(
            (at, at + len(needle.text)) for needle in self._needles for at in _find_some(folded, needle)
        )
        spans: list[tuple[int, int]] = []
        for left, right in found:
            if not spans or left > spans[-1][1]:
                spans.append((left, right))
            elif right > spans[-1][1]:
                spans[-1] = (spans[-1][0], right)
        if content.isascii():
            return spans
        return [(_origin(content, left, inside=True), _origin(content, right)) for left, right in spans]


def _pieces(text: str) -> list[str]:
    text = text[:MAX_QUERY_CHARS].translate(_QUOTES)
    if text.count('"') % 2:  # a quotation mark that nobody closed is a character like any other
        head, _, tail = text.rpartition('"')
        pieces = _PIECE.findall(head)
        rest = [*(("", word) for word in tail.split())]
        if rest and not tail[:1].isspace():
            rest[0] = ("", '"' + rest[0][1])
        else:
            rest.insert(0, ("", '"'))
        pieces += rest
    else:
        pieces = _PIECE.findall(text)
    found = [normalise(phrase or word) for phrase, word in pieces]
    return [piece for piece in dict.fromkeys(found) if piece.strip()]


def _needle(piece: str) -> _Needle:
    return _Needle(piece, _WORD_CHAR.match(piece) is not None)


def _query_terms(piece: str) -> list[QueryTerm]:
    found: list[QueryTerm] = []
    for match in _TOKEN.finditer(piece):
        run, word, symbol = match.groups()
        if run and len(run) > 1:
            found += [QueryTerm(pair, False) for pair in map(operator.add, run, run[1:])]
        elif run:
            found.append(QueryTerm(run, True))
        elif word:
            found.append(QueryTerm(word[:MAX_WORD_CHARS], match.end() == len(piece)))
        else:
            found.append(QueryTerm(symbol, False))
    return found


def _find(folded: str, needle: _Needle, start: int = 0) -> int:
    at = folded.find(needle.text, start)
    if needle.from_word_start:
        while at > 0 and _WORD_CHAR.match(folded[at - 1]):
            at = folded.find(needle.text, at + 1)
    return at


def _find_some(folded: str, needle: _Needle, most: int = 50) -> list[int]:
    found: list[int] = []
    at = _find(folded, needle)
    while at >= 0 and len(found) < most:
        found.append(at)
        at = _find(folded, needle, at + len(needle.text))
    return found


def _origin(content: str, position: int, *, inside: bool = False) -> int:
    """Return the place in ``content`` whose compared form is ``position`` characters long.

    ``inside``: the character that holds this position, else the one behind it.
    """
    low, high = 0, len(content)
    while low < high:
        middle = (low + high) // 2
        length = len(normalise(content[: middle + 1] if inside else content[:middle]))
        if length > position if inside else length >= position:
            high = middle
        else:
            low = middle + 1
    return low
