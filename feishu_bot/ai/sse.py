"""The lines of a server-sent event stream, put together from whatever pieces the network delivers."""

from __future__ import annotations

from typing import Final

MAX_EVENT_BYTES: Final = 4 * 1024 * 1024  # a server that sends more without an end of line means no good


class EventTooLarge(ValueError):
    """An event has more bytes than are kept; the stream cannot be read any further."""


class EventSplitter:
    """Gives the ``data`` of each complete event (WHATWG HTML, 9.2.6; lines end with LF or CRLF).

    Other fields and comments are passed over. Time and memory are linear in the bytes fed, however they are
    cut into pieces.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._line: list[bytes] = []  # pieces of a line whose end has not come yet
        self._data: list[bytes] = []  # the data lines of an event whose empty line has not come yet
        self._size = 0  # of both

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of every event that ``piece`` completes; EventTooLarge when one grows without end."""
        if b"\n" not in piece:
            self._line.append(piece)
            self._grow(len(piece))
            return []
        if self._line:
            self._line.append(piece)
            piece = b"".join(self._line)
            self._line.clear()
        lines = piece.split(b"\n")
        rest = lines.pop()
        events: list[bytes] = []
        data = self._data
        for raw in lines:
            line = raw[:-1] if raw.endswith(b"\r") else raw
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif not line and data:
                events.append(data[0] if len(data) == 1 else b"\n".join(data))
                data.clear()
        self._size = sum(map(len, data)) if data else 0
        if rest:
            self._line.append(rest)
        self._grow(len(rest))
        return events

    def finish(self) -> list[bytes]:
        """Return the event that the stream ended in; some servers leave out the last empty line."""
        return self.feed(b"\n\n")

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._max:
            raise EventTooLarge(f"an event of more than {self._max} bytes")
