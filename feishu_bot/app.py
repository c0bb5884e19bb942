"""The composition root: builds the parts, starts them, stops them in reverse."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from feishu_bot import __version__
from feishu_bot.access import Access
from feishu_bot.agent_commands import AgentCommands
from feishu_bot.ai.circuit import Circuits
from feishu_bot.ai.mcp_servers import McpServers
from feishu_bot.backups import Backups
from feishu_bot.budget_commands import BudgetCommands
from feishu_bot.chats import Chats
from feishu_bot.closing import Closing
from feishu_bot.commands import BuiltinCommands
from feishu_bot.conversation_commands import ConversationCommands
from feishu_bot.delivery import Delivery
from feishu_bot.errors import StoreUnavailable
from feishu_bot.gate import Gate
from feishu_bot.intake import Intake
from feishu_bot.metrics import Metrics
from feishu_bot.model import End
from feishu_bot.operation import Operation, Process, make_agent
from feishu_bot.orders import OperatorCommands
from feishu_bot.pipeline import Pipeline
from feishu_bot.platforms.base import PlatformContext, platform_types
from feishu_bot.plugin_bot import ChatBot
from feishu_bot.plugins import Plugins
from feishu_bot.retention import Retention
from feishu_bot.schedule import Job, Schedule, add_usage, cleanup, remove_hidden
from feishu_bot.store.conversations import PIECE
from feishu_bot.store.engine import is_hopeless
from feishu_bot.store.store import Store
from feishu_bot.store.trouble import count_conversations
from feishu_bot.store.work import Change
from feishu_bot.toolbox import Toolbox
from feishu_bot.waiters import Waiters
from feishu_bot.web.admin import Inside
from feishu_bot.web.chat import Chat
from feishu_bot.web.doors import ChatView, Doors
from feishu_bot.web.health import Health
from feishu_bot.web.send import Send
from feishu_bot.web.server import Server
from feishu_bot.web.sockets import Sockets
from feishu_bot.web.webhooks import Webhooks
from feishu_bot.worker import Worker

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable
    from datetime import timedelta

    from feishu_bot.config import BotSettings
    from feishu_bot.hooks import Command
    from feishu_bot.model import InboundMessage
    from feishu_bot.planner import Planner
    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.work import Committed, Outcome, PartToSend, Planned, Transaction, Work

log = logging.getLogger(__name__)

GRACE_S: Final = 20.0  # what runs at SIGTERM may finish in this time
_REMOVE_HIDDEN: Final = "remove hidden"
FLUSH_S: Final = 5.0  # and the outbox in this
_WAIT_FOR_STORE_S: Final = 1.0  # between two looks for a database that is away at start


class App:
    """The server: one process's web doors, worker, delivery and schedule over one store.

    ``process`` is what the process was given by whoever started it. ``clock`` gives Unix seconds, ``reached`` is
    told of each step of a message's way; both are for tests.
    """

    def __init__(
        self,
        settings: BotSettings,
        process: Process | None = None,
        *,
        clock: Callable[[], float] = time.time,
        reached: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self._process = process = process or Process()
        self._reached = reached
        chat, persistence = settings.chat, settings.ai.conversation_persistence
        self.store = Store(
            persistence.db_url, auto_migrate=persistence.auto_migrate, lease_ms=process.lease_ms
        )
        self.access = Access(settings.access, chat.admins)
        self.platforms = self._make_platforms()
        self._builtin = BuiltinCommands(chat, self._more_commands())
        self.plugins = Plugins(settings.plugins, builtin=self._builtin)
        self.circuits = Circuits()
        self.agent = make_agent(settings, self.circuits)
        self.mcp_servers = McpServers()
        self.pipeline = Pipeline(
            settings,
            agent=self.agent,
            platforms=self.platforms,
            plugins=self.plugins,
            access=self.access,
            store=self.store,
            toolbox=Toolbox((self.plugins, self.mcp_servers)),
            holds=self._holds,
        )
        step = reached if reached is not None else _nothing
        self.waiters = Waiters(self.store)
        self.delivery = Delivery(
            self.store,
            self.platforms,
            keep_texts=persistence.enabled,
            sharers=lambda: self.operation.controls.servers,
            holds=self._holds_part,
            reached=step,
        )
        self.worker = Worker(
            self.store,
            self.pipeline,
            self.delivery,
            finished=self._finished,
            expired=self._expired,
            on_text=self.waiters.on_text,
            answer_within_ms=_milliseconds(chat.answer_within),
            report=self._report,
            keep_texts=persistence.enabled,
            reached=step,
        )
        self.pipeline.dropped = self.worker.drop
        windows = any(platform.has_reply_window for platform in self.platforms.values())
        self.closing = Closing(self.store, self.pipeline, self.delivery, needed=windows)
        self.intake = Intake(
            settings,
            self.store,
            self.access,
            recorded=self.worker.nudge,
            wants_events=lambda: self.plugins.wants_events,
            is_order=self.pipeline.planner.is_order,
            told=self._told,
        )
        self.metrics = Metrics(self.intake.counts, self._gauges, process.peers, self.circuits.states)
        self.gate = Gate(
            settings.server,
            self.store,
            depth=lambda: self.worker.depth,
            folder=self.store.folder,
        )
        self.backups = Backups(settings.schedule.backup, self.store, settings.schedule.zone)
        self.schedule = Schedule(self.store, settings.schedule.zone, self._jobs() + self.backups.jobs())
        self.operation = Operation(self, process)
        self._server = self._make_server(clock)
        self._store_open = self._open = False

    # ------------------------------------------------------------------------------------------ building

    def _more_commands(self) -> list[Command]:
        conversations = ConversationCommands(
            self.store, lambda account: self.platforms[account].settings.tenant, lambda: self.settings.chat
        )
        orders = OperatorCommands(lambda: self.operation.controls, lambda: self.settings.chat.command_prefix)
        agents = AgentCommands(lambda: self.settings.chat.command_prefix, self.store)
        budgets = BudgetCommands(
            self.store,
            lambda: self.pipeline.planner.budgets,
            lambda: self.settings.chat.command_prefix,
        )
        return [
            *conversations.commands(),
            *agents.commands(),
            *orders.commands(),
            *budgets.commands(),
        ]

    def _make_platforms(self) -> dict[str, Platform]:
        types, settings = platform_types(), self.settings
        context = PlatformContext(
            network=settings.network,
            language=settings.chat.language,
            require_at_in_groups=Chats(settings).all_require_mention,
            identified=self._identified,
            connected=self._connected,
        )
        return {
            account: types[own.type](account, own, context)
            for account, own in settings.platforms.items()
            if own.enabled
        }

    def _identified(self) -> None:
        """Judge the mentions that waited for the bot's own id."""
        self.worker.look_now()

    def _connected(self, account: str) -> None:
        """Send at once what waited for a way out."""
        self.delivery.hasten(account)

    def _jobs(self) -> list[Job]:
        cleaning = self.settings.schedule.cleanup
        jobs = [
            Job(_REMOVE_HIDDEN, None, partial(remove_hidden, self.store)),
            Job("usage", "7 * * * *", partial(add_usage, self.store)),
        ]
        if not cleaning.enabled:
            return jobs

        async def clean() -> None:
            result = await cleanup(self.store, Retention.of(self.settings))
            log.info("cleanup done", extra={"result": str(result)})

        return [*jobs, Job("cleanup", cleaning.cron, clean)]

    def _make_server(self, clock: Callable[[], float]) -> Server:
        account = next((name for name, p in self.platforms.items() if p.name == "web"), None)
        chat = self._chat_door = Chat(
            account,
            store=self.store,
            intake=self.intake,
            waiters=self.waiters,
            gate=self.gate,
            patience_s=_patience_s(self.settings),
            agents=lambda: ("default", *self.settings.ai.agents),
            pause_of=self.operation.controls.pause_of,
        )
        send = Send(
            self.store,
            self.platforms,
            max_chars=lambda: self.settings.chat.max_message_length,
            sent=self.delivery.nudge,
        )
        doors = Doors(
            self.store,
            self.settings.server,
            account=account,
            language=lambda: self.settings.chat.language,
            chat=self._chat_view,
            inside=self._inside(),
        )
        webhooks = Webhooks(
            self.platforms, self.intake, self.gate, self.metrics, clock=clock, reached=self._reached
        )
        sockets = Sockets(self.platforms, self.intake, self.gate, self.metrics, reached=self._reached)
        health = Health(self.metrics, broken=self._broken, degraded=self._degraded)
        return Server(
            self.settings.server,
            doors=doors,
            webhooks=webhooks,
            sockets=sockets,
            chat=chat,
            send=send,
            health=health,
            listening=self._process.listening,
        )

    def _inside(self) -> Inside:
        return Inside(
            settings=lambda: self.settings,
            origins=lambda: self.operation.origins,
            budgets=lambda: self.pipeline.planner.budgets,
            schedule=self.schedule,
            platforms=self.platforms,
            problems=lambda: self._broken() + self._degraded(),
            lines=self._process.lines,
            retried=self.worker.poll_now,
        )

    def _chat_view(self) -> ChatView:
        agent, settings = self.agent, self.settings
        return ChatView(
            settings.chat.command_prefix,
            images=settings.ai.enabled and agent.takes_images(),
            files=settings.ai.enabled and agent.takes_files(),
        )

    def configure(self, settings: BotSettings) -> None:
        """Go on with other settings, as far as they can hold at once (``reload.merge``)."""
        self.settings = settings
        self.access.configure(settings.access, settings.chat.admins)
        self._builtin.configure(settings.chat)
        self.pipeline.configure(settings, self.agent)
        self.pipeline.load_commands()
        self.intake.configure(settings)
        self.worker.answer_within_ms = _milliseconds(settings.chat.answer_within)
        self.gate.configure(settings.server)
        self._chat_door.patience_s = _patience_s(settings)

    # ------------------------------------------------------------------------------------------- running

    @property
    def port(self) -> int:
        """The port that is listened on, also where the configuration says 0."""
        return self._server.port

    async def start(self) -> None:
        """Listen, then open the store: while a database is away, ``/healthz`` answers and webhooks get 503.

        Raises StoreUnavailable or SchemaMismatch for what waiting cannot mend, OSError for a port in use.
        """
        await self._server.start()
        await self.operation.listen()
        await self._open_store()
        url = f"http://{self.settings.server.host}:{self.port}/"
        log.info("ready", extra={"url": url, "version": __version__})

    async def start_alone(self) -> None:
        """Open the store and answer only what this process records: no doors, no deliveries, no schedule.

        Raises StoreUnavailable or SchemaMismatch.
        """
        await asyncio.to_thread(self.store.open, self.pipeline.planner, version=__version__)
        self._store_open = True
        await self.mcp_servers.configure(self.settings.ai.mcp_servers)
        await self.plugins.start(self._bot_for)
        self.pipeline.load_commands()
        await self.worker.start(alone=True)
        await self.operation.controls.start()

    async def _open_store(self) -> None:
        planner: Any = self.pipeline.planner
        if self._reached is not None:
            planner = _Watched(planner, self._reached)
        told = False
        await self.backups.refuse_damaged()
        while True:
            try:
                await asyncio.to_thread(self.store.open, planner, version=__version__)
            except StoreUnavailable as error:
                if is_hopeless(error):
                    raise StoreUnavailable(f"{error} ({self.store.location})") from error
                if not isinstance(error.__cause__, Exception):
                    raise
                if not told:
                    log.warning("waiting for the database", extra={"reason": str(error)})
                    told = True
                await asyncio.sleep(_WAIT_FOR_STORE_S)
            else:
                break
        self._store_open = True
        log.info(
            "database ready",
            extra={
                "kind": self.store.capabilities.kind,
                "where": self.store.location,
            },
        )
        network = self.store.network_problem()
        if network is not None:
            log.warning("database on a network", extra={"reason": network})
        await self.mcp_servers.configure(self.settings.ai.mcp_servers)
        await self.plugins.start(self._bot_for)
        self.pipeline.load_commands()
        self.schedule.add(Job(f"plugin {name}", job.cron, job.run) for name, job in self.plugins.jobs())
        for platform in self.platforms.values():
            await platform.start()
        await self._insist(self.worker.start)
        await self.closing.start()
        await self.schedule.start()
        await self._insist(self.operation.start)
        self._open = True
        self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        """Read the histories that will be asked for first, and count, while messages come in already."""
        try:
            found = await self.store.warm(self.settings.ai.conversation_persistence.warm_sessions)
            # With a million conversations a second or more, from a disk that has not read them yet.
            conversations = await self.store.read(count_conversations)
        except StoreUnavailable as error:
            log.warning("sessions not warmed", extra={"reason": str(error)})
        else:
            log.info("sessions warmed", extra={"sessions": found, "conversations": conversations})

    async def _insist(self, begin: Callable[[], Awaitable[None]]) -> None:
        """Begin again until the database is there for it: it can go away also after it has been opened."""
        while True:
            try:
                await begin()
            except StoreUnavailable as error:
                log.warning("waiting for the database", extra={"reason": str(error)})
                await asyncio.sleep(_WAIT_FOR_STORE_S)
            else:
                return

    def _bot_for(self, plugin: str) -> ChatBot:
        own = self.settings.plugins.settings.get(plugin, {})
        return ChatBot(self.pipeline, self.store, self.platforms, own, name=plugin, sent=self.delivery.nudge)

    async def stop(self) -> None:
        """Stop accepting, finish or give back what runs, flush the outbox, close."""
        self.gate.draining = True
        await self._server.refuse_connections()
        if self._store_open:  # of what follows, nothing minds being stopped before it has started
            if self._open:
                self._warming.cancel()
                await asyncio.gather(self._warming, return_exceptions=True)
                await self.operation.stop()
            else:
                await self.operation.controls.stop()
            await self.schedule.stop()
            await self.backups.stop()
            await self.closing.stop()
            await self.worker.stop(GRACE_S)
            await self.delivery.stop(FLUSH_S)
            await self.pipeline.indicator.stop()
            await self.plugins.stop()
            await self.mcp_servers.stop()
            for platform in self.platforms.values():
                await platform.stop()
        await self._server.stop()
        await self.agent.close()
        if self._store_open:
            with suppress(StoreUnavailable):
                await self.store.close()
        else:
            self.store.engine.dispose()
        await self.operation.leave()
        log.info("stopped")

    async def run(
        self, *, ready: Callable[[App], None] | None = None, stopping: asyncio.Event | None = None
    ) -> None:
        """Serve until SIGTERM or SIGINT, or until ``stopping`` is set; a second signal stops at once.

        SIGHUP has the configuration read again. Under a supervisor only that decides when to stop at once.
        """
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event() if stopping is None else stopping

        def on_signal() -> None:
            if stopping.is_set() and not self._process.supervised:
                log.warning("stopped at once by a second signal")
                sys.stderr.flush()
                os._exit(1)  # nothing is tidied up: what was promised is on disk
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        loop.add_signal_handler(signal.SIGHUP, self.operation.reload_soon)
        starting = asyncio.create_task(self.start())
        waiting = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([starting, waiting], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                if ready is not None:
                    ready(self)
                await waiting
        finally:
            waiting.cancel()
            starting.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)
            await self.stop()

    # ------------------------------------------------------------------------------------------- telling

    def _finished(self, work: Work, outcome: Outcome, committed: Committed) -> None:
        """Count a message's end, tell who waits, and write its one line."""
        self.waiters.finished(work, outcome, committed)
        if outcome.change is Change.CLEAR and work.conversation and work.conversation.last_seq > PIECE:
            self.schedule.again(_REMOVE_HIDDEN)  # a long conversation's rows go in pieces
        account, now = work.message.account, self.store.now_ms()
        self.metrics.ends[account, committed.end.value] += 1
        self.metrics.count_calls(outcome.calls)
        self.metrics.answered.observe(max(0, now - work.received_at) / 1000)
        log.info(
            "message ended",
            extra={
                "inbox": work.inbox_id,
                "account": account,
                "end": committed.end.value,
                "reason": outcome.reason,
                "attempt": work.attempt,
                "ms": now - work.received_at,
            },
        )

    def _holds(self, account: str, asks_model: bool) -> bool:  # noqa: FBT001  # two words of one question
        return self.operation.controls.holds(account, asks_model)

    def _holds_part(self, part: PartToSend) -> bool:
        return self.operation.controls.holds_part(part)

    def _report(self, tx: Transaction) -> None:
        self.operation.controls.report(tx)

    def _told(self, message: InboundMessage) -> None:
        self.operation.controls.recorded(message)

    def _expired(self, ended: Counter[str]) -> None:
        for account, count in ended.items():
            self.metrics.ends[account, End.EXPIRED.value] += count

    def _gauges(self) -> dict[str, float]:
        depth, now = self.worker.depth, self.store.now_ms()
        gauges: dict[str, float] = {
            "delivered_total": self.delivery.delivered,
            "delivery_retries_total": self.delivery.retried,
            "replies_given_up_total": self.delivery.given_up,
            "messages_active": self.worker.active,
        }
        if depth is not None:
            gauges["queue_depth"] = depth.waiting
            gauges["queue_age_seconds"] = (now - depth.oldest_at) / 1000 if depth.oldest_at else 0
            gauges["outbox_depth"] = depth.unsent
            gauges["outbox_age_seconds"] = (
                (now - depth.oldest_unsent_at) / 1000 if depth.oldest_unsent_at else 0
            )
        return gauges

    def _broken(self) -> list[str]:
        if not self._open:
            return ["starting: the database is not open yet"]
        problem = self.store.problem() or self.worker.unreachable
        return ([problem] if problem else []) + self.worker.problems() + self.operation.broken()

    def _degraded(self) -> list[str]:
        found = self.gate.degraded(self.store.now_ms())
        for platform in self.platforms.values():
            found += platform.problems()
        return (
            found
            + self.circuits.problems()
            + self.mcp_servers.problems()
            + self.plugins.problems()
            + self.backups.problems()
            + self.operation.degraded()
        )


class _Watched:
    """The planner, telling that a lane has been claimed (step 4) before its work begins (step 5)."""

    def __init__(self, planner: Planner, reached: Callable[[str], None]) -> None:
        self._planner = planner
        self._reached = reached
        self.history_turns = planner.history_turns

    def tenant(self, account: str) -> str:
        return self._planner.tenant(account)

    def plan(self, *args: Any, **keywords: Any) -> Planned:
        self._reached("claimed")
        return self._planner.plan(*args, **keywords)

    def degrade(self, *args: Any, **keywords: Any) -> Planned:
        return self._planner.degrade(*args, **keywords)


def _milliseconds(length: timedelta | None) -> int | None:
    return None if length is None else int(length.total_seconds() * 1000)


def _patience_s(settings: BotSettings) -> float:
    """Return how long all calls for one answer can take."""
    return settings.ai.timeout_s * (1 + settings.ai.retries + len(settings.ai.fallback_models))


def _nothing(_step: str) -> None:
    pass
