"""An answer on its way into the record, and what is noted beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from feishu_bot.groups import metadata
from feishu_bot.parts import storable
from feishu_bot.store.quotes import CHAT
from feishu_bot.store.work import NewMessage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from feishu_bot.ai.agent import AgentAnswer, ToolRound
    from feishu_bot.model import InboundMessage
    from feishu_bot.store.work import Work


@dataclass(slots=True)
class Said:
    """What a model or a plugin has said, with its tokens, and the tools that were called on the way."""

    text: str
    tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[ToolRound, ...] = ()

    def steps(self, work: Work, note: dict[str, Any]) -> Iterator[NewMessage]:
        """Yield what is stored of the tools that were called on the way, with ``note`` beside each."""
        steps = [message for done in self.rounds for message in done.messages()]
        for number, (role, content, tokens, own) in enumerate(steps):
            yield NewMessage(
                role=role,
                content=storable(content),
                tokens=tokens,
                metadata_json=storable(orjson.dumps(own | note).decode()),
                save_key=f"in:{work.inbox_id}:step:{number}",
            )


def sent_to_model(work: Work, answer: AgentAnswer) -> dict[str, Any]:
    """Return what went into an answer, for ``/why``."""
    plan, rows = answer.plan, work.history
    count = 0 if plan is None else len(plan.history)
    first = rows[len(rows) - count].seq if 0 < count <= len(rows) else None
    return {
        "messages": count,
        "first_seq": first,
        "input_tokens": answer.calls[-1].input_tokens,
        "calls": len(answer.calls),
        "summary": plan is not None and plan.summarized,
        "tools": sorted({call.name for done in answer.rounds for call in done.calls}),
    }


def chat_note(work: Work, message: InboundMessage) -> dict[str, Any]:
    """Return the chat of an answer in a conversation that spans several."""
    noted = metadata(message, work.lease.lane_key)
    return {CHAT: noted[CHAT]} if CHAT in noted else {}
