"""What an operator types, and the workers that he looks after."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.bots import Bot, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.e2e.bots import Bots


@dataclass
class Operator:
    """Runs commands beside the servers of a test."""

    bots: Bots
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def workers(self, config: Mapping[str, Any], count: int) -> Bot:
        """Start a server with several workers and return when all of them serve."""
        bot = self.bots.launch({**config, "server": {**config["server"], "workers": count}})
        await until(lambda: bot.lines("workers ready") or bot.exit_code is not None, "the workers")
        assert bot.exit_code is None, bot.log.read_text()
        bot.url = bot.lines("workers ready")[0]["url"].rstrip("/")
        return bot

    @property
    def config(self) -> Path:
        """The configuration of the server that was started last."""
        return self.bots.folder / f"config-{len(self.bots.started) - 1}.yaml"

    async def types(self, *words: str, config: Path | None = None) -> tuple[int, str]:
        """Return exit code and output of a command."""
        log = self.bots.folder / f"command-{next(self._numbers)}"
        arguments = [words[0], "--config", str(config or self.config), *words[1:]]
        command = Bot(self.bots.nursery.start("bot", arguments, self.bots.folder, log), log)
        code = await command.ended()
        return code, log.read_text()

    async def status(self) -> dict[str, Any]:
        """Return what ``status --json`` prints."""
        code, text = await self.types("status", "--json")
        assert code == 0, text
        found: dict[str, Any] = json.loads(text)
        return found


def pids(bot: Bot) -> dict[int, int]:
    """Return the workers that run, by their numbers."""
    found = {}
    for child in Path(f"/proc/{bot.pid}/task/{bot.pid}/children").read_text().split():
        command = Path(f"/proc/{child}/stat")
        if command.exists():
            found[int(child)] = int(child)
    return dict(enumerate(sorted(found)))


def served_by(bot: Bot, client_port: int) -> int:
    """Return the pid of the worker that serves a client's connection."""
    remote = f":{client_port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{line[9]}]" for line in lines if line[2].endswith(remote)}
    for pid in pids(bot).values():
        if any(str(fd.readlink()) in inodes for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()):
            return pid
    raise AssertionError("no worker serves it")
