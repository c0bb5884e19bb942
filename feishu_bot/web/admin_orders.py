"""What administrators change from the console. Each order is asked about, and on record in the transaction it is done in."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.errors import BadPayload
from feishu_bot.store import allowances, controls, conversations
from feishu_bot.store.cleanup import drop_dead, retry_dead
from feishu_bot.store.console import Page, dead_letters
from feishu_bot.store.work import Amounts

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from feishu_bot.store.work import Charge, Transaction
    from feishu_bot.web.admin import Desk

Fields = dict[str, str]

MAX_RETRIED: Final = 10_000  # letters by one order
_PIECE: Final = 100  # letters in one transaction
_LETTER: Final = re.compile(r"(in|out)-[0-9]{1,15}", re.ASCII)
_ID: Final = re.compile(r"[0-9]{1,15}", re.ASCII)
_AMOUNT: Final = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,6})?", re.ASCII)
_MICRO: Final = 1_000_000
_MAX_SAID: Final = 500  # characters
_MAX_KEY: Final = 255


class Orders:
    """``remove_rows`` takes what is left of a conversation that was hidden."""

    def __init__(self, desk: Desk, remove_rows: Callable[[int], None]) -> None:
        self._desk = desk
        self._remove_rows = remove_rows

    # ---------------------------------------------------------------------------------------- dead letters

    async def dead(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        """Retry or drop one letter, or retry all that a search has found."""
        desk, do, letter = self._desk, fields.get("do"), fields.get("id", "")
        words = desk.words(request)
        if do == "retry_all":
            asked = desk.confirmed(request, fields, "dead", words["ask_retry_all"])
            return asked or await self._retry_all(request, fields)
        change = {"retry": retry_dead, "drop": drop_dead}.get(do or "")
        if change is None or not _LETTER.fullmatch(letter):
            raise BadPayload("expected retry or drop and a dead letter's id")
        asked = desk.confirmed(request, fields, "dead", words[f"ask_{do}"].replace("{id}", letter))
        if asked is not None:
            return asked
        order = desk.order_of(request, fields, letter)
        found = await desk.carry_out(
            f"dead.{do}", order, partial(change, ids=[letter], shard=desk.store.shard)
        )
        if do == "retry":
            desk.inside.retried()
        return desk.back("dead", why="why_gone") if found == [] else desk.back("dead", letter)

    async def _retry_all(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        desk, text = self._desk, fields.get("q", "")
        letters = await desk.store.read(lambda tx: dead_letters(tx, Page(text, 0, MAX_RETRIED)))
        ids = [letter.id for letter in letters]
        order, done = desk.order_of(request, fields, "all" if not text else f"all with {text}"), 0
        for start in range(0, len(ids), _PIECE):
            piece = order._replace(source=f"{order.source}:{start}")
            change = partial(retry_dead, ids=ids[start : start + _PIECE], shard=desk.store.shard)
            found = await desk.carry_out("dead.retry", piece, change, told=list)
            done += len(found or ())
            desk.inside.retried()
        return desk.back("dead", done)

    # --------------------------------------------------------------------------------------- conversations

    async def conversations(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        """Delete a conversation: it is gone at once, its rows follow in pieces."""
        desk, number = self._desk, fields.get("id", "")
        if fields.get("do") != "delete" or not _ID.fullmatch(number):
            raise BadPayload("expected delete and a conversation's id")
        ask = desk.words(request)["ask_delete"].replace("{id}", number)
        asked = desk.confirmed(request, fields, "conversations", ask)
        if asked is not None:
            return asked
        conversation_id = int(number)

        def hide(tx: Transaction) -> dict[str, Any]:
            row = conversations.get(tx, conversation_id)
            conversations.hide(tx, conversation_id)
            return {"messages": row["message_count"]}

        order = desk.order_of(request, fields, f"conversation {number}")
        await desk.carry_out("conversation.delete", order, hide, told=dict)
        self._remove_rows(conversation_id)
        return desk.back("conversations", f"#{number}")

    # --------------------------------------------------------------------------------------------- budgets

    async def budgets(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        """Grant more of a budget for its window now, or begin that anew."""
        desk, do, key = self._desk, fields.get("do"), fields.get("key", "")
        budgets = desk.inside.budgets()
        own = budgets.by_name.get(fields.get("budget", ""))
        if do not in {"grant", "reset"} or own is None or not 0 < len(key) <= _MAX_KEY:
            raise BadPayload("expected grant or reset, a budget and whose")
        charge = budgets.charge(own, key, desk.store.now_ms())
        amounts = _read_amounts(charge, fields) if do == "grant" else Amounts()
        ask = desk.words(request)[f"ask_{do}"].replace("{key}", key).replace("{budget}", own.name)
        asked = desk.confirmed(request, fields, "budgets", ask.replace("{n}", fields.get("amount", "")))
        if asked is not None:
            return asked
        order = desk.order_of(request, fields, key)
        if do == "grant":
            await desk.store.run(lambda tx: allowances.grant(tx, [charge], amounts, order))
        else:
            await desk.store.run(lambda tx: allowances.reset(tx, [charge], order))
        return desk.back("budgets", key)

    # ------------------------------------------------------------------------------------------------ jobs

    async def jobs(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        """Begin a job out of turn, in this process."""
        desk, job = self._desk, fields.get("job", "")
        if fields.get("do") != "run" or job not in {known.name for known in desk.inside.schedule.jobs}:
            raise BadPayload("expected run and a job's name")
        ask = desk.words(request)["ask_run"].replace("{job}", job)
        asked = desk.confirmed(request, fields, "jobs", ask)
        if asked is not None:
            return asked
        order = desk.order_of(request, fields, job)
        if await desk.carry_out("job.run", order, lambda _tx: True) is None:
            return desk.back("jobs", job)  # ordered before
        begun = await desk.inside.schedule.run_now(job)
        return desk.back("jobs", job) if begun else desk.back("jobs", why="why_running")

    # ------------------------------------------------------------------------------------------- platforms

    async def platforms(self, request: web.Request, fields: Fields) -> web.StreamResponse:
        """Pause everything, the models or one account, or go on."""
        desk, do, target = self._desk, fields.get("do"), fields.get("target", "")
        words, account = desk.words(request), target.removeprefix("account:")
        if target in {controls.ALL, controls.MODELS}:
            what = words[f"what_{target}"]
        elif target.startswith("account:") and (
            account in desk.inside.settings().platforms or do == "resume"
        ):
            what = account
        else:
            raise BadPayload("expected what to pause or resume")
        say = fields.get("say", "").strip() or None
        if do not in {"pause", "resume"} or len(say or "") > _MAX_SAID or len(target) > _MAX_KEY:
            raise BadPayload("expected pause or resume")
        asked = desk.confirmed(request, fields, "platforms", words[f"ask_{do}"].replace("{what}", what))
        if asked is not None:
            return asked
        order = desk.order_of(request, fields, target)
        if do == "pause":

            def pause(tx: Transaction) -> bool:
                controls.pause(tx, target, say=say, by=order.actor)
                return True

            await desk.carry_out("pause", order, pause, told=lambda _done: {"say": say})
        else:
            whole = None if target == controls.ALL else target
            await desk.carry_out("resume", order, lambda tx: controls.resume(tx, whole))
        return desk.back("platforms", what)


def _read_amounts(charge: Charge, fields: Fields) -> Amounts:
    """Return how much is granted, in the unit that the form names."""
    text, unit = fields.get("amount", "").strip(), fields.get("unit")
    places = {name: place for name, place, _ in charge.limits()}
    if not _AMOUNT.fullmatch(text) or unit not in places or (unit != "cost" and "." in text):
        raise BadPayload("amount: expected a number of what the budget limits")
    number = int(Decimal(text) * _MICRO) if unit == "cost" else int(text)
    if not 0 < number <= 10**15:
        raise BadPayload("amount: expected a number above 0")
    amounts = [0, 0, 0]
    amounts[places[unit]] = number
    return Amounts(*amounts)
