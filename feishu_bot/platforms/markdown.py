"""Whether a text is written with Markdown."""

from __future__ import annotations

import re

_MARKDOWN = re.compile(
    r"""
      ^\ {0,3}(?:```|~~~)              # a code fence
    | ^\ {0,3}\#{1,6}\ +\S             # a heading
    | ^\ {0,3}[-*+]\ +\S               # a list; numbered ones look the same as text
    | ^\ {0,3}\|?\ *:?-{3,}:?\ *\|     # the rule of a table
    | \*\*[^\s*](?:[^\n]{0,500}?\S)?\*\*   # bold
    | ~~[^\s~][^~\n]{0,500}~~          # struck out
    | `[^`\n]+`                        # code
    | \[[^\]\n]{1,500}\]\(\S+?\)       # a link
    """,
    re.MULTILINE | re.VERBOSE,
)


def holds_markdown(text: str) -> bool:
    """Return whether ``text`` is written with Markdown that would look raw as plain text."""
    return _MARKDOWN.search(text) is not None
