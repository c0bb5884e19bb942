"""Which part of a conversation is sent to the model, and how stored rows become messages of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import orjson

from feishu_bot.ai.chat_model import ChatMessage, ToolCall
from feishu_bot.ai.tokens import TOKENS_PER_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.ai.chat_model import Role


# A row begins with role, content and tokens; what follows is its owner's. The sixth value, if there is one, tells
# which tools an assistant's message calls, or which call a tool's message answers (JSON, as it is stored).
HistoryRow = tuple[str, str, int, *tuple[object, ...]]
Row = TypeVar("Row", bound=HistoryRow)

_TOOLS: Final = 5


@dataclass(frozen=True, slots=True)
class History:
    """What was chosen, oldest first. ``counts`` are the tokens of each message, without its framing."""

    messages: tuple[ChatMessage, ...] = ()
    counts: tuple[int, ...] = ()
    start: int = 0  # the row it begins with

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
    start = choose_start(rows, max_turns=max_turns, max_tokens=max_tokens, room=room)
    chosen: Sequence[HistoryRow] = rows[start:]
    if any(_is_of_tools(row) for row in chosen):
        pairs = _with_calls(chosen)
        return History(tuple([message for message, _ in pairs]), tuple([count for _, count in pairs]), start)
    return History(
        tuple([ChatMessage(cast("Role", row[0]), row[1]) for row in chosen]),
        tuple([row[2] for row in chosen]),
        start,
    )


def choose_start(
    rows: Sequence[HistoryRow], *, max_turns: int, max_tokens: int, room: int | None = None
) -> int:
    """Return the index of the row that ``choose_history`` begins with; the number of rows if it takes none."""
    start, used, framed = len(rows), 0, 0
    turns = tokens = count = 0
    tools = False
    for index in range(len(rows) - 1, -1, -1):
        if turns >= max_turns:
            break
        row = rows[index]
        tokens += row[2]
        count += 1
        tools = tools or _is_of_tools(row)
        if row[0] != "user":
            continue
        if tools:  # rare enough to look at the turn again
            kept = _with_calls(rows[index : index + count])
            tokens, count = sum(tokens for _, tokens in kept), len(kept)
        used += tokens
        framed += TOKENS_PER_MESSAGE * count
        if used > max_tokens or (room is not None and used + framed > room):
            break
        start = index
        turns += 1
        tokens = count = 0
        tools = False
    return start


def _is_of_tools(row: HistoryRow) -> bool:
    return row[0] == "tool" or (len(row) > _TOOLS and row[_TOOLS] is not None)


def _with_calls(rows: Sequence[HistoryRow]) -> list[tuple[ChatMessage, int]]:
    """Return messages with their counts in which every call has its result and every result its call.

    Models refuse a prompt that is otherwise. Results that are stored without the name of their call are kept where
    they follow an assistant's message.
    """
    kept: list[tuple[ChatMessage, int]] = []
    index = 0
    while index < len(rows):
        row = rows[index]
        index += 1
        if row[0] == "tool":
            if _call_id(row) is None and kept and kept[-1][0].role in {"assistant", "tool"}:
                kept.append((ChatMessage("tool", row[1]), row[2]))
            continue
        calls = read_calls(row[_TOOLS]) if row[0] == "assistant" and len(row) > _TOOLS else ()
        if not calls:
            kept.append((ChatMessage(cast("Role", row[0]), row[1]), row[2]))
            continue
        results: dict[str, HistoryRow] = {}
        while index < len(rows) and rows[index][0] == "tool":
            results[_call_id(rows[index]) or ""] = rows[index]
            index += 1
        if all(call.id in results for call in calls):
            kept.append((ChatMessage("assistant", row[1], tool_calls=calls), row[2]))
            for call in calls:
                result = results[call.id]
                kept.append((ChatMessage("tool", result[1], tool_call_id=call.id), result[2]))
        elif row[1].strip():  # a result was removed: what was said beside the calls can stay
            kept.append((ChatMessage("assistant", row[1]), row[2]))
    return kept


# ------------------------------------------------------------------------------------- calls as they are stored


def call_metadata(calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Return what is stored beside an assistant's message that calls tools. This key has to be the first."""
    return {"tool_calls": [call._asdict() for call in calls]}


def result_metadata(call: ToolCall) -> dict[str, Any]:
    """Return what is stored beside a tool's message."""
    return {"tool_name": call.name, "tool_call_id": call.id}


def read_calls(stored: object) -> tuple[ToolCall, ...]:
    """Return the calls of an assistant's message; none where they are not as they should be."""
    found = _load(stored).get("tool_calls")
    calls = []
    for item in found if isinstance(found, list) else ():
        function = item.get("function", item) if isinstance(item, dict) else {}
        values = (item.get("id") if function else None, function.get("name"), function.get("arguments"))
        if not all(isinstance(value, str) for value in values):
            return ()
        calls.append(ToolCall(*cast("tuple[str, str, str]", values)))
    return tuple(calls) if len({call.id for call in calls}) == len(calls) else ()


def _call_id(row: HistoryRow) -> str | None:
    found = _load(row[_TOOLS] if len(row) > _TOOLS else None).get("tool_call_id")
    return found if isinstance(found, str) else None


def _load(stored: object) -> dict[str, Any]:
    try:
        found = orjson.loads(stored) if isinstance(stored, str) else None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
