"""YAML as a tree of values that know where they were written, and the list of mistakes found in it.

Only the parser's events are used: no tag makes an object, nothing recurses, and size, depth and the expansion of
aliases are bounded, so that a hostile file gives one clear line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NODES = 20_000  # values in one file, aliases counted as often as they are used
MAX_DEPTH = 40
MAX_MISTAKES = 100  # lines of one report
_QUOTED = re.compile(r"'[^']{2,}'|\"[^\"]{2,}\"")
_STRING_TAGS = {None, "!", "tag:yaml.org,2002:str"}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from: a line of a file, or a source such as ``environment NAME``."""

    source: str
    line: int = 0
    column: int = 0

    @property
    def place(self) -> str:
        """``file:line:column``, or the source's name."""
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as it was written.

    ``quoted`` texts are never read as numbers or null. ``raw``: the text of a variable, to be read as YAML where
    no text is expected. ``shown`` is what a message may repeat when ``text`` had variables replaced in it.
    """

    origin: Origin
    text: str
    quoted: bool = False
    raw: bool = False
    shown: str | None = None

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text in {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    origin: Origin
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping."""

    origin: Origin
    items: Mapping[str, Node]


Node = Scalar | Sequence | Section


# ----------------------------------------------------------------------------------------------- mistakes


def show_key(key: str) -> str:
    """Return a key as a message may show it: short, printable, and cut where a value may have been glued on."""
    cut = re.split(r"[\s:=]", key.strip(), maxsplit=1)[0]
    text = cut[:48] + ("…" if len(cut) > 48 or cut != key.strip() else "")  # noqa: PLR2004 - a line's worth
    return text if text.isprintable() and text else repr(text)


def show_path(path: Iterable[str]) -> str:
    return ".".join(map(show_key, path))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    found = get_close_matches(word[:64].lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


@dataclass(slots=True)
class Mistakes:
    """Collects every mistake, so that all are told at once."""

    found: list[tuple[int, int, int, str]] = field(default_factory=list)

    def add(
        self,
        origin: Origin,
        path: Iterable[str],
        wrong: str,
        *,
        got: str | None = None,
        expected: str | None = None,
        meant: str | None = None,
    ) -> None:
        """Add one line. ``got`` and ``expected`` must hold no secret."""
        where = show_path(path)
        line = f"{origin.place}: {where}: {wrong}" if where else f"{origin.place}: {wrong}"
        if got is not None:
            line += f" (got {got})"
        if expected:
            line += f"; expected {expected}"
        if meant:
            line += f"; did you mean {meant}?"
        self.found.append((0 if origin.line else 1, origin.line, origin.column, line))

    @property
    def is_full(self) -> bool:
        return len(self.found) >= MAX_MISTAKES

    def lines(self) -> list[str]:
        """Return the lines of the file in its order, then the others."""
        lines = [entry[3] for entry in sorted(self.found, key=lambda entry: entry[:3])]
        if len(lines) > MAX_MISTAKES:
            more = len(lines) - MAX_MISTAKES
            lines[MAX_MISTAKES:] = [f"and {more} more"]
        return lines


# ---------------------------------------------------------------------------------------------- reading


class _Stop(Exception):
    """The rest of the text cannot be read."""


@dataclass(slots=True)
class _Frame:
    """A container that is being read."""

    origin: Origin
    anchor: str | None
    is_mapping: bool
    items: list[Node] = field(default_factory=list)
    members: dict[str, Node] = field(default_factory=dict)
    merged: dict[str, Node] = field(default_factory=dict)
    key: str | None = None
    key_origin: Origin | None = None
    size: int = 1


class _Reader:
    def __init__(self, source: str, mistakes: Mistakes, *, marks: bool) -> None:
        self.source = source
        self.mistakes = mistakes
        self.marks = marks
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.frames: list[_Frame] = []
        self.total = 0
        self.root: Node | None = None
        self.documents = 0

    def origin(self, mark: Any) -> Origin:
        return (
            Origin(self.source, mark.line + 1, mark.column + 1)
            if self.marks and mark
            else Origin(self.source)
        )

    def path(self) -> list[str]:
        parts = [frame.key if frame.is_mapping else str(len(frame.items)) for frame in self.frames]
        return [part for part in parts if part is not None]

    def stop(self, origin: Origin, wrong: str) -> _Stop:
        self.mistakes.add(origin, self.path(), wrong)
        return _Stop()

    def read(self, text: str) -> Node | None:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    raise self.stop(self.origin(event.start_mark), "a second document (---) in one file")
            elif isinstance(event, yaml.NodeEvent):
                self.node(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self.close()
        return self.root

    def node(self, event: Any) -> None:
        origin = self.origin(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self.alias(event.anchor, origin)
        elif isinstance(event, yaml.ScalarEvent):
            self.scalar(event, origin)
        else:
            self.check_tag(event, origin, {None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})
            if len(self.frames) >= MAX_DEPTH:
                raise self.stop(origin, f"nested more than {MAX_DEPTH} deep")
            if self.frames and self.frames[-1].is_mapping and self.frames[-1].key is None:
                raise self.stop(origin, "a list or section cannot be a key")
            self.frames.append(_Frame(origin, event.anchor, isinstance(event, yaml.MappingStartEvent)))

    def check_tag(self, event: Any, origin: Origin, allowed: set[str | None]) -> None:
        if event.tag not in allowed:
            self.mistakes.add(origin, self.path(), "tags are not taken; quote a text that begins with !")

    def scalar(self, event: Any, origin: Origin) -> None:
        top = self.frames[-1] if self.frames else None
        if top is not None and top.is_mapping and top.key is None:
            top.key, top.key_origin = event.value, origin
            if event.value in top.members:
                first = top.members[event.value].origin
                self.mistakes.add(origin, self.path(), f"duplicate key, first in line {first.line}")
            return
        self.check_tag(event, origin, _STRING_TAGS)
        quoted = bool(event.style) or event.tag == "tag:yaml.org,2002:str"
        node = Scalar(origin, event.value, quoted=quoted)
        if event.anchor:
            self.anchors[event.anchor] = (node, 1)
        self.append(node, 1)

    def alias(self, name: str | None, origin: Origin) -> None:
        if self.frames and self.frames[-1].is_mapping and self.frames[-1].key is None:
            raise self.stop(origin, "an alias cannot be a key; quote a text that begins with *")
        if name is None or name not in self.anchors:
            raise self.stop(origin, "an alias without its anchor; quote a text that begins with *")
        self.append(*self.anchors[name])

    def close(self) -> None:
        frame = self.frames.pop()
        node: Node
        if frame.is_mapping:
            node = Section(frame.origin, {**frame.merged, **frame.members})
        else:
            node = Sequence(frame.origin, tuple(frame.items))
        if frame.anchor:
            self.anchors[frame.anchor] = (node, frame.size)
        self.append(node, frame.size)

    def append(self, node: Node, size: int) -> None:
        if not self.frames:
            self.root = node
            return
        top = self.frames[-1]
        top.size += size
        self.total += 1
        if top.size > MAX_NODES or self.total > MAX_NODES:
            raise self.stop(node.origin, f"more than {MAX_NODES} values, counting what aliases repeat")
        if not top.is_mapping:
            top.items.append(node)
            return
        key, origin = top.key or "", top.key_origin or node.origin
        if key == "<<":
            self.merge(top, node, origin)
        elif key not in top.members:
            top.members[key] = replace(node, origin=origin)
        top.key = None

    def merge(self, top: _Frame, node: Node, origin: Origin) -> None:
        parts = node.items if isinstance(node, Sequence) else (node,)
        for part in parts:
            if not isinstance(part, Section):
                self.mistakes.add(origin, self.path(), "only sections can be merged with <<")
                continue
            for key, value in part.items.items():
                top.merged.setdefault(key, value)


def read_yaml(text: str, source: str, mistakes: Mistakes, *, marks: bool = True) -> Node | None:
    """Read one YAML document; None when it is empty or when a mistake was added."""
    reader = _Reader(source, mistakes, marks=marks)
    try:
        text.encode()
        return reader.read(text)
    except _Stop:
        pass
    except UnicodeEncodeError:
        mistakes.add(Origin(source), (), "not UTF-8")
    except yaml.MarkedYAMLError as error:
        mistakes.add(
            reader.origin(error.problem_mark or error.context_mark), (), _syntax(error.problem or "")
        )
    except yaml.reader.ReaderError as error:
        position = error.position if isinstance(error.position, int) else 0
        before = text[:position]
        origin = (
            Origin(source, before.count("\n") + 1, position - before.rfind("\n")) if marks else Origin(source)
        )
        mistakes.add(origin, (), "a control character; only printable text can stand in a configuration")
    except yaml.YAMLError:
        mistakes.add(Origin(source), (), "not YAML")
    return None


def _syntax(problem: str) -> str:
    """Say what the parser found, without repeating text of the file (it may be part of a secret)."""
    if "cannot start any token" in problem:
        return "not YAML: a tab or one of @ ` % begins a value; indent with spaces, and quote such a text"
    if "tag" in problem:
        return "not YAML: a tag that cannot be read; quote a text that begins with !"
    if "alias" in problem or "anchor" in problem:
        return "not YAML: an anchor or alias that cannot be read; quote a text that begins with & or *"
    return "not YAML: " + _QUOTED.sub("…", problem)[:120]


# ------------------------------------------------------------------------------------------------ making


def from_python(value: Any, origin: Origin) -> Node:
    """Return plain Python data as a tree in which everything has one origin."""
    if isinstance(value, Mapping):
        return Section(origin, {str(key): from_python(item, origin) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Sequence(origin, tuple(from_python(item, origin) for item in value))
    if value is None:
        return Scalar(origin, "null")
    if isinstance(value, bool):
        return Scalar(origin, "true" if value else "false")
    return Scalar(origin, str(value), quoted=isinstance(value, str))


def merge(base: Node | None, over: Node) -> Node:
    """Return ``base`` with ``over`` laid on it: sections key by key, all else replaced."""
    if not isinstance(base, Section) or not isinstance(over, Section):
        return over
    items = dict(base.items)
    for key, value in over.items.items():
        items[key] = merge(items.get(key), value)
    return Section(over.origin if over.origin.line else base.origin, items)


def put(root: Node, path: list[str], value: Node) -> Node:
    """Return ``root`` with ``value`` merged in at ``path``; a number is the place in a list that has it."""
    if not path:
        return merge(root, value)
    head, rest = path[0], path[1:]
    if isinstance(root, Sequence) and head.isdecimal() and int(head) < len(root.items):
        place = int(head)
        items = list(root.items)
        items[place] = put(items[place], rest, value)
        return Sequence(root.origin, tuple(items))
    members = dict(root.items) if isinstance(root, Section) else {}
    below = members.get(head, Section(value.origin, {}))
    members[head] = put(below, rest, value)
    return Section(root.origin, members)


def look_up(root: Node, path: Iterable[str]) -> Node | None:
    """Return the value at ``path``, or None."""
    node: Node | None = root
    for part in path:
        if isinstance(node, Section):
            node = node.items.get(part)
        elif isinstance(node, Sequence) and part.isdecimal() and int(part) < len(node.items):
            node = node.items[int(part)]
        else:
            return None
    return node
