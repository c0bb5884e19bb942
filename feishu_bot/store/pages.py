"""Rows of a SQLite file read from its pages, without the tree that leads to them.

For a file whose tree is broken: every leaf page that still is one gives its rows. The format is that of
https://www.sqlite.org/fileformat2.html, sections 1.6 (b-tree pages) and 2.1 (records).
"""

from __future__ import annotations

import mmap
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Value = int | float | str | bytes | None

_MAGIC = b"SQLite format 3\0"
_PAGE_SIZE = 4096  # SQLite's default, where the header does not say
_HEADER = 100  # bytes before the content of the first page
_TABLE_LEAF = 0x0D
_LEAF_HEADER = 8
_MAX_VARINT = 9
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # serial type -> bytes
_FLOAT, _ZERO, _ONE, _BLOB = 7, 8, 9, 12


class Row(NamedTuple):
    """A row as a page holds it; a column that is the rowid itself is None in ``values``."""

    rowid: int
    values: list[Value]


class _Unreadable(Exception):
    """These bytes are no row."""


@contextmanager
def open_pages(path: Path) -> Iterator[Pages]:
    """Yield the pages of a file, whatever is in it."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield Pages(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield Pages(content)


class Pages:
    """The pages of a database file."""

    def __init__(self, content: mmap.mmap | bytes) -> None:
        self._content = content
        self._size, self._usable = self._read_sizes()
        self.count = len(content) // self._size

    def _read_sizes(self) -> tuple[int, int]:
        """Return the size of a page and how much of it is used."""
        header = self._content[:_HEADER]
        if len(header) < _HEADER or header[:16] != _MAGIC:
            return _PAGE_SIZE, _PAGE_SIZE
        (size,) = struct.unpack(">H", header[16:18])
        size = 65536 if size == 1 else size
        if size < 512 or size & (size - 1):  # noqa: PLR2004  # the least that the format allows
            return _PAGE_SIZE, _PAGE_SIZE
        return size, size - min(header[20], size // 8)

    def rows(self) -> Iterator[Row]:
        """Yield every row of every leaf page of a table, pages that are free left out as far as that is known."""
        free = self._free_pages()
        for number in range(1, self.count + 1):
            if number not in free:
                yield from self._rows_of(number)

    def _page(self, number: int) -> bytes:
        if not 1 <= number <= self.count:
            raise _Unreadable
        return self._content[(number - 1) * self._size : number * self._size]

    def _free_pages(self) -> set[int]:
        """Return the pages on the list of free ones: what they hold was removed."""
        free: set[int] = set()
        if self._content[:16] != _MAGIC:
            return free
        (trunk,) = struct.unpack(">I", self._content[32:36])
        while trunk and trunk not in free:
            free.add(trunk)
            try:
                page = self._page(trunk)
            except _Unreadable:
                break
            trunk, count = struct.unpack(">II", page[:8])
            count = min(count, self._size // 4 - 2)
            free.update(struct.unpack(f">{count}I", page[8 : 8 + 4 * count]))
        return free

    def _rows_of(self, number: int) -> Iterator[Row]:
        page = self._page(number)
        start = _HEADER if number == 1 else 0
        if page[start] != _TABLE_LEAF:
            return
        (count,) = struct.unpack(">H", page[start + 3 : start + 5])
        first = start + _LEAF_HEADER
        if first + 2 * count > self._size:
            return
        for pointer in struct.unpack(f">{count}H", page[first : first + 2 * count]):
            try:
                yield self._row(page, pointer)
            except _Unreadable:
                continue

    def _row(self, page: bytes, place: int) -> Row:
        size, place = _varint(page, place)
        rowid, place = _varint(page, place)
        if size > len(self._content):
            raise _Unreadable
        if rowid >= 1 << 63:
            rowid -= 1 << 64
        return Row(rowid, _record(self._payload(page, place, size)))

    def _payload(self, page: bytes, place: int, size: int) -> bytes:
        """Return a row's bytes, with those that did not fit into its page."""
        usable = self._usable
        if size <= usable - 35:
            found = page[place : place + size]
            if len(found) < size:
                raise _Unreadable
            return found
        least = (usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (usable - 4)
        if local > usable - 35:
            local = least
        if place + local + 4 > len(page):
            raise _Unreadable
        parts = [page[place : place + local]]
        (following,) = struct.unpack(">I", page[place + local : place + local + 4])
        missing = size - local
        while missing > 0:
            more = self._page(following)
            (following,) = struct.unpack(">I", more[:4])
            parts.append(more[4 : min(usable, 4 + missing)])
            missing -= len(parts[-1])
        return b"".join(parts)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for length in range(_MAX_VARINT):
        if place + length >= len(data):
            raise _Unreadable
        byte = data[place + length]
        if length == _MAX_VARINT - 1:
            return (value << 8) | byte, place + _MAX_VARINT
        value = (value << 7) | (byte & 0x7F)
        if byte < 0x80:  # noqa: PLR2004  # the bit that says that more follows
            return value, place + length + 1
    raise _Unreadable


def _record(payload: bytes) -> list[Value]:
    header, place = _varint(payload, 0)
    if header > len(payload):
        raise _Unreadable
    types = []
    while place < header:
        serial, place = _varint(payload, place)
        types.append(serial)
    values: list[Value] = []
    for serial in types:
        length = _length(serial)
        data = payload[place : place + length]
        if len(data) < length:
            raise _Unreadable
        values.append(_value(serial, data))
        place += length
    return values


def _length(serial: int) -> int:
    if serial in _INTEGERS:
        return _INTEGERS[serial]
    if serial == _FLOAT:
        return 8
    return (serial - _BLOB) // 2 if serial >= _BLOB else 0


def _value(serial: int, data: bytes) -> Value:
    if serial == 0:
        return None
    if serial in _INTEGERS:
        return int.from_bytes(data, "big", signed=True)
    if serial == _FLOAT:
        value: float = struct.unpack(">d", data)[0]
        return value
    if serial in {_ZERO, _ONE}:
        return serial - _ZERO
    if serial < _BLOB:  # 10 and 11 are never written
        raise _Unreadable
    return data.decode("utf-8", "replace") if serial % 2 else data
