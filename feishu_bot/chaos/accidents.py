"""Has the accidents of a plan happen, and ends them all."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import orjson

from feishu_bot.chaos import scenario as kinds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from feishu_bot.chaos.bases import Base
    from feishu_bot.chaos.scenario import Fault
    from feishu_bot.chaos.servers import Group
    from feishu_bot.testing.proxy import Proxy


class Fakes:
    """The platforms and the model, in their own process (``testing.outside``)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._asking = asyncio.Lock()

    async def hear(self) -> dict[str, Any]:
        """Return the next thing that it says."""
        assert self._process.stdout is not None  # noqa: S101  # made with a pipe
        line = await self._process.stdout.readline()
        if not line:
            raise ChildProcessError("the process of the fakes has ended")
        return cast("dict[str, Any]", orjson.loads(line))

    async def ask(self, **order: str) -> dict[str, Any]:
        """Give an order and return the answer."""
        assert self._process.stdin is not None  # noqa: S101  # as above
        async with self._asking:
            self._process.stdin.write(orjson.dumps(order) + b"\n")
            await self._process.stdin.drain()
            return await self.hear()


@dataclass(slots=True)
class Accidents:
    """What happens to whom. ``done`` counts what did happen, by kind; ``details`` by what exactly."""

    groups: Sequence[Group]
    base: Base
    fakes: Fakes
    ways: Sequence[Sequence[Proxy]]  # of each group: its ways to the database
    done: Counter[str] = field(default_factory=Counter)
    details: Counter[str] = field(default_factory=Counter)
    _alone: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def happen(self, plan: Sequence[Fault], *, over: asyncio.Event) -> None:
        """Have them happen, each at its time, until ``over``; when this is left, for whatever reason, all have ended."""
        start = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as running:
            for fault in plan:
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), start + fault.at - asyncio.get_running_loop().time())
                if over.is_set():
                    break
                running.create_task(self._happen(fault))

    async def _happen(self, fault: Fault) -> None:
        if await self._do(fault):
            self.done[fault.kind] += 1
            if fault.detail:
                self.details[fault.detail] += 1

    async def _do(self, fault: Fault) -> bool:
        number = int(fault.victim * len(self.groups))
        group, ways = self.groups[number], self.ways[number]
        within = fault.victim * len(self.groups) - number  # chooses within the group
        match fault.kind:
            case kinds.KILL:
                async with self._alone[f"group {number}"]:
                    return await group.kill_one(within)
            case kinds.MACHINE:
                return group.kill()
            case kinds.STOP | kinds.STALL:
                return await group.stall(within, fault.length_s)
            case kinds.RESTART | kinds.FREEZE:
                return await self._strike_server(fault)
            case kinds.LOCK:
                async with self._alone["database"]:
                    await asyncio.to_thread(self.base.hold, fault.length_s)
            case kinds.CUT:
                for way in ways:
                    way.cut()
            case kinds.AWAY:
                async with self._alone[f"way {number}"]:
                    await _close(ways, fault.length_s)
            case kinds.PLATFORM | kinds.MODEL:
                who, _, trouble = fault.detail.partition(" ")
                async with self._alone[who]:
                    await self._outage(who, trouble, fault.length_s)
        return True

    async def _strike_server(self, fault: Fault) -> bool:
        async with self._alone["database"]:
            if fault.kind == kinds.RESTART:
                how = cast("Literal['at once', 'orderly']", fault.detail)
                await asyncio.to_thread(self.base.restart, how, fault.length_s)
                return True
            try:
                self.base.freeze(frozen=True)
                await asyncio.sleep(fault.length_s)
            finally:
                self.base.freeze(frozen=False)
        return True

    async def _outage(self, who: str, trouble: str, seconds: float) -> None:
        try:
            await self.fakes.ask(do="trouble", who=who, kind=trouble)
            await asyncio.sleep(seconds)
        finally:
            await asyncio.shield(self.fakes.ask(do="calm", who=who, kind=trouble))


async def _close(ways: Sequence[Proxy], seconds: float) -> None:
    """Take no connection, and break those that there are."""
    try:
        for way in ways:
            way.up = False
            way.cut()
        await asyncio.sleep(seconds)
    finally:
        for way in ways:
            way.up = True
