"""``/budget``: what operators see and change of a person's budgets, from a chat."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from feishu_bot.commands import budget_line
from feishu_bot.hooks import Command
from feishu_bot.model import make_key, person_key
from feishu_bot.store import allowances
from feishu_bot.store import budgets as ledger
from feishu_bot.store.audit import Order
from feishu_bot.store.people import Person
from feishu_bot.store.work import Amounts
from feishu_bot.texts import amount, help_of, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.budgets import Budgets
    from feishu_bot.hooks import Context
    from feishu_bot.model import InboundMessage, Unit
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Charge

HERE: Final = "here"  # instead of a person: the budgets that are shared, as they count the chat at hand
_AMOUNT: Final = re.compile(
    r"(\$?)(\d{1,15})(?:\.(\d{1,6}))?(usd|tokens?|calls?|次)?", re.IGNORECASE | re.ASCII
)
_MICRO_DIGITS: Final = 6
_MAX_AMOUNT: Final = 10**15  # of an order: a thousand million dollars


class BudgetCommands:
    """``/budget show|grant|reset``. ``budgets`` and ``prefix`` are those that hold now."""

    def __init__(self, store: Store, budgets: Callable[[], Budgets], prefix: Callable[[], str]) -> None:
        self._store = store
        self._budgets = budgets
        self._prefix = prefix

    def commands(self) -> Sequence[Command]:
        """Return them."""
        return (
            Command(
                "budget",
                self._budget,
                help_of("budget"),
                aliases=("预算",),
                usage="show|grant|reset USER",
                admin_only=True,
            ),
        )

    async def _budget(self, context: Context, args: str) -> str:
        language = context.language
        wanted, *words = _words(context.message, args) or [""]
        if wanted not in {"show", "grant", "reset"} or not words:
            return self._usage(language)
        who, *rest = words
        charges = self._charges(context.message, who)
        if not charges:
            return say(language, "budget_of_nobody", who=who)
        target = who if who == HERE else charges[0].key
        match wanted, rest:
            case "show", []:
                return await self._shown(context, target, charges)
            case "grant", [much, *name] if len(name) <= 1:
                return await self._grant(context, target, charges, much, name)
            case "reset", name if len(name) <= 1:
                chosen = [c for c in charges if not name or c.budget == name[0]]
                if not chosen:
                    return self._which(language, charges)
                order = _order_of(context.message, target)
                await self._store.run(lambda tx: allowances.reset(tx, chosen, order))
                return await self._shown(context, target, chosen)
        return self._usage(language)

    async def _grant(
        self, context: Context, target: str, charges: Sequence[Charge], much: str, name: Sequence[str]
    ) -> str:
        language = context.language
        chosen = [c for c in charges if not name or c.budget == name[0]]
        if len(chosen) != 1:
            return self._which(language, charges)
        granted = _read_amount(much, chosen[0])
        if granted is None:
            return self._usage(language)
        order = _order_of(context.message, target)
        await self._store.run(lambda tx: allowances.grant(tx, chosen, Amounts(*granted), order))
        return await self._shown(context, target, chosen)

    async def _shown(self, context: Context, target: str, charges: Sequence[Charge]) -> str:
        language = context.language
        found = await self._store.read(lambda tx: ledger.read_balances(tx, charges))
        lines = [say(language, "budget_of", who=target)]
        lines += [budget_line(context.bot, view, language) for view in self._budgets().views(charges, found)]
        for charge in charges:
            balance = found.get(charge.window)
            for unit, place, _ in charge.limits():
                if balance is not None and balance.granted[place]:
                    more = amount(language, unit, balance.granted[place])
                    lines.append(say(language, "budget_granted", budget=charge.budget, amount=more))
        return "\n".join(lines)

    def _charges(self, message: InboundMessage, who: str) -> Sequence[Charge]:
        budgets, now_ms = self._budgets(), self._store.now_ms()
        if who == HERE:
            return [
                charge
                for charge in budgets.charges(message, now_ms)
                if budgets.by_name[charge.budget].scope != "user"
            ]
        person = Person.of(who if ":" in who else person_key(message.account, who))
        if person.platform is None or person.sender_id is None:
            return ()
        return budgets.of_person(person.platform, person.sender_id, now_ms)

    def _usage(self, language: str) -> str:
        return say(language, "budget_usage", command=f"{self._prefix()}budget")

    @staticmethod
    def _which(language: str, charges: Sequence[Charge]) -> str:
        names = "、" if language == "zh" else ", "
        return say(language, "budget_which", budgets=names.join(charge.budget for charge in charges))


def _words(message: InboundMessage, args: str) -> list[str]:
    """Return the words of an order; a mention stands for the person that it names, whatever the name."""
    for mention in message.mentions:
        if not mention.is_bot:
            person = person_key(message.account, mention.id)
            for shown in (mention.key, f"@{mention.name}" if mention.name else ""):
                args = args.replace(shown, f" {person} ") if shown else args
    return args.split()


def _order_of(message: InboundMessage, target: str) -> Order:
    source = make_key("order", message.account, message.event_key)
    return Order(message.person, target, source)


def _read_amount(text: str, charge: Charge) -> tuple[int, int, int] | None:
    """Return an amount such as ``5000``, ``20calls`` or ``$1.5``; a bare number is of what the budget limits first."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    sign, whole, part, word = match.groups()
    units: dict[str, Unit] = {"u": "cost", "t": "tokens", "c": "requests", "次": "requests"}
    unit = "cost" if sign else units[word[0].lower()] if word else next(charge.limits())[0]
    limited = {name for name, _, _ in charge.limits()}
    if unit not in limited or (sign and word) or (part and unit != "cost"):
        return None
    if unit == "cost":
        micro_usd = int(whole) * 10**_MICRO_DIGITS + int((part or "").ljust(_MICRO_DIGITS, "0"))
        return (0, 0, micro_usd) if micro_usd <= _MAX_AMOUNT else None
    return (int(whole), 0, 0) if unit == "tokens" else (0, int(whole), 0)
