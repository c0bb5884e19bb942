"""Tools of MCP servers: programs that are started here, or servers that are reached by HTTP.

The official client is imported only where a server is configured. Each server has a task of its own that connects, asks
for the tools, looks after the connection and connects anew when it is lost; nobody waits for that at start.
"""

from __future__ import annotations

import asyncio
import logging
import re
import tempfile
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import orjson

from feishu_bot.ai.chat_model import ToolSpec
from feishu_bot.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from feishu_bot.ai.chat_model import ToolCall
    from feishu_bot.config import McpServerSettings

log = logging.getLogger(__name__)

LOOK_S: Final = 60.0  # how often a server is asked for its tools: they may have changed, or it may be gone
CONNECT_S: Final = 30.0
MAX_TOOLS: Final = 200  # of one server
MAX_SCHEMA_BYTES: Final = 32_768  # of one tool
_AGAIN_S: Final = (
    10.0  # before the end is asked for again: the library gives a program some seconds to end by itself
)
_PAUSES_S: Final = (1.0, 2.0, 5.0, 15.0, 60.0)  # before it is tried again
_MAX_STDERR_BYTES: Final = 1 << 20
_MAX_NAME: Final = 64
_CLOSED: Final = -32000  # the client's own codes: the connection is gone,
_TIMED_OUT: Final = -32001  # no answer in time
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")


def check_servers(servers: Mapping[str, McpServerSettings]) -> list[str]:
    """Return a line that says what to install where servers are configured and their client is missing."""
    if servers and find_spec("mcp") is None:
        return ["ai.mcp_servers: the MCP client is missing; install it with: pip install 'feishu-bot[mcp]'"]
    return []


class McpServers:
    """The tools of all configured servers; a source for the toolbox. ``sleep`` waits between two tries."""

    def __init__(self, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self._servers: dict[str, _Server] = {}
        self._seen: tuple[tuple[ToolSpec, ...], ...] = ()
        self._tools: tuple[ToolSpec, ...] = ()

    async def configure(self, settings: Mapping[str, McpServerSettings]) -> None:
        """Connect to the servers that are new or changed, and leave those that are gone. Raises ConfigError."""
        mistakes = check_servers(settings)
        if mistakes:
            raise ConfigError(mistakes)
        for name, server in list(self._servers.items()):
            if settings.get(name) != server.settings:
                del self._servers[name]
                await server.stop()
        for name, wanted in settings.items():
            if name not in self._servers:
                self._servers[name] = _Server(name, wanted, self._sleep)

    async def stop(self) -> None:
        """End the programs and close the connections."""
        servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            await server.stop()

    def tools(self) -> tuple[ToolSpec, ...]:
        """Return the tools of all servers, ``SERVER_TOOL``; those of one that is away stay."""
        seen = tuple([server.specs for server in list(self._servers.values())])
        if len(seen) != len(self._seen) or any(a is not b for a, b in zip(seen, self._seen, strict=True)):
            by_name = {spec.name: spec for specs in reversed(seen) for spec in specs}
            self._tools, self._seen = tuple(by_name.values()), seen
        return self._tools

    async def run_tool(self, _context: object, call: ToolCall) -> str:
        """Run a tool where it is; what does not work is told in words."""
        for server in list(self._servers.values()):
            if call.name in server.names:
                return await server.call(call)
        return "The tool is not there any more."

    def problems(self) -> list[str]:
        """Return one line for every server that is not connected, and for tools that are left out."""
        return [line for server in list(self._servers.values()) for line in server.problems()]


class _Server:
    """One server and its connection."""

    def __init__(
        self, name: str, settings: McpServerSettings, sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self.settings = settings
        self.specs: tuple[ToolSpec, ...] = ()
        self.names: dict[str, str] = {}  # ours -> the server's own
        self._name = name
        self._sleep = sleep
        self._client: Any = None
        self._connected = asyncio.Event()
        self._look = asyncio.Event()
        self._reason = "not connected yet"
        self._left_out: list[str] = []
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"mcp {name}")

    async def stop(self) -> None:
        """End the program, or close the connection."""
        self._stopping = True
        while not self._task.done():  # the client's library may take a cancellation for a lost connection
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_AGAIN_S)
        await asyncio.gather(self._task, return_exceptions=True)

    def problems(self) -> list[str]:
        found = [f"mcp server {self._name}: {line}" for line in self._left_out]
        if not self._connected.is_set():
            found.append(f"mcp server {self._name} is not connected: {self._reason}")
        return found

    # --------------------------------------------------------------------------------------- the connection

    async def _run(self) -> None:
        """Be connected. Whatever the server or its client's library does wrong ends here, and is tried again."""
        tried = 0
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            while not self._stopping:
                try:
                    async with AsyncExitStack() as stack:
                        async with asyncio.timeout(CONNECT_S):
                            client = await self._connect(stack, stderr)
                            await self._ask_for_tools(client)
                        tried = 0
                        self._usable(client)
                        log.info(
                            "mcp server connected", extra={"server": self._name, "tools": len(self.specs)}
                        )
                        await self._stay(client, stderr)
                except Exception as error:
                    self._reason = _words(error, stderr)
                    log.exception("mcp server lost", extra={"server": self._name, "reason": self._reason})
                finally:
                    self._client = None
                    self._connected.clear()
                if not self._stopping:
                    await self._sleep(_PAUSES_S[min(tried, len(_PAUSES_S) - 1)])
                tried += 1

    async def _connect(self, stack: AsyncExitStack, stderr: Any) -> Any:
        mcp = await asyncio.to_thread(import_module, "mcp")  # takes a second
        settings = self.settings
        if settings.command is not None:
            stdio = import_module("mcp.client.stdio")
            parameters = mcp.StdioServerParameters(
                command=settings.command,
                args=list(settings.args),
                env={name: value.get_secret_value() for name, value in settings.env.items()},
                cwd=settings.cwd,
            )
            transport = stdio.stdio_client(parameters, errlog=stderr)
        else:
            http = import_module("mcp.client.streamable_http")
            headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
            session = import_module("mcp.shared._httpx_utils").create_mcp_http_client(headers=headers)
            await stack.enter_async_context(session)
            transport = http.streamable_http_client(str(settings.url), http_client=session)
        client = mcp.Client(transport, read_timeout_seconds=settings.timeout_s)
        return await stack.enter_async_context(client)

    def _usable(self, client: Any) -> None:
        self._client = client
        self._connected.set()

    async def _stay(self, client: Any, stderr: Any) -> None:
        """Ask for the tools now and then, which also shows whether the server is there; ends with an error."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()
            async with asyncio.timeout(CONNECT_S):
                await self._ask_for_tools(client)
            self._usable(client)
            if stderr.seek(0, 2) > _MAX_STDERR_BYTES:
                stderr.seek(0)
                stderr.truncate()

    async def _ask_for_tools(self, client: Any) -> None:
        found: list[Any] = []
        cursor = None
        while len(found) <= MAX_TOOLS:
            page = await client.list_tools(cursor=cursor, cache_mode="refresh")
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        specs, names, left_out = _specs(self._name, self.settings.tools, found)
        self._left_out = left_out
        if specs != self.specs:
            self.specs, self.names = specs, names

    # ---------------------------------------------------------------------------------------------- calling

    async def call(self, call: ToolCall) -> str:
        """Run a tool; if the connection turns out to be lost, once more on the next one."""
        try:
            arguments = orjson.loads(call.arguments) if call.arguments.strip() else {}
        except ValueError:
            return "The tool was not run: the arguments are not JSON."
        if not isinstance(arguments, dict):
            return "The tool was not run: the arguments are no JSON object."
        limit_s = self.settings.timeout_s
        try:
            async with asyncio.timeout(2 * limit_s):
                for _ in range(2):
                    await self._connected.wait()
                    said = await self._call_once(self._client, call.name, arguments)
                    if said is not None:
                        return said
        except TimeoutError:
            return f"The tool's server does not answer ({limit_s:g} s)."
        return "The tool's server has gone away; it may be back soon."

    async def _call_once(self, client: Any, name: str, arguments: dict[str, Any]) -> str | None:
        """Return what the tool says; None where the connection was lost."""
        error_of_mcp: type[Exception] = import_module("mcp").MCPError
        try:
            result = await client.call_tool(self.names[name], arguments)
        except error_of_mcp as error:
            code = getattr(error, "code", 0)
            log.warning("mcp call failed", extra={"server": self._name, "tool": name, "code": code})
            if code == _CLOSED:
                self._lost()
                return None
            if code == _TIMED_OUT:
                return f"The tool took longer than {self.settings.timeout_s:g} s."
            return f"The tool has failed: {error}"
        except (OSError, RuntimeError, ValueError, AttributeError, KeyError) as error:
            log.warning(
                "mcp call failed", extra={"server": self._name, "tool": name, "error": type(error).__name__}
            )
            self._lost()
            return None
        text = _text_of(result)
        return f"The tool has failed: {text}" if result.is_error else text

    def _lost(self) -> None:
        """Have the connection looked at: where it is lost, that shows."""
        self._client = None
        self._connected.clear()
        self._look.set()


def _specs(
    server: str, patterns: Sequence[str], found: Sequence[Any]
) -> tuple[tuple[ToolSpec, ...], dict[str, str], list[str]]:
    """Return the tools that are wanted, their own names by ours, and what was left out."""
    specs: list[ToolSpec] = []
    names: dict[str, str] = {}
    left_out: list[str] = []
    for tool in found[:MAX_TOOLS]:
        if not any(fnmatchcase(tool.name, pattern) for pattern in patterns):
            continue
        name = _NO_NAME.sub("_", f"{server}_{tool.name}")[:_MAX_NAME]
        if name in names:
            left_out.append(f"two tools would be called {name}")
        elif len(orjson.dumps(tool.input_schema)) > MAX_SCHEMA_BYTES:
            left_out.append(f"the schema of {tool.name[:_MAX_NAME]} is too large")
        else:
            names[name] = tool.name
            specs.append(ToolSpec(name, tool.description or tool.title or "", tool.input_schema))
    if len(found) > MAX_TOOLS:
        left_out.append(f"it has more than {MAX_TOOLS} tools")
    return tuple(specs), names, left_out


def _text_of(result: Any) -> str:
    """Return what a result says, as the model is told; what is no text is named."""
    parts: list[str] = []
    for item in result.content:
        text = getattr(item, "text", None) or getattr(getattr(item, "resource", None), "text", None)
        if isinstance(text, str):
            parts.append(text)
        elif item.type == "resource_link":
            parts.append(f"[link: {item.uri}]")
        else:
            parts.append(f"[{item.type}: {getattr(item, 'mime_type', None) or 'no text'}]")
    if not parts and result.structured_content is not None:
        parts.append(orjson.dumps(result.structured_content, default=str).decode())
    return "\n".join(parts)


def _words(error: BaseException, stderr: Any) -> str:
    """Return why a connection ended: the innermost error, and the last line that the program has written."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    stderr.flush()
    size = stderr.seek(0, 2)
    stderr.seek(max(0, size - 2000))
    lines = [line.strip() for line in stderr.read().splitlines() if line.strip()]
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(f"{words} ({lines[-1]})".split())[:300] if lines else words[:300]
