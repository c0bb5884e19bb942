"""Chat commands: telling them from messages, finding them by name, and the five that are built in."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from feishu_bot.hooks import COMMAND_NAME, Command, Reply
from feishu_bot.model import spans_chats
from feishu_bot.texts import amount, help_of, one_line, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from feishu_bot.config.settings import ChatSettings
    from feishu_bot.hooks import Bot, BudgetView, Context, StoredMessage

RETRY: Final = "retry"  # becomes the question it repeats
HISTORY_TURNS = 5  # of /history without a number
MAX_HISTORY_TURNS = 20
SHOWN_CHARACTERS = 100  # of each message in /history

_FULL_WIDTH: Final = {
    code: code + 0xFEE0 for code in range(0x21, 0x7F)
}  # "/" -> "／", as Chinese keyboards type it


@dataclass(frozen=True, slots=True)
class ParsedCommand:
    """What was typed: ``name`` in lower case without prefix, ``args`` as they stand, without blanks around."""

    name: str
    args: str


class CommandTable:
    """The commands of the server by what people type. ``commands`` holds them in the order of ``/help``.

    Raises ValueError when two commands have one name: none may take another's place unseen.
    """

    def __init__(self, prefix: str, language: str, commands: Sequence[Command]) -> None:
        self.prefix = prefix
        self.language = language
        self.commands = tuple(commands)
        self._prefixes = (prefix, prefix.translate(_FULL_WIDTH))
        self._by_name: dict[str, Command] = {}
        for command in self.commands:
            for name in command.names:
                other = self._by_name.setdefault(name, command)
                if other is not command:
                    raise ValueError(f"the command {name!r} is both {other.name!r} and {command.name!r}")

    def parse(self, text: str) -> ParsedCommand | None:
        """Return the command that ``text`` is, known or not; None if it is something said to the bot.

        A command is the prefix with a name right behind it. ``/help@bot`` is ``/help``. What could be no name is
        no command: the prefix alone, ``//``, and paths such as ``/usr/bin/env``.
        """
        text = text.strip()
        if not text.startswith(self._prefixes):
            return None
        words = text[len(self.prefix) :].split(None, 1)
        if not words or text[len(self.prefix)].isspace():
            return None
        name = words[0].partition("@")[0]
        if COMMAND_NAME.fullmatch(name) is None:
            return None
        return ParsedCommand(name.casefold(), words[1] if len(words) > 1 else "")

    def find(self, name: str) -> Command | None:
        """Return the command with this name or alias, in whatever case."""
        return self._by_name.get(name.casefold())

    def nearest(self, name: str, *, is_admin: bool = False) -> str | None:
        """Return the name or alias that was probably meant, among the commands that the speaker may use."""
        return _nearest(name, [c for c in self.commands if is_admin or not c.admin_only])


def _nearest(name: str, commands: Sequence[Command]) -> str | None:
    known = [known for command in commands for known in command.names]
    # Of two Chinese characters one is half of the name.
    found = get_close_matches(name.casefold(), known, n=1, cutoff=0.6 if name.isascii() else 0.5)
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------ built in


class BuiltinCommands:
    """``/help``, ``/new``, ``/clear``, ``/history`` and ``/usage``, given to the server as a plugin gives its own.

    ``more`` are commands that stand behind them.
    """

    def __init__(self, chat: ChatSettings, more: Sequence[Command] = ()) -> None:
        self._more = more
        self.configure(chat)

    def configure(self, chat: ChatSettings) -> None:
        """Go on with other settings."""
        self._chat = chat
        self._prefix = chat.command_prefix

    async def commands(self, bot: Bot) -> Sequence[Command]:  # noqa: ARG002  # the signature is the hook's
        return (
            Command("help", self._help, help_of("help"), aliases=("帮助",), usage="[NAME]"),
            Command("new", self._new, help_of("new"), aliases=("新对话", "reset")),
            Command("clear", self._clear, help_of("clear"), aliases=("清空",)),
            Command("history", self._history, help_of("history"), aliases=("历史",), usage="[N]"),
            Command("usage", self._usage, help_of("usage"), aliases=("用量",)),
            *self._more,
        )

    # ---------------------------------------------------------------------------------------------- help

    async def _help(self, context: Context, args: str) -> str:
        language = context.language
        visible = [c for c in context.commands if context.is_admin or not c.admin_only]
        if args:
            return self._help_of(args, visible, language)
        return "\n".join(
            [
                say(language, "help_title"),
                *(self._line(command, language) for command in visible),
                "",
                say(language, self._in_groups()),
            ]
        )

    def _in_groups(self) -> str:
        if not self._chat.enable_in_groups:
            return "help_groups_off"
        return "help_groups_mention" if self._chat.require_at_in_groups else "help_groups_all"

    def _help_of(self, args: str, visible: Sequence[Command], language: str) -> str:
        name = args.removeprefix(self._prefix)
        for command in visible:
            if name.casefold() in command.names:
                return self._line(command, language)
        nearest = _nearest(name, visible)
        hint = say(language, "nearest", command=self._prefix + nearest) if nearest else ""
        shown = one_line(self._prefix + name, SHOWN_CHARACTERS)
        return say(language, "help_unknown", command=shown, nearest=hint, prefix=self._prefix)

    def _line(self, command: Command, language: str) -> str:
        shown = self._prefix + command.name
        if command.usage:
            shown += " " + command.usage
        # The built-in aliases are Chinese: of no use to those who read English.
        aliases = [a for a in command.aliases if language == "zh" or a.isascii()]
        if aliases:
            listed = "、" if language == "zh" else ", "
            shown += say(language, "help_alias", aliases=listed.join(self._prefix + a for a in aliases))
        text = command.help.get(language) or next(iter(command.help.values()), "")
        return say(language, "help_line", command=shown, help=text) if text else shown

    # -------------------------------------------------------------------------------------- conversation

    async def _new(self, context: Context, args: str) -> Reply:
        if args:
            return Reply(self._no_arguments(context, "new"))
        return Reply(say(context.language, "new"), change="archive" if context.conversation else None)

    async def _clear(self, context: Context, args: str) -> Reply:
        language = context.language
        if args:
            return Reply(self._no_arguments(context, "clear"))
        if context.conversation is None:
            return Reply(say(language, "clear", count=0))
        if spans_chats(context.message, context.scope):
            return Reply(say(language, "clear_spans", prefix=self._prefix))
        return Reply(say(language, "clear", count=context.conversation.message_count), change="clear")

    async def _history(self, context: Context, args: str) -> str:
        language = context.language
        most = int(args) if args.isdecimal() and len(args) < 4 else 0  # noqa: PLR2004  # 999 is too many already
        if not args:
            most = HISTORY_TURNS
        if not 1 <= most <= MAX_HISTORY_TURNS:
            return say(language, "history_usage", command=self._prefix + "history", most=MAX_HISTORY_TURNS)
        if spans_chats(context.message, context.scope):
            return say(language, "history_spans")
        turns = list(_turns(context.history))[-most:]
        if not turns:
            return say(language, "history_empty")
        lines = [say(language, "history_title", turns=len(turns))]
        for number, turn in enumerate(turns, start=1):
            for message in turn:
                if message.role in {"user", "assistant"} and message.content.strip():
                    text = one_line(message.content, SHOWN_CHARACTERS)
                    who = message.speaker or say(language, "history_you")
                    lines.append(say(language, f"history_{message.role}", number=number, who=who, text=text))
        return "\n".join(lines)

    def _no_arguments(self, context: Context, name: str) -> str:
        return say(context.language, "command_no_arguments", command=self._prefix + name)

    # --------------------------------------------------------------------------------------------- usage

    async def _usage(self, context: Context, args: str) -> str:
        if args:
            return self._no_arguments(context, "usage")
        language = context.language
        conversation = context.conversation
        lines = [
            say(
                language,
                "usage_conversation",
                count=conversation.message_count if conversation else 0,
                tokens=conversation.total_tokens if conversation else 0,
            )
        ]
        budgets = await context.bot.budgets(context.message)
        lines += [budget_line(context.bot, budget, context.language) for budget in budgets]
        if not budgets:
            lines.append(say(language, "usage_no_budget"))
        return "\n".join(lines)


def budget_line(bot: Bot, budget: BudgetView, language: str) -> str:
    """Return what is used of a budget, what is left, and when it ends."""
    ends = reserved = ""
    if budget.ends_ms is not None:
        ends = say(language, "budget_ends", at=bot.local_time(budget.ends_ms))
    if budget.reserved:
        reserved = say(language, "usage_reserved", reserved=amount(language, budget.unit, budget.reserved))
    window = say(language, f"window_{budget.window}")
    if budget.scope != "user":
        window += say(language, "usage_shared", by=say(language, f"scope_{budget.scope}"))
    left = max(0, budget.limit - budget.used - budget.reserved)
    return say(
        language,
        "usage_budget",
        budget=budget.name,
        window=window,
        used=amount(language, budget.unit, budget.used),
        limit=amount(language, budget.unit, budget.limit),
        left=amount(language, budget.unit, left),
        reserved=reserved,
        ends=ends,
    ).rstrip()


def _turns(history: Sequence[StoredMessage]) -> Iterator[list[StoredMessage]]:
    """Yield the turns, oldest first: a user message and all that answers it."""
    turn: list[StoredMessage] = []
    for message in history:
        if message.role == "user":
            if turn:
                yield turn
            turn = [message]
        elif turn:  # what stands before the first question answers one that is not at hand
            turn.append(message)
    if turn:
        yield turn
