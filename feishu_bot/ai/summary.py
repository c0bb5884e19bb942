"""The rolling summary: what no longer fits into the history, told in short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from feishu_bot.ai.chat_model import ChatMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.ai.history import HistoryRow

SPARE_TURNS: Final = 8  # read beyond the window, so that what falls out of it is still at hand
MAX_TOKENS: Final = 512  # of a summary
CALL: Final = 999  # its number among the calls of an attempt; the others count from 0
_SEQ: Final = 3  # where in a row its number in the conversation stands
_MAX_CHARS: Final = 4000  # of one message that is summarised
_INSTRUCTION: Final = (
    "Summarise the conversation below for an assistant that will continue it. Keep names, facts, decisions, open "
    "questions and wishes of the user; leave out greetings. Write in the conversation's language, at most 200 words, "
    "and nothing but the summary."
)


@dataclass(frozen=True, slots=True)
class DueSummary:
    """A summary to be made: of the one before and of these messages; ``upto`` is the last one's number."""

    before: str | None
    rows: tuple[HistoryRow, ...]
    upto: int

    def messages(self) -> tuple[ChatMessage, ...]:
        """Return what the model is asked."""
        lines = [f"[summary so far]\n{self.before}"] if self.before else []
        lines += [
            f"[{row[0]}] {row[1][:_MAX_CHARS]}"
            for row in self.rows
            if row[0] in {"user", "assistant"} and row[1]
        ]
        return ChatMessage("system", _INSTRUCTION), ChatMessage("user", "\n".join(lines))


def due_summary(
    rows: Sequence[HistoryRow], start: int, *, before: str | None, summarized_to: int
) -> DueSummary | None:
    """Return the summary that is due when the history sent begins at row ``start``; None while all fits.

    It tells of more than has fallen out: of the older half of the window too, so that it is made now and then only.
    """
    fallen = [row for row in rows[:start] if _number(row) > summarized_to]
    if not any(row[0] == "user" for row in fallen):
        return None
    end = start
    for index in range(start, start + (len(rows) - start) // 2 + 1):
        if index < len(rows) and rows[index][0] == "user":
            end = index
    told = tuple(row for row in rows[:end] if _number(row) > summarized_to)
    return DueSummary(before, told, _number(told[-1]))


def _number(row: HistoryRow) -> int:
    number = row[_SEQ] if len(row) > _SEQ else 0
    return number if isinstance(number, int) else 0
