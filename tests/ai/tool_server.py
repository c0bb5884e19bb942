"""A small MCP server for the tests: on standard input and output, or with a port by HTTP."""

from __future__ import annotations

import os
import sys
from typing import Any

import anyio
from mcp.server import MCPServer

shop: Any = MCPServer("shop")


@shop.tool()
def price(article: str, count: int = 1) -> str:
    """Tells a price."""
    if article == "gold":
        raise ValueError("not for sale")
    return f"{count} {article} cost {3 * count}, says {os.getpid()}, {os.environ.get('GREETING', '')}"


@shop.tool()
def close_down() -> str:
    """Ends the server."""
    os._exit(1)


@shop.tool(name="slow.answer")
async def slow_answer() -> str:
    """Takes its time."""
    await anyio.sleep(60)
    return "at last"


@shop.tool()
def many() -> list[str]:
    """Says several things."""
    return ["one", "two"]


if len(sys.argv) > 1:
    shop.run("streamable-http", port=int(sys.argv[1]))
else:
    shop.run("stdio")
