"""PostgreSQL's NOTIFY: a hint that a process has recorded what another had better work on.

Nothing depends on it: who hears nothing finds the same by asking the database each second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feishu_bot.store.engine import capabilities

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from feishu_bot.store.work import Transaction

log = logging.getLogger(__name__)

CHANNEL: Final = "feishu_bot"
_LISTEN_S: Final = 1.0  # between two looks whether to stop
_RECONNECT_S: Final = 5.0
_NOTIFY = text(f"NOTIFY {CHANNEL}")


def notify(tx: Transaction) -> None:
    """Wake the other processes when this transaction is committed; on other databases nothing."""
    if tx.kind == "postgresql":
        tx.connection.execute(_NOTIFY)


class Notices:
    """Calls ``heard`` on the event loop that started it, once for any number of notices at once."""

    def __init__(self, engine: Engine, heard: Callable[[], None]) -> None:
        self._engine = engine
        self._heard = heard
        self._stopped = threading.Event()
        self._waiting = (
            threading.Lock()
        )  # held by whoever closes the connection, or cuts the wait on it short
        self._listening: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, with a connection of its own. Does nothing where the database cannot notify."""
        if capabilities(self._engine).notify:
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, args=(loop,), name="notices", daemon=True)
            self._thread.start()

    async def stop(self) -> None:
        """Stop listening."""
        self._stopped.set()
        if self._thread is None:
            return
        import psycopg  # noqa: PLC0415  # on PostgreSQL only

        with self._waiting, suppress(OSError, psycopg.Error):
            if self._listening is not None:  # it waits for its server; nothing but the socket's end wakes it
                with socket.socket(fileno=os.dup(self._listening.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self._thread.join)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        import psycopg  # noqa: PLC0415  # on PostgreSQL only

        while not self._stopped.is_set():
            try:
                self._listen(loop)
            except (DBAPIError, PoolTimeout, psycopg.Error) as error:
                log.debug("notices lost", extra={"reason": type(error).__name__})
                self._stopped.wait(_RECONNECT_S)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        connection = self._engine.raw_connection()
        try:
            driver: Any = connection.driver_connection
            connection.detach()  # not one of the pool's: it waits most of the time
            driver.autocommit = True
            driver.execute(f"LISTEN {CHANNEL}")
            with self._waiting:
                self._listening = driver
            while not self._stopped.is_set():
                heard = list(driver.notifies(timeout=_LISTEN_S, stop_after=1))
                if heard and not loop.is_closed():
                    loop.call_soon_threadsafe(self._heard)
        finally:
            with self._waiting:
                self._listening = None
                connection.close()
