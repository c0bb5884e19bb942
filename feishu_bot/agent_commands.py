"""The chat commands that choose who answers in a conversation, ``/agent /persona /model``, and ``/why``."""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from feishu_bot.hooks import Answering, Command, Reply
from feishu_bot.store.threads import last_answer
from feishu_bot.texts import help_of, say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from feishu_bot.hooks import Context
    from feishu_bot.store.store import Store

Kind = Literal["agent", "persona", "model"]

# What people type for "as configured" and for "which are there", unless something is called so.
_OFF: Final = frozenset({"off", "reset", "none", "default", "关闭", "重置", "默认"})
_LIST: Final = frozenset({"", "list", "show", "列表"})
_SHOWN: Final = 60  # characters of a name that was typed


class AgentCommands:
    """Each shows what there is to choose from and what is chosen, or chooses for this conversation.

    Where several people share a conversation only administrators choose. ``prefix`` returns what commands begin with.
    """

    def __init__(self, prefix: Callable[[], str], store: Store) -> None:
        self._prefix = prefix
        self._store = store

    def commands(self) -> Sequence[Command]:
        """Return them, in the order of ``/help``."""
        return (
            Command(
                "agent", partial(self._run, "agent"), help_of("agent"), aliases=("助手",), usage="[NAME]"
            ),
            Command(
                "persona",
                partial(self._run, "persona"),
                help_of("persona"),
                aliases=("人格",),
                usage="[NAME|off]",
            ),
            Command(
                "model", partial(self._run, "model"), help_of("model"), aliases=("模型",), usage="[NAME]"
            ),
            Command("why", self._why, help_of("why"), aliases=("为什么",)),
        )

    async def _run(self, kind: Kind, context: Context, args: str) -> Reply:
        language, now = context.language, context.answering or Answering()
        known, current = _choices(kind, now)
        word = args.removeprefix("set ").strip()
        if word not in known and word.casefold() in _LIST:
            return Reply(self._listed(kind, context, known, current))
        if now.is_shared and not context.is_admin:
            return Reply(say(language, "choice_shared"))
        if word not in known and word.casefold() in _OFF:
            return Reply(say(language, f"{kind}_reset"), change=kind)
        found = _find(word, known)
        if found is None:
            near = get_close_matches(word, known, n=1)
            command = f"{self._prefix()}{kind}"
            hint = say(language, "nearest", command=f"{command} {near[0]}") if near else ""
            shown = word if len(word) <= _SHOWN else word[: _SHOWN - 1] + "…"
            return Reply(say(language, f"{kind}_unknown", name=shown, nearest=hint, command=command))
        return Reply(say(language, f"{kind}_chosen", name=found), change=kind, detail=found)

    async def _why(self, context: Context, args: str) -> str:
        """Tell what went into the last answer: numbers only, so that nothing of another chat can show."""
        language = context.language
        if args:
            return say(language, "command_no_arguments", command=f"{self._prefix()}why")
        conversation = context.conversation
        stored = None
        if conversation is not None:
            stored = await self._store.read(lambda tx: last_answer(tx, conversation.id))
        noted: dict[str, Any] = orjson.loads(stored) if stored else {}
        sent = noted.get("context")
        if not isinstance(sent, dict):
            return say(language, "why_none")
        first = sent.get("first_seq")
        lines = [
            say(
                language,
                "why",
                model=noted.get("model", ""),
                tokens=sent["input_tokens"],
                calls=sent["calls"],
            ),
            say(language, "why_history", count=sent["messages"], first=first)
            if first
            else say(language, "why_alone"),
        ]
        if sent.get("summary"):
            lines.append(say(language, "why_summary"))
        if sent.get("tools"):
            lines.append(say(language, "why_tools", tools=", ".join(sent["tools"])))
        return "\n".join(lines)

    def _listed(self, kind: Kind, context: Context, known: Mapping[str, str], current: str | None) -> str:
        language = context.language
        if not known:
            return say(language, f"{kind}_none")
        lines = [say(language, f"{kind}_title")]
        for name, text in known.items():
            mark = say(language, "choice_current") if name == current else ""
            lines.append(say(language, "choice_line", name=name, text=f": {text}" if text else "", mark=mark))
        return "\n".join([*lines, say(language, f"{kind}_usage", command=f"{self._prefix()}{kind}")])


def _choices(kind: Kind, now: Answering) -> tuple[Mapping[str, str], str | None]:
    """Return what can be chosen, with descriptions, and what is."""
    if kind == "agent":
        return now.agents, now.agent
    if kind == "persona":
        return dict.fromkeys(now.personas, ""), now.persona
    return dict.fromkeys(now.models, ""), now.model


def _find(word: str, known: Mapping[str, str]) -> str | None:
    """Return what was meant: by its name in any case, or by the end of a model's name if only one has it."""
    if word in known:
        return word
    folded = word.casefold()
    same = [name for name in known if name.casefold() == folded]
    same = same or [name for name in known if name.casefold().partition(":")[2] == folded]
    return same[0] if len(same) == 1 else None
