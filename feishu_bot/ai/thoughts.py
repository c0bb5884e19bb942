"""What a model thinks aloud before it answers, told from the answer while both arrive."""

from __future__ import annotations

from typing import Final

_TAGS: Final = ("<think>", "<thinking>", "<thought>")


class Thoughts:
    """Passes an answer on without the ``<think>…</think>`` blocks at its beginning.

    Such tags elsewhere are part of the answer. What was begun and never closed is a thought. Time is linear in the
    text, however it is cut.
    """

    def __init__(self) -> None:
        self._waiting = ""  # may still become a tag
        self._end: str | None = None  # of the block that we are in
        self._after = False  # a block: blanks behind it are not the answer's
        self._answering = False

    def feed(self, piece: str) -> str:
        """Return what of ``piece``, and of what waited, belongs to the answer."""
        if self._answering:
            return piece
        text = self._waiting + piece
        self._waiting = ""
        while text:
            if self._end is not None:
                at = text.find(self._end)
                if at < 0:
                    self._waiting = text[-(len(self._end) - 1) :]
                    return ""
                text = text[at + len(self._end) :]
                self._end, self._after = None, True
                continue
            head = text.lstrip()
            tag = next((tag for tag in _TAGS if head.startswith(tag)), None)
            if tag is not None:
                self._end = f"</{tag[1:]}"
                text = head[len(tag) :]
            elif any(tag.startswith(head) for tag in _TAGS):  # nothing but blanks is the beginning of any
                self._waiting = text
                return ""
            else:
                self._answering = True
                return head if self._after else text
        return ""

    def finish(self) -> str:
        """Return what still waited, when nothing more comes."""
        waiting, self._waiting = self._waiting, ""
        if self._end is not None:
            return ""
        return waiting.lstrip() if self._after else waiting
