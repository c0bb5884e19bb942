"""Which budgets count a message, and what people are told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfo

from feishu_bot.access import applies
from feishu_bot.hooks import BudgetView
from feishu_bot.model import ChatType, InboundMessage, make_key
from feishu_bot.store.work import Amounts, Balance, Charge
from feishu_bot.texts import of_limit, say
from feishu_bot.windows import window_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from feishu_bot.config import BotSettings, BudgetSettings
    from feishu_bot.model import BudgetRefusal, CallUsage
    from feishu_bot.store.work import Standing, WindowKey
    from feishu_bot.windows import Window

EVERYBODY: Final = "*"  # what a global budget counts under; no account or person is called so
NEARLY, OVER = 1, 2  # what has been told of a window


class Budgets:
    """The budgets of a configuration. ``tenant`` names the tenant of an account, ``local_time`` an instant."""

    def __init__(
        self, settings: BotSettings, *, tenant: Callable[[str], str], local_time: Callable[[int], str]
    ) -> None:
        self._tenant = tenant
        self._local_time = local_time
        self._zone = ZoneInfo(settings.schedule.timezone)
        self._windows: dict[Window, tuple[int, int | None]] = {}
        self.configure(settings)

    def configure(self, settings: BotSettings) -> None:
        """Go on with other settings; what was used is kept by the budgets' names."""
        self.by_name: Mapping[str, BudgetSettings] = {budget.name: budget for budget in settings.budgets}

    # ------------------------------------------------------------------------------------------ counting

    def charges(
        self,
        message: InboundMessage,
        now_ms: int,
        *,
        model: str | None = None,
        spared: frozenset[str] = frozenset(),
    ) -> tuple[Charge, ...]:
        """Return the rows that a call of this speaker is held against.

        ``model`` None: whatever model. ``spared`` are budgets that have wanted another model already.
        """
        return tuple([
            self.charge(budget, self._key(budget, message), now_ms)
            for budget in self.by_name.values()
            if budget.name not in spared
            and (budget.degrade_to is None or budget.degrade_to != model)
            and applies(budget.match, message)
        ])  # fmt: skip

    def of_person(self, account: str, sender_id: str, now_ms: int) -> tuple[Charge, ...]:
        """Return the rows that count a person alone, in whatever chat."""
        speaker = InboundMessage(account, "", sender_id=sender_id)
        found = []
        for budget in self.by_name.values():
            match = budget.match
            anywhere = None if match is None else match.model_copy(update={"chat": None})
            if budget.scope == "user" and applies(anywhere, speaker):
                found.append(self.charge(budget, speaker.person, now_ms))
        return tuple(found)

    def charge(self, budget: BudgetSettings, key: str, now_ms: int) -> Charge:
        """Return the row of a budget that counts for ``key`` now."""
        start, end = self._bounds(budget.window, now_ms)
        return Charge(
            budget.name,
            key,
            start,
            budget.limit_tokens,
            end,
            limit_requests=budget.limit_requests,
            limit_micro_usd=budget.limit_micro_usd,
            soft=budget.on_exceeded == "warn",
            degrade_to=budget.degrade_to,
            # Who shares a budget with all the others is not told: the operator is, by an alert.
            watched=budget.scope in {"user", "chat"}
            and (budget.warn_at is not None or budget.on_exceeded == "warn"),
        )

    def _key(self, budget: BudgetSettings, message: InboundMessage) -> str:
        """Return what a budget counts a message under."""
        match budget.scope:
            case "chat":
                if message.chat_type is ChatType.PRIVATE or not message.chat_id:
                    return message.user_key
                return make_key(message.account, message.chat_id)
            case "platform":
                return message.account
            case "tenant":
                return self._tenant(message.account)
            case "global":
                return EVERYBODY
            case _:
                return message.person

    def _bounds(self, window: Window, now_ms: int) -> tuple[int, int | None]:
        """Return a window's bounds; the calendar is asked once per window, not once per message."""
        known = self._windows.get(window)
        if known is None or now_ms < known[0] or (known[1] is not None and now_ms >= known[1]):
            known = self._windows[window] = window_bounds(window, now_ms, self._zone)
        return known

    # ------------------------------------------------------------------------------------------- telling

    def refused(self, refusal: BudgetRefusal, *, prefix: str, language: str) -> str:
        """Return what the speaker of a refused call is told."""
        if refusal.unpriced:
            return say(language, "budget_unpriced", budget=refusal.budget, prefix=prefix)
        amount = of_limit(language, refusal.unit, refusal.used + refusal.reserved, refusal.limit)
        ends = self._ends(refusal.ends_ms, language)
        return say(language, "budget", budget=refusal.budget, amount=amount, ends=ends)

    def degraded(self, spared: Iterable[str], model: str, *, language: str) -> str:
        """Return the line that another model has answered because of these budgets."""
        between = "、" if language == "zh" else ", "
        named = between.join(sorted(name for name in spared if name))
        return say(language, "budget_degraded", budget=named, model=model)

    def warnings(
        self, standings: Iterable[Standing], calls: Iterable[CallUsage], *, language: str
    ) -> list[tuple[WindowKey, int, str]]:
        """Return what is to be told of budgets that these calls have nearly used up: window, level, sentence.

        Nothing of what was told in the same window before.
        """
        taken = Amounts()
        for call in calls:
            if call.outcome != "failed":
                taken += Amounts(call.input_tokens + call.output_tokens, 1, call.cost_micro_usd or 0)
        found = []
        for charge, balance in standings:
            level, sentence = self._warning(charge, balance, taken, language)
            if level > balance.told:
                found.append((charge.window, level, sentence))
        return found

    def _warning(self, charge: Charge, balance: Balance, taken: Amounts, language: str) -> tuple[int, str]:
        budget = self.by_name.get(charge.budget)
        share = None if budget is None else budget.warn_at
        level, sentence = 0, ""
        for unit, place, limit in charge.limits(balance.granted):
            used = balance.used[place] + taken[place]
            if charge.soft and used > limit:
                reached, key = OVER, "budget_over"
            elif share is not None and used >= share * limit:
                reached, key = NEARLY, "budget_nearly"
            else:
                continue
            if reached > level:
                level, amount = reached, of_limit(language, unit, used, limit)
                ends = self._ends(charge.ends_ms, language)
                sentence = say(language, key, budget=charge.budget, amount=amount, ends=ends).strip()
        return level, sentence

    def _ends(self, ends_ms: int | None, language: str) -> str:
        return "" if ends_ms is None else say(language, "budget_ends", at=self._local_time(ends_ms))

    def views(self, charges: Iterable[Charge], found: Mapping[WindowKey, Balance]) -> list[BudgetView]:
        """Return what is used of budgets: a view for each thing that they limit."""
        return [
            BudgetView(
                charge.budget,
                self.by_name[charge.budget].window,
                balance.used[place],
                balance.reserved[place],
                limit,
                charge.ends_ms,
                unit=unit,
                scope=self.by_name[charge.budget].scope,
            )
            for charge in charges
            for balance in (found.get(charge.window, Balance()),)
            for unit, place, limit in charge.limits(balance.granted)
        ]
