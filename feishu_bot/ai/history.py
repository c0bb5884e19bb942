"""Which part of a conversation is sent to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from feishu_bot.ai.chat_model import ChatMessage
from feishu_bot.ai.tokens import TOKENS_PER_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.ai.chat_model import Role


# A row begins with role, content and tokens; what follows is its owner's.
HistoryRow = tuple[str, str, int, *tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class History:
    """What was chosen, oldest first. ``counts`` are the tokens of each message, without its framing."""

    messages: tuple[ChatMessage, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """The tokens of all messages, without their framing."""
        return sum(self.counts)


def choose_history(
    rows: Sequence[HistoryRow],
    *,
    max_turns: int,
    max_tokens: int,
    room: int | None = None,
) -> History:
    """Return the newest whole turns that fit, without a hole: the first that does not fit ends the choice.

    ``rows`` begin with role, content and tokens, oldest first. A turn is a user message and all that follows until
    the next one; rows before the first user message belong to none and are left out, as is a tool row that
    follows neither the assistant message that called the tool nor another tool row of it. ``max_tokens`` bounds
    the contents; ``room``, what is left of the model's window, bounds contents and framing.
    """
    start, used, framed = len(rows), 0, 0
    turns = tokens = count = 0
    tools = False
    for index in range(len(rows) - 1, -1, -1):
        if turns >= max_turns:
            break
        role = rows[index][0]
        tokens += rows[index][2]
        count += 1
        tools = tools or role == "tool"
        if role != "user":
            continue
        if tools:  # rare enough to look at the turn again
            kept = _with_calls(rows[index : index + count])
            tokens, count_kept = sum(row[2] for row in kept), len(kept)
        else:
            count_kept = count
        used += tokens
        framed += TOKENS_PER_MESSAGE * count_kept
        if used > max_tokens or (room is not None and used + framed > room):
            break
        start = index
        turns += 1
        tokens = count = 0
    chosen = _with_calls(rows[start:]) if tools else rows[start:]
    return History(
        tuple([ChatMessage(cast("Role", row[0]), row[1]) for row in chosen]),
        tuple([row[2] for row in chosen]),
    )


def _with_calls(turn: Sequence[HistoryRow]) -> list[HistoryRow]:
    """Return the turn without tool rows that follow no call; models refuse a prompt that holds one."""
    kept: list[HistoryRow] = []
    for row in turn:
        if row[0] == "tool" and (not kept or kept[-1][0] not in {"assistant", "tool"}):
            continue
        kept.append(row)
    return kept
