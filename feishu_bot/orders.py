"""What an operator orders from a chat: ``/pause`` and ``/resume``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from feishu_bot.hooks import Command
from feishu_bot.texts import help_of, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from feishu_bot.hooks import Context

PAUSE: Final = "pause"
RESUME: Final = "resume"
ORDERS: Final = frozenset({PAUSE, RESUME})  # obeyed also while everything is paused
MODELS: Final = "models"
ALL: Final = "all"
_SHOWN: Final = {MODELS: "paused_models", ALL: "paused_all"}


class Orders(Protocol):
    """Where orders are put for every process."""

    def accounts(self) -> list[str]: ...
    async def pause(self, target: str, *, say: str | None, by: str) -> None: ...
    async def resume(self, target: str | None) -> int: ...


class OperatorCommands:
    """The commands of ``chat.admins``. ``prefix`` is what commands begin with now."""

    def __init__(self, orders: Callable[[], Orders], prefix: Callable[[], str]) -> None:
        self._orders = orders
        self._prefix = prefix

    def commands(self) -> Sequence[Command]:
        """Return them."""
        usage = f"[ACCOUNT|{MODELS}]"
        return (
            Command(
                PAUSE,
                self._pause,
                help_of(PAUSE),
                aliases=("暂停",),
                usage=f"{usage} [TEXT]",
                admin_only=True,
            ),
            Command(RESUME, self._resume, help_of(RESUME), aliases=("恢复",), usage=usage, admin_only=True),
        )

    async def _pause(self, context: Context, args: str) -> str:
        orders, language = self._orders(), context.language
        words = args.split(None, 1)
        target, sentence = ALL, args
        if words and words[0] in {MODELS, ALL, *orders.accounts()}:
            target, sentence = words[0], words[1] if len(words) > 1 else ""
        await orders.pause(_target(target), say=sentence or None, by=context.message.person)
        shown = say(language, _SHOWN[target]) if target in _SHOWN else target
        return say(language, "paused", target=shown, prefix=self._prefix())

    async def _resume(self, context: Context, args: str) -> str:
        orders, language = self._orders(), context.language
        if args and args not in {MODELS, ALL, *orders.accounts()}:
            targets = "|".join([*orders.accounts(), MODELS])
            return say(language, "resume_usage", command=self._prefix() + RESUME, targets=targets)
        ended = await orders.resume(_target(args) if args else None)
        return say(language, "resumed" if ended else "not_paused")


def _target(word: str) -> str:
    """Return what the record calls it: accounts have a mark, for one of them may be named ``all``."""
    return word if word in _SHOWN else f"account:{word}"
