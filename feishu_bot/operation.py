"""What an operator sees and orders of one server process: orders, reports, alerts, other workers, a new configuration."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from feishu_bot import log as logs
from feishu_bot.ai.agent import Agent
from feishu_bot.ai.mcp_servers import check_servers
from feishu_bot.ai.models import make_model
from feishu_bot.ai.tokens import warm
from feishu_bot.alerts import Alerts, Local
from feishu_bot.controls import Controls
from feishu_bot.errors import ConfigError
from feishu_bot.peers import SILENT_S
from feishu_bot.reload import changes, is_live, merge
from feishu_bot.store.notices import Notices
from feishu_bot.store.work import LEASE_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from socket import socket

    from feishu_bot.ai.circuit import Circuits
    from feishu_bot.app import App
    from feishu_bot.config import BotSettings, Loaded
    from feishu_bot.log import RecentErrors, RecentLines
    from feishu_bot.peers import Peers

log = logging.getLogger(__name__)

_SHOWN_ERRORS: Final = 3
_LAST_CALLS_S: Final = (
    30.0  # beyond the time-outs of its calls, until an agent is closed that another replaced
)


@dataclass(frozen=True, slots=True)
class Process:
    """What a server process is given by whoever has started it.

    ``listening`` gives the sockets of a port that workers share, ``peers`` are those workers; ``supervised`` is true
    where a parent decides when to stop at once, ``replaces`` the owner of leases that this worker has replaced.
    ``reread`` reads the configuration again and raises ConfigError; ``origins`` tell where each value came from.
    ``errors`` and ``lines`` are what this process has logged lately.
    ``lease_ms``: how long a lane is held without being renewed; shorter ones are for tests.
    """

    reread: Callable[[], Loaded] | None = None
    errors: RecentErrors | None = None
    lines: RecentLines | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    peers: Peers | None = None
    listening: Callable[[], Sequence[socket]] | None = None
    supervised: bool = False
    replaces: str | None = None
    lease_ms: int = LEASE_MS


class Operation:
    """Built with the parts of an app, started after its store and stopped before anything else."""

    def __init__(self, app: App, process: Process) -> None:
        self._app = app
        self._process = process
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._replaced: list[Agent] = []
        self.origins = process.origins
        self.controls = Controls(
            app.store,
            worker=app.worker,
            delivery=app.delivery,
            gate=app.gate,
            platforms=app.platforms,
            chat=lambda: app.settings.chat,
            reload=self.reload,
            is_order=app.pipeline.planner.is_order,
            words=self._words,
            stop=app.waiters.stop,
        )
        self.alerts = Alerts(
            app.settings,
            app.store,
            app.platforms,
            local=Local(
                depth=lambda: app.worker.depth,
                free_mb=app.gate.free_mb,
                backup_problems=app.backups.problems,
                is_paused=lambda: bool(self.controls.pauses),
            ),
            sent=app.delivery.nudge,
        )
        self._notices = Notices(app.store.engine, self._heard)

    async def listen(self) -> None:
        """Tell the other workers from now on what this one counts."""
        if self._process.peers is not None:
            await self._process.peers.start(self._app.metrics.counts)

    async def start(self) -> None:
        """Follow orders, look for trouble. Raises StoreUnavailable."""
        await self.controls.start(replaces=self._process.replaces)
        await self.alerts.start()
        self._app.store.gives_away = lambda: self._app.worker.is_full and self.controls.servers > 1
        self._notices.start()

    async def stop(self) -> None:
        """Follow no more orders."""
        await self._notices.stop()
        await self.alerts.stop()
        await self.controls.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def leave(self) -> None:
        """Close what is left, and tell the other workers for the last time what was counted."""
        for agent in self._replaced:
            await agent.close()
        if self._process.peers is not None:
            await self._process.peers.stop()

    def broken(self) -> list[str]:
        """Return what makes this machine unfit to serve: loops that ended, workers that are not heard of."""
        return self.controls.problems() + self.alerts.problems() + self._silent_workers()

    def degraded(self) -> list[str]:
        """Return the orders in force that keep answers back."""
        return self.controls.degraded()

    def _silent_workers(self) -> list[str]:
        if self._process.peers is None:
            return []
        return [
            f"worker {slot} has not been heard of for {age:.0f} s"
            for slot, age in self._process.peers.ages().items()
            if age > SILENT_S
        ]

    def _words(self) -> dict[str, Any]:
        errors, peers = self._process.errors, self._process.peers
        return {
            "port": self._app.port,
            "worker": None if peers is None else peers.slot,
            "errors": [] if errors is None else errors.last()[-_SHOWN_ERRORS:],
        }

    def _heard(self) -> None:
        if not self._app.worker.is_full:
            self._app.worker.poll_now()

    # --------------------------------------------------------------------------------------------- reload

    def reload_soon(self) -> None:
        """Read the configuration again (SIGHUP)."""

        async def reload() -> None:
            await self.reload()

        task = asyncio.get_running_loop().create_task(reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again and go on with what can hold at once; a bad one changes nothing.

        Returns ``mistakes``, what was ``applied`` and what needs a ``restart``.
        """
        if self._process.reread is None:
            return {"mistakes": ["this server was started without a configuration file"]}
        async with self._reloading:
            try:
                loaded = await asyncio.to_thread(self._process.reread)
                return await self._go_on_with(loaded)
            except ConfigError as error:
                log.error("configuration refused", extra={"reason": "; ".join(error.mistakes)})  # noqa: TRY400  # no fault of ours
                return {"mistakes": error.mistakes}

    async def _go_on_with(self, loaded: Loaded) -> dict[str, Any]:
        app = self._app
        settings = merge(app.settings, loaded.settings)
        found = list(changes(app.settings, loaded.settings))
        applied = [path for path in found if is_live(path)]
        restart = [path for path in found if not is_live(path)]
        if any(path.startswith(("ai.", "budget")) for path in applied):
            # Loading a model's encoding takes a while.
            agent = await asyncio.to_thread(make_agent, settings, app.circuits)
            self._close_later(app.agent)
            app.agent = agent
        if any(path.startswith("ai.mcp_servers") for path in applied):
            await app.mcp_servers.configure(settings.ai.mcp_servers)
        app.configure(settings)
        self.origins = dict(self.origins) | {
            path: origin for path, origin in loaded.origins.items() if is_live(path)
        }
        self.alerts.configure(settings)
        if self._process.errors is not None:
            logs.configure(settings.logging, secrets=loaded.secret_values())
        log.info(
            "configuration reloaded", extra={"applied": ", ".join(applied), "restart": ", ".join(restart)}
        )
        return {"applied": applied, "restart": restart}

    def _close_later(self, agent: Agent) -> None:
        self._replaced.append(agent)
        ai = self._app.settings.ai
        pause_s = ai.timeout_s * (1 + ai.retries + len(ai.fallback_models)) + _LAST_CALLS_S

        async def close() -> None:
            await asyncio.sleep(pause_s)
            self._replaced.remove(agent)
            await agent.close()

        task = asyncio.get_running_loop().create_task(close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def make_agent(settings: BotSettings, circuits: Circuits) -> Agent:
    """Return the agent of a configuration, for its models and those that budgets degrade to. Raises ConfigError."""
    cheaper = [budget.degrade_to for budget in settings.budgets if budget.degrade_to is not None]
    mistakes = check_servers(settings.ai.mcp_servers)
    if mistakes:
        raise ConfigError(mistakes)
    model = make_model(settings.ai, network=settings.network)
    for name in cheaper:
        model.open(name)
        warm(name)
    return Agent(settings.ai, model=model, budget_margin=settings.budget_margin, circuits=circuits)
