"""Steps 8 and 9: parts leave the outbox, in the order of their lane, again and again until an end is certain."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import orjson

from feishu_bot.errors import NotConnected, RetryLater, StoreUnavailable, Undeliverable
from feishu_bot.model import Outgoing, make_key
from feishu_bot.pace import Pace
from feishu_bot.parts import CALL, read_part, read_stream
from feishu_bot.store.refusals import refuses
from feishu_bot.store.waiting import NOT_CONNECTED, hasten, left_by_others, waiting_parts
from feishu_bot.store.work import Lease, PartToSend, SendResult, SendStep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from feishu_bot.platforms.base import Platform
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction

log = logging.getLogger(__name__)

GIVE_UP_MS: Final = 24 * 3600 * 1000  # after so long of "later" a reply is dead
ASIDE_AFTER: Final = 10  # attempts after which a reply that alone fails no longer holds its lane
MAX_PAUSE_S: Final = 900.0
HELD_MS: Final = 60_000  # after so long a part that is to wait is looked at again
PER_ACCOUNT: Final = 64  # calls to one platform account at once
_HASTENED: Final = 500  # lanes of one transaction
_AGAIN_S: Final = 0.5  # between two looks for what may go at once
_PAUSE_S: Final = 0.5  # before the store is asked again after it could not be used


class Delivery:
    """Sends what the outbox holds. One part of a lane at a time; lanes beside each other."""

    def __init__(
        self,
        store: Store,
        platforms: Mapping[str, Platform],
        *,
        keep_texts: bool = True,
        sharers: Callable[[], int] = lambda: 1,
        holds: Callable[[PartToSend], bool] = lambda _part: False,
        reached: Callable[[str], None] = lambda _step: None,
    ) -> None:
        self._store = store
        self._platforms = platforms
        self._keep_texts = keep_texts
        self._sharers = sharers
        self._holds = holds  # whether an operator wants a part to wait
        self._reached = reached  # told of each step; tests stop the process there
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._handed: dict[str, PartToSend] = {}
        self._hastening: set[asyncio.Task[None]] = set()
        self._limits = {account: asyncio.Semaphore(PER_ACCOUNT) for account in platforms}
        self._paces = {a: _paces(platform, sharers) for a, platform in platforms.items() if not platform.pull}
        self._last_success: dict[str, int] = {}  # chat -> ms, to tell a bad reply from a bad platform
        self._stopping = False
        self.delivered = 0
        self.retried = 0
        self.given_up = 0

    @property
    def lanes(self) -> list[str]:
        """The lanes being sent for."""
        return list(self._tasks)

    def take(self, part: PartToSend) -> None:
        """Send a part that is marked as attempting under our lease, then what follows in its lane."""
        lane = part.lease.lane_key
        if lane in self._tasks:  # it is looking at the lane just now, and finds it held by this part's lease
            self._handed[lane] = part
            return
        self._tasks[lane] = asyncio.create_task(self._run(lane, part))

    def nudge(self, lane_key: str) -> None:
        """Say that a lane may have a part to send."""
        if lane_key in self._tasks:
            self._again.add(lane_key)
        elif not self._stopping:
            self._tasks[lane_key] = asyncio.create_task(self._run(lane_key, None))

    def hasten(self, account: str) -> None:
        """Send now what waits for another attempt: there is a new way to the platform."""
        if not self._stopping:
            task = asyncio.create_task(self._hasten(account))
            self._hastening.add(task)
            task.add_done_callback(self._hastening.discard)

    async def _hasten(self, account: str) -> None:
        try:
            # Once more for what was being tried in vain, and not yet put back, when the way opened.
            for pause_s in (0.0, _AGAIN_S):
                await asyncio.sleep(pause_s)
                found = await self._store.read(lambda tx: waiting_parts(tx, account))
                for start in range(0, len(found), _HASTENED):
                    keys = found[start : start + _HASTENED]
                    await self._store.run(partial(hasten, account=account, lane_keys=keys))
                    for lane in keys:
                        self.nudge(lane)
        except StoreUnavailable as error:
            log.warning("store unavailable", extra={"step": "hasten", "reason": str(error)})

    async def gather(self) -> None:
        """Send what other processes could not, having no client of the platform. Raises StoreUnavailable."""
        if self._stopping or self._sharers() < 2:  # noqa: PLR2004  # this process and another
            return
        for account, platform in self._platforms.items():
            if not platform.has_socket:
                continue
            left = await self._store.read(partial(left_by_others, account=account, most=_HASTENED))
            keys = sorted({lane for lane, payload in left if platform.reaches(read_part(payload)[0])})
            if keys:
                await self._store.run(partial(hasten, account=account, lane_keys=keys))
                for lane in keys:
                    self.nudge(lane)

    async def stop(self, grace_s: float) -> None:
        """Finish what is being sent, for at most ``grace_s`` seconds."""
        self._stopping = True
        tasks = [*self._tasks.values(), *self._hastening]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, lane: str, part: PartToSend | None) -> None:
        """Send a lane's parts until there is none that may go now. One of the edges that catch everything."""
        try:
            lease = part.lease if part is not None else self._lease(lane)
            step = SendStep(lease)
            if part is None:
                found = await self._step(step)
                part = found if isinstance(found, PartToSend) else None
            while part is not None:
                result = await self._send(part)
                self._reached("sent")
                found = await self._step(SendStep(part.lease, result))
                part = found if isinstance(found, PartToSend) else None
                if result.state == "pending":
                    self._look_later(lane, result.not_before)
        except Exception:
            log.exception("delivery failed", extra={"lane": lane})
        finally:
            del self._tasks[lane]
            handed = self._handed.pop(lane, None)
            if handed is not None and not self._stopping:
                self.take(handed)
            elif lane in self._again:
                self._again.discard(lane)
                self.nudge(lane)

    def _lease(self, lane: str) -> Lease:
        return Lease(lane, str(self._store.owner), secrets.token_hex(8))

    async def _step(self, step: SendStep) -> PartToSend | object:
        """Record a result and take the next part; the result is not forgotten while the store is away."""
        while True:
            try:
                return await self._store.send_step(step)
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "delivered", "reason": str(error)})
                if step.result is None:
                    return None
                await asyncio.sleep(_PAUSE_S)

    def _look_later(self, lane: str, not_before: int) -> None:
        pause_s = max(0.0, (not_before - self._store.now_ms()) / 1000)
        if pause_s < 1.0 and not self._stopping:  # longer ones are found by looking at the database
            asyncio.get_running_loop().call_later(pause_s + 0.002, self.nudge, lane)

    # ----------------------------------------------------------------------------------------- one part

    async def _send(self, part: PartToSend) -> SendResult:
        now = self._store.now_ms()
        platform = self._platforms.get(part.account)
        if platform is None:
            return self._later(part, RetryLater(f"account {part.account} is not configured"), "")
        if self._holds(part):
            # Whoever resumes has it go at once; looking again is for an order that was not heard of.
            return SendResult(
                part.id, "pending", error="paused", not_before=now + HELD_MS, attempts=part.attempts - 1
            )
        outgoing = self._outgoing(part, platform, now)
        if outgoing.possibly_repeated and not platform.settings.resend_unknown:
            self.given_up += 1
            reason = "it may have arrived (resend_unknown: false)"
            return self._ended(part, "dead", reason, outcome_unknown=True)
        chat = make_key(part.account, outgoing.target.chat_id or outgoing.target.sender_id)
        await self._await_turn(part.account, chat)
        now = self._store.now_ms()
        if part.reply_before is not None and now > part.reply_before:
            self.given_up += 1
            return self._ended(part, "expired", "the platform's reply window has closed")
        try:
            async with self._limits[part.account]:
                await self._mind_refusals(outgoing)
                sent_id = await _hand_over(outgoing, platform)
        except Undeliverable as error:
            self.given_up += 1
            log.warning("reply refused", extra={"part": f"out-{part.id}", "reason": error.reason})
            return self._ended(part, "expired" if error.expired else "refused", error.reason)
        except RetryLater as error:
            return self._later(part, error, chat)
        except Exception as error:
            # A fault of the platform's own file: what reached the platform is not known.
            log.exception("platform failed", extra={"part": f"out-{part.id}", "account": part.account})
            return self._later(part, RetryLater(type(error).__name__, outcome_unknown=True), chat)
        self.delivered += 1
        self._last_success[chat] = now
        if len(self._last_success) > 10_000:  # noqa: PLR2004  # a bound on memory, nothing depends on it
            self._last_success.clear()
        return SendResult(part.id, "sent", sent_id=sent_id, erase=not self._keep_texts)

    async def _await_turn(self, account: str, chat: str) -> None:
        """Keep below what the platform allows to one chat, and of the whole account."""
        to_chat, by_account = self._paces.get(account, (None, None))
        if to_chat is not None:  # first: what waits here does not use up the account's
            await to_chat.wait(chat)
        if by_account is not None:
            await by_account.wait()

    async def _mind_refusals(self, outgoing: Outgoing) -> None:
        """Raise Undeliverable for a message that answers nobody, to a chat that has refused those."""
        if outgoing.target.reply_to is not None or outgoing.kind == CALL:
            return
        try:
            unwelcome = await self._store.read(partial(_unwelcome, outgoing=outgoing))
        except StoreUnavailable as error:
            raise RetryLater(str(error)) from None
        if unwelcome:
            raise Undeliverable("this chat takes nothing but answers any more")

    def _ended(
        self,
        part: PartToSend,
        state: Literal["refused", "dead", "expired"],
        reason: str,
        *,
        outcome_unknown: bool = False,
    ) -> SendResult:
        return SendResult(
            part.id, state, error=reason, outcome_unknown=outcome_unknown, erase=not self._keep_texts
        )

    def _outgoing(self, part: PartToSend, platform: Platform, now: int) -> Outgoing:
        target, text = read_part(part.payload)
        horizon = platform.idempotent_for_s
        repeated = (
            part.unknown_at is not None
            and horizon is not None
            and now - part.first_attempt_at > horizon * 1000
        )
        return Outgoing(
            account=part.account,
            source=part.source,
            kind=part.kind,
            part=part.part,
            target=target,
            text=text,
            attempts=part.attempts,
            possibly_repeated=repeated,
            unknown_since_ms=part.unknown_at,
            stream=read_stream(part.payload),
        )

    def _later(self, part: PartToSend, error: RetryLater, chat: str) -> SendResult:
        now = self._store.now_ms()
        if now - part.first_attempt_at > GIVE_UP_MS:
            self.given_up += 1
            log.warning("reply given up", extra={"part": f"out-{part.id}", "reason": error.reason})
            return self._ended(part, "dead", error.reason, outcome_unknown=error.outcome_unknown)
        self.retried += 1
        pause_s = min(MAX_PAUSE_S, 0.25 * 2 ** min(part.attempts, 16)) * random.uniform(0.8, 1.2)  # noqa: S311  # jitter
        if error.after_s is not None:
            pause_s = max(error.after_s, 0.05) * random.uniform(1.0, 1.1)  # noqa: S311  # jitter
        alone = self._last_success.get(chat, 0) > part.first_attempt_at
        log.info(
            "reply postponed",
            extra={"part": f"out-{part.id}", "reason": error.reason, "seconds": round(pause_s, 2)},
        )
        return SendResult(
            part.id,
            "pending",
            error=NOT_CONNECTED if isinstance(error, NotConnected) else error.reason,
            not_before=now + int(pause_s * 1000),
            outcome_unknown=error.outcome_unknown,
            aside=alone and part.attempts >= ASIDE_AFTER and not part.lease.lane_key.startswith("aside:"),
        )


def _unwelcome(tx: Transaction, outgoing: Outgoing) -> bool:
    """Say whether a message that answers nobody is not wanted where it goes."""
    return refuses(tx, outgoing.account, outgoing.target.chat_id or outgoing.target.sender_id)


async def _hand_over(outgoing: Outgoing, platform: Platform) -> str | None:
    """Send a part, or make the call that it is."""
    if outgoing.kind != CALL:
        return await platform.send(outgoing)
    if not platform.takes_calls:
        raise Undeliverable("this account takes no calls any more")
    call = orjson.loads(outgoing.text)
    self_id = outgoing.target.extra.get("self_id") or ""
    await platform.call(call["action"], call["params"], self_id=self_id)
    return None


def _paces(platform: Platform, sharers: Callable[[], int]) -> tuple[Pace | None, Pace | None]:
    """Return the paces to one chat and of the whole account."""
    to_chat, in_all = platform.settings.messages_per_chat_per_s, platform.settings.messages_per_s
    return (
        None if to_chat is None else Pace(to_chat, 1.0, sharers=sharers),
        None if in_all is None else Pace(in_all, 1.0, sharers=sharers),
    )
