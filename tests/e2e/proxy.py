"""A TCP proxy between a server and its database, that can be cut."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from sqlalchemy.engine import make_url


class Proxy:
    """Stands before a database server; ``url`` leads through it. ``up`` False refuses what comes."""

    def __init__(self, db_url: str, *, up: bool = True) -> None:
        self._target = make_url(db_url)
        self.up = up
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return self._target.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lead_to(self, db_url: str) -> None:
        """Lead new connections to another server."""
        self._target = make_url(db_url)

    def cut(self) -> None:
        """Break every connection, in the middle of whatever it carries."""
        for writer in self._open:
            if writer.transport is not None:
                writer.transport.abort()
        self._open.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.up:
            writer.transport.abort()
            return
        default = 5432 if self._target.drivername.startswith("postgres") else 3306
        there, back = await asyncio.open_connection(self._target.host, self._target.port or default)
        self._open |= {writer, back}
        for task in (self._pipe(reader, back), self._pipe(there, writer)):
            made = asyncio.create_task(task)
            self._tasks.add(made)
            made.add_done_callback(self._tasks.discard)

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()
        self._open.discard(writer)
