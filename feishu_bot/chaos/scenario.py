"""What a run is: how many of what, for how long, and which accidents when. All of it follows from the seed."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from feishu_bot.testing.outside import MODEL_TROUBLES, PLATFORM_TROUBLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What can happen. Those of a kind that a database does not know are left out there.
KILL: Final = "kill"  # a worker ends by SIGKILL
MACHINE: Final = "machine"  # a whole group of processes does, at one instant
STOP: Final = "stop"  # a worker sleeps (SIGSTOP) for longer than its lease, and goes on
STALL: Final = "stall"  # a worker sleeps for less than a second
RESTART: Final = "restart"  # the database server ends and starts again
FREEZE: Final = "freeze"  # the database server hangs, as with a slow disk
LOCK: Final = "lock"  # somebody else holds the database's locks
CUT: Final = "cut"  # the connections of a group to the database break
AWAY: Final = "away"  # and no new one is taken for a while
PLATFORM: Final = "platform"  # Feishu or QQ is in trouble
MODEL: Final = "model"  # the model is

KILLS: Final = (KILL, KILL, KILL, MACHINE)
EVERYTHING: Final = (
    *(KILL, KILL, MACHINE, STOP, STALL),
    *(RESTART, FREEZE, LOCK, CUT, AWAY),
    *(PLATFORM, PLATFORM, MODEL, MODEL),
)
WORDS: Final = {
    KILL: "workers killed",
    MACHINE: "groups of processes killed at once",
    STOP: "workers stopped for longer than a lease",
    STALL: "workers stopped for a moment",
    RESTART: "database restarts",
    FREEZE: "database frozen",
    LOCK: "database locked by another writer",
    CUT: "connections to the database cut",
    AWAY: "database out of reach",
    PLATFORM: "platform outages",
    MODEL: "model outages",
}
_FIRST_S: Final = 0.5  # after the first message


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run. Messages are sent for ``seconds``, or until there are ``messages`` of them.

    ``rate`` is in messages per second over all chats, ``gap_s`` the mean time between two accidents. ``groups`` of
    ``workers`` processes each serve one database; ``apart`` puts each group into namespaces of its own, as on a
    machine of its own. ``faults`` are kinds of accidents, or one with its detail (``platform feishu lost``, ``model slow``). ``command`` starts a server when ``run --config FILE`` is added to it.
    """

    seed: int
    seconds: float = 60.0
    messages: int | None = None
    chats: int = 20
    rate: float = 15.0
    groups: int = 1
    workers: int = 4
    apart: bool = False
    lease_s: float = 15.0
    faults: Sequence[str] = KILLS
    gap_s: float = 1.2
    settle_s: float = 180.0
    command: Sequence[str] = (sys.executable, "-m", "feishu_bot")

    @property
    def expected_s(self) -> float:
        """How long messages are sent, about."""
        return self.seconds if self.messages is None else self.messages / self.rate


@dataclass(frozen=True, slots=True)
class Fault:
    """An accident: ``at`` seconds after the first message, for ``length_s``.

    ``victim`` (0 to 1) chooses who is hit among those who are there then; ``detail`` says how.
    """

    at: float
    kind: str
    victim: float
    length_s: float = 0.0
    detail: str = ""


def plan(scenario: Scenario, possible: frozenset[str]) -> list[Fault]:
    """Return the accidents of a run in their order; each kind comes about as often as the scenario names it."""
    chance = random.Random(scenario.seed)  # noqa: S311  # accidents, no secrets
    kinds = [fault for fault in scenario.faults if fault.partition(" ")[0] in possible]
    if not kinds:
        return []
    faults: list[Fault] = []
    at = _FIRST_S
    for kind in _shuffled(kinds, chance):
        at += chance.expovariate(1 / scenario.gap_s) if faults else 0.0
        if at >= scenario.expected_s:
            return faults
        faults.append(_fault(at, kind, scenario, chance))
    raise AssertionError("the kinds never end")


def _shuffled(kinds: list[str], chance: random.Random) -> Iterator[str]:
    for _ in itertools.count():
        yield from chance.sample(kinds, len(kinds))


def _fault(at: float, name: str, scenario: Scenario, chance: random.Random) -> Fault:
    victim = chance.random()
    kind, _, wanted = name.partition(" ")
    match kind:
        case "stop":
            # Others look for lanes each second: so long until one has taken over what it held.
            return Fault(at, kind, victim, scenario.lease_s + chance.uniform(1.5, 4.0))
        case "stall":
            return Fault(at, kind, victim, chance.uniform(0.05, 0.8))
        case "restart":
            return Fault(at, kind, victim, chance.uniform(0.0, 2.0), chance.choice(("at once", "orderly")))
        case "platform":
            detail = f"{chance.choice(('feishu', 'qq'))} {chance.choice(PLATFORM_TROUBLES)}"
            return Fault(at, kind, victim, chance.uniform(0.5, 4.0), wanted or detail)
        case "model":
            trouble = chance.choice(MODEL_TROUBLES)
            return Fault(at, kind, victim, chance.uniform(0.3, 1.5), f"model {wanted or trouble}")
        case "freeze" | "lock" | "away":
            return Fault(at, kind, victim, chance.uniform(0.2, 3.0))
        case _:
            return Fault(at, kind, victim)
