"""What is sent to a model: system prompt, history, question and tools, counted and cut so that they fit. No I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import orjson

from feishu_bot.ai.chat_model import ChatMessage
from feishu_bot.ai.drift import Drift
from feishu_bot.ai.history import choose_history
from feishu_bot.ai.images import image_tokens
from feishu_bot.ai.models import ECHO, context_window
from feishu_bot.ai.summary import MAX_TOKENS
from feishu_bot.ai.tokens import (
    TOKENS_PER_MESSAGE,
    count_tokens,
    encoding_name,
    prompt_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.ai.chat_model import Image, ToolCall, ToolSpec
    from feishu_bot.ai.history import HistoryRow
    from feishu_bot.ai.profile import Profile
    from feishu_bot.ai.summary import DueSummary

_TOKENS_PER_TOOL: Final = 12  # of framing, beyond the tool's own JSON
_TOKENS_PER_CALL: Final = 8
_KEPT: Final = 64  # counts of lists of tools

# Between system prompt and summary; the model reads it, nobody else.
SUMMARY_INTRODUCTION: Final = "Summary of the earlier conversation:"


@dataclass(frozen=True, slots=True)
class CallPlan:
    """One call that may be made: what is sent, and what must be reserved before.

    ``counts`` are the tokens of each message without framing, ``prompt_tokens`` those of all with it and with the
    tools. The first ``fixed`` messages (the system prompt) and the last ``tail`` ones (the question, and what came
    of the tools since) are never left out.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    counts: tuple[int, ...]
    fixed: int
    prompt_tokens: int
    max_output_tokens: int
    reserve_tokens: int
    profile: Profile
    tail: int = 1
    tools: tuple[ToolSpec, ...] = ()
    may_call: bool = True
    start: int = 0  # the row of the history that was sent first
    summarized: bool = False  # a summary of what was before goes along

    @property
    def history(self) -> tuple[ChatMessage, ...]:
        """What of the conversation is sent."""
        return self.messages[self.fixed : len(self.messages) - self.tail]

    @property
    def question(self) -> ChatMessage:
        """What the user has said."""
        return self.messages[-self.tail]


class Prompts:
    """Plans calls. ``margin`` widens the reservations of models whose own encoding is not at hand.

    ``stored`` is the encoding that what is stored was counted by: ``ai.model``'s.
    """

    def __init__(self, margin: float, *, stored: str) -> None:
        self._drift = Drift(margin)
        self._stored = stored
        self._heads: dict[tuple[str, str], int] = {}  # tokens of system prompts, by encoding
        self._tools: dict[tuple[str, int], tuple[tuple[ToolSpec, ...], int]] = {}

    def plan(
        self,
        profile: Profile,
        history_rows: Sequence[HistoryRow],
        user_text: str,
        user_tokens: int,
        *,
        model: str | None = None,
        tools: tuple[ToolSpec, ...] = (),
        summary: str | None = None,
    ) -> CallPlan:
        """Return the first call for a user's text; see ``Agent.plan``."""
        name = model or profile.model
        tools = () if name == ECHO else tools
        head, head_counts = self._head(profile, summary, name)
        history = choose_history(
            _counted(history_rows, name, again=encoding_name(name) != self._stored),
            max_turns=profile.max_history_turns,
            max_tokens=profile.max_history_tokens,
            room=self._room(profile, name, (*head_counts, user_tokens), tools),
        )
        plan = CallPlan(
            name,
            (*head, *history.messages, ChatMessage("user", user_text)),
            (*head_counts, *history.counts, user_tokens),
            len(head),
            0, 0, 0,
            profile,
            tools=tools,
            start=history.start,
            summarized=bool(summary),
        )  # fmt: skip
        return self._measured(plan)

    def summary(self, profile: Profile, due: DueSummary) -> CallPlan:
        """Return the call that makes a summary."""
        messages = due.messages()
        counts = tuple([message_tokens(message, profile.model) for message in messages])
        short = replace(profile, max_output_tokens=min(MAX_TOKENS, profile.max_output_tokens))
        plan = CallPlan(profile.model, messages, counts, 1, 0, 0, 0, short, may_call=False)
        return self._measured(plan)

    def for_model(self, plan: CallPlan, model: str) -> CallPlan:
        """Return the same call to another model, counted anew if that one counts differently."""
        counts = plan.counts
        if encoding_name(model) != encoding_name(plan.model):
            counts = tuple([message_tokens(message, model) for message in plan.messages])
        elif plan.question.images:
            at = len(counts) - plan.tail
            counts = (*counts[:at], message_tokens(plan.question, model), *counts[at + 1 :])
        return self._fitted(replace(plan, model=model, counts=counts))

    def shortened(self, plan: CallPlan) -> CallPlan:
        """Return the same call with the newer half of its history, in whole turns."""
        whole = sum(count + TOKENS_PER_MESSAGE for count in plan.counts[plan.fixed : -plan.tail])
        return self._measured(self._cut(plan, whole // 2))

    def with_results(
        self, plan: CallPlan, text: str, calls: Sequence[ToolCall], results: Sequence[str], *, may_call: bool
    ) -> CallPlan:
        """Return the call that follows when tools were run: the same with what they were asked and have said."""
        said = [ChatMessage("assistant", text, tool_calls=tuple(calls))]
        for call, result in zip(calls, results, strict=True):
            said.append(ChatMessage("tool", result, tool_call_id=call.id))
        counts = [message_tokens(message, plan.model) for message in said]
        longer = replace(
            plan,
            messages=(*plan.messages, *said),
            counts=(*plan.counts, *counts),
            tail=plan.tail + len(said),
            may_call=may_call,
        )
        return self._fitted(longer)

    def enclose(self, plan: CallPlan, images: Sequence[Image], words: str = "") -> CallPlan:
        """Return the call with the question's pictures and a file's words, counted as they are; see ``Agent.enclose``."""
        *others, question = plan.messages
        content = "\n\n".join([text for text in (question.content, words) if text])
        question = question._replace(content=content, images=tuple(images))
        counts = (*plan.counts[:-1], message_tokens(question, plan.model))
        measured = self._measured(replace(plan, messages=(*others, question), counts=counts))
        return replace(measured, reserve_tokens=plan.reserve_tokens)

    def learn(self, plan: CallPlan, reported: int) -> None:
        """Take over how many tokens the provider says a prompt had."""
        if not plan.question.images:  # they are counted by another rule
            self._drift.learn(plan.model, counted=plan.prompt_tokens, reported=reported)

    # ------------------------------------------------------------------------------------------- measuring

    def _measured(self, plan: CallPlan) -> CallPlan:
        prompt = prompt_tokens(plan.counts) + self._tool_tokens(plan.tools, plan.model)
        output = plan.profile.max_output_tokens
        if plan.model == ECHO:  # its answer is the question, whatever the bound says
            output = max(output, plan.counts[-plan.tail])
        reserve = math.ceil(prompt * self._drift.factor(plan.model)) + output
        return replace(plan, prompt_tokens=prompt, max_output_tokens=output, reserve_tokens=reserve)

    def _fitted(self, plan: CallPlan) -> CallPlan:
        """Return the call without the oldest turns that its model's window has no room for."""
        kept = (*plan.counts[: plan.fixed], *plan.counts[-plan.tail :])
        room = self._room(plan.profile, plan.model, kept, plan.tools)
        return self._measured(plan if room is None else self._cut(plan, room))

    def _cut(self, plan: CallPlan, room: int) -> CallPlan:
        fixed, end = plan.fixed, len(plan.messages) - plan.tail
        start = end
        for index in range(end - 1, fixed - 1, -1):
            room -= plan.counts[index] + TOKENS_PER_MESSAGE
            if room < 0:
                break
            if plan.messages[index].role == "user":
                start = index
        return replace(
            plan,
            messages=(*plan.messages[:fixed], *plan.messages[start:]),
            counts=(*plan.counts[:fixed], *plan.counts[start:]),
        )

    def _room(
        self, profile: Profile, model: str, counts: Sequence[int], tools: tuple[ToolSpec, ...]
    ) -> int | None:
        """Return the tokens that the model's window leaves for the history; None where it is unknown."""
        window = context_window(model)
        if window is None:
            return None
        room = int((window - profile.max_output_tokens) / self._drift.factor(model))
        return room - prompt_tokens(counts) - self._tool_tokens(tools, model)

    def _head(
        self, profile: Profile, summary: str | None, model: str
    ) -> tuple[tuple[ChatMessage, ...], tuple[int, ...]]:
        """Return the system prompt, if there is one, and its tokens; a summary stands in it, as not all take two."""
        text, tokens = profile.system_prompt, 0
        if text.strip():
            key = (encoding_name(model), text)
            known = self._heads.get(key)
            if known is None:
                if len(self._heads) >= _KEPT:
                    self._heads.clear()
                known = self._heads[key] = count_tokens(text, model)
            tokens = known
        if summary is not None and summary.strip():
            more = f"{SUMMARY_INTRODUCTION}\n{summary}"
            text = f"{text}\n\n{more}" if tokens else more
            tokens += count_tokens(f"\n\n{more}", model)
        return ((ChatMessage("system", text),), (tokens,)) if tokens else ((), ())

    def _tool_tokens(self, tools: tuple[ToolSpec, ...], model: str) -> int:
        """Count the tools as they are sent; the list itself is kept, so that its identity is."""
        if not tools:
            return 0
        key = (encoding_name(model), id(tools))
        known = self._tools.get(key)
        if known is None:
            if len(self._tools) >= _KEPT:
                self._tools.clear()
            texts = [orjson.dumps(tool._asdict()).decode() for tool in tools]
            tokens = sum(count_tokens(text, model) for text in texts) + _TOKENS_PER_TOOL * len(tools)
            known = self._tools[key] = (tools, tokens)
        return known[1]


def message_tokens(message: ChatMessage, model: str) -> int:
    """Count a message with its pictures and the calls in it."""
    tokens = count_tokens(message.content, model)
    tokens += sum(image_tokens(model, i.width, i.height, i.detail) for i in message.images)
    for call in message.tool_calls:
        tokens += count_tokens(f"{call.name} {call.arguments}", model) + _TOKENS_PER_CALL
    return tokens


def _counted(rows: Sequence[HistoryRow], model: str, *, again: bool) -> Sequence[HistoryRow]:
    """Return the rows, those without a count counted (the library stores what its caller says); ``again``: all."""
    if not again and all(row[2] or not row[1] for row in rows):
        return rows
    return [
        row if row[2] and not again else (row[0], row[1], count_tokens(row[1], model), *row[3:])
        for row in rows
    ]
