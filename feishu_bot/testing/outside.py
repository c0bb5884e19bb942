"""All that is outside a server, in one process: fakes of Feishu, QQ and a model, each of which can be in trouble.

Orders come on stdin and answers leave on stdout, one JSON object a line; the process ends with its stdin.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final, Literal, cast

import orjson

from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.model import Behaviour, FakeModelServer
from feishu_bot.testing.qq import FakeQQ
from feishu_bot.testing.serving import Failure

Trouble = Literal["refuse", "503", "500", "lost", "cut", "slow", "mute", "429", "broken", "hang"]

# What each can be in: refuse takes no connection, lost does what it is asked and cuts the connection before it says
# so, mute says so only when nobody listens any more.
PLATFORM_TROUBLES: Final[tuple[Trouble, ...]] = ("refuse", "503", "500", "lost", "cut", "slow", "mute")
MODEL_TROUBLES: Final[tuple[Trouble, ...]] = ("refuse", "503", "500", "429", "cut", "broken", "hang", "slow")

_UNTIL_CALMED: Final = 100_000
_PLATFORM: Final[dict[str, Failure]] = {
    "503": Failure(status=503, raw=b"down"),
    "500": Failure(status=500, raw=b"internal error"),
    "lost": Failure(drop="after"),
    "cut": Failure(drop="before"),
    "slow": Failure(delay_s=1.5),
    "mute": Failure(delay_s=22.0),  # more than a call of ours may take
}
_MODEL: Final[dict[str, Behaviour]] = {
    "503": Behaviour("status", status=503, retry_after="2"),
    "500": Behaviour("status", status=500),
    "429": Behaviour("status", status=429, retry_after="2"),
    "cut": Behaviour("drop"),
    "broken": Behaviour("broken"),
    "hang": Behaviour("hang"),
    "slow": Behaviour(delay_s=2.5),
}


class Outside:
    """The fakes. ``delay_s``: how long the model takes when it is well."""

    def __init__(self, *, app_secret: str, delay_s: float) -> None:
        self._calm = Behaviour(delay_s=delay_s)
        self.feishu = FakeFeishu(app_secret=app_secret)
        self.qq = FakeQQ(app_secret=app_secret)
        self.model = FakeModelServer(default=self._calm)

    async def start(self) -> dict[str, str]:
        """Listen; return where."""
        await self.feishu.start()
        await self.qq.start()
        await self.model.start()
        return {"feishu": self.feishu.url, "qq": self.qq.url, "model": self.model.base_url}

    async def stop(self) -> None:
        """Close every connection."""
        await self.feishu.stop()
        await self.qq.stop()
        await self.model.stop()

    async def trouble(self, who: str, kind: str) -> None:
        """Bring one of them into trouble, until it is calmed."""
        if who == "model":
            if kind == "refuse":
                await self.model.stop()
            else:
                self.model.default = _MODEL[kind]
            return
        fake = self._platform(who)
        if kind == "refuse":
            await fake.stop()
        else:
            fake.fail(_PLATFORM[kind], times=_UNTIL_CALMED)

    async def calm(self, who: str, kind: str) -> None:
        """End its trouble."""
        if who == "model":
            if kind in {"refuse", "hang"}:  # what hangs is cut
                await self.model.stop()
                await self.model.start()
            self.model.default = self._calm
            return
        fake = self._platform(who)
        fake.recover()
        if kind == "refuse":
            await fake.start(port=int(fake.url.rpartition(":")[2]))

    def _platform(self, who: str) -> FakeFeishu | FakeQQ:
        return self.feishu if who == "feishu" else self.qq

    def seen(self) -> dict[str, Any]:
        """Return what the members of the chats see, in order, and what the model would bill."""
        return {
            "feishu": [(m.reply_to, m.text, m.at) for m in self.feishu.visible],
            "qq": [(m.msg_id, m.text, m.at) for m in self.qq.visible],
            "folded": self.feishu.folded + self.qq.folded,
            "calls": self.model.count,
            "tokens": self.model.tokens,
        }

    async def obey(self, order: dict[str, str]) -> dict[str, Any]:
        """Carry out one order and return the answer to it."""
        match order["do"]:
            case "trouble":
                await self.trouble(order["who"], order["kind"])
            case "calm":
                await self.calm(order["who"], order["kind"])
            case "seen":
                return self.seen()
            case other:
                raise ValueError(other)
        return {}


async def _run(app_secret: str, delay_s: float) -> None:
    outside = Outside(app_secret=app_secret, delay_s=delay_s)
    _say(await outside.start())
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        _say(await outside.obey(cast("dict[str, str]", orjson.loads(line))))
    await outside.stop()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], float(sys.argv[2])))
