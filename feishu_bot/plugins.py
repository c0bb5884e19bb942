"""Plugins: found, loaded, asked in their order, and never in a message's way.

Whatever a plugin does wrong is reported and skipped. One thing cannot be helped: code that computes or blocks
without an ``await`` holds the whole process, and nothing can interrupt it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import logging
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import orjson

from feishu_bot.ai.chat_model import ToolSpec
from feishu_bot.arguments import Arguments
from feishu_bot.errors import BotError
from feishu_bot.hooks import Command, Job, Reply, Tool, ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from feishu_bot.ai.chat_model import ToolCall
    from feishu_bot.config.settings import PluginSettings
    from feishu_bot.hooks import Bot, Context

log = logging.getLogger(__name__)

ENTRY_POINTS = "feishu_bot.plugins"  # the group in which an installed package names its plugins
BUILT_IN = "builtin"  # the name under which the server's own commands stand
FAILURES_IN_A_ROW = 5  # so many, and a hook is not called for a while
SWITCHED_OFF_S = 60.0

# A hook and what it is called with.
_HOOKS: Final[dict[str, tuple[str, ...]]] = {
    "startup": ("bot",),
    "commands": ("bot",),
    "tools": ("bot",),
    "jobs": ("bot",),
    "on_message": ("context",),
    "on_event": ("context",),
    "on_answer": ("context", "answer"),
    "shutdown": ("bot",),
}
_PLUGIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")  # no dot and no slash: it stays in its folder
_TEXT_OR_NONE: Final = (str, type(None))
_FAILED: Final = object()

Hook = Callable[..., Awaitable[Any]]


class PluginError(BotError):
    """The plugin is not right; the message says what its author or the operator should change."""


class PluginMissing(PluginError):
    """There is no such plugin; the message says where it was looked for."""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long a plugin may take, in seconds.

    ``command`` is one run of a command, ``commands`` the list of them; so with ``tool`` and ``tools``.
    """

    load: float = 10.0
    startup: float = 10.0
    shutdown: float = 10.0
    commands: float = 5.0
    command: float = 20.0
    tools: float = 5.0
    jobs: float = 5.0
    tool: float = 30.0
    on_message: float = 20.0
    on_answer: float = 20.0
    on_event: float = 5.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin ready to be started; ``notes`` says what in it is probably a mistake."""

    hooks: dict[str, Hook]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Failures:
    """The failures in a row of one hook of one plugin."""

    count: int = 0
    off_until: float = 0.0
    last: str = ""


@dataclass(slots=True)
class _Plugin:
    name: str
    bot: Bot
    hooks: dict[str, Hook] = field(default_factory=dict)
    failures: dict[str, _Failures] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _ToolOf:
    """A tool with its owner."""

    tool: Tool
    plugin: _Plugin
    arguments: Arguments


class Plugins:
    """The plugins of one server. ``builtin`` is an object with hooks that comes before all others.

    ``clock`` counts seconds.
    """

    def __init__(
        self,
        settings: PluginSettings,
        *,
        builtin: object | None = None,
        limits: TimeLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._builtin = builtin
        self._limits = limits or TimeLimits()
        self._clock = clock
        self._plugins: list[_Plugin] = []
        self._asked: dict[str, list[_Plugin]] = {hook: [] for hook in _HOOKS}
        self._commands: list[Command] = []
        self._owners: dict[str, _Plugin] = {}  # of commands, by name
        self._tools: dict[str, _ToolOf] = {}
        self._specs: tuple[ToolSpec, ...] = ()
        self._jobs: dict[str, Job] = {}
        self._problems: list[str] = []
        self._overdue: set[asyncio.Task[Any]] = set()  # cancelled, and not ended yet

    # -------------------------------------------------------------------------------------- start and stop

    async def start(self, bot_for: Callable[[str], Bot]) -> None:
        """Load and start the plugins in the order in which they are enabled.

        One that cannot be used is left out; the log and ``problems`` say why.
        """
        if self._builtin is not None:
            await self._start_one(_Plugin(BUILT_IN, bot_for(BUILT_IN)), inspect_plugin(self._builtin))
        for name in dict.fromkeys(self._settings.enabled):
            plugin = _Plugin(name, bot_for(name))
            loaded = await self._call(
                plugin, "load", self._limits.load, _load_in_thread, self._directory, name
            )
            if loaded is _FAILED:
                self._problems.append(f"{name}: {plugin.failures['load'].last}")
            else:
                await self._start_one(plugin, loaded)
        log.info("plugins ready", extra={"plugins": [p.name for p in self._plugins if p.name != BUILT_IN]})

    @property
    def _directory(self) -> Path:
        return Path(self._settings.directory)

    async def _start_one(self, plugin: _Plugin, loaded: Loaded) -> None:
        plugin.hooks = loaded.hooks
        self._note(plugin, loaded.notes)
        if "startup" in plugin.hooks and await self._hook(plugin, "startup", plugin.bot) is _FAILED:
            self._problems.append(f"{plugin.name}: startup: {plugin.failures['startup'].last}")
            return
        self._plugins.append(plugin)
        for hook in plugin.hooks:
            self._asked[hook].append(plugin)
        for hook, add in (
            ("commands", self._add_commands),
            ("tools", self._add_tools),
            ("jobs", self._add_jobs),
        ):
            if hook not in plugin.hooks:
                continue
            found = await self._hook(plugin, hook, plugin.bot, expected=(list, tuple))
            if found is _FAILED:
                self._problems.append(f"{plugin.name}: {hook}: {plugin.failures[hook].last}")
            else:
                add(plugin, found)

    def _add_commands(self, plugin: _Plugin, found: Sequence[object]) -> None:
        for command in found:
            if not isinstance(command, Command):
                self._note(plugin, [f"commands: {type(command).__name__} instead of a Command"])
                continue
            taken = [name for name in command.names if name in self._owners]
            if taken:
                owner = self._owners[taken[0]].name
                self._note(plugin, [f"the command {taken[0]!r} is left out: {owner} has it already"])
                continue
            self._commands.append(command)
            self._owners.update(dict.fromkeys(command.names, plugin))

    def _add_tools(self, plugin: _Plugin, found: Sequence[object]) -> None:
        for tool in found:
            if not isinstance(tool, Tool):
                self._note(plugin, [f"tools: {type(tool).__name__} instead of a Tool"])
                continue
            if tool.name in self._tools:
                owner = self._tools[tool.name].plugin.name
                self._note(plugin, [f"the tool {tool.name!r} is left out: {owner} has it already"])
                continue
            try:
                self._tools[tool.name] = _ToolOf(tool, plugin, Arguments(tool.run, tool.parameters))
            except ValueError as error:
                self._note(plugin, [f"the tool {tool.name!r} is left out: {error}"])
        self._specs = tuple(
            ToolSpec(name, own.tool.description, own.arguments.schema) for name, own in self._tools.items()
        )

    def _add_jobs(self, plugin: _Plugin, found: Sequence[object]) -> None:
        for job in found:
            if not isinstance(job, Job):
                self._note(plugin, [f"jobs: {type(job).__name__} instead of a Job"])
            elif f"{plugin.name}.{job.name}" in self._jobs:
                self._note(plugin, [f"the job {job.name!r} is left out: there are two of this name"])
            else:
                self._jobs[f"{plugin.name}.{job.name}"] = job

    def _note(self, plugin: _Plugin, reasons: Sequence[str]) -> None:
        for reason in reasons:
            self._problems.append(f"{plugin.name}: {reason}")
            log.warning("plugin problem", extra={"plugin": plugin.name, "reason": reason})

    async def stop(self) -> None:
        """Shut the plugins down, the last first."""
        plugins, self._plugins = self._plugins, []
        for asked in self._asked.values():
            asked.clear()
        for plugin in reversed(plugins):
            if "shutdown" in plugin.hooks:
                await self._hook(plugin, "shutdown", plugin.bot)

    def problems(self) -> list[str]:
        """Return one line for everything that is left out: plugins, commands, hooks switched off for now."""
        now = self._clock()
        off = [
            f"{plugin.name}: {hook} is switched off for {failures.off_until - now:.0f} s "
            f"after {failures.count} failures in a row: {failures.last}"
            for plugin in self._plugins
            for hook, failures in plugin.failures.items()
            if failures.off_until > now
        ]
        return self._problems + off

    @property
    def wants_events(self) -> bool:
        """Whether any plugin asks for what nobody said; if none does, events end when they are recorded."""
        return bool(self._asked["on_event"])

    @property
    def take_messages(self) -> bool:
        """Whether any plugin may answer messages itself."""
        return bool(self._asked["on_message"])

    @property
    def change_answers(self) -> bool:
        """Whether any plugin has the last word on answers: nobody may see them before."""
        return bool(self._asked["on_answer"])

    # ----------------------------------------------------------------------------- on the way of a message

    def commands(self) -> list[Command]:
        """Return the commands in the order of ``/help``: the built-in ones first. No name is there twice."""
        return list(self._commands)

    async def run_command(self, command: Command, context: Context, args: str) -> Reply | None:
        """Run one of ``commands``; None when it failed, which is reported."""
        plugin = self._owners[command.names[0]]
        reply = await self._call(
            plugin,
            f"command {command.name}",
            self._limits.command,
            command.run,
            replace(context, bot=plugin.bot),
            args,
            expected=(Reply, str),
        )
        if reply is _FAILED:
            return None
        return Reply(reply) if isinstance(reply, str) else reply

    def jobs(self) -> list[tuple[str, Job]]:
        """Return what plugins do by the clock, as ``plugin.job``."""
        return list(self._jobs.items())

    def tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools of all plugins, as a model is told of them. No name is there twice."""
        return self._specs

    async def run_tool(self, context: Context, call: ToolCall) -> str:
        """Run one of ``tools``; what does not work is reported, and told in words."""
        own = self._tools[call.name]
        try:
            arguments = own.arguments.parse(call.arguments)
        except ValueError as error:
            return f"The tool was not run: {error}"
        hook = f"tool {call.name}"
        result = await self._call(
            own.plugin,
            hook,
            self._limits.tool,
            partial(_told, own.tool.run, arguments),
            replace(context, bot=own.plugin.bot),
            expected=(str,),
        )
        if result is not _FAILED:
            return str(result)
        failures = own.plugin.failures.get(hook)
        if failures is not None and failures.count >= FAILURES_IN_A_ROW:
            return "The tool does not work at the moment."
        return "The tool has failed."

    async def on_message(self, context: Context) -> tuple[str, str] | None:
        """Return the answer of the first plugin that has one, and its name. A blank answer is none."""
        for plugin in self._asked["on_message"]:
            answer = await self._hook(
                plugin, "on_message", replace(context, bot=plugin.bot), expected=_TEXT_OR_NONE
            )
            if isinstance(answer, str) and answer.strip():
                return answer, plugin.name
        return None

    async def on_event(self, context: Context) -> None:
        """Tell every plugin of something that nobody said."""
        for plugin in self._asked["on_event"]:
            await self._hook(plugin, "on_event", replace(context, bot=plugin.bot))

    async def on_answer(self, context: Context, answer: str) -> str:
        """Return the answer as the plugins leave it, each given what the one before made of it."""
        for plugin in self._asked["on_answer"]:
            changed = await self._hook(
                plugin, "on_answer", replace(context, bot=plugin.bot), answer, expected=_TEXT_OR_NONE
            )
            if isinstance(changed, str) and changed.strip():
                answer = changed
        return answer

    # --------------------------------------------------------------------------------------------- calling

    async def _hook(
        self, plugin: _Plugin, hook: str, *args: Any, expected: tuple[type, ...] = (object,)
    ) -> Any:
        limit_s: float = getattr(self._limits, hook)
        return await self._call(plugin, hook, limit_s, plugin.hooks[hook], *args, expected=expected)

    async def _call(
        self,
        plugin: _Plugin,
        hook: str,
        limit_s: float,
        function: Hook,
        *args: Any,
        expected: tuple[type, ...] = (object,),
    ) -> Any:
        """Return what the plugin's function returns, or ``_FAILED`` after a report; the only edge of plugins."""
        failures = plugin.failures.get(hook)
        if failures is not None and failures.count >= FAILURES_IN_A_ROW:
            if failures.off_until > self._clock():
                return _FAILED
            failures.off_until = self._clock() + limit_s  # one call tries; the others do not wait for it
        try:
            result = await self._within(limit_s, plugin, hook, function, args)
            if not isinstance(result, expected):
                wanted = " or ".join("None" if t is type(None) else t.__name__ for t in expected)
                raise PluginError(f"returned {type(result).__name__} instead of {wanted}")  # noqa: TRY301  # counts as a failure like any
        except PluginMissing as error:  # a mistake in the settings: our own stack would say nothing about it
            log.error("plugin missing", extra={"plugin": plugin.name, "reason": str(error)})  # noqa: TRY400  # see above
            self._count_failure(plugin, hook, error)
            return _FAILED
        except Exception as error:
            log.exception("plugin failed", extra={"plugin": plugin.name, "hook": hook})
            self._count_failure(plugin, hook, error)
            return _FAILED
        if failures is not None:
            plugin.failures.pop(hook, None)
        return result

    async def _within(self, limit_s: float, plugin: _Plugin, hook: str, function: Hook, args: Any) -> Any:
        # A task of its own: what it does to its task, or leaves undone when cancelled, does not reach the caller.
        task = asyncio.get_running_loop().create_task(_run(function, args))
        try:
            await asyncio.sleep(0)  # enough for all that wait for nothing
            if not task.done():
                await asyncio.wait((task,), timeout=limit_s)
            if not task.done():
                log.error("plugin hangs", extra={"plugin": plugin.name, "hook": hook, "where": _where(task)})
                raise PluginError(f"took longer than {limit_s:g} s")
        finally:
            if not task.done():
                task.cancel()
                self._overdue.add(task)
                task.add_done_callback(self._ended)
        if task.cancelled():
            raise PluginError("cancelled itself")
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._overdue.discard(task)
        if not task.cancelled():
            task.exception()  # asked for, so that nobody reports it a second time

    def _count_failure(self, plugin: _Plugin, hook: str, error: Exception) -> None:
        failures = plugin.failures.setdefault(hook, _Failures())
        failures.count += 1
        failures.last = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        if failures.count >= FAILURES_IN_A_ROW:
            failures.off_until = self._clock() + SWITCHED_OFF_S
            log.error(
                "plugin hook switched off",
                extra={
                    "plugin": plugin.name,
                    "hook": hook,
                    "failures": failures.count,
                    "seconds": SWITCHED_OFF_S,
                },
            )


async def _run(function: Hook, args: Any) -> Any:
    try:
        awaitable = function(*args)
        if not inspect.isawaitable(awaitable):
            raise PluginError("is not asynchronous: write 'async def'")
        return await awaitable
    except SystemExit as error:  # would end the event loop, and so the server
        raise PluginError("tried to end the program") from error


async def _told(function: Hook, arguments: dict[str, Any], context: Context) -> str:
    """Return what a tool says as the text that the model is told."""
    try:
        awaitable = function(context, **arguments)
        if not inspect.isawaitable(awaitable):
            raise PluginError("is not asynchronous: write 'async def'")
        said = await awaitable
    except ToolError as error:
        return str(error)
    return said if isinstance(said, str) else orjson.dumps(said, default=str).decode()


def _where(task: asyncio.Task[Any]) -> list[str]:
    """Return what a task waits for, from the outside in; its stack would end at the first ``await``."""
    lines: list[str] = []
    waiting: object = task.get_coro()
    while inspect.iscoroutine(waiting):
        frame = waiting.cr_frame
        if frame is not None:
            lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        waiting = waiting.cr_await
    return lines[1:]  # the first is ours


# ------------------------------------------------------------------------------------------------- loading


async def _load_in_thread(directory: Path, name: str) -> Loaded:
    """Load a plugin on a thread that nobody waits for at exit: a module that hangs when imported holds up nothing."""
    loaded: Future[Loaded] = Future()
    threading.Thread(
        target=_load_into, args=(loaded, directory, name), name=f"plugin-{name}", daemon=True
    ).start()
    return await asyncio.wrap_future(loaded)


def _load_into(loaded: Future[Loaded], directory: Path, name: str) -> None:
    loaded.set_running_or_notify_cancel()
    try:
        loaded.set_result(load_plugin(directory, name))
    except SystemExit as error:
        loaded.set_exception(PluginError(f"ended the program when imported ({error.code})"))
    except BaseException as error:  # noqa: BLE001  # raised where the plugin is asked for
        loaded.set_exception(error)


def load_plugin(directory: Path, name: str) -> Loaded:
    """Return the plugin: ``NAME.py`` or ``NAME/__init__.py`` in the folder, else the installed one of this name.

    Raises PluginMissing when there is none, PluginError when it has no usable hook, and whatever its import raises.
    """
    if _PLUGIN_NAME.fullmatch(name) is None:
        raise PluginError(f"{name!r} is no plugin's name: letters, digits, - and _")
    if name == BUILT_IN:
        raise PluginError("this name is the server's own")
    loaded: Any = None
    for path in (directory / f"{name}.py", directory / name / "__init__.py"):
        if path.is_file():
            loaded = _import_file(path, name)
            break
    else:
        loaded = _load_installed(directory, name)
    loaded = getattr(loaded, "plugin", loaded) if isinstance(loaded, ModuleType) else loaded
    return inspect_plugin(loaded() if isinstance(loaded, type) else loaded)


def _import_file(path: Path, name: str) -> ModuleType:
    """Import a file under a private name, so that it neither hides nor is hidden by another module."""
    module_name = f"_feishu_bot_plugin_{name}"
    for old in [m for m in sys.modules if m == module_name or m.startswith(module_name + ".")]:
        del sys.modules[old]
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(module_name, path, submodule_search_locations=folder)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(module_name, None)
        raise
    return module


def _load_installed(directory: Path, name: str) -> object:
    found = entry_points(group=ENTRY_POINTS, name=name)
    if not found:
        raise PluginMissing(
            f"there is neither {directory / name}.py nor {directory / name / '__init__.py'}, and no installed plugin "
            "of this name: put it there, correct plugins.directory, or take it out of plugins.enabled"
        )
    return next(iter(found)).load()


def inspect_plugin(plugin: object) -> Loaded:
    """Return the hooks of a plugin. Raises PluginError for one that could not be awaited or called, and for none."""
    hooks: dict[str, Hook] = {}
    for hook, parameters in _HOOKS.items():
        function = getattr(plugin, hook, None)
        if function is None or isinstance(function, ModuleType):
            continue
        if not callable(function):
            raise PluginError(f"{hook} is no function")
        if not (
            inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        ):
            raise PluginError(f"{hook} would block the server: write 'async def {hook}'")
        try:
            inspect.signature(function).bind(*parameters)
        except TypeError:
            raise PluginError(f"{hook} does not take ({', '.join(parameters)})") from None
        hooks[hook] = function
    notes = tuple(_misspelt(plugin))
    if not hooks:
        raise PluginError("; ".join(notes or ("has no hook",)) + "; the hooks are " + ", ".join(_HOOKS))
    return Loaded(hooks, notes)


def _misspelt(plugin: object) -> Iterator[str]:
    """Yield a line for each function that was probably meant to be a hook."""
    for name in dir(plugin):
        if name in _HOOKS or not inspect.iscoroutinefunction(getattr(plugin, name, None)):
            continue
        near = get_close_matches(name, _HOOKS, n=1, cutoff=0.8)
        if name.startswith("on_") or near:
            yield f"{name} is no hook" + (f"; did you mean {near[0]}?" if near else "")
