"""Step 5: what a message needs. Decided inside the transaction that begins it, so without I/O and quickly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal
from zoneinfo import ZoneInfo

from feishu_bot.access import Access, applies
from feishu_bot.ai.profile import DEFAULT
from feishu_bot.ai.summary import SPARE_TURNS, due_summary
from feishu_bot.ai.tokens import count_tokens, encoding_name
from feishu_bot.attachments import readable
from feishu_bot.budgets import Budgets
from feishu_bot.chats import Chats
from feishu_bot.commands import RETRY, CommandTable
from feishu_bot.groups import is_shared, question, with_speakers
from feishu_bot.model import InboundMessage, make_key, spans_chats
from feishu_bot.orders import ORDERS
from feishu_bot.store.work import ConversationState, HistoryRow, Planned, PlannedCall
from feishu_bot.texts import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from feishu_bot.ai.agent import Agent
    from feishu_bot.ai.profile import Profile
    from feishu_bot.ai.prompt import CallPlan
    from feishu_bot.ai.summary import DueSummary
    from feishu_bot.commands import ParsedCommand
    from feishu_bot.config import BotSettings
    from feishu_bot.hooks import Command
    from feishu_bot.model import Attachment
    from feishu_bot.platforms.base import Platform
    from feishu_bot.toolbox import Toolbox

MAX_ATTEMPTS: Final = 5
_LOOK_AGAIN_MS: Final = 60_000  # what waits, e.g. for the bot's own id, is looked at again at the latest then


@dataclass(frozen=True, slots=True)
class Decision:
    """What ``plan`` decided for a message; ``message`` is as the platform judged it."""

    kind: Literal["ignore", "expire", "dead", "refuse", "event", "command", "answer"]
    message: InboundMessage
    reason: str | None = None
    sentence: str = ""
    once: str | None = None  # a source of its own, where the sentence is said once only
    command: ParsedCommand | None = None
    call: CallPlan | None = None
    summarized: tuple[str | None, int] = (None, 0)  # the summary that goes along, and up to where it tells
    due: DueSummary | None = None
    attachments: tuple[Attachment, ...] = ()  # that the model is shown
    again: int | None = None  # the place of the question that is answered anew
    spared: frozenset[str] = frozenset()  # budgets that wanted another model than they hold


class Planner:
    """Decides what a message needs. One for all lanes; holds nothing of a message."""

    def __init__(
        self,
        settings: BotSettings,
        *,
        agent: Agent,
        platforms: Mapping[str, Platform],
        access: Access,
        toolbox: Toolbox,
        holds: Callable[[str, bool], bool] = lambda _account, _asks_model: False,
    ) -> None:
        self._zone = ZoneInfo(settings.schedule.timezone)
        self._tenants = {account: platform.settings.tenant for account, platform in platforms.items()}
        self.budgets = Budgets(settings, tenant=self.tenant, local_time=self.local_time)
        self.configure(settings, agent)
        self.commands = CommandTable(self._chat.command_prefix, self._chat.language, [])
        persistence = settings.ai.conversation_persistence
        profiles = agent.profiles.values()
        spare = SPARE_TURNS if any(profile.summarize for profile in profiles) else 0
        most = max(profile.max_history_turns for profile in profiles)
        self.history_turns = most + spare if persistence.enabled else 0
        self._holds = holds  # whether messages of an account, or those for a model, are kept for later
        self._platforms = platforms
        self._access = access
        self._toolbox = toolbox

    def configure(self, settings: BotSettings, agent: Agent) -> None:
        """Go on with other settings and another agent."""
        self._settings = settings
        self._chat = settings.chat
        self.chats = Chats(settings)
        self._agent = agent
        self.budgets.configure(settings)
        within = settings.chat.answer_within
        self._answer_within_ms = None if within is None else int(within.total_seconds() * 1000)

    def load_commands(self, commands: Sequence[Command]) -> None:
        """Take the commands of the built-ins and of the plugins that have started."""
        self.commands = CommandTable(self._chat.command_prefix, self._chat.language, commands)

    def local_time(self, instant_ms: int) -> str:
        """Return an instant as people here write it."""
        local = datetime.fromtimestamp(instant_ms / 1000, UTC).astimezone(self._zone)
        return local.strftime("%Y-%m-%d %H:%M")

    def tenant(self, account: str) -> str:
        return str(self._tenants.get(account, "default"))

    def plan(
        self,
        message: InboundMessage,
        conversation: ConversationState | None,
        history: Sequence[HistoryRow],
        *,
        attempt: int,
        received_at: int,
        now_ms: int,
    ) -> Planned:
        """Decide what a message needs; runs on the writer's thread, so it is pure and quick."""
        judged = self._first(message, conversation, attempt, self._too_old(received_at, now_ms), now_ms)
        if isinstance(judged, Planned):
            return judged
        message = judged
        profile = self.profile(message, conversation)
        decision = self._decide(message, attempt, received_at, now_ms, profile.model)
        if decision.command is not None:
            decision = self._again(decision, history)
        if self._is_held(decision):
            return Planned(wait_ms=now_ms + _LOOK_AGAIN_MS)
        if decision.kind != "answer" or not self._settings.ai.enabled:
            return Planned(decision)
        if conversation is not None and profile.summarize:
            known = (conversation.summary, conversation.summarized_to)
            decision = replace(decision, summarized=known)
        return self._with_call(decision, history, profile, now_ms)

    def degrade(
        self, planned: Planned, history: Sequence[HistoryRow], *, model: str, budget: str, now_ms: int
    ) -> Planned:
        """Plan the same call to ``model``; ``budget`` counts it no more, for it limits other models."""
        decision: Decision = planned.decision
        call = decision.call
        assert call is not None  # noqa: S101  # it is this call that was refused
        decision = replace(
            decision,
            spared=decision.spared | {budget},
            attachments=self._shown(decision.message, model),
        )
        return self._with_call(decision, history, replace(call.profile, model=model), now_ms)

    def _with_call(
        self, decision: Decision, history: Sequence[HistoryRow], profile: Profile, now_ms: int
    ) -> Planned:
        """Return the decision with the call that it takes, and what must be reserved for that."""
        message, shown = decision.message, decision.attachments
        scope = self.chats.of(message).scope
        if is_shared(message, scope):
            history = with_speakers(history, profile.model)
        images = sum(a.kind == "image" for a in shown)
        room = self._chat.max_input_tokens - (message.tokens or 0) if len(shown) > images else 0
        if decision.again is not None:
            history, asked = _before(history, decision.again)
            text, tokens = asked.content, asked.tokens
        else:
            text, tokens = question(message, scope, profile.model)
        if encoding_name(profile.model) != encoding_name(self._settings.ai.model):
            tokens = count_tokens(text, profile.model)  # what is stored was counted by the other
        call = self._agent.plan(
            history,
            text,
            tokens,
            images=images,
            file_tokens=room,
            profile=profile,
            tools=self._toolbox.choose(profile.tools),
            summary=decision.summarized[0],
        )
        if profile.summarize:
            before, upto = decision.summarized
            due = due_summary(history, call.start, before=before, summarized_to=upto)
            decision = replace(decision, due=due)
        charges = self.budgets.charges(message, now_ms, model=call.model, spared=decision.spared)
        cost = self._agent.most_cost(call)
        return Planned(
            replace(decision, call=call),
            PlannedCall(call.model, call.prompt_tokens, call.reserve_tokens, charges, cost),
        )

    def _first(
        self,
        message: InboundMessage,
        conversation: ConversationState | None,
        attempt: int,
        is_old: bool,  # noqa: FBT001  # too old to answer
        now_ms: int,
    ) -> InboundMessage | Planned:
        """Return the message as its platform judges it, or what is done where no answer is asked for."""
        if message.account not in self._platforms and not is_old:
            # Switched off: there is nobody to answer through now.
            return Planned(wait_ms=now_ms + _LOOK_AGAIN_MS)
        if message.continues and conversation is None:
            return Planned(Decision("ignore", message, "the conversation was deleted"))
        if message.kind == "event":
            return Planned(Decision("event" if attempt <= MAX_ATTEMPTS else "ignore", message, "event"))
        if message.addressed is None:
            judged = self._judge(message)
            if judged is None and not is_old:
                return Planned(wait_ms=now_ms + _LOOK_AGAIN_MS)
            message = judged or replace(message, addressed=False)
            if not message.addressed and self.chats.of(message).require_at_in_groups:
                return Planned(Decision("ignore", message, "not addressed"))
        return message

    def profile(self, message: InboundMessage, conversation: ConversationState | None) -> Profile:
        """Return how a message is answered: as it asks, as its conversation has chosen, as the rules say."""
        if message.agent is not None and (conversation is None or conversation.agent != message.agent):
            return self._agent.profile(message.agent)
        if conversation is None:
            return self._agent.profile(self._default_agent(message))
        agent = conversation.agent or self._default_agent(message)
        return self._agent.profile(agent, persona=conversation.persona, model=conversation.model)

    def _default_agent(self, message: InboundMessage) -> str:
        """Return who answers here where nobody has chosen."""
        chat = next((chat for chat in self._settings.chats if applies(chat.match, message)), None)
        if chat is not None and chat.agent is not None:
            return chat.agent
        for rule in self._settings.ai.agent_for:
            if applies(rule.match, message, tenant=self.tenant(message.account)):
                return rule.agent
        return DEFAULT

    def _judge(self, message: InboundMessage) -> InboundMessage | None:
        """Return the message as its platform judges it; None while the bot's own id is unknown."""
        platform = self._platforms.get(message.account)
        judged = platform.judge(message) if platform is not None else replace(message, addressed=True)
        if judged is None:
            return None
        if judged.addressed is None:
            judged = replace(judged, addressed=judged.quotes_bot)
        if (
            judged.addressed and judged.tokens is None and judged.text
        ):  # it was counted with the mention in it
            judged = replace(judged, tokens=count_tokens(judged.text, self._settings.ai.model))
        return judged

    def _is_held(self, decision: Decision) -> bool:
        """Say whether an operator wants this to wait; his own orders never do."""
        if decision.kind == "expire" or not self._holds(
            decision.message.account, decision.kind == "answer" and self._settings.ai.enabled
        ):
            return False
        return not (decision.command is not None and self.is_order(decision.message))

    def is_order(self, message: InboundMessage) -> bool:
        """Say whether a message is an operator's order to go on or to stop."""
        if not self._access.is_admin(message):
            return False
        parsed = self.commands.parse(message.text)
        command = None if parsed is None else self.commands.find(parsed.name)
        return command is not None and command.name in ORDERS

    def _too_old(self, received_at: int, now_ms: int) -> bool:
        return self._answer_within_ms is not None and now_ms - received_at > self._answer_within_ms

    def _decide(
        self, message: InboundMessage, attempt: int, received_at: int, now_ms: int, model: str
    ) -> Decision:
        if self._too_old(received_at, now_ms):
            # The sweep has passed it by; one note per chat and minute.
            once = make_key(
                "expired", message.account, str(now_ms // 60_000), message.chat_id, message.sender_id
            )
            return Decision(
                "expire", message, "too old to answer", self._say(message, "expired", count=1), once
            )
        if message.reply_before_ms is not None and now_ms > message.reply_before_ms:
            return Decision("expire", message, "the platform's reply window has closed")
        if attempt > MAX_ATTEMPTS:
            return Decision("dead", message, f"gave up after {MAX_ATTEMPTS} attempts")
        if not self._access.allows(message):
            day = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(self._zone).date()
            once = make_key("access", message.account, day.isoformat(), message.chat_id, message.sender_id)
            return Decision("refuse", message, "access", self._say(message, "no_access"), once)
        shown = self._shown(message, model)
        if message.unreadable is not None and not shown:
            key = "bare_mention" if message.unreadable == "mention" else "cannot_read"
            return Decision("refuse", message, f"cannot read: {message.unreadable}", self._say(message, key))
        command = self.commands.parse(message.text)
        if command is not None:
            return Decision("command", message, command=command)
        limit = self._chat.max_input_tokens
        if (message.tokens or 0) > limit:
            sentence = self._say(message, "too_long", tokens=message.tokens, limit=limit)
            return Decision("refuse", message, "too long", sentence)
        return Decision("answer", message, attachments=shown)

    def _shown(self, message: InboundMessage, model: str) -> tuple[Attachment, ...]:
        """Return what the model is shown beside the words."""
        if not message.attachments or not self._settings.ai.enabled:
            return ()
        platform, agent = self._platforms.get(message.account), self._agent
        return readable(message, platform, images=agent.takes_images(model), files=agent.takes_files(model))

    def _again(self, decision: Decision, history: Sequence[HistoryRow]) -> Decision:
        """Return ``/retry`` as the question that it repeats, everything else as it is."""
        parsed = decision.command
        command = None if parsed is None or parsed.args else self.commands.find(parsed.name)
        if command is None or command.name != RETRY or not self._settings.ai.enabled:
            return decision
        if spans_chats(decision.message, self.chats.of(decision.message).scope):
            return decision  # the last question may be one of another group
        asked = next((row for row in reversed(history) if row.role == "user"), None)
        if asked is None:
            return decision
        message = replace(decision.message, text=asked.content, tokens=asked.tokens)
        return replace(decision, kind="answer", message=message, command=None, again=asked.seq)

    def _say(self, message: InboundMessage, key: str, **values: object) -> str:
        return say(self.chats.of(message).language, key, prefix=self._chat.command_prefix, **values)


def _before(history: Sequence[HistoryRow], seq: int) -> tuple[Sequence[HistoryRow], HistoryRow]:
    """Return what was said before the question at ``seq``, and the question."""
    for index, row in enumerate(history):
        if row.seq == seq:
            return history[:index], row
    raise LookupError(f"the history has no message {seq}")
