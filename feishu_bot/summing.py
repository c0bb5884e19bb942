"""The summary of a conversation, made beside an answer and stored with it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from feishu_bot.model import End

if TYPE_CHECKING:
    from feishu_bot.ai.agent import Agent, Reserve
    from feishu_bot.model import CallUsage
    from feishu_bot.planner import Decision
    from feishu_bot.store.work import Outcome


class Summing:
    """One summary on its way, if one is due. ``end`` it in any case: what is not wanted any more is given up."""

    def __init__(self) -> None:
        self._task: asyncio.Task[tuple[str | None, CallUsage | None]] | None = None
        self._upto = 0

    def begin(self, agent: Agent, decision: Decision, reserve: Reserve) -> None:
        """Begin to make the summary that is due."""
        if decision.due is not None and decision.call is not None:
            made = agent.summarize(decision.call.profile, decision.due, reserve=reserve)
            self._task, self._upto = asyncio.get_running_loop().create_task(made), decision.due.upto

    async def added_to(self, outcome: Outcome) -> Outcome:
        """Return an outcome with its summary. One that is no answer does not wait for it.

        The call of a summary that is given up is booked whole, as is every call that nobody has heard the end of.
        """
        if self._task is None or (outcome.end is not End.ANSWERED and not self._task.done()):
            return outcome
        text, used = await self._task
        calls = outcome.calls if used is None else (used, *outcome.calls)
        return replace(outcome, calls=calls, summary=(text, self._upto) if text else None)

    def end(self) -> None:
        """Give up what is not done."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
