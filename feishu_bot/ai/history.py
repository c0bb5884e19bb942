"""Which part of a conversation is sent to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from feishu_bot.ai.chat_model import ChatMessage
from feishu_bot.ai.tokens import TOKENS_PER_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.ai.chat_model import Role


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
    rows: Sequence[tuple[str, str, int]],
    *,
    max_turns: int,
    max_tokens: int,
    room: int | None = None,
) -> History:
    """Return the newest whole turns that fit, without a hole: the first that does not fit ends the choice.

    ``rows`` are ``(role, content, tokens)``, oldest first. A turn is a user message and all that follows until
    the next one; rows before the first user message belong to none and are left out, as is a tool row that
    follows neither the assistant message that called the tool nor another tool row of it. ``max_tokens`` bounds
    the contents; ``room``, what is left of the model's window, bounds contents and framing.
    """
    turns: list[list[tuple[str, str, int]]] = []
    used = framed = 0
    end = len(rows)
    for start in range(len(rows) - 1, -1, -1):
        if len(turns) >= max_turns:
            break
        if rows[start][0] != "user":
            continue
        turn = _with_calls(rows[start:end])
        used += sum(row[2] for row in turn)
        framed += TOKENS_PER_MESSAGE * len(turn)
        if used > max_tokens or (room is not None and used + framed > room):
            break
        turns.append(turn)
        end = start
    chosen = [row for turn in reversed(turns) for row in turn]
    return History(
        tuple([ChatMessage(cast("Role", role), content) for role, content, _ in chosen]),
        tuple([tokens for _, _, tokens in chosen]),
    )


def _with_calls(turn: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Return the turn without tool rows that follow no call; models refuse a prompt that holds one."""
    kept: list[tuple[str, str, int]] = []
    for row in turn:
        if row[0] == "tool" and kept[-1][0] not in {"assistant", "tool"}:
            continue
        kept.append(row)
    return kept
