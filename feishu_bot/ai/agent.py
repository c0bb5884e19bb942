"""The agent: what is sent to the model, what it may cost, and what to do when it fails.

``plan`` decides without any I/O, so that its reservation can be made in the transaction that begins a message;
``answer`` calls the model with no transaction open and returns a value for the transaction that commits.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, ReportedUsage, TextDelta
from feishu_bot.ai.history import choose_history
from feishu_bot.ai.images import image_tokens, most_image_tokens, takes_images
from feishu_bot.ai.models import ECHO, context_window
from feishu_bot.ai.tokens import (
    TOKENS_PER_MESSAGE,
    count_tokens,
    encoding_name,
    is_exact,
    prompt_tokens,
    reserved_tokens,
    warm,
)
from feishu_bot.errors import BudgetExceeded, ModelError
from feishu_bot.model import CallUsage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from feishu_bot.ai.chat_model import ChatModel, Image
    from feishu_bot.ai.history import HistoryRow
    from feishu_bot.config import AISettings
    from feishu_bot.model import BudgetRefusal

log = logging.getLogger(__name__)

MAX_WAIT_S: Final = 20.0  # between two tries, whatever the provider asks for
_WAIT_S: Final = 0.5  # where it asks for nothing


class Reserve(Protocol):
    """Reserves a further call before it is made; raises BudgetExceeded if a budget does not hold it."""

    def __call__(self, *, call: int, model: str, tokens: int) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class CallPlan:
    """One call that may be made: what is sent, and what must be reserved before.

    ``counts`` are the tokens of each message without framing, ``prompt_tokens`` those of all with it. The
    first ``fixed`` messages (the system prompt) and the last one (the question) are never left out.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    counts: tuple[int, ...]
    fixed: int
    prompt_tokens: int
    max_output_tokens: int
    reserve_tokens: int

    @property
    def history(self) -> tuple[ChatMessage, ...]:
        """What of the conversation is sent."""
        return self.messages[self.fixed : -1]


@dataclass(frozen=True, slots=True)
class AgentAnswer:
    """What came of all calls of one attempt.

    Either ``text`` is the answer and ``finish`` says why it ended (stop, length, filtered, …), or it is None
    and ``failure`` is the last call's error. ``refusal`` is set when a further call was not within budget.
    ``calls`` holds every call that was made, in order; ``model`` is the one that was asked last.
    """

    text: str | None
    calls: tuple[CallUsage, ...]
    model: str
    failure: ModelError | None = None
    refusal: BudgetRefusal | None = None
    finish: str = ""


class Agent:
    """Answers with the configured model, and with its fallbacks where that fails.

    ``sleep`` waits between tries; ``jitter`` gives numbers from 0 to 1. Building an agent loads the encodings
    of its models (about 0.2 s each): build it before listening.
    """

    def __init__(
        self,
        settings: AISettings,
        *,
        model: ChatModel,
        budget_margin: float = 1.15,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._model = model
        self._margin = budget_margin
        self._sleep = sleep
        self._jitter = jitter
        for name in (settings.model, *settings.fallback_models):
            warm(name)
        prompt = settings.system_prompt
        self._system = (ChatMessage("system", prompt),) if prompt.strip() else ()
        self._system_tokens: dict[str, int] = {}  # by encoding
        self._calls: dict[str, asyncio.Semaphore] = {}  # by model; who waits there is not timed yet

    def plan(
        self,
        history_rows: Sequence[HistoryRow],
        user_text: str,
        user_tokens: int,
        *,
        model: str | None = None,
        images: int = 0,
        file_tokens: int = 0,
    ) -> CallPlan:
        """Return the first call for a user's text.

        ``history_rows`` begin with role, content and tokens, oldest first; those stored without a count are counted.
        ``model`` stands in for the configured one, e.g. where a budget degrades. ``images``: how many pictures go
        along, reserved for as the largest there can be; ``file_tokens``: at most so many of a text file's. Both
        follow by ``enclose``. No I/O.
        """
        settings = self._settings
        name = model or settings.model
        user_tokens += images * most_image_tokens(name, settings.image_detail) + file_tokens
        head = self._system
        head_counts = self._head_counts(name)
        persistence = settings.conversation_persistence
        history = choose_history(
            _counted(history_rows, name),
            max_turns=persistence.max_history_turns,
            max_tokens=persistence.max_history_tokens,
            room=self._room(name, (*head_counts, user_tokens)),
        )
        return self._make(
            name,
            (*head, *history.messages, ChatMessage("user", user_text)),
            (*head_counts, *history.counts, user_tokens),
            len(head),
        )

    def takes_images(self, model: str | None = None) -> bool:
        """Return whether a model, by default the configured one, is given users' pictures."""
        return takes_images(model or self._settings.model, self._settings.images)

    def takes_files(self, model: str | None = None) -> bool:
        """Return whether a model, by default the configured one, is given text files."""
        return (model or self._settings.model) != ECHO

    def enclose(self, plan: CallPlan, images: Sequence[Image], words: str = "") -> CallPlan:
        """Return the call with the pictures and words that were planned for, counted as they are.

        What is reserved stays.
        """
        *others, question = plan.messages
        content = (
            f"{question.content}\n\n{words}" if question.content and words else question.content or words
        )
        question = question._replace(content=content, images=tuple(images))
        counts = (*plan.counts[:-1], _tokens(question, plan.model))
        return replace(plan, messages=(*others, question), counts=counts, prompt_tokens=prompt_tokens(counts))

    async def answer(
        self, plan: CallPlan, *, reserve: Reserve, on_text: Callable[[str], None] | None = None
    ) -> AgentAnswer:
        """Ask the model and return what came of it; model errors and refused budgets are values here.

        Call 0 is reserved by the caller. The planned model is tried twice if its error may pass, then each
        fallback once; a prompt that is too long is shortened once. Every further call is first reserved.
        ``on_text`` gets the answer as it comes, until a call that has already given some breaks off: the next
        call's text then comes only whole, in the result. Cancellation passes through.
        """
        tries = _Tries(self._settings.fallback_models, plan.model)
        calls: list[CallUsage] = []
        while True:
            async with self._room_at(plan.model):
                outcome = await self._call(plan, len(calls), on_text)
            calls.append(outcome.usage)
            failure = outcome.failure
            if failure is None:
                return AgentAnswer(outcome.text, tuple(calls), plan.model, finish=outcome.finish)
            if outcome.shown:
                on_text = None
            log.warning(
                "model call failed",
                extra={"model": plan.model, "call": outcome.usage.call, "kind": failure.kind, "outcome": outcome.usage.outcome},
            )  # fmt: skip
            following = self._following(plan, failure, tries)
            if following is None:
                return AgentAnswer(None, tuple(calls), plan.model, failure)
            if following is plan:
                await self._sleep(self._wait_s(failure))
            try:
                await reserve(call=len(calls), model=following.model, tokens=following.reserve_tokens)
            except BudgetExceeded as exceeded:
                return AgentAnswer(None, tuple(calls), plan.model, failure, exceeded.refusal)
            plan = following

    async def close(self) -> None:
        """Close the model's connections."""
        await self._model.close()

    # ------------------------------------------------------------------------------------------- planning

    def _make(
        self, model: str, messages: tuple[ChatMessage, ...], counts: tuple[int, ...], fixed: int
    ) -> CallPlan:
        prompt = prompt_tokens(counts)
        output = self._settings.max_output_tokens
        if model == ECHO:  # its answer is the question, whatever the bound says
            output = max(output, counts[-1])
        reserve = reserved_tokens(prompt, model=model, max_output_tokens=output, margin=self._margin)
        return CallPlan(model, messages, counts, fixed, prompt, output, reserve)

    def _head_counts(self, model: str) -> tuple[int, ...]:
        if not self._system:
            return ()
        encoding = encoding_name(model)
        tokens = self._system_tokens.get(encoding)
        if tokens is None:
            tokens = self._system_tokens[encoding] = count_tokens(self._system[0].content, model)
        return (tokens,)

    def _room(self, model: str, counts: Sequence[int]) -> int | None:
        """Return the tokens that the model's window leaves for the history; None where it is unknown."""
        window = context_window(model)
        if window is None:
            return None
        margin = 1.0 if is_exact(model) else self._margin
        return int((window - self._settings.max_output_tokens) / margin) - prompt_tokens(counts)

    def _following(self, plan: CallPlan, failure: ModelError, tries: _Tries) -> CallPlan | None:
        """Return the next call to make after ``failure``, or None when nothing is left to try."""
        if failure.kind == "too_long" and tries.shorten() and plan.history:
            return self._shortened(plan)
        if failure.retry and tries.again(plan.model):
            return plan
        model = tries.next_fallback()
        while model is not None and plan.messages[-1].images and not self.takes_images(model):
            model = tries.next_fallback()
        return None if model is None else self._for_model(plan, model)

    def _shortened(self, plan: CallPlan) -> CallPlan:
        """Return the same call with the newer half of its history, in whole turns."""
        fixed, last = plan.fixed, len(plan.messages) - 1
        history = list(zip(plan.messages[fixed:last], plan.counts[fixed:last], strict=True))
        half = choose_history(
            [(message.role, message.content, count) for message, count in history],
            max_turns=len(history),
            max_tokens=sum(count for _, count in history),
            room=sum(count + TOKENS_PER_MESSAGE for _, count in history) // 2,
        )
        return self._make(
            plan.model,
            (*plan.messages[:fixed], *half.messages, plan.messages[last]),
            (*plan.counts[:fixed], *half.counts, plan.counts[last]),
            fixed,
        )

    def _for_model(self, plan: CallPlan, model: str) -> CallPlan:
        """Return the same call to another model, counted anew if that one counts differently."""
        counts = plan.counts
        if encoding_name(model) != encoding_name(plan.model):
            counts = tuple([_tokens(message, model) for message in plan.messages])
        elif plan.messages[-1].images:
            counts = (*counts[:-1], _tokens(plan.messages[-1], model))
        return self._make(model, plan.messages, counts, plan.fixed)

    def _wait_s(self, failure: ModelError) -> float:
        jitter = self._jitter()
        if failure.after_s is None:
            return _WAIT_S * (1.0 + jitter)
        return min(MAX_WAIT_S, failure.after_s + _WAIT_S * jitter)

    # -------------------------------------------------------------------------------------------- calling

    def _room_at(self, model: str) -> asyncio.Semaphore:
        """Return where calls to a model wait while as many as are allowed are under way."""
        found = self._calls.get(model)
        if found is None:
            found = self._calls[model] = asyncio.Semaphore(self._settings.max_calls)
        return found

    async def _call(self, plan: CallPlan, call: int, on_text: Callable[[str], None] | None) -> _Outcome:
        pieces: list[str] = []
        usage: ReportedUsage | None = None
        finish = ""
        request = ChatRequest(plan.model, plan.messages, plan.max_output_tokens, plan.prompt_tokens)
        try:
            async for event in self._model.stream(request):
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
                    if on_text is not None:
                        on_text(event.text)
                elif isinstance(event, ReportedUsage):
                    usage = event
                else:
                    finish = event.reason
        except ModelError as error:
            unknown = error.outcome_unknown or bool(pieces)
            return _Outcome(
                _booked(plan, call) if unknown else _unbilled(plan, call), error, shown=bool(pieces)
            )
        text = "".join(pieces)
        failure = _no_answer(finish) if not text.strip() else None
        if usage is not None:
            booked = CallUsage(call, plan.model, usage.input_tokens, usage.output_tokens)
        elif failure is not None:
            booked = _booked(plan, call)
        else:
            booked = CallUsage(call, plan.model, plan.prompt_tokens, count_tokens(text, plan.model))
        return _Outcome(booked, failure, text, finish, shown=bool(pieces))


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one call brought."""

    usage: CallUsage
    failure: ModelError | None
    text: str = ""
    finish: str = ""
    shown: bool = False  # some text was handed on


class _Tries:
    """What may still be tried for one answer."""

    def __init__(self, fallbacks: Sequence[str], first: str) -> None:
        self._first = first
        self._may_retry = True
        self._may_shorten = True
        self._fallbacks = iter([model for model in dict.fromkeys(fallbacks) if model != first])

    def shorten(self) -> bool:
        may, self._may_shorten = self._may_shorten, False
        return may

    def again(self, model: str) -> bool:
        may, self._may_retry = self._may_retry and model == self._first, False
        return may

    def next_fallback(self) -> str | None:
        return next(self._fallbacks, None)


def _tokens(message: ChatMessage, model: str) -> int:
    """Count a message with its pictures."""
    words = count_tokens(message.content, model)
    return words + sum(image_tokens(model, i.width, i.height, i.detail) for i in message.images)


def _counted(rows: Sequence[HistoryRow], model: str) -> Sequence[HistoryRow]:
    """Return the rows, those without a count counted (the library stores what its caller says)."""
    if all(row[2] or not row[1] for row in rows):
        return rows
    return [row if row[2] or not row[1] else (row[0], row[1], count_tokens(row[1], model)) for row in rows]


def _booked(plan: CallPlan, call: int) -> CallUsage:
    """Return a call that may have been billed: its tokens are all that was reserved for it."""
    output = plan.reserve_tokens - plan.prompt_tokens
    return CallUsage(call, plan.model, plan.prompt_tokens, output, "unknown")


def _unbilled(plan: CallPlan, call: int) -> CallUsage:
    return CallUsage(call, plan.model, 0, 0, "failed")


def _no_answer(finish: str) -> ModelError:
    if finish == "filtered":
        return ModelError("filtered", "the provider's filter left no answer")
    return ModelError("nonsense", "an empty answer")
