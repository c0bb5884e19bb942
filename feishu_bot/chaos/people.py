"""The messages of a run: numbered, signed as the platforms sign, and repeated until they are acknowledged."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from feishu_bot.testing import qq
from feishu_bot.testing.feishu import sign_and_encrypt, text_event

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from feishu_bot.chaos.scenario import Scenario

APP_SECRET: Final = "app-secret-of-the-chaos"  # noqa: S105  # of a fake
ENCRYPT_KEY: Final = "encrypt-key-of-the-chaos"
SPENDER: Final = "spender"  # begins the names of those whose budget is soon used up

_TIMEOUT_S: Final = 3.0  # after which a platform repeats an event
_PAUSE_S: Final = (0.1, 0.8)  # before it does
_OK: Final = 200
_TEXT: Final = re.compile(r"message (\d+) of chat (\d+)\b")


@dataclass(frozen=True, slots=True)
class Chat:
    """One person in one chat: a conversation of its own. Every fourth is on QQ, every third in a group."""

    number: int

    @property
    def platform(self) -> str:
        return "qq" if self.number % 4 == 3 else "feishu"  # noqa: PLR2004  # see above

    @property
    def in_group(self) -> bool:
        return self.number % 3 == 1

    @property
    def user(self) -> str:
        """The person's id."""
        if self.platform == "qq":
            return f"{0xC0FFEE00 + self.number:032X}"
        return f"ou_{SPENDER if self.number % 8 == 4 else 'user'}{self.number}"  # noqa: PLR2004  # some of them

    def message_id(self, number: int) -> str:
        return f"{'ROBOT1.0' if self.platform == 'qq' else 'om'}_{self.number}_{number}"

    def request(self, number: int) -> tuple[Mapping[str, str], bytes]:
        """Return headers and body of a message, signed now."""
        text, message_id = f"message {number} of chat {self.number}", self.message_id(number)
        ids: dict[str, Any] = {"message_id": message_id, "event_id": f"evt_{self.number}_{number}"}
        if self.platform == "qq":
            if self.in_group:
                event = qq.group_event(text, member=self.user, group=f"{self.number // 8:032X}", **ids)
            else:
                event = qq.private_event(text, user=self.user, **ids)
            return qq.signed_event(event, secret=APP_SECRET)
        if self.in_group:
            said = text_event(
                text,
                open_id=self.user,
                chat_id=f"oc_group{self.number // 8}",
                chat_type="group",
                mention_bot=True,
                **ids,
            )
        else:
            said = text_event(text, open_id=self.user, chat_id=f"oc_{self.number}", **ids)
        return sign_and_encrypt(said, encrypt_key=ENCRYPT_KEY)


def number_of(text: str) -> tuple[int, int] | None:
    """Return chat and number of the message that a text quotes."""
    found = _TEXT.search(text)
    return None if found is None else (int(found[2]), int(found[1]))


@dataclass(slots=True)
class Sent:
    """A message that was sent. Instants are seconds since the start; None: not (yet) acknowledged."""

    chat: Chat
    number: int
    first_at: float
    acked_at: float | None = None
    acked_on: float | None = None  # the wall clock then
    took_s: float = 0.0  # of the request that was acknowledged
    posts: int = 0

    @property
    def message_id(self) -> str:
        return self.chat.message_id(self.number)


@dataclass(slots=True)
class People:
    """All who write. ``urls`` are the servers' doors, taken at random, as a load balancer without a memory does."""

    scenario: Scenario
    urls: Sequence[str]
    sent: dict[tuple[int, int], Sent] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)  # 0: no answer
    repeated: int = 0  # sent again although it had been acknowledged
    reordered: int = 0  # sent after the next one, or beside it
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _http: aiohttp.ClientSession | None = None
    _left: int = 0

    async def talk(self) -> None:
        """Send messages until the time is over or all are sent, and go on until each is acknowledged."""
        self._left = self.scenario.messages if self.scenario.messages is not None else 10**9
        # A connection of its own for each request, so that a process that sleeps keeps none of them.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._http:
            asyncio.get_running_loop().call_later(self._time_s, self.over.set)
            await asyncio.gather(*(self._chat(Chat(n)) for n in range(self.scenario.chats)))
            self.over.set()
            while self._tasks:
                await asyncio.gather(*self._tasks)

    @property
    def _time_s(self) -> float:
        return self.scenario.seconds if self.scenario.messages is None else 86_400.0

    @property
    def acknowledged(self) -> int:
        """How many messages have been acknowledged so far."""
        return sum(1 for sent in self.sent.values() if sent.acked_at is not None)

    async def _chat(self, chat: Chat) -> None:
        chance = random.Random(f"{self.scenario.seed}/{chat.number}")  # noqa: S311  # habits, no secrets
        pause_s = self.scenario.chats / self.scenario.rate
        number = 0
        while await self._wait(chance.expovariate(1 / pause_s)):
            habit = chance.random()
            pair = habit < 0.2  # noqa: PLR2004  # one of five times
            fresh = [self._new(chat, number + n) for n in range(1 + pair) if self._take()]
            number += len(fresh)
            if not fresh:
                return
            if len(fresh) > 1:
                self.reordered += 1
            if habit < 0.1:  # noqa: PLR2004  # the second overtakes the first
                for sent in reversed(fresh):
                    await self._deliver(sent, chance)
            elif habit < 0.3:  # noqa: PLR2004  # both at once, or the same one twice
                copies = [*fresh, *fresh] if not pair else fresh
                self.repeated += len(copies) - len(fresh)
                await asyncio.gather(*(self._deliver(sent, chance) for sent in copies))
            else:
                await self._deliver(fresh[0], chance)
            if chance.random() < 0.1:  # noqa: PLR2004  # and once more, later
                self._later(self._repeat(fresh[0], chance, chance.uniform(0.0, 8.0)))

    def _take(self) -> bool:
        self._left -= 1
        return self._left >= 0

    async def _wait(self, seconds: float) -> bool:
        """Wait; False when no more is to be sent."""
        if self._left <= 0:
            return False
        try:
            await asyncio.wait_for(self.over.wait(), seconds)
        except TimeoutError:
            return True
        return False

    def _new(self, chat: Chat, number: int) -> Sent:
        return self.sent.setdefault((chat.number, number), Sent(chat, number, float("inf")))

    def _later(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _repeat(self, sent: Sent, chance: random.Random, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.repeated += 1
        await self._deliver(sent, chance)

    async def _deliver(self, sent: Sent, chance: random.Random) -> None:
        """Post a message until it is acknowledged."""
        sent.first_at = min(sent.first_at, time.monotonic())
        while True:
            started = time.monotonic()
            status = await self._post(chance.choice(self.urls), sent)
            self.statuses[status] += 1
            sent.posts += 1
            if status == _OK:
                break
            await asyncio.sleep(chance.uniform(*_PAUSE_S))
        if sent.acked_at is None:
            sent.acked_at, sent.acked_on = time.monotonic(), time.time()
            sent.took_s = sent.acked_at - started

    async def _post(self, url: str, sent: Sent) -> int:
        headers, body = sent.chat.request(sent.number)
        if self._http is None:
            raise AssertionError("messages are sent by talk()")
        try:
            async with self._http.post(
                f"{url}/webhook/{sent.chat.platform}", data=body, headers=headers
            ) as response:
                await response.read()
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0
