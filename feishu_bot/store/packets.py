"""A connection to MariaDB that sends no more at once than the server takes.

The server cuts off whoever does, mostly before its reason can be read. That looks like a server that has died, after
which a transaction is run again: each time for nothing, and at the cost of all that wait behind it.
"""

from __future__ import annotations

import functools
import ssl
from typing import Any, Final

from pymysql.connections import Connection
from pymysql.constants import ER
from pymysql.err import DataError

_ALWAYS_TAKEN: Final = (
    2**18
)  # characters, which are at most a MiB: less than that no server is installed with


class BoundedConnection(Connection):
    """Raises DataError, naming the setting, for a statement that is too large; the connection stays as it was."""

    _most: int | None = None

    def query(self, sql: str | bytes | bytearray, unbuffered: bool = False) -> int:  # noqa: FBT001, FBT002  # the driver's signature
        """Send a statement with its values in it."""
        if len(sql) > _ALWAYS_TAKEN:
            # Rows that are stored together come as a bytearray.
            self._check(sql.encode(self.encoding, "surrogateescape") if isinstance(sql, str) else sql)
        return super().query(sql, unbuffered)

    def _create_ssl_ctx(self, sslp: ssl.SSLContext | dict[str, Any]) -> ssl.SSLContext:
        if sslp:
            made: ssl.SSLContext = super()._create_ssl_ctx(sslp)  # type: ignore[misc]  # a method of the driver's own
            return made
        return _unverified()

    def _check(self, sql: bytes | bytearray) -> None:
        if self._most is None:  # it holds as long as the connection
            with self.cursor() as cursor:
                cursor.execute("SELECT @@max_allowed_packet")
                self._most = int(cursor.fetchall()[0][0])
        if len(sql) + 1 >= self._most:  # the one is the command's own byte
            raise DataError(
                ER.NET_PACKET_TOO_LARGE,
                f"a statement of {len(sql)} bytes is more than the database server takes at once; "
                f"its max_allowed_packet is {self._most}",
            )


@functools.cache
def _unverified() -> ssl.SSLContext:
    """Return what encrypts where the server can and the URL asks for no verification.

    The driver makes one for each connection and reads all authorities of the system for it, which are then not
    asked: 20 ms of the processor, several times as much as all the rest of a connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
