"""The agent: what is sent to the model, what it may cost, and what to do when it fails.

``plan`` decides without any I/O, so that its reservation can be made in the transaction that begins a message;
``answer`` calls the model with no transaction open and returns a value for the transaction that commits.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from feishu_bot.ai.chat_model import ChatMessage, ChatRequest, ReportedUsage, TextDelta, ToolCalls
from feishu_bot.ai.circuit import Circuits
from feishu_bot.ai.history import call_metadata, result_metadata
from feishu_bot.ai.images import most_image_tokens, takes_images
from feishu_bot.ai.models import ECHO
from feishu_bot.ai.prices import Prices
from feishu_bot.ai.profile import DEFAULT, choose_profile, make_profiles, models_of
from feishu_bot.ai.prompt import CallPlan, Prompts, message_tokens
from feishu_bot.ai.summary import CALL
from feishu_bot.ai.tokens import count_aside, count_tokens, encoding_name, warm
from feishu_bot.errors import BudgetExceeded, ModelError
from feishu_bot.model import CallUsage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from feishu_bot.ai.chat_model import ChatModel, Image, ToolCall, ToolSpec
    from feishu_bot.ai.history import HistoryRow
    from feishu_bot.ai.profile import Profile
    from feishu_bot.ai.summary import DueSummary
    from feishu_bot.config import AISettings
    from feishu_bot.model import BudgetRefusal

    RunTools = Callable[[tuple[ToolCall, ...]], Awaitable[Sequence[str]]]

log = logging.getLogger(__name__)

MAX_WAIT_S: Final = 20.0  # between two tries, whatever the provider asks for
_WAIT_S: Final = 0.5  # where it asks for nothing


class Reserve(Protocol):
    """Reserves a further call before it is made; raises BudgetExceeded if a budget does not hold it.

    ``cost`` is in millionths of a dollar, None where the model has no known price.
    """

    def __call__(self, *, call: int, model: str, tokens: int, cost: int | None) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class ToolRound:
    """Tools that were called together, and what came of each. ``tokens`` are the calls', as the provider counts them."""

    text: str
    calls: tuple[ToolCall, ...]
    results: tuple[str, ...]
    tokens: int
    result_tokens: tuple[int, ...]

    def messages(self) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
        """Yield what is stored of it: role, content, tokens and metadata of each message."""
        yield "assistant", self.text, self.tokens, call_metadata(self.calls)
        for call, result, tokens in zip(self.calls, self.results, self.result_tokens, strict=True):
            yield "tool", result, tokens, result_metadata(call)


@dataclass(frozen=True, slots=True)
class AgentAnswer:
    """What came of all calls of one attempt.

    Either ``text`` is the answer and ``finish`` says why it ended (stop, length, filtered, …), or it is None
    and ``failure`` is the last call's error. ``refusal`` is set when a further call was not within budget.
    ``calls`` holds every call that was made, in order; ``model`` is the one that was asked last, with ``plan``.
    ``rounds`` are the tools that were run on the way.
    """

    text: str | None
    calls: tuple[CallUsage, ...]
    model: str
    failure: ModelError | None = None
    refusal: BudgetRefusal | None = None
    finish: str = ""
    rounds: tuple[ToolRound, ...] = ()
    plan: CallPlan | None = None


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
        circuits: Circuits | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._model = model
        self._prices = Prices(settings.prices)
        self._sleep = sleep
        self._jitter = jitter
        self.profiles = make_profiles(settings)
        self.models = models_of(settings)
        for name in self.models:
            warm(name)
        self._prompts = Prompts(budget_margin, stored=encoding_name(settings.model))
        self._circuits = circuits or Circuits()
        self._calls: dict[str, asyncio.Semaphore] = {}  # by model; who waits there is not timed yet

    def profile(self, agent: str, *, persona: str | None = None, model: str | None = None) -> Profile:
        """Return how an agent answers; what is not configured (any more) is passed over."""
        personas = self._settings.personas
        known = model if model in self.models else None
        return choose_profile(self.profiles, personas, agent=agent, persona=persona, model=known)

    def plan(
        self,
        history_rows: Sequence[HistoryRow],
        user_text: str,
        user_tokens: int,
        *,
        model: str | None = None,
        images: int = 0,
        file_tokens: int = 0,
        profile: Profile | None = None,
        tools: tuple[ToolSpec, ...] = (),
        summary: str | None = None,
    ) -> CallPlan:
        """Return the first call for a user's text.

        ``history_rows`` begin with role, content and tokens, oldest first; those stored without a count are counted.
        ``profile`` None is the default agent's; ``model`` stands in for its model, e.g. where a budget degrades.
        ``images``: how many pictures go along, reserved for as the largest there can be; ``file_tokens``: at most so
        many of a text file's. Both follow by ``enclose``. ``summary`` tells of what was said before these rows. No I/O.
        """
        profile = profile or self.profiles[DEFAULT]
        model = model or self._first(profile, images=images)
        pictures = images * most_image_tokens(model, self._settings.image_detail)
        return self._prompts.plan(
            profile,
            history_rows,
            user_text,
            user_tokens + pictures + file_tokens,
            model=model,
            tools=tools,
            summary=summary,
        )

    def _first(self, profile: Profile, *, images: int) -> str:
        """Return the agent's model, or the first of its fallbacks that may be asked where that may not."""
        if self._circuits.permits(profile.model):
            return profile.model
        for model in profile.fallback_models:
            if not (images and not self.takes_images(model)) and self._circuits.permits(model):
                return model
        return profile.model

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
        return self._prompts.enclose(plan, images, words)

    async def answer(
        self,
        plan: CallPlan,
        *,
        reserve: Reserve,
        on_text: Callable[[str], None] | None = None,
        run_tools: RunTools | None = None,
    ) -> AgentAnswer:
        """Ask the model and return what came of it; model errors and refused budgets are values here.

        Call 0 is reserved by the caller. The planned model is tried again ``retries`` times if its error may pass, then
        each fallback once, unless its circuit is open; a prompt that is too long is shortened once. Tools that the model calls are run and it is asked
        again with what came of them, at most ``max_tool_rounds`` times. Every further call is first reserved.
        ``on_text`` gets the answer as it comes, until a call that has already given some breaks off or calls tools:
        the next call's text then comes only whole, in the result. Cancellation passes through.
        """
        tries = _Tries(plan.profile.fallback_models, plan.model, self._settings.retries)
        calls: list[CallUsage] = []
        rounds: list[ToolRound] = []
        while True:
            async with self._room_at(plan.model):
                outcome = await self._call(plan, len(calls), on_text)
            calls.append(outcome.usage)
            if outcome.shown:
                on_text = None
            failure, following = outcome.failure, None
            if failure is None and outcome.tool_calls and run_tools is not None:
                results = await run_tools(outcome.tool_calls)
                rounds.append(_round(plan, outcome, results))
                following = self._after_tools(plan, rounds[-1], len(rounds))
                tries = _Tries(plan.profile.fallback_models, plan.model, self._settings.retries)
            elif failure is None:
                return AgentAnswer(
                    outcome.text, tuple(calls), plan.model,
                    finish=outcome.finish, rounds=tuple(rounds), plan=plan,
                )  # fmt: skip
            else:
                log.warning(
                    "model call failed",
                    extra={"model": plan.model, "call": outcome.usage.call, "kind": failure.kind, "outcome": outcome.usage.outcome},
                )  # fmt: skip
                following = self._following(plan, failure, tries)
                if following is None:
                    return AgentAnswer(None, tuple(calls), plan.model, failure)
                if following is plan:
                    await self._sleep(self._wait_s(failure, tries.made))
            try:
                plan = await self._reserved(following, len(calls), reserve)
            except BudgetExceeded as exceeded:
                return AgentAnswer(None, tuple(calls), plan.model, failure, exceeded.refusal)

    async def summarize(
        self, profile: Profile, due: DueSummary, *, reserve: Reserve
    ) -> tuple[str | None, CallUsage | None]:
        """Return a summary, None if none was made, and what its call cost, None if there was none.

        It is asked for once; whatever becomes of it, the answer does not depend on it.
        """
        plan = await asyncio.to_thread(self._prompts.summary, profile, due)
        try:
            await reserve(call=CALL, model=plan.model, tokens=plan.reserve_tokens, cost=self.most_cost(plan))
        except BudgetExceeded:
            return None, None
        async with self._room_at(plan.model):
            outcome = await self._call(plan, CALL, None)
        if outcome.failure is not None:
            log.warning("no summary made", extra={"model": plan.model, "kind": outcome.failure.kind})
            return None, outcome.usage
        return outcome.text.strip(), outcome.usage

    async def _reserved(self, plan: CallPlan, call: int, reserve: Reserve) -> CallPlan:
        """Reserve a further call, or that of another model where a budget wants one; raises BudgetExceeded."""
        asked: set[str] = set()
        while True:
            asked.add(plan.model)
            try:
                await reserve(
                    call=call, model=plan.model, tokens=plan.reserve_tokens, cost=self.most_cost(plan)
                )
            except BudgetExceeded as exceeded:
                model = exceeded.refusal.degrade_to
                if model is None or model in asked:
                    raise
                plan = self._prompts.for_model(plan, model)
            else:
                return plan

    def most_cost(self, plan: CallPlan) -> int | None:
        """Return what a call costs at most, in millionths of a dollar; None where the model has no known price."""
        output = plan.max_output_tokens
        return self._prices.cost(plan.model, plan.reserve_tokens - output, output)

    async def close(self) -> None:
        """Close the model's connections."""
        await self._model.close()

    # ------------------------------------------------------------------------------------------ following

    def _after_tools(self, plan: CallPlan, done: ToolRound, rounds: int) -> CallPlan:
        """Return the call that tells what came of the tools; the last one has to be answered in words."""
        may_call = rounds < self._settings.max_tool_rounds
        return self._prompts.with_results(plan, done.text, done.calls, done.results, may_call=may_call)

    def _following(self, plan: CallPlan, failure: ModelError, tries: _Tries) -> CallPlan | None:
        """Return the next call to make after ``failure``, or None when nothing is left to try."""
        if failure.kind == "too_long" and tries.shorten() and plan.history:
            return self._prompts.shortened(plan)
        patience = (
            failure.after_s is None or failure.after_s <= MAX_WAIT_S or not plan.profile.fallback_models
        )
        if failure.retry and patience and tries.again(plan.model):
            return plan
        while (model := tries.next_fallback()) is not None:
            blind = plan.question.images and not self.takes_images(model)
            if not blind and self._circuits.permits(model):
                return self._prompts.for_model(plan, model)
        return None

    def _wait_s(self, failure: ModelError, tried: int) -> float:
        jitter = self._jitter()
        if failure.after_s is None:
            return min(MAX_WAIT_S, _WAIT_S * 2.0 ** (tried - 1) * (1.0 + jitter))
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
        asked: tuple[ToolCall, ...] = ()
        request = ChatRequest(
            plan.model, plan.messages, plan.max_output_tokens, plan.prompt_tokens,
            tools=plan.tools, may_call=plan.may_call, temperature=plan.profile.temperature,
        )  # fmt: skip
        try:
            async for event in self._model.stream(request):
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
                    if on_text is not None:
                        on_text(event.text)
                elif isinstance(event, ReportedUsage):
                    usage = event
                elif isinstance(event, ToolCalls):
                    asked = event.calls
                else:
                    finish = event.reason
        except ModelError as error:
            self._circuits.failed(plan.model, error)
            unknown = error.outcome_unknown or bool(pieces)
            return _Outcome(
                _booked(plan, call) if unknown else _unbilled(plan, call), error, shown=bool(pieces)
            )
        outcome = await self._judged(plan, call, "".join(pieces), usage=usage, finish=finish, asked=asked)
        if outcome.failure is None:
            self._circuits.succeeded(plan.model)
        elif finish != "length":  # that was the question's bound, and no fault of the server
            self._circuits.failed(plan.model, outcome.failure)
        return outcome

    async def _judged(
        self,
        plan: CallPlan,
        call: int,
        text: str,
        *,
        usage: ReportedUsage | None,
        finish: str,
        asked: tuple[ToolCall, ...],
    ) -> _Outcome:
        """Return what a call brought whose stream is complete."""
        if not (plan.tools and plan.may_call):
            asked = ()  # it has made them up
        failure = None if asked or text.strip() else _no_answer(finish)
        if usage is None and failure is not None:
            return _Outcome(_booked(plan, call), failure, text, finish, shown=bool(text))
        if usage is not None:
            self._prompts.learn(plan, usage.input_tokens)
        else:
            usage = ReportedUsage(plan.prompt_tokens, await _spoken(text, asked, plan.model))
        booked = CallUsage(
            call,
            plan.model,
            usage.input_tokens,
            usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            cost_micro_usd=self._prices.cost(
                plan.model, usage.input_tokens, usage.output_tokens, usage.cached_tokens
            ),
        )
        return _Outcome(booked, failure, text, finish, shown=bool(text), tool_calls=asked)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one call brought."""

    usage: CallUsage
    failure: ModelError | None
    text: str = ""
    finish: str = ""
    shown: bool = False  # some text was handed on
    tool_calls: tuple[ToolCall, ...] = ()


class _Tries:
    """What may still be tried for one answer."""

    def __init__(self, fallbacks: Sequence[str], first: str, retries: int) -> None:
        self._first = first
        self._retries = retries
        self.made = 0  # tries again
        self._may_shorten = True
        self._fallbacks = iter([model for model in dict.fromkeys(fallbacks) if model != first])

    def shorten(self) -> bool:
        may, self._may_shorten = self._may_shorten, False
        return may

    def again(self, model: str) -> bool:
        if model != self._first or self.made >= self._retries:
            return False
        self.made += 1
        return True

    def next_fallback(self) -> str | None:
        return next(self._fallbacks, None)


async def _spoken(text: str, calls: tuple[ToolCall, ...], model: str) -> int:
    words = await count_aside(text, model)
    return words + message_tokens(ChatMessage("assistant", "", tool_calls=calls), model)


def _round(plan: CallPlan, outcome: _Outcome, results: Sequence[str]) -> ToolRound:
    counts = tuple([count_tokens(result, plan.model) for result in results])
    return ToolRound(outcome.text, outcome.tool_calls, tuple(results), outcome.usage.output_tokens, counts)


def _booked(plan: CallPlan, call: int) -> CallUsage:
    """Return a call that may have been billed: its tokens are all that was reserved for it."""
    output = plan.reserve_tokens - plan.prompt_tokens
    return CallUsage(call, plan.model, plan.prompt_tokens, output, "unknown")


def _unbilled(plan: CallPlan, call: int) -> CallUsage:
    return CallUsage(call, plan.model, 0, 0, "failed")


def _no_answer(finish: str) -> ModelError:
    if finish == "filtered":
        return ModelError("filtered", "the provider's filter left no answer")
    if finish == "length":
        return ModelError("nonsense", "nothing but thoughts within max_output_tokens")
    return ModelError("nonsense", "an empty answer")
