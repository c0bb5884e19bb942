"""The tools that models may call: which there are, which an agent is offered, and the running of them."""

from __future__ import annotations

import asyncio
import logging
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feishu_bot.ai.chat_model import ToolCall, ToolSpec
    from feishu_bot.hooks import Context

log = logging.getLogger(__name__)

MAX_AT_ONCE: Final = 16  # of the calls of one answer; the others are told so
MAX_RESULT_CHARS: Final = 20_000  # of what one tool says
_REMEMBERED: Final = 64  # choices


class ToolSource(Protocol):
    """Something that has tools. ``tools`` gives the same object as long as nothing has changed."""

    def tools(self) -> tuple[ToolSpec, ...]: ...

    async def run_tool(self, context: Context, call: ToolCall) -> str:
        """Return what the tool says, or in words why it did not work. Raises nothing."""


class Toolbox:
    """The tools of all sources; where two have one name, the first source's holds."""

    def __init__(self, sources: Sequence[ToolSource]) -> None:
        self._sources = tuple(sources)
        self._seen: tuple[tuple[ToolSpec, ...], ...] = ()
        self._chosen: dict[tuple[str, ...], tuple[ToolSpec, ...]] = {}

    def choose(self, patterns: tuple[str, ...]) -> tuple[ToolSpec, ...]:
        """Return the tools whose names fit one of ``patterns``: the same object for the same tools."""
        seen = tuple([source.tools() for source in self._sources])
        if len(seen) != len(self._seen) or any(
            new is not old for new, old in zip(seen, self._seen, strict=True)
        ):
            self._chosen = {}
            self._seen = seen
        chosen = self._chosen
        found = chosen.get(patterns)
        if found is None:
            if len(chosen) >= _REMEMBERED:
                chosen.clear()
            by_name = {spec.name: spec for specs in reversed(seen) for spec in reversed(specs)}
            names = [name for name in by_name if any(fnmatchcase(name, p) for p in patterns)]
            found = chosen[patterns] = tuple([by_name[name] for name in sorted(names)])
        return found

    async def run(
        self, context: Context, offered: Sequence[ToolSpec], calls: Sequence[ToolCall]
    ) -> list[str]:
        """Run what was called, all at once, and return what each says in the order of the calls.

        A tool that was not offered, that fails or says too much is words for the model, never an error.
        """
        names = {spec.name for spec in offered}
        tasks = [self._run_one(context, names, call, number) for number, call in enumerate(calls)]
        return list(await asyncio.gather(*tasks))

    async def _run_one(self, context: Context, names: set[str], call: ToolCall, number: int) -> str:
        if call.name not in names:
            return f"There is no tool {call.name[:64]!r}. There are: {', '.join(sorted(names))}."
        if number >= MAX_AT_ONCE:
            return f"Not run: at most {MAX_AT_ONCE} tools are run at once."
        source = next((s for s in self._sources if any(t.name == call.name for t in s.tools())), None)
        if source is None:
            return f"The tool {call.name} is not there any more."
        said = await source.run_tool(context, call)
        log.info("tool called", extra={"tool": call.name, "characters": len(said)})
        if len(said) > MAX_RESULT_CHARS:
            return f"{said[:MAX_RESULT_CHARS]}\n[cut: {len(said) - MAX_RESULT_CHARS} characters more]"
        return said or "(nothing)"
