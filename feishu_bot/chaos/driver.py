"""Runs a scenario: starts everything, has messages sent and accidents happen, lets it settle, and judges."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.chaos.accidents import Accidents, Fakes
from feishu_bot.chaos.people import APP_SECRET, ENCRYPT_KEY, SPENDER, People
from feishu_bot.chaos.record import read_record, read_waiting
from feishu_bot.chaos.scenario import AWAY, CUT, KILL, MACHINE, MODEL, PLATFORM, STALL, STOP, plan
from feishu_bot.chaos.servers import Group, Network, environment, run_command
from feishu_bot.chaos.verdict import Evidence, Verdict, judge
from feishu_bot.errors import BotError, StoreUnavailable
from feishu_bot.testing.clusters import free_port
from feishu_bot.testing.proxy import Proxy

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from feishu_bot.chaos.bases import Base
    from feishu_bot.chaos.scenario import Scenario

MODEL_DELAY_S: Final = 0.15  # a message is at work for so long, so that a kill meets some
LIMITS: Final = {"wide": 50_000_000, "narrow": 800}  # tokens
_LINE: Final = 256 * 1024 * 1024  # what the fakes say in one line
_STILL_S: Final = 0.3  # between two looks whether all has settled


@dataclass(slots=True)
class Result:
    """What a run has brought."""

    scenario: Scenario
    kind: str  # of the database
    verdict: Verdict
    seconds: float  # for which messages were sent
    settled_s: float
    sent: int
    posts: int
    repeated: int
    reordered: int
    folded: int  # second copies that a platform knew by their key
    given_up: int  # messages that ended dead at first, and were answered when somebody asked for it
    model_calls: int
    done: Counter[str]
    details: Counter[str]
    ack_s: list[float]  # of the requests that were acknowledged
    waited_s: list[float]  # from the first request until then
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found when all had settled."""

    seen: dict[str, Any]
    given_up: frozenset[tuple[int, int]]
    servers: list[str]
    seconds: float
    settled_s: float


class Run:
    """One run, in a folder of its own. ``tell`` hears how far it is; ``over`` ends the sending early."""

    def __init__(
        self,
        scenario: Scenario,
        base: Base,
        folder: Path,
        *,
        tell: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self._scenario = scenario
        self._base = base
        self._folder = folder
        self._tell = tell
        self._groups: list[Group] = []
        self._ways: list[list[Proxy]] = []
        self.people = People(scenario, [])

    def enough(self) -> None:
        """Send nothing more, and go on to the verdict."""
        self.people.over.set()

    async def run(self) -> Result:
        """Return what came of it. Raises BotError when it could not be carried out."""
        async with AsyncExitStack() as stack:
            fakes, addresses = await self._start_fakes(stack)
            await self._start_servers(stack, addresses)
            accidents = Accidents(self._groups, self._base, fakes, self._ways)
            started = time.monotonic()
            await self._trouble(accidents)
            seconds, settling = time.monotonic() - started, time.monotonic()
            await self._settle()
            given_up = await self._answer_anew()
            settled_s = time.monotonic() - settling
            seen = await fakes.ask(do="seen")
            ended = await self._stop()
            self._tell("judging")
            found = _Found(seen, given_up, ended, seconds, settled_s)
            return await self._judge(found, accidents)

    # ------------------------------------------------------------------------------------------- starting

    async def _start_fakes(self, stack: AsyncExitStack) -> tuple[Fakes, dict[str, str]]:
        self._tell("starting the fakes")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "feishu_bot.testing.outside", APP_SECRET, str(MODEL_DELAY_S)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE,
            cwd=self._folder,
            env=environment(self._folder),
            start_new_session=True,
        )
        stack.push_async_callback(_end, process)
        fakes = Fakes(process)
        return fakes, await fakes.hear()

    async def _start_servers(self, stack: AsyncExitStack, addresses: Mapping[str, str]) -> None:
        scenario = self._scenario
        for number in range(scenario.groups):
            network = await asyncio.to_thread(Network, number) if scenario.apart else None
            if network is not None:
                stack.callback(network.close)
            here = "127.0.0.1" if network is None else network.here
            outside = dict(addresses)
            if network is not None:
                for who, url in addresses.items():
                    way = await stack.enter_async_context(_before(url, here))
                    outside[who] = url.replace(url.split("/")[2], f"{here}:{way.port}")
            db_url, ways = self._base.url, []
            if self._base.address is not None:
                way = await stack.enter_async_context(Proxy(*self._base.address, on=here))
                db_url, ways = self._base.through(here, way.port), [way]
            there = "127.0.0.1" if network is None else network.there
            config = configuration(scenario, db_url, outside, host=there)
            group = Group(
                number,
                self._folder,
                config,
                command=scenario.command,
                network=network,
                options=("--lease-s", str(scenario.lease_s)),
            )
            stack.push_async_callback(group.close)
            self._groups.append(group)
            self._ways.append(ways)
        self._tell("starting the servers")
        for group in self._groups:
            await group.start()
        for group in self._groups:
            await group.ready()
        self.people.urls = [group.url for group in self._groups]

    # ------------------------------------------------------------------------------------------- trouble

    async def _trouble(self, accidents: Accidents) -> None:
        """Send all messages while the accidents happen; return when both are over."""
        possible = self._base.possible | {KILL, MACHINE, STOP, STALL, PLATFORM, MODEL}
        if not any(self._ways):
            possible = possible - {CUT, AWAY}
        telling = asyncio.create_task(self._tell_often(accidents))
        happening = asyncio.create_task(
            accidents.happen(plan(self._scenario, possible), over=self.people.over)
        )
        talking = asyncio.create_task(self.people.talk())
        try:
            # Whichever fails first ends the run; the accidents end by themselves, a little after the messages.
            await asyncio.gather(talking, happening)
        finally:
            for task in (telling, talking, happening):
                task.cancel()
            await asyncio.gather(telling, talking, happening, return_exceptions=True)

    async def _tell_often(self, accidents: Accidents) -> None:
        start = time.monotonic()
        while True:
            self._tell(
                f"{time.monotonic() - start:.0f} of {self._scenario.expected_s:.0f} s, "
                f"{self.people.acknowledged} messages acknowledged, {accidents.done.total()} accidents"
            )
            await asyncio.sleep(0.5)

    async def _settle(self) -> None:
        """Wait until nothing is left to do, or for as long as that may take."""
        end = time.monotonic() + self._scenario.settle_s
        waiting: tuple[int, int] | None = None
        while time.monotonic() < end:
            with suppress(StoreUnavailable):
                waiting = await asyncio.to_thread(read_waiting, self._base.url)
                if waiting == (0, 0):
                    return
                self._tell(f"settling: {waiting[0]} messages and {waiting[1]} replies to go")
            await asyncio.sleep(_STILL_S)

    async def _answer_anew(self) -> frozenset[tuple[int, int]]:
        """Have what was given up answered, as an operator does after an outage; return what that was."""
        record = await asyncio.to_thread(read_record, self._base.url)
        dead = frozenset(
            (sent.chat.number, sent.number)
            for sent in self.people.sent.values()
            if any(entry.state == "dead" for entry in record.entries.get(sent.message_id, ()))
        )
        if dead:
            self._tell(f"{len(dead)} given up, to be answered anew")
            file = str(self._groups[0].file)
            if self._scenario.apart:  # there, the way to the database is another
                file = str(self._write_config())
            command = (*self._scenario.command, "dead", "retry", "--all", "--config", file)
            await run_command(command, folder=self._folder)
            await self._settle()
        return dead

    def _write_config(self) -> Path:
        config = configuration(self._scenario, self._base.url, {}, host="127.0.0.1")
        return Group(len(self._groups), self._folder, config, command=()).file

    async def _stop(self) -> list[str]:
        self._tell("stopping the servers")
        codes = await asyncio.gather(*(group.stop() for group in self._groups))
        found = [
            f"group {number} did not stop when asked"
            if code is None
            else f"group {number} stopped with exit code {code}"
            for number, code in enumerate(codes)
            if code != 0
        ]
        return [death for group in self._groups for death in group.deaths] + found

    # -------------------------------------------------------------------------------------------- verdict

    async def _judge(self, found: _Found, accidents: Accidents) -> Result:
        seen, given_up = found.seen, found.given_up
        people, sent = self.people, list(self.people.sent.values())
        evidence = Evidence(
            sent=sent,
            record=await asyncio.to_thread(read_record, self._base.url),
            seen={"feishu": seen["feishu"], "qq": seen["qq"]},
            given_up=given_up,
            limits=LIMITS,
            model_tokens=seen["tokens"],
            servers=found.servers,
        )
        acknowledged = [s for s in sent if s.acked_at is not None]
        return Result(
            scenario=self._scenario,
            kind=self._base.kind,
            verdict=judge(evidence),
            seconds=found.seconds,
            settled_s=found.settled_s,
            sent=len(sent),
            posts=people.statuses.total(),
            repeated=people.repeated,
            reordered=people.reordered,
            folded=seen["folded"],
            given_up=len(given_up),
            model_calls=seen["calls"],
            done=accidents.done,
            details=accidents.details,
            ack_s=[s.took_s for s in acknowledged],
            waited_s=[s.acked_at - s.first_at for s in acknowledged if s.acked_at is not None],
            complaints=[words for group in self._groups for words in group.complaints()],
        )


def configuration(
    scenario: Scenario, db_url: str, outside: Mapping[str, str], *, host: str
) -> dict[str, Any]:
    """Return the configuration of a group of servers."""
    pace = {"messages_per_s": None, "messages_per_chat_per_s": None}  # a fake has no such limits
    budgets = [
        {"name": "wide", "window": "total", "limit_tokens": LIMITS["wide"]},
        {
            "name": "narrow",
            "window": "total",
            "limit_tokens": LIMITS["narrow"],
            "match": {"user": f"feishu:ou_{SPENDER}*"},
        },
    ]
    return {
        "server": {"host": host, "port": free_port(), "workers": scenario.workers, "min_free_mb": 0},
        "chat": {"language": "en"},
        "ai": {
            "model": "openai:gpt-4o",
            "base_url": outside.get("model", "http://127.0.0.1:9"),
            "api_key": "sk-fake",
            "timeout_s": 5,
            "max_output_tokens": 64,
            "conversation_persistence": {"db_url": db_url, "max_history_turns": 3},
        },
        "budgets": budgets,
        "platforms": {
            "web": {"enabled": False},
            "feishu": {
                "enabled": True,
                "app_id": "cli_fake",
                "app_secret": APP_SECRET,
                "encrypt_key": ENCRYPT_KEY,
                "base_url": outside.get("feishu", "http://127.0.0.1:9"),
                **pace,
            },
            "qq": {
                "enabled": True,
                "app_id": "102000001",
                "app_secret": APP_SECRET,
                "base_url": outside.get("qq", "http://127.0.0.1:9"),
                "token_url": outside.get("qq", "http://127.0.0.1:9") + "/app/getAppAccessToken",
            },
        },
        "plugins": {"enabled": []},
        "schedule": {"cleanup": {"enabled": False}, "backup": {"enabled": False}},
        "logging": {"format": "json"},
    }


def _before(url: str, on: str) -> Proxy:
    host, _, port = url.split("/")[2].partition(":")
    return Proxy(host, int(port), on=on)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 5.0)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run(
    scenario: Scenario, base: Base, folder: Path, *, tell: Callable[[str], None] = lambda _words: None
) -> Result:
    """Run a scenario on a database, in a folder. The first SIGINT ends the sending, the second the run.

    Raises BotError when it cannot be carried out, and CancelledError when it was ended.
    """
    one, loop = Run(scenario, base, folder, tell=tell), asyncio.get_running_loop()
    running = asyncio.create_task(one.run())

    def interrupted() -> None:
        if one.people.over.is_set():
            running.cancel()
        one.enough()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, running.cancel)
    try:
        return await running
    except ChildProcessError as error:
        raise BotError(str(error)) from None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)
