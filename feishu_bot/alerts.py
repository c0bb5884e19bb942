"""Tells the operator that something is wrong: through an account's outbox, or a Feishu custom bot.

Every process looks once a minute. A row of the database decides who tells: each kind at most once an hour to each
receiver, over all processes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.errors import DeliveryError, StoreUnavailable
from feishu_bot.model import make_key
from feishu_bot.platforms.custom_bot import CustomBot
from feishu_bot.push import chat_target, push_rows
from feishu_bot.store import controls, jobs, outbox, trouble
from feishu_bot.store.work import Charge
from feishu_bot.texts import dollars, say
from feishu_bot.windows import window_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from feishu_bot.config import AlertSettings, BotSettings
    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.leases import Depth
    from feishu_bot.store.store import Store
    from feishu_bot.store.trouble import Window
    from feishu_bot.store.work import Transaction

log = logging.getLogger(__name__)

LOOK_S: Final = 60.0
EVERY_MS: Final = 3_600_000  # between two alerts of one kind to one receiver
WARN_AT: Final = 0.8  # of a budget


@dataclass(frozen=True, slots=True)
class Local:
    """What this process knows without asking the database."""

    depth: Callable[[], Depth | None]
    free_mb: Callable[[], float | None]
    backup_problems: Callable[[], list[str]]
    is_paused: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Trouble:
    """One thing to tell. ``windows``: budget windows that are told of once only."""

    kind: str
    values: Mapping[str, object]
    windows: Sequence[Window] = field(default=())


class Alerts:
    """The alerts of one process. ``sent`` is told of the lane that has a new part."""

    def __init__(
        self,
        settings: BotSettings,
        store: Store,
        platforms: Mapping[str, Platform],
        *,
        local: Local,
        sent: Callable[[str], None],
        host: str | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._platforms = platforms
        self._local = local
        self._sent = sent
        self._host = host or socket.gethostname()
        self._bots: dict[str, CustomBot] = {}
        self._loop: asyncio.Task[None] | None = None

    def configure(self, settings: BotSettings) -> None:
        """Go on with other settings."""
        self._settings = settings

    async def start(self) -> None:
        """Look from now on."""
        self._loop = asyncio.create_task(self._run(), name="alerts")

    async def stop(self) -> None:
        """Stop looking."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        for bot in self._bots.values():
            await bot.close()

    def problems(self) -> list[str]:
        """Return why this part of the server is dead, if it is."""
        return ["alerts loop ended"] if self._loop is not None and self._loop.done() else []

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except StoreUnavailable as error:
                log.warning("alerts not looked for", extra={"reason": str(error)})

    async def look(self) -> None:
        """Tell each receiver what is wrong and was not told within the hour. Raises StoreUnavailable."""
        if not self._settings.alerts:
            return
        backups = self._local.backup_problems()
        for alert in self._settings.alerts:
            found = await self._store.read(partial(self._look_for, alert=alert, backups=backups))
            for trouble_found in found:
                await self._tell(alert, trouble_found)

    # ------------------------------------------------------------------------------------------- looking

    def _look_for(self, tx: Transaction, *, alert: AlertSettings, backups: list[str]) -> list[_Trouble]:
        found = [
            self._dead(tx),
            self._budgets(tx),
            self._backup(tx, backups),
            self._queue(tx),
            self._disk(),
            self._tokens(tx, alert.tokens),
            self._conversations(tx, alert.conversations),
        ]
        return [item for item in found if item is not None and item.kind in alert.on]

    def _dead(self, tx: Transaction) -> _Trouble | None:
        messages, parts = trouble.given_up_since(tx, tx.now_ms - EVERY_MS)
        return _Trouble("dead", {"messages": messages, "parts": parts}) if messages or parts else None

    def _budgets(self, tx: Transaction) -> _Trouble | None:
        zone = self._settings.schedule.zone
        limits = {}
        for budget in self._settings.budgets:
            start, _ = window_bounds(budget.window, tx.now_ms, zone)
            limits[budget.name] = Charge(
                budget.name,
                "",
                start,
                budget.limit_tokens,
                None,
                limit_requests=budget.limit_requests,
                limit_micro_usd=budget.limit_micro_usd,
            )
        shares = [(limits[b.name], b.warn_at or WARN_AT) for b in self._settings.budgets]
        windows = trouble.full_windows(tx, shares)
        if not windows:
            return None
        shown = "\n".join(f"{w.budget} {w.key}: {_shown(w, limits[w.budget])}" for w in windows)
        return _Trouble("budget", {"windows": shown}, windows)

    @staticmethod
    def _backup(tx: Transaction, problems: list[str]) -> _Trouble | None:
        run = jobs.last_runs(tx).get("backup")
        if run is not None and run.error and (run.finished_at or 0) > tx.now_ms - EVERY_MS:
            problems = [*problems, run.error]
        return _Trouble("backup", {"reason": "; ".join(problems)}) if problems else None

    def _queue(self, tx: Transaction) -> _Trouble | None:
        depth = self._local.depth()
        if depth is None or depth.oldest_at is None or self._local.is_paused():
            return None
        age_s = (tx.now_ms - depth.oldest_at) // 1000
        if age_s <= self._settings.server.max_waiting_age_s:
            return None
        return _Trouble("queue", {"waiting": depth.waiting, "seconds": age_s})

    def _disk(self) -> _Trouble | None:
        free = self._local.free_mb()
        if free is None or free >= self._settings.server.min_free_mb:
            return None
        return _Trouble("disk", {"free": int(free), "least": self._settings.server.min_free_mb})

    def _tokens(self, tx: Transaction, most: int | None) -> _Trouble | None:
        if most is None:
            return None
        start, _ = window_bounds("day", tx.now_ms, self._settings.schedule.zone)
        used = trouble.tokens_since(tx, start)
        return _Trouble("tokens", {"used": used, "most": most}) if used > most else None

    @staticmethod
    def _conversations(tx: Transaction, most: int | None) -> _Trouble | None:
        if most is None:
            return None
        count = trouble.count_conversations(tx)
        return _Trouble("conversations", {"count": count, "most": most}) if count > most else None

    # ------------------------------------------------------------------------------------------- telling

    async def _tell(self, alert: AlertSettings, found: _Trouble) -> None:
        name = make_key(found.kind, alert.to, alert.chat or "")
        text = say(self._settings.chat.language, f"alert_{found.kind}", host=self._host, **found.values)
        by_bot = "/" in alert.to
        rows = [] if by_bot else self._rows(alert, text, f"{name}:{self._store.now_ms()}")

        def claim(tx: Transaction) -> bool:
            """Claim the hour; what goes through the outbox is put there in the same transaction."""
            if not controls.claim_turn(tx, "alert", name, EVERY_MS):
                return False
            if found.windows and not _first(tx, name, found.windows):
                controls.give_turn_back(tx, "alert", name)
                return False
            outbox.push(tx, rows)
            return True

        if not await self._store.run(claim):
            return
        log.warning("alert", extra={"kind": found.kind, **found.values})
        if not by_bot:
            self._sent(rows[0]["lane_key"])
            return
        try:
            await self._bot(alert).send(text)
        except DeliveryError as error:
            log.warning("alert not delivered", extra={"kind": found.kind, "reason": error.reason})
            await self._store.run(lambda tx: _take_back(tx, name, found.windows))

    def _rows(self, alert: AlertSettings, text: str, source: str) -> list[dict[str, Any]]:
        return push_rows(
            alert.to,
            self._platforms[alert.to],
            source=make_key("alert", source),
            target=chat_target(alert.chat or ""),
            text=text,
            max_chars=self._settings.chat.max_message_length,
        )

    def _bot(self, alert: AlertSettings) -> CustomBot:
        bot = self._bots.get(alert.to)
        if bot is None:
            secret = None if alert.secret is None else alert.secret.get_secret_value()
            bot = self._bots[alert.to] = CustomBot(alert.to, secret, network=self._settings.network)
        return bot


def _shown(window: Window, charge: Charge) -> str:
    """Return what is used of each limit, e.g. ``800/1000, $1.5/$2``."""
    return ", ".join(
        f"{dollars(window.used[n])}/{dollars(limit)}" if unit == "cost" else f"{window.used[n]}/{limit}"
        for unit, n, limit in charge.limits(window.granted)
    )


def _warned(name: str, window: Window) -> str:
    return make_key(name, window.name)


def _first(tx: Transaction, name: str, windows: Sequence[Window]) -> bool:
    """Say whether one of these windows was never told of; all of them are told of now."""
    return bool(controls.first_warnings(tx, [_warned(name, window) for window in windows]))


def _take_back(tx: Transaction, name: str, windows: Sequence[Window]) -> None:
    controls.give_turn_back(tx, "alert", name)
    for window in windows:
        controls.give_turn_back(tx, "warned", _warned(name, window))
