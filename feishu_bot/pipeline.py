"""Steps 6 and 7: what is answered, and what that means for the record.

``answer`` thinks with no transaction open and returns one value, the ``Outcome``, that one transaction stores.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import uuid4

import orjson

from feishu_bot.ai.profile import DEFAULT
from feishu_bot.ai.tokens import count_aside, count_tokens
from feishu_bot.attachments import Attachments, noted, placeholders
from feishu_bot.errors import BudgetExceeded
from feishu_bot.groups import metadata
from feishu_bot.hooks import Answering, BudgetView, Context, ConversationView, Reply
from feishu_bot.indicator import Indicator
from feishu_bot.model import CallUsage, ChatType, End, InboundMessage, Target, make_key
from feishu_bot.parts import part_payload, storable, with_stream
from feishu_bot.planner import Planner
from feishu_bot.plugin_bot import ChatBot
from feishu_bot.said import Said, chat_note, sent_to_model
from feishu_bot.split import fit_text
from feishu_bot.store import budgets as ledger
from feishu_bot.store import refusals
from feishu_bot.store.amendments import amend
from feishu_bot.store.quotes import CHAT
from feishu_bot.store.work import (
    CHOICES,
    Change,
    NewConversation,
    NewMessage,
    NewPart,
    Outcome,
    PlannedCall,
    Work,
)
from feishu_bot.summing import Summing
from feishu_bot.texts import say
from feishu_bot.toolbox import Toolbox

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from feishu_bot.access import Access
    from feishu_bot.ai.agent import Agent, AgentAnswer
    from feishu_bot.ai.chat_model import ToolCall
    from feishu_bot.ai.prompt import CallPlan
    from feishu_bot.config import BotSettings
    from feishu_bot.hooks import Bot, StoredMessage
    from feishu_bot.live import Live
    from feishu_bot.model import BudgetRefusal
    from feishu_bot.planner import Decision
    from feishu_bot.platforms.base import Platform
    from feishu_bot.plugins import Plugins
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction

log = logging.getLogger(__name__)

TITLE_CHARS: Final = 50


class Pipeline:
    """Answers what ``planner`` has decided. One for all lanes; holds nothing of a message between two steps."""

    def __init__(
        self,
        settings: BotSettings,
        *,
        agent: Agent,
        platforms: Mapping[str, Platform],
        plugins: Plugins,
        access: Access,
        store: Store,
        toolbox: Toolbox | None = None,
        holds: Callable[[str, bool], bool] = lambda _account, _asks_model: False,
    ) -> None:
        self._toolbox = toolbox or Toolbox((plugins,))
        self.planner = Planner(
            settings, agent=agent, platforms=platforms, access=access, toolbox=self._toolbox, holds=holds
        )
        self.configure(settings, agent)
        self._platforms = platforms
        self._plugins = plugins
        self._access = access
        self._store = store
        self.bot: Bot = ChatBot(self, store, platforms, {})
        self._keeps = settings.ai.conversation_persistence.enabled
        self.indicator = Indicator(store)
        self._attachments = Attachments()
        # Told of a message (lane, inbox id) that was recalled or edited before it had ended.
        self.dropped: Callable[[str, int], None] = lambda _lane, _inbox_id: None

    def configure(self, settings: BotSettings, agent: Agent) -> None:
        """Go on with other settings and another agent; what is being answered is answered with the old ones."""
        self._settings = settings
        self._chat = settings.chat
        self._agent = agent
        self.planner.configure(settings, agent)

    async def take_over_signs(self) -> None:
        """Begin to take back what ended processes have shown in chats. Raises StoreUnavailable."""
        await self.indicator.take_over(self._platforms)

    def load_commands(self) -> None:
        """Take the commands of the built-ins and of the plugins that have started."""
        self.planner.load_commands(self._plugins.commands())

    # ------------------------------------------------------------------------------------------ answering

    async def answer(self, work: Work, on_text: Live | None = None) -> Outcome:
        """Return all that ending this message means. No transaction is open while this waits.

        ``on_text`` gets the answer piece by piece, for somebody who waits for it in this process.
        """
        outcome = await self._outcome(work, on_text)
        if self._keeps or on_text is None or not on_text.has_listener():
            return outcome
        # Whoever fetches his answer from the record gets this one from memory.
        return replace(outcome, parts=tuple(replace(p, erase=p.sent) for p in outcome.parts))

    async def _outcome(self, work: Work, on_text: Live | None) -> Outcome:
        decision: Decision = work.planned.decision
        match decision.kind:
            case "event":
                if decision.message.change is not None:
                    await self._amend(decision.message)
                if decision.message.welcome is not None:
                    await self._store.run(partial(_note_welcome, event=decision.message))
                await self._plugins.on_event(self._context(work, decision.message))
                return Outcome(work, End.IGNORED, "event", erase=True)
            case "ignore":
                return Outcome(work, End.IGNORED, decision.reason, erase=True)
            case "expire":
                return self._note(work, decision, End.EXPIRED, decision.sentence)
            case "dead":
                return self._given_up(work, decision)
            case "refuse":
                return self._note(work, decision, End.REFUSED, decision.sentence)
            case "command":
                return await self._command(work, decision)
        return await self._reply(work, decision, on_text)

    async def _amend(self, event: InboundMessage) -> None:
        """Do to the record what was done to an earlier message on the platform."""
        shard = self._store.shard
        amended = await self._store.run(lambda tx: amend(tx, event, shard=shard))
        if amended.lane_key is not None and amended.inbox_id is not None:
            self.dropped(amended.lane_key, amended.inbox_id)
        log.info(
            "message amended",
            extra={"change": event.change, "messages": amended.messages, "amended": amended.inbox_id},
        )

    async def _command(self, work: Work, decision: Decision) -> Outcome:
        parsed = decision.command
        assert parsed is not None  # noqa: S101  # the decision is made with it
        context = self._context(work, decision.message)
        command = self.planner.commands.find(parsed.name)
        shown = self._chat.command_prefix + parsed.name
        if command is None:
            nearest = self.planner.commands.nearest(parsed.name, is_admin=context.is_admin)
            hint = (
                self._say(decision.message, "nearest", command=self._chat.command_prefix + nearest)
                if nearest
                else ""
            )
            reply: Reply | None = Reply(
                self._say(decision.message, "unknown_command", command=shown, nearest=hint)
            )
        elif command.admin_only and not context.is_admin:
            reply = Reply(self._say(decision.message, "admins_only"))
        else:
            reply = await self._plugins.run_command(command, context, parsed.args)
        if reply is None:
            reply = Reply(self._say(decision.message, "command_failed", command=shown))
        change = Change(reply.change) if reply.change else None
        made = self._new_conversation(work, replace(decision.message, text="")) if change in CHOICES else None
        return Outcome(
            work,
            End.ANSWERED,
            f"command {reply.change}" if reply.change else "command",
            conversation=made,
            change=change,
            detail=reply.detail,
            parts=self._parts(decision.message, "answer", storable(reply.text)),
            erase=not self._keeps,
        )

    async def _reply(self, work: Work, decision: Decision, on_text: Live | None) -> Outcome:
        summing = Summing()
        try:
            outcome = await self._replied(work, decision, on_text, summing)
            return await summing.added_to(outcome)
        finally:
            summing.end()

    async def _replied(
        self, work: Work, decision: Decision, on_text: Live | None, summing: Summing
    ) -> Outcome:
        context = cache(partial(self._context, work, decision.message))  # most messages concern no plugin
        by_plugin = await self._plugins.on_message(context()) if self._plugins.take_messages else None
        if by_plugin is not None:
            text, name = by_plugin
            said = Said(text, await count_aside(text, self._settings.ai.model), {"plugin": name})
            return await self._answered(work, decision, context, said, self._not_called(work))
        if decision.call is None:
            return self._note(work, decision, End.REFUSED, self._say(decision.message, "ai_off"))
        if work.refusal is not None:
            return self._over_budget(work, decision, work.refusal, ())
        platform, message = self._platforms.get(work.message.account), decision.message
        detail = self._settings.ai.image_detail
        live = not self._plugins.change_answers
        with self.indicator.watch(platform, message, on_text, live=live, inbox_id=work.inbox_id) as seen:
            async with self._attachments.loaded(
                platform, message, decision.attachments, detail=detail
            ) as shown:
                if shown.problem:
                    sentence = self._say(decision.message, "not_loaded")
                    return self._note(
                        work, decision, End.REFUSED, sentence, reason=f"not loaded: {shown.problem}"
                    )
                call = decision.call
                if shown.images or shown.words:
                    call = await asyncio.to_thread(self._agent.enclose, call, shown.images, shown.words)
                    if shown.words and (refused := await self._too_long(work, decision, call)):
                        return refused
                run_tools = partial(self._run_tools, context, call) if call.tools else None
                summing.begin(self._agent, decision, self._reserver(work))
                asking = self._agent.answer(
                    call, reserve=self._reserver(work), on_text=seen.tell, run_tools=run_tools
                )
                answer = await (asking if on_text is None else on_text.until_stopped(asking))
        if answer is None:
            said_so_far = on_text.said if on_text is not None else ""
            return await self._stopped(work, decision, context, call.model, said_so_far)
        outcome = await self._concluded(work, decision, context, answer)
        if seen.stream is None or not outcome.parts:
            return outcome
        first, *rest = outcome.parts
        return replace(
            outcome, parts=(replace(first, payload=with_stream(first.payload, seen.stream)), *rest)
        )

    async def _concluded(
        self, work: Work, decision: Decision, context: Callable[[], Context], answer: AgentAnswer
    ) -> Outcome:
        """Return what the agent's answer, or its having none, means for the message."""
        if answer.text is None:
            if answer.refusal is not None and answer.failure is None:
                return self._over_budget(work, decision, answer.refusal, answer.calls)
            is_filtered = answer.failure is not None and answer.failure.kind == "filtered"
            key = "filtered" if is_filtered else "error"
            return self._failed(work, decision, self._reason(answer), answer.calls, key=key)
        used = answer.calls[-1]
        metadata = {
            "model": answer.model,
            "finish_reason": answer.finish,
            "context": sent_to_model(work, answer),
        }
        text = answer.text
        if answer.finish == "filtered":
            text = f"{text}\n\n{self._say(decision.message, 'filtered_rest')}"
        said = Said(text, used.output_tokens - used.reasoning_tokens, metadata, answer.rounds)
        return await self._answered(work, decision, context, said, answer.calls)

    async def _stopped(
        self, work: Work, decision: Decision, context: Callable[[], Context], model: str, text: str
    ) -> Outcome:
        """End a message whose asker wants no more: what he has seen is the answer.

        Nobody knows what the provider bills for a call that was broken off, so it is booked whole.
        """
        if text.strip():
            tokens = await asyncio.to_thread(count_tokens, text, model)
            said = Said(text, tokens, {"model": model, "finish_reason": "stopped"})
            return await self._answered(work, decision, context, said, ())
        return Outcome(
            work,
            End.ANSWERED,
            "stopped",
            messages=(self._user_message(work, decision),) if self._keeps and decision.again is None else (),
            conversation=self._new_conversation(work, decision.message),
            parts=self._parts(decision.message, "note", self._say(decision.message, "stopped")),
            erase=not self._keeps,
        )

    async def _too_long(self, work: Work, decision: Decision, call: CallPlan) -> Outcome | None:
        """Refuse a question that a file has made longer than what is allowed, and reserved for."""
        words, limit = call.messages[-1].content, self._chat.max_input_tokens
        tokens = await asyncio.to_thread(count_tokens, words, call.model)
        if tokens <= limit:
            return None
        return self._note(
            work,
            decision,
            End.REFUSED,
            self._say(decision.message, "too_long", tokens=tokens, limit=limit),
            reason="too long",
        )

    async def _run_tools(
        self, context: Callable[[], Context], call: CallPlan, asked: tuple[ToolCall, ...]
    ) -> Sequence[str]:
        return await self._toolbox.run(context(), call.tools, asked)

    def _reserver(self, work: Work) -> Any:
        decision: Decision = work.planned.decision
        spared = decision.spared
        longest = decision.call.profile.max_output_tokens if decision.call is not None else 0

        async def reserve(*, call: int, model: str, tokens: int, cost: int | None) -> None:
            nonlocal spared
            charges = self.planner.budgets.charges(
                decision.message, self._store.now_ms(), model=model, spared=spared
            )
            planned = PlannedCall(model, max(0, tokens - longest), tokens, charges, cost)
            refusal = await self._store.reserve(work, call, planned)
            if refusal is not None:
                if refusal.degrade_to is not None:
                    spared |= {refusal.budget}
                raise BudgetExceeded(refusal)

        return reserve

    def _not_called(self, work: Work) -> tuple[CallUsage, ...]:
        """Release the reservation of a call that was not made."""
        planned = work.planned.call
        if planned is None or work.refusal is not None:
            return ()
        return (CallUsage(0, planned.model, 0, 0, "failed"),)

    # ------------------------------------------------------------------------------------------- outcomes

    async def _answered(
        self,
        work: Work,
        decision: Decision,
        context: Callable[[], Context],
        said: Said,
        calls: tuple[CallUsage, ...],
    ) -> Outcome:
        text = said.text
        if self._plugins.change_answers:
            text = await self._plugins.on_answer(context(), text)
        text, note = storable(text), chat_note(work, decision.message)
        assistant = NewMessage(
            role="assistant",
            content=text,
            tokens=said.tokens,
            metadata_json=orjson.dumps(said.metadata | note).decode(),
            save_key=f"in:{work.inbox_id}:assistant",
        )
        said_before = decision.again is not None
        asked = () if said_before else (self._user_message(work, decision),)
        stored = (*asked, *said.steps(work, note), assistant)
        shown = self._with_model(text, decision, calls)
        outcome = Outcome(
            work,
            End.ANSWERED,
            "retry" if said_before else None,
            messages=stored if self._keeps else (),
            change=Change.CUT if said_before else None,
            detail=decision.again,
            conversation=self._new_conversation(work, decision.message),
            calls=calls,
            parts=self._parts(decision.message, "answer", shown),
            erase=not self._keeps,
        )
        return self._with_warnings(outcome, decision.message, shown)

    def _with_model(self, text: str, decision: Decision, calls: tuple[CallUsage, ...]) -> str:
        """Return an answer with the line that a budget had another model give it, if one had."""
        if not decision.spared or not calls:
            return text
        return f"{text}\n\n{self.planner.budgets.degraded(decision.spared, calls[-1].model, language=self.planner.chats.of(decision.message).language)}"

    def _with_warnings(self, outcome: Outcome, message: InboundMessage, text: str) -> Outcome:
        """Return an outcome that tells the speaker, once per window, which budgets are nearly used up."""
        found = self.planner.budgets.warnings(
            outcome.work.standings,
            outcome.calls,
            language=self.planner.chats.of(outcome.work.message).language,
        )
        if not found:
            return outcome
        if self._fetches(message):  # he gets one part, and none but his own
            text = "\n\n".join([text, *(sentence for _, _, sentence in found)])
            parts = self._parts(message, "answer", text)
        else:
            parts = outcome.parts
            for window, level, sentence in found:
                # A source of its own: of two answers that were made at once only one tells it.
                source = make_key("warned", str(level), *map(str, reversed(window)))
                parts += self._parts(message, "note", sentence, source=source)
        return replace(outcome, parts=parts, told={window: level for window, level, _ in found})

    def _failed(
        self, work: Work, decision: Decision, reason: str, calls: tuple[CallUsage, ...], *, key: str = "error"
    ) -> Outcome:
        """End a message that could not be answered: its words are kept, the user gets one sentence."""
        sentence = self._chat.error_message or self._say(decision.message, key)
        return Outcome(
            work,
            End.DEAD,
            reason,
            messages=(self._user_message(work, decision),) if self._keeps and decision.again is None else (),
            conversation=self._new_conversation(work, decision.message),
            calls=calls,
            parts=self._parts(decision.message, "error", sentence),
            erase=not self._keeps,
        )

    def _given_up(self, work: Work, decision: Decision) -> Outcome:
        """End a message whose attempts all broke; only words meant for the model belong to the conversation."""
        message, outcome = decision.message, self._failed(work, decision, decision.reason or "", ())
        if message.unreadable is None and self.planner.commands.parse(message.text) is None:
            return outcome
        return replace(outcome, messages=(), conversation=None)

    def unstorable(self, outcome: Outcome, reason: str) -> Outcome:
        """Return what can be stored of an outcome whose texts the database refuses: its end, and one sentence."""
        decision: Decision = outcome.work.planned.decision
        failed = self._failed(outcome.work, decision, reason, outcome.calls)
        return replace(failed, messages=(), conversation=None)

    def _over_budget(
        self, work: Work, decision: Decision, refusal: BudgetRefusal, calls: tuple[CallUsage, ...]
    ) -> Outcome:
        sentence = self.planner.budgets.refused(
            refusal,
            prefix=self._chat.command_prefix,
            language=self.planner.chats.of(decision.message).language,
        )
        outcome = self._note(work, decision, End.REFUSED, sentence, reason=f"budget {refusal.budget}")
        return replace(outcome, calls=calls)

    def _note(
        self, work: Work, decision: Decision, end: End, sentence: str, *, reason: str | None = None
    ) -> Outcome:
        message = decision.message
        # Who asked at a door waits there, so he is told each time.
        source = None if self._fetches(message) else decision.once
        parts = self._parts(message, "note", sentence, source=source) if sentence else ()
        return Outcome(
            work,
            end,
            reason or decision.reason,
            parts=parts,
            calls=self._not_called(work),
            erase=not self._keeps,
        )

    def _user_message(self, work: Work, decision: Decision) -> NewMessage:
        message, shown = decision.message, decision.attachments
        beside, content, tokens = metadata(message, work.lease.lane_key), message.text, message.tokens or 0
        if shown:
            words = placeholders(shown, self.language)
            content = f"{content}\n{words}" if content else words
            tokens, beside = (
                count_tokens(content, self._settings.ai.model),
                {**beside, "attachments": noted(shown)},
            )
        return NewMessage(
            role="user",
            content=content,
            tokens=tokens,
            metadata_json=orjson.dumps(beside).decode() if beside else None,
            sender_id=message.user_key,
            source_id=message.message_id,
            save_key=f"in:{work.inbox_id}:user",
        )

    def _new_conversation(self, work: Work, message: InboundMessage) -> NewConversation | None:
        title = message.text.strip()[:TITLE_CHARS] or None
        if work.conversation is not None and work.conversation.title is not None:
            return None
        lane, shared = work.lease.lane_key, _is_shared(work)
        return NewConversation(
            public_id=message.conversation or str(uuid4()),
            scope_key=lane,
            user_key=make_key(message.account, "chat", message.chat_id) if shared else message.user_key,
            platform=message.account,
            # One that spans groups belongs to none, also when the scope is another one day.
            chat_id=None if CHAT in metadata(message, lane) else message.chat_id or None,
            user_id=None if shared else message.person,
            agent=message.agent,
            title=title,
        )

    def _fetches(self, message: InboundMessage) -> bool:
        """Say whether the asker fetches his answer from the record."""
        platform = self._platforms.get(message.account)
        return platform is None or platform.pull

    def _parts(
        self, message: InboundMessage, kind: str, text: str, *, source: str | None = None
    ) -> tuple[NewPart, ...]:
        """Cut an answer into parts that the platform takes; the last limit is the platform's own."""
        platform = self._platforms.get(message.account)
        target = Target.of(message)
        before = message.reply_before_ms
        if platform is None or self._fetches(message):
            return (NewPart(kind, 0, part_payload(target, text), source, before, sent=True),)
        texts = fit_text(
            text,
            max_chars=self._chat.max_message_length,
            platform_chars=platform.max_part_chars,
            max_bytes=platform.max_part_bytes,
            max_parts=platform.parts_to(target),
            ending=self._say(message, "shortened"),
        )
        return tuple(
            NewPart(kind, n, part_payload(target, part), source, before) for n, part in enumerate(texts)
        )

    # ------------------------------------------------------------------------------------------ for hooks

    def _context(self, work: Work, message: InboundMessage) -> Context:
        state, chat = work.conversation, self.planner.chats.of(message)
        return Context(
            bot=self.bot,
            message=message,
            conversation=None
            if state is None
            else ConversationView(state.id, state.title, state.message_count, state.total_tokens),
            history=cast("Sequence[StoredMessage]", work.history),  # rows with the same fields
            commands=self.planner.commands.commands,
            is_admin=self._access.is_admin(message),
            scope=chat.scope,
            spoken=chat.language,
            answering=self._answering(work, message),
        )

    def _answering(self, work: Work, message: InboundMessage) -> Answering:
        ai, profile = self._settings.ai, self.planner.profile(message, work.conversation)
        return Answering(
            agent=profile.name,
            model=profile.model,
            persona=profile.persona,
            agents={DEFAULT: "", **{name: agent.description or "" for name, agent in ai.agents.items()}},
            personas=tuple(ai.personas),
            models=self._agent.models,
            is_shared=_is_shared(work),
        )

    def local_time(self, instant_ms: int) -> str:
        return self.planner.local_time(instant_ms)

    async def budgets_of(self, message: InboundMessage) -> list[BudgetView]:
        """Return every budget that applies to the speaker, with what is used of it now."""
        budgets = self.planner.budgets
        charges = budgets.charges(message, self._store.now_ms())
        return budgets.views(charges, await self._store.read(lambda tx: ledger.read_balances(tx, charges)))

    def expired_note(self, message: InboundMessage, count: int) -> dict[str, Any] | None:
        """Return the outbox row of the note that ``count`` messages of this chat were too old to answer."""
        platform = self._platforms.get(message.account)
        if platform is None or platform.pull:
            return None
        if message.chat_type is not ChatType.PRIVATE and not message.addressed:
            return None
        target = replace(Target.of(message), reply_to=None)
        return {
            "source": make_key("expired", message.account, message.event_key),
            "kind": "note",
            "part": 0,
            "lane_key": "note:" + make_key(message.account, message.chat_id or message.sender_id),
            "account": message.account,
            "payload": part_payload(target, self._say(message, "expired", count=count)),
            "reply_before": message.reply_before_ms,
        }

    def closing_note(self, message: InboundMessage) -> str | None:
        """Return the part that tells a speaker that his platform will soon take no reply, None for none."""
        if not message.addressed or message.kind == "event" or not self._access.allows(message):
            return None
        return part_payload(Target.of(message), self._say(message, "closing"))

    @property
    def language(self) -> str:
        return self._chat.language

    @property
    def max_message_length(self) -> int:
        return self._chat.max_message_length

    def _say(self, message: InboundMessage, key: str, **values: object) -> str:
        return say(self.planner.chats.of(message).language, key, prefix=self._chat.command_prefix, **values)

    @staticmethod
    def _reason(answer: AgentAnswer) -> str:
        if answer.refusal is not None:
            return f"model {answer.model}: {answer.failure}; no budget for another call"
        return f"model {answer.model}: {answer.failure}"


def _is_shared(work: Work) -> bool:
    return work.lease.lane_key.startswith(("chat:", "thread:"))


def _note_welcome(tx: Transaction, event: InboundMessage) -> None:
    """Keep whether a chat wants more than answers."""
    chat = event.chat_id or event.sender_id
    refusals.note(tx, event.account, chat, refused=not event.welcome, at_ms=event.sent_at_ms)
