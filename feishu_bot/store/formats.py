"""The files that conversations are exported to and imported from. Nothing here knows a database.

JSON: ``[{"conversation": {…}, "messages": [{…}, …]}, …]``, or one such object. JSONL: a line for the conversation,
one for each message, and ``{"end": N}``. CSV: the same as rows, for spreadsheets. Markdown: to be read only.
All are written and read a message at a time.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from feishu_bot.errors import InvalidImport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

MAX_VALUE_CHARS: Final = 1 << 26  # of one conversation's head or one message in a file
_CHUNK: Final = 1 << 16

HEAD_FIELDS: Final = (
    "id",
    "public_id",
    "user_key",
    "platform",
    "chat_id",
    "created_at",
    "last_activity",
    "summary",
    "total_tokens",
    "message_count",
    "active_persona_id",
    "tenant_id",
    "user_id",
    "agent",
    "title",
    "traits",
    "scope_key",
    "forked_from",
    "forked_at",
)
MESSAGE_FIELDS: Final = (
    "id",
    "role",
    "content",
    "timestamp",
    "tokens",
    "metadata",
    "sender_id",
    "source_id",
    "save_key",
    "edited_at",
    "recalled_at",
)


def dumps(value: object) -> str:
    """Return JSON on one line."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # a number of more than 64 bits or half a character, somewhere in what others stored
        return json.dumps(value, separators=(",", ":"))


# ------------------------------------------------------------------------------------------------ writing


class Writer(ABC):
    """Writes conversations one after the other: ``begin``, ``message`` for each, ``end``; at last ``close``."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._messages = 0

    @abstractmethod
    def begin(self, head: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def message(self, message: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    def close(self) -> None:
        """Write what stands behind the last conversation."""


class JsonWriter(Writer):
    """``single``: the file is one conversation, not a list of them."""

    def __init__(self, file: IO[str], *, single: bool = False) -> None:
        super().__init__(file)
        self._single = single
        self._before = "" if single else "[\n"

    def begin(self, head: Mapping[str, Any]) -> None:
        self._file.write(f'{self._before}{{"conversation": {dumps(head)},\n"messages": [')
        self._before = ",\n"
        self._messages = 0

    def message(self, message: Mapping[str, Any]) -> None:
        self._file.write(("," if self._messages else "") + "\n" + dumps(message))
        self._messages += 1

    def end(self) -> None:
        self._file.write("\n]}" if self._messages else "]}")

    def close(self) -> None:
        if not self._single:
            self._file.write("[]" if self._before == "[\n" else "\n]")
        self._file.write("\n")


class JsonlWriter(Writer):
    def begin(self, head: Mapping[str, Any]) -> None:
        self._file.write(dumps({"conversation": head}) + "\n")
        self._messages = 0

    def message(self, message: Mapping[str, Any]) -> None:
        self._file.write(dumps({"message": message}) + "\n")
        self._messages += 1

    def end(self) -> None:
        self._file.write(f'{{"end":{self._messages}}}\n')


_FORMULA: Final = frozenset("=+-@＝＋－＠")
_BEHIND_APOSTROPHE: Final = _FORMULA | frozenset("\t\r\n'")
_CSV_TEXTS: Final = frozenset({"content", "role", "user_key", "platform"})  # never null: empty is empty
_CSV_OBJECTS: Final = frozenset({"traits", "metadata"})
_CSV_NUMBERS: Final = frozenset({"total_tokens", "message_count", "tokens", "forked_at"})
_CSV_COLUMNS: Final = (
    "record",
    *HEAD_FIELDS,
    *(f"message_{name}" if name in HEAD_FIELDS else name for name in MESSAGE_FIELDS),
)


def _needs_apostrophe(text: str) -> bool:
    return text[0] in _BEHIND_APOSTROPHE or text.lstrip()[:1] in _FORMULA


def to_cell(value: object) -> str:
    """Return what a cell holds: nothing that a spreadsheet takes for a formula, and not two values alike.

    A text that begins like a formula (blanks in front of it or not) or with an apostrophe gets an apostrophe in
    front; an empty one is an apostrophe, because an empty cell is no value at all.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return dumps(value)
    if not value:
        return "'"
    return "'" + value if _needs_apostrophe(value) else value


def from_cell(cell: str) -> str | None:
    """Return what ``to_cell`` was given, of texts; an apostrophe that somebody else began a cell with stays."""
    if not cell:
        return None
    if cell == "'":
        return ""
    return cell[1:] if cell[0] == "'" and _needs_apostrophe(cell[1:]) else cell


class CsvWriter(Writer):
    """With a byte order mark and every cell in quotes, as spreadsheets like it."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file)
        file.write("\ufeff")
        self._rows = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        self._rows.writerow(_CSV_COLUMNS)
        self._head = [""] * len(HEAD_FIELDS)

    def begin(self, head: Mapping[str, Any]) -> None:
        cells = [to_cell(head.get(name)) for name in HEAD_FIELDS]
        self._rows.writerow(["conversation", *cells, *[""] * len(MESSAGE_FIELDS)])
        # Repeated beside each message, so that a spreadsheet can sort and filter.
        shown = {"public_id", "user_key", "platform", "chat_id"}
        self._head = [cell if name in shown else "" for name, cell in zip(HEAD_FIELDS, cells, strict=True)]
        self._messages = 0

    def message(self, message: Mapping[str, Any]) -> None:
        cells = [to_cell(message.get(name)) for name in MESSAGE_FIELDS]
        self._rows.writerow(["message", *self._head, *cells])
        self._messages += 1

    def end(self) -> None:
        counted = [str(self._messages) if name == "message_count" else "" for name in HEAD_FIELDS]
        self._rows.writerow(["end", *counted, *[""] * len(MESSAGE_FIELDS)])


class MarkdownWriter(Writer):
    """For people. It is not read back: what belongs to a message and what it says look alike in it."""

    def begin(self, head: Mapping[str, Any]) -> None:
        title = " ".join((head.get("title") or head["user_key"]).split())
        self._file.write(f"# {title}\n\n")
        for name in ("user_key", "platform", "chat_id", "created_at", "last_activity", "total_tokens"):
            if head.get(name) is not None:
                self._file.write(f"- {name}: {head[name]}\n")
        if head.get("summary"):
            self._file.write("\n" + _quoted(head["summary"]))

    def message(self, message: Mapping[str, Any]) -> None:
        about = [message["timestamp"], message["role"], message.get("sender_id")]
        self._file.write(f"\n**{' · '.join(word for word in about if word)}**\n\n")
        self._file.write(_quoted(message["content"]))

    def end(self) -> None:
        self._file.write("\n")


def _quoted(content: str) -> str:
    return "".join(f"> {line}\n" for line in content.split("\n"))


_WRITERS: Final[Mapping[str, Callable[[IO[str]], Writer]]] = {
    "json": JsonWriter,
    "jsonl": JsonlWriter,
    "csv": CsvWriter,
    "md": MarkdownWriter,
}
FORMATS: Final = tuple(_WRITERS)


def make_writer(file: IO[str], kind: str, *, single: bool = False) -> Writer:
    """Return a writer of ``kind`` (json, jsonl, csv or md); ``single``: for one conversation in a file of its own."""
    return JsonWriter(file, single=single) if kind == "json" else _WRITERS[kind](file)


# ------------------------------------------------------------------------------------------------ reading


class Found(NamedTuple):
    """A value and where it stands: ``line 7``."""

    where: str
    value: Any


class Incoming(NamedTuple):
    """A conversation as it is read. ``messages`` must be read to its end before the next conversation."""

    head: Found
    messages: Iterator[Found]


def read_file(path: Path, *, advance: Callable[[int], None] | None = None) -> Iterator[Incoming]:
    """Yield the conversations of a JSON, JSONL or CSV file; ``advance`` is told how many bytes were read.

    Raises InvalidImport with line and reason where the file is damaged, OSError where it cannot be read.
    """
    kind = _kind_of(path)
    with path.open("rb") as raw:
        source = _Source(raw, advance)
        if kind == "jsonl":
            yield from _read_jsonl(source)
        elif kind == "csv":
            yield from _read_csv(source)
        else:
            yield from _read_json(_Json(source))


def _kind_of(path: Path) -> str:
    kind = path.suffix.lower().removeprefix(".")
    if kind in {"json", "jsonl", "csv"}:
        return kind
    if kind == "md":
        raise InvalidImport(f"{path.name}: Markdown can only be exported; import JSON, JSONL or CSV")
    with path.open("rb") as file:
        first = file.readline(_CHUNK).removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith((b'{"conversation":', b'{"conversation" :')):
        with suppress(ValueError):
            return "jsonl" if set(json.loads(first)) == {"conversation"} else "json"
        return "json"
    return "json" if first[:1] in {b"", b"[", b"{"} else "csv"


class _Source:
    """The text of a file, a line or a piece at a time."""

    def __init__(self, raw: IO[bytes], advance: Callable[[int], None] | None) -> None:
        self._raw = raw
        self._advance = advance or (lambda _read: None)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.number = 0  # of the line that was yielded last

    def __iter__(self) -> Iterator[str]:
        """Yield the lines with their ends."""
        while line := self._raw.readline(MAX_VALUE_CHARS):
            self._advance(len(line))
            self.number += 1
            if len(line) >= MAX_VALUE_CHARS:
                raise InvalidImport(f"line {self.number}: longer than {MAX_VALUE_CHARS} bytes")
            yield self._decode(line, self.number)

    def read(self, most: int, line: int) -> str | None:
        """Return the next piece, None at the end; ``line`` is the number of the line it begins in."""
        piece = self._raw.read(most)
        self._advance(len(piece))
        text = self._decode(piece, line, final=not piece)
        return text if piece else None

    def _decode(self, piece: bytes, line: int, *, final: bool = False) -> str:
        try:
            return self._decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            line += piece.count(b"\n", 0, error.start)
            raise InvalidImport(f"line {line}: this is no UTF-8 text") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)
_BLANK: Final = re.compile(r"[ \t\r\n]*")


class _Json:
    """JSON text, read a value at a time."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._text = ""
        self._at = 0
        self._line = 1  # of the beginning of ``_text``
        self._ended = False

    @property
    def where(self) -> str:
        return f"line {self._line + self._text.count(chr(10), 0, self._at)}"

    def peek(self) -> str:
        """Return the next character that is no blank; empty at the end."""
        while True:
            match = _BLANK.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> str:
        """Take one of the ``expected`` characters."""
        found = self.peek()
        if not found or found not in expected:
            seen = repr(found) if found else "the end of the file"
            raise InvalidImport(f"{self.where}: expected {' or '.join(expected)}, found {seen}")
        self._at += 1
        return found

    def value(self) -> Found:
        """Take a whole value."""
        if not self.peek():
            raise InvalidImport(f"{self.where}: the file ends in the middle")
        where = self.where
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                line = self._line + error.lineno - 1
                if self._more():
                    continue
                raise InvalidImport(f"line {line}: {error.msg} (column {error.colno})") from None
            except (ValueError, RecursionError) as error:
                raise InvalidImport(f"{where}: {error}") from None
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._at = end
            return Found(where, value)

    def _more(self) -> bool:
        """Read as much again as there is, so that a long value is not looked at too often."""
        left = len(self._text) - self._at
        if self._ended or left > MAX_VALUE_CHARS:
            return False
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        piece = self._source.read(max(_CHUNK, left), self._line + self._text.count("\n"))
        if piece is None:
            self._ended = True
            return False
        self._text += piece
        return True


def _read_json(source: _Json) -> Iterator[Incoming]:
    if source.peek() == "[":
        source.take("[")
        if source.peek() == "]":
            source.take("]")
        else:
            yield from _read_object(source)
            while source.take(",]") == ",":
                yield from _read_object(source)
    else:
        yield from _read_object(source)
    if source.peek():
        raise InvalidImport(f"{source.where}: text behind the end")


def _read_object(source: _Json) -> Iterator[Incoming]:
    """Yield the one conversation of an object, whatever the order of its members."""
    source.peek()
    began = source.where
    source.take("{")
    head: Found | None = None
    early: list[Found] | None = None
    more = source.peek() != "}"
    while more:
        name = source.value().value
        source.take(":")
        if name == "messages" and head is not None:
            yield Incoming(head, chain(_read_list(source), _read_rest(source)))
            return
        if name == "messages":
            early = list(_read_list(source))
        elif name == "conversation":
            head = source.value()
        else:
            source.value()
        if head is not None and early is not None:
            yield Incoming(head, chain(_read_rest(source), early))
            return
        more = source.take(",}") == ","
    missing = '"conversation"' if head is None else '"messages"'
    raise InvalidImport(f"{began}: no {missing} in this object")


def _read_rest(source: _Json) -> Iterator[Found]:
    """Read the members behind those that are needed, so that a conversation that is cut off there is damaged too."""
    while source.take(",}") == ",":
        source.value()
        source.take(":")
        source.value()
    yield from ()


def _read_list(source: _Json) -> Iterator[Found]:
    source.take("[")
    if source.peek() == "]":
        source.take("]")
        return
    yield source.value()
    while source.take(",]") == ",":
        yield source.value()


# ------------------------------------------------------------------------------------------- line by line


class _Records:
    """Conversations out of a sequence of records: ``conversation``, ``message`` …, ``end``."""

    def __init__(self, records: Iterator[tuple[str, str, Any]]) -> None:
        self._records = records

    def __iter__(self) -> Iterator[Incoming]:
        for kind, where, value in self._records:
            if kind != "conversation":
                raise InvalidImport(f"{where}: {kind} before any conversation")
            yield Incoming(Found(where, value), self._messages(where))

    def _messages(self, began: str) -> Iterator[Found]:
        count = 0
        for kind, where, value in self._records:
            if kind == "message":
                count += 1
                yield Found(where, value)
                continue
            if kind != "end":
                raise InvalidImport(f"{where}: the conversation of {began} has no end")
            if value != count:
                raise InvalidImport(f"{where}: {value} messages announced, {count} found")
            return
        raise InvalidImport(f"the file ends in the middle of the conversation of {began}")


def _read_jsonl(source: _Source) -> Iterator[Incoming]:
    def records() -> Iterator[tuple[str, str, Any]]:
        for line in source:
            if not line.strip():
                continue
            where = f"line {source.number}"
            try:
                record = _DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise InvalidImport(f"{where}: {error.msg} (column {error.colno})") from None
            except (ValueError, RecursionError) as error:
                raise InvalidImport(f"{where}: {error}") from None
            if not isinstance(record, dict) or len(record) != 1:
                raise InvalidImport(
                    f'{where}: expected {{"conversation": …}}, {{"message": …}} or {{"end": N}}'
                )
            ((kind, value),) = record.items()
            if kind not in {"conversation", "message", "end"}:
                raise InvalidImport(f"{where}: unknown record {kind!r}")
            yield kind, where, value

    yield from _Records(records())


def _read_csv(source: _Source) -> Iterator[Incoming]:
    if csv.field_size_limit() < MAX_VALUE_CHARS:
        csv.field_size_limit(MAX_VALUE_CHARS)  # of the whole process; its default is 128 KiB
    rows = csv.reader(iter(source), strict=True)

    def records() -> Iterator[tuple[str, str, Any]]:
        columns: list[str] | None = None
        began = 1
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise InvalidImport(f"line {began}: {error}") from None
            where, began = f"line {began}", rows.line_num + 1
            if columns is None:
                columns = _columns(cells, where)
            elif len(cells) != len(columns):
                raise InvalidImport(f"{where}: {len(cells)} cells instead of {len(columns)}")
            else:
                yield _record(dict(zip(columns, cells, strict=True)), where)

    yield from _Records(records())


def _columns(cells: list[str], where: str) -> list[str]:
    needed = ("record", "user_key", "platform", "role", "content")
    missing = [name for name in needed if name not in cells]
    if missing:
        raise InvalidImport(f"{where}: no column {', '.join(missing)}")
    return cells


def _record(cells: Mapping[str, str], where: str) -> tuple[str, str, Any]:
    kind = cells["record"]
    if kind == "conversation":
        return kind, where, {n: _value(n, cells[n], where) for n in HEAD_FIELDS if n in cells}
    if kind == "message":
        columns = {n: f"message_{n}" if n in HEAD_FIELDS else n for n in MESSAGE_FIELDS}
        return kind, where, {n: _value(n, cells[c], where) for n, c in columns.items() if c in cells}
    if kind == "end":
        return kind, where, _value("message_count", cells.get("message_count", ""), where)
    raise InvalidImport(f"{where}: the column record holds {kind!r}, not conversation, message or end")


def _value(name: str, cell: str, where: str) -> Any:
    if name in _CSV_NUMBERS or name in _CSV_OBJECTS:
        if not cell:
            return None
        try:
            return _DECODER.decode(cell)
        except (ValueError, RecursionError):
            raise InvalidImport(
                f"{where}: {name} is no {'object' if name in _CSV_OBJECTS else 'number'}"
            ) from None
    text = from_cell(cell)
    return "" if text is None and name in _CSV_TEXTS else text
