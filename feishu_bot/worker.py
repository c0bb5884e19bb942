"""Steps 4 to 7 in this process: lanes are taken, their oldest message is answered, the outcome is committed.

The database is the truth about what is to be done; ``nudge`` only says "look now", so that a message recorded by
this process does not wait for the next look.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from feishu_bot.errors import LeaseLost, StoreError, StoreUnavailable
from feishu_bot.log import bind
from feishu_bot.model import End
from feishu_bot.planner import MAX_ATTEMPTS
from feishu_bot.store import cleanup, leases
from feishu_bot.store.work import Lease, NoWork, Outcome, Work
from feishu_bot.turns import Turns

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from feishu_bot.delivery import Delivery
    from feishu_bot.live import Live
    from feishu_bot.pipeline import Pipeline
    from feishu_bot.store.leases import Depth
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Committed, Transaction

log = logging.getLogger(__name__)

MAX_ACTIVE: Final = 1000  # messages of this process that are being answered at once
MAX_PER_CHAT: Final = 100  # of these, of one group
MAX_PER_CLAIM: Final = 200  # lanes taken by one transaction
MAX_LOOKED_AT: Final = 20_000  # lanes that one look at the database may bring
POLL_S: Final = 1.0  # how often the database is asked for lanes nobody works on
SWEEP_S: Final = 30.0  # how often messages that are too old are ended
FETCH_MS: Final = 300_000  # how long an answer is kept for its asker where texts are not kept
_PAUSE_S: Final = 0.5  # before the store is asked again after it could not be used
_RETRY_MS: Final = (1000, 3000, 10_000, 30_000)  # pauses after an attempt that broke


class Worker:
    """Works on lanes until it is stopped.

    ``finished`` is told of every committed message, ``expired`` how many were too old to answer, by account.
    """

    def __init__(
        self,
        store: Store,
        pipeline: Pipeline,
        delivery: Delivery,
        *,
        finished: Callable[[Work, Outcome, Committed], None],
        expired: Callable[[Counter[str]], None],
        on_text: Callable[[Work], Live | None],
        answer_within_ms: int | None,
        report: Callable[[Transaction], None] = lambda _tx: None,
        keep_texts: bool = True,
        reached: Callable[[str], None] = lambda _step: None,
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._delivery = delivery
        self._finished = finished
        self._expired = expired
        self._on_text = on_text
        self.answer_within_ms = answer_within_ms
        self._report = report  # written with every renewal of the leases
        self._keep_texts = keep_texts
        self._erased_until = 0  # answers that were fetched, or not, before this instant hold no text
        self._reached = reached  # told of each step; tests stop the process there
        self._ready = Turns(MAX_PER_CHAT)
        self._active: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._wake = asyncio.Event()
        self._look = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._looks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._leaving = False
        self.depth: Depth | None = None
        self.unreachable: str | None = None  # why the database could not be asked the last time

    async def start(self, *, alone: bool = False) -> None:
        """Begin to work. What an earlier process left on this machine is taken over at once.

        ``alone``: on nothing but the lanes that it is nudged for.
        """
        if not alone:
            await self._sweep()
        loops = {"claim": self._claim(), "renew": self._renew()}
        if not alone:
            loops["poll"] = self._poll()
        self._loops = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]

    async def stop(self, grace_s: float) -> None:
        """Take no new work; let what runs finish for ``grace_s`` seconds, then give it back unfinished."""
        self._stopping = True
        self._wake.set()
        try:
            async with asyncio.timeout(grace_s):
                if self._loops:
                    await asyncio.wait(self._loops[:1])  # lanes that are being taken are ours to answer
                while self._active:
                    await asyncio.wait(list(self._active.values()))
        except TimeoutError:
            log.warning("answers given back", extra={"messages": len(self._active)})
        tasks = (*self._active.values(), *self._loops, *self._looks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def nudge(self, lane_key: str) -> None:
        """Say that a lane has something new."""
        if lane_key in self._active:
            self._again.add(lane_key)
        elif self._ready.add(lane_key):
            self._wake.set()

    def drop(self, lane_key: str, inbox_id: int) -> None:
        """Stop working on a message whose answer nobody wants any more; what comes behind it does not wait."""
        task = self._active.get(lane_key)
        if task is not None and task.get_name() == _task_name(inbox_id):
            self._again.add(lane_key)
            task.cancel()

    def poll_now(self) -> None:
        """Ask the database at once what is to be done: another process has something to give away."""
        self._look.set()

    @property
    def leaving(self) -> bool:
        """Whether what is not begun yet is left to other processes."""
        return self._leaving

    @leaving.setter
    def leaving(self, leaving: bool) -> None:
        self._leaving = leaving
        self._wake.set()

    @property
    def is_full(self) -> bool:
        """Whether a message recorded by this process would have to wait here."""
        return self._leaving or self._stopping or len(self._active) >= MAX_ACTIVE

    def look_now(self) -> None:
        """Have every waiting lane looked at again (a platform has learned its own id)."""
        task = asyncio.ensure_future(self._look_now())
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def ready(self) -> int:
        """How many lanes wait here for their turn."""
        return len(self._ready)

    def problems(self) -> list[str]:
        """Return the loops of this worker that have died; there are none unless something is very wrong."""
        if self._stopping:
            return []
        return [f"{t.get_name()} loop ended" for t in self._loops[:3] if t.done()]

    # -------------------------------------------------------------------------------------------- loops

    async def _claim(self) -> None:
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            while self._ready and not self._stopping and not self._leaving:
                room = MAX_ACTIVE - len(self._active)
                if room <= 0:
                    break  # a task that ends wakes us
                await self._begin(self._ready.take(min(room, MAX_PER_CLAIM)))

    async def _begin(self, lanes: list[str]) -> None:
        """Begin the oldest message of lanes that were taken for their turn."""
        owner, token = str(self._store.owner), secrets.token_hex(8)
        held = [Lease(lane, owner, token) for lane in lanes]
        again = False
        while True:
            try:
                results = await self._store.begin(held, again=again)
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "begin", "reason": str(error)})
                if self._stopping:
                    self._ready.done(lanes)
                    return
                # Again with the same token: if they were taken all the same, they are still ours.
                again = True
                await asyncio.sleep(_PAUSE_S)
            except Exception:
                log.exception("messages cannot be begun", extra={"lanes": len(lanes)})
                await self._stumbled(lanes)
                return
            else:
                break
        for lane, result in zip(lanes, results, strict=True):
            if isinstance(result, Work):
                self._reached("begun")
                self._active[lane] = asyncio.create_task(self._run(result), name=_task_name(result.inbox_id))
                continue
            self._ready.done((lane,))
            # Busy with us: what came while its message was being begun is next.
            if result is NoWork.AGAIN or (result is NoWork.BUSY and lane in self._active):
                self.nudge(lane)

    async def _stumbled(self, lanes: list[str]) -> None:
        """Find the lane whose message cannot be begun, so that it holds up no other."""
        if len(lanes) > 1:
            for each in lanes:
                await self._begin([each])
            return
        (lane,) = lanes
        self._ready.done(lanes)
        stumble = partial(
            cleanup.stumble,
            lane_key=lane,
            pause_ms=_RETRY_MS[0],
            most=MAX_ATTEMPTS,
            reason="cannot be begun",
            shard=self._store.shard,
        )
        try:
            await self._store.run(stumble)
        except StoreError as unavailable:
            log.warning("store unavailable", extra={"step": "begin", "reason": str(unavailable)})

    async def _poll(self) -> None:
        while True:
            # Beyond the lanes that wait here for their turn already, which come again at every look.
            most = min(MAX_LOOKED_AT, MAX_ACTIVE + len(self._ready) + len(self._active))
            self._look.clear()
            try:
                ready, to_send = await self._store.read(partial(leases.ready_lanes, most=most))
                self.depth = await self._store.read(leases.depth)
                if not self._leaving:
                    await self._delivery.gather()
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "poll", "reason": str(error)})
                self.unreachable = str(error)
            else:
                self.unreachable = None
                if not self._leaving:
                    for lane in ready:
                        if lane not in self._active:
                            self.nudge(lane)
                    for lane in to_send:
                        self._delivery.nudge(lane)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), POLL_S)

    async def _renew(self) -> None:
        next_sweep = time.monotonic() + SWEEP_S
        while True:
            await asyncio.sleep(self._store.lease_ms / 3000)
            try:
                await self.renew_now()
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + SWEEP_S
                    await self._sweep()
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "renew", "reason": str(error)})

    async def renew_now(self) -> None:
        """Renew the leases and put down this process's report at once. Raises StoreUnavailable."""
        owner, working, sending = self._store.owner, list(self._active), self._delivery.lanes

        def renew(tx: Transaction) -> list[str]:
            leases.renew(tx, str(owner), working, sending)
            self._report(tx)
            return leases.take_over(tx, owner.host)

        gone = await self._store.run(renew)
        if gone:
            log.warning("work of ended processes taken over", extra={"processes": len(gone)})
            await self._pipeline.take_over_signs()

    async def _sweep(self) -> None:
        """End what is too old to answer, with one note per chat; take back signs that nobody else will."""
        await self._pipeline.take_over_signs()
        if not self._keep_texts:
            await self._erase()
        age = self.answer_within_ms
        if age is None:
            return
        expire = partial(
            cleanup.expire,
            older_than_ms=age,
            note=self._pipeline.expired_note,
            shard=self._store.shard,
            erase=not self._keep_texts,
        )
        while ended := await self._store.run(expire):
            log.warning("messages too old to answer ended", extra={"messages": ended.total()})
            self._expired(ended)

    async def _erase(self) -> None:
        """Erase the texts of answers whose askers have had the time to fetch them."""
        since, until = self._erased_until, self._store.now_ms() - FETCH_MS
        await self._store.run(partial(cleanup.erase_sent, since=since, until=until))
        self._erased_until = until

    async def _look_now(self) -> None:
        with suppress(StoreUnavailable):
            for lane in await self._store.read(leases.waiting_lanes):
                self.nudge(lane)

    # ------------------------------------------------------------------------------------- one message

    async def _run(self, work: Work) -> None:
        """Answer one message and commit what that means. The edge that keeps a lane's bad luck to itself."""
        lane = work.lease.lane_key
        more = work.more
        try:
            with bind(account=work.message.account, lane=lane, inbox=work.inbox_id):
                outcome = await self._pipeline.answer(work, self._on_text(work))
                self._reached("answered")
                outcome, committed = await self._commit(outcome)
                self._reached("committed")
                self._finished(work, outcome, committed)
                if committed.sending is not None:
                    self._delivery.take(committed.sending)
                elif outcome.parts:
                    self._delivery.nudge(lane)
        except LeaseLost as error:
            log.warning("work dropped", extra={"inbox": work.inbox_id, "reason": str(error)})
        except asyncio.CancelledError:
            await self._give_back(work, 0)
            raise
        except StoreUnavailable as error:  # a further call could not be reserved
            log.warning("store unavailable", extra={"step": "answer", "reason": str(error)})
            await self._give_back(work, _RETRY_MS[min(work.attempt, len(_RETRY_MS)) - 1])
            more = False
        except Exception:
            log.exception("attempt failed", extra={"inbox": work.inbox_id, "attempt": work.attempt})
            await self._give_back(work, _RETRY_MS[min(work.attempt, len(_RETRY_MS)) - 1])
            more = False
        finally:
            del self._active[lane]
            self._ready.done((lane,))
            if (more or lane in self._again) and not self._stopping:
                self._again.discard(lane)
                self.nudge(lane)
            else:
                self._again.discard(lane)
            if self._ready:
                self._wake.set()

    async def _commit(self, outcome: Outcome) -> tuple[Outcome, Committed]:
        """Commit, and go on trying while the store is away: the answer has been paid for.

        What the store refuses as it is, is committed without its texts: it would refuse them each time.
        """
        while True:
            try:
                return outcome, await self._store.commit(outcome)
            except StoreUnavailable as error:
                log.warning("store unavailable", extra={"step": "commit", "reason": str(error)})
                await asyncio.sleep(_PAUSE_S)
            except StoreError as error:
                if not outcome.messages and outcome.end is End.DEAD:
                    raise
                log.error("answer refused by the store", extra={"reason": str(error)})  # noqa: TRY400  # no fault of ours
                outcome = self._pipeline.unstorable(outcome, "the database refuses the answer")

    async def _give_back(self, work: Work, pause_ms: int) -> None:
        try:
            await self._store.run(lambda tx: leases.give_back(tx, work.lease, tx.now_ms + pause_ms))
        except StoreUnavailable:
            log.debug("lease left to end by itself", extra={"inbox": work.inbox_id})


def _task_name(inbox_id: int) -> str:
    return f"in-{inbox_id}"
