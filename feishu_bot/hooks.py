"""What plugins can do: eight asynchronous hooks, one per line of ``Plugin``. The built-in commands use the same.

A plugin is an object with any of these methods, or a module with functions of these names. A hook that raises or
takes longer than its time is reported and skipped; it never stops a message.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from feishu_bot.config import check_cron
from feishu_bot.model import Scope

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from feishu_bot.model import InboundMessage, Unit


COMMAND_NAME = re.compile(r"[^\W_][\w-]{0,31}")  # letters of any script, digits, - and _

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what every provider takes


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of the conversation, as commands and plugins see it."""

    role: str
    content: str
    tokens: int
    seq: int = 0  # its place in the conversation
    speaker: str | None = None  # who said it, where several share the conversation


@dataclass(frozen=True, slots=True)
class ConversationView:
    """The conversation a message belongs to, as it is stored now."""

    id: int
    title: str | None
    message_count: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class BudgetView:
    """What is left of one budget for the speaker. ``ends_ms`` None: the window never ends.

    The numbers are in ``unit``: tokens, requests (calls of a model), or cost in millionths of a dollar. A budget that
    limits several has a view for each. ``scope`` says who shares it.
    """

    name: str
    window: str
    used: int
    reserved: int
    limit: int
    ends_ms: int | None
    unit: Unit = "tokens"
    scope: Literal["user", "chat", "platform", "tenant", "global"] = "user"


class Bot(Protocol):
    """What the server offers to plugins and commands."""

    @property
    def language(self) -> str:
        """``zh`` or ``en``: the bot's own sentences."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The plugin's own part of ``plugins.settings``; empty for built-in commands."""

    def local_time(self, instant_ms: int) -> str:
        """Return an instant as people here write it (``schedule.timezone``)."""

    async def budgets(self, message: InboundMessage) -> Sequence[BudgetView]:
        """Return every budget that applies to the speaker of ``message``."""

    async def send(
        self,
        platform: str,
        text: str,
        *,
        chat: str | None = None,
        user: str | None = None,
        key: str | None = None,
    ) -> None:
        """Say something that answers nobody: on disk when this returns, then sent in order, with retries.

        ``platform`` is the account, ``chat`` the platform's id of a group, ``user`` a person, a user key or the
        platform's id of somebody. With a ``key`` of the plugin's own a second call with the same one sends nothing.
        Raises ``feishu_bot.errors.Undeliverable`` where nothing can be sent, ValueError for a user of another
        account, and StoreUnavailable.
        """

    async def call(self, where: InboundMessage | str, action: str, /, **params: Any) -> Any:
        """Make a call of the platform's own API now, and return its data.

        ``where``: a message or event of the account, or the account's name. Nothing is recorded: if the server
        dies, or no client is connected to this process, the call is not made. Raises
        ``feishu_bot.errors.RetryLater`` or ``Undeliverable``, also on platforms without such an API.
        """

    async def call_later(self, message: InboundMessage, action: str, /, **params: Any) -> None:
        """Record a call of the platform's own API, to be made as soon as it can be reached.

        It is made by whichever process has the connection, within a day, and again while its outcome is unknown: it
        must do no harm twice. The same call about the same message is recorded once. Raises
        ``feishu_bot.errors.Undeliverable`` on platforms without such an API, TypeError for what is no JSON.
        """


@dataclass(frozen=True, slots=True)
class Answering:
    """Who answers in a conversation now, and what could be chosen instead. ``agents``: name -> description."""

    agent: str = ""
    model: str = ""
    persona: str | None = None
    agents: Mapping[str, str] = field(default_factory=dict)
    personas: Sequence[str] = ()
    models: Sequence[str] = ()
    is_shared: bool = False  # by several people


@dataclass(frozen=True, slots=True)
class Context:
    """What a hook is told about the message at hand."""

    bot: Bot
    message: InboundMessage
    conversation: ConversationView | None
    history: Sequence[StoredMessage]  # oldest first, the newest turns
    commands: Sequence[Command] = ()  # all that are known, in the order of ``/help``
    is_admin: bool = False
    scope: Scope = Scope.USER_IN_CHAT  # who shares the conversation here
    spoken: str | None = None  # the language of this chat, where it is not the bot's
    answering: Answering | None = None

    @property
    def language(self) -> str:
        """``zh`` or ``en``: the bot's own sentences in this chat."""
        return self.spoken or self.bot.language


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command says. ``change``: what the store does to the conversation in the same transaction.

    ``detail`` belongs to the change: ``switch`` to the archived conversation with this id, ``rename`` to this title,
    ``fork`` into a copy that ends at this ``seq``, ``cut`` away what stands behind this ``seq``; ``agent``,
    ``persona`` and ``model`` choose the one with this name, None what is configured.
    """

    text: str
    change: (
        Literal["archive", "clear", "switch", "rename", "fork", "cut", "agent", "persona", "model"] | None
    ) = None
    detail: int | str | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the chat. ``name`` and ``aliases`` are without the prefix; ``help`` is by language.

    Raises ValueError for a name that nobody could type.
    """

    name: str
    run: Callable[[Context, str], Awaitable[Reply | str]]
    help: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    usage: str = ""  # its arguments, e.g. "[N]"
    admin_only: bool = False

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if COMMAND_NAME.fullmatch(name) is None:
                raise ValueError(
                    f"{name!r} cannot be a command: a letter or digit, then at most 31 letters, digits, - and _"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """All that it can be called by, without the prefix, as names are compared: in lower case."""
        return tuple(dict.fromkeys(name.casefold() for name in (self.name, *self.aliases)))


@dataclass(frozen=True, slots=True)
class Job:
    """What a plugin does by the clock, once over all processes: ``cron`` is a line of crontab(5).

    ``run`` takes nothing. If it dies or the server stops, it is begun anew; so what it does must be safe to do twice
    (``bot.send`` with a ``key`` is). Raises ValueError for a name or a line that is none.
    """

    name: str
    cron: str
    run: Callable[[], Awaitable[None]]

    def __post_init__(self) -> None:
        if COMMAND_NAME.fullmatch(self.name) is None:
            raise ValueError(
                f"{self.name!r} cannot be a job: a letter or digit, then at most 31 more, - and _"
            )
        check_cron(self.cron)


class ToolError(Exception):
    """Raised by a tool to tell the model, in these words, why it cannot do what was asked."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call: ``async def name(context, city: str, days: int = 1)``.

    ``name`` and ``description`` are by default the function's own and its docstring. ``parameters`` is the JSON
    schema of its arguments; by default it is made from the annotations, and what a model sends is checked by them.
    What it returns is told to the model: a text, or anything that can be JSON. Raises ValueError for a name that
    not every provider takes.
    """

    run: Callable[..., Awaitable[Any]]
    name: str = ""
    description: str = ""
    parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.run, "__name__", ""))
        if TOOL_NAME.fullmatch(self.name) is None:
            raise ValueError(f"{self.name!r} cannot be a tool: at most 64 letters, digits, - and _ of ASCII")
        if not self.description:
            object.__setattr__(self, "description", inspect.getdoc(self.run) or "")


class Plugin(Protocol):
    """The hooks. All are optional; each is awaited with a time limit."""

    async def startup(self, bot: Bot) -> None: ...
    async def commands(self, bot: Bot) -> Sequence[Command]: ...
    async def tools(self, bot: Bot) -> Sequence[Tool]: ...
    async def jobs(self, bot: Bot) -> Sequence[Job]: ...
    async def on_message(self, context: Context) -> str | None: ...
    async def on_event(self, context: Context) -> None: ...
    async def on_answer(self, context: Context, answer: str) -> str | None: ...
    async def shutdown(self, bot: Bot) -> None: ...
