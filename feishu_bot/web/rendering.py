"""Markdown of people and models as HTML that a page may show: no HTML of theirs, no pictures, no scripts."""

from __future__ import annotations

import html
import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline

MAX_CHARS: Final = 20_000  # of a longer text the source is shown as it is
_TAGS: Final = frozenset(
    ("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "em", "strong", "s", "del", "code", "pre", "blockquote", "ul",
     "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td")
)  # fmt: skip
_ATTRIBUTES: Final = {
    "a": {"href", "title"},
    "ol": {"start"},
    "code": {"class"},
    "th": {"align"},
    "td": {"align"},
}
_MAX_NESTING: Final = 20

_REMEMBERED: Final = 256  # texts, so that a page that is opened again costs nothing

_CJK: Final = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")


def _emphasis(state: StateInline, silent: bool) -> bool:  # noqa: FBT001  # the signature of a rule
    """Mark ``*`` as CommonMark does, but beside Chinese, Japanese and Korean as where there is no punctuation.

    These languages put no blank behind punctuation, so that CommonMark finds no end in ``**注意：**请看``.
    """
    from markdown_it.rules_inline.emphasis import tokenize  # noqa: PLC0415  # see _markdown

    start, before = state.pos, len(state.delimiters)
    if not tokenize(state, silent):
        return False
    last = state.src[start - 1] if start else " "
    following = state.src[state.pos] if state.pos < state.posMax else " "
    if state.src[start] == "*" and (_CJK.match(last) or _CJK.match(following)):
        for delimiter in state.delimiters[before:]:
            delimiter.open = delimiter.open or not following.isspace()
            delimiter.close = delimiter.close or not last.isspace()
    return True


@cache
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt  # noqa: PLC0415  # a bot whose pages nobody opens never needs it

    markdown = (
        MarkdownIt(
            "commonmark", {"html": False, "linkify": False, "breaks": True, "maxNesting": _MAX_NESTING}
        )
        .enable(["table", "strikethrough"])
        .disable(["image"])
    )
    markdown.inline.ruler.at("emphasis", _emphasis)
    return markdown


@lru_cache(_REMEMBERED)
def render(text: str) -> str:
    """Return a text as HTML, made of an allow-list of elements; links open elsewhere and tell nobody who we are."""
    if len(text) > MAX_CHARS:
        return f"<pre>{html.escape(text)}</pre>"
    import nh3  # noqa: PLC0415  # as above

    return nh3.clean(
        _markdown().render(text),
        tags=set(_TAGS),
        attributes={tag: set(names) for tag, names in _ATTRIBUTES.items()},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        allowed_classes=None,
    )
