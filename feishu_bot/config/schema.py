"""What the settings tree expects at each place, in a form that the loader, the texts and the messages share."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le

from feishu_bot.config.values import HIDDEN, Expected, Marker, Secret, Secrets, Settings

if TYPE_CHECKING:
    from pydantic import BaseModel

_SECRET_NAME = re.compile(r"secret|token|password|passwd|key", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^:@/?#\s]*):\S*@")
_PASSWORD_IN_QUERY = re.compile(r"(?i)((?:secret|token|password|passwd|key)[^=&\s]*=)[^&\s]*")
_TOKEN_IN_HOOK = re.compile(r"(?<=/hook/)[^/?#\s]+")  # whoever has the URL of a custom bot can speak as it
_UNBOUNDED = 2**53


@dataclass(frozen=True, slots=True)
class Shape:
    """What is expected at one place.

    ``kind``: ``section`` (of the class ``model``), ``map`` (name -> ``item``), ``list`` (of ``item``), ``text``,
    ``number``, ``switch`` or ``any``. ``expected`` says it in words; ``choices`` are the only texts allowed.
    """

    kind: Literal["section", "map", "list", "text", "number", "switch", "any"]
    expected: str
    optional: bool = False
    secret: bool = False
    marker: Marker | None = None
    choices: tuple[str, ...] = ()
    model: type[Settings] | None = None
    item: Shape | None = None

    @property
    def is_leaf(self) -> bool:
        return self.kind in {"text", "number", "switch"}


ANY = Shape("any", "any value")


def shape_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> Shape:
    """Return the shape of a type annotation; ``metadata`` is what stood in its outer ``Annotated``."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return shape_of(inner, (*_flat(more), *metadata))
    if get_origin(annotation) in {Union, types.UnionType}:
        members = [member for member in get_args(annotation) if member is not types.NoneType]
        optional = len(members) < len(get_args(annotation))
        shape = shape_of(members[0], metadata)
        if optional:
            shape = replace(shape, optional=True, expected=f"{shape.expected}, or null")
        return shape
    shape = _plain_shape(annotation, metadata)
    for item in metadata:
        if isinstance(item, Expected):
            shape = replace(shape, expected=str(item))
        elif isinstance(item, Marker):
            shape = replace(shape, marker=item)
    return shape


def _flat(metadata: list[Any]) -> list[Any]:
    """Unpack what pydantic's ``Field`` keeps inside an ``Annotated``."""
    return [part for item in metadata for part in (getattr(item, "metadata", None) or [item])]


def _plain_shape(annotation: Any, metadata: tuple[Any, ...]) -> Shape:
    origin, arguments = get_origin(annotation), get_args(annotation)
    shape = Shape("text", "a text")
    if annotation in {Secret, Secrets}:
        many = ", or a list of texts while one rotates" if annotation is Secrets else ""
        shape = Shape("text", f"a text{many}", secret=True, optional=annotation is Secrets)
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        shape = Shape("section", "a section (lines of key: value)", model=annotation)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        shape = Shape("map", "a section (lines of name: value)", item=shape_of(arguments[1]))
    elif origin in {tuple, list}:
        item = shape_of(arguments[0])
        each = "a section (key: value)" if item.kind == "section" else item.expected
        shape = Shape("list", f"a list; each: {each}", item=item)
    elif origin is Literal or (isinstance(annotation, type) and issubclass(annotation, Enum)):
        choices = arguments if origin is Literal else tuple(member.value for member in annotation)
        words = ", ".join(map(str, choices))
        shape = Shape(
            "text", f"one of {words}" if len(choices) > 1 else words, choices=tuple(map(str, choices))
        )
    elif annotation is bool:
        shape = Shape("switch", "true or false")
    elif annotation in {int, float}:
        shape = Shape("number", _number(annotation, metadata))
    elif annotation is Any:
        shape = ANY
    return shape


def _number(annotation: type, metadata: tuple[Any, ...]) -> str:
    what = "a whole number" if annotation is int else "a number"
    low = high = None
    for item in metadata:
        if isinstance(item, Ge):
            low = f"from {item.ge}"
        elif isinstance(item, Gt):
            low = f"above {item.gt}"
        elif isinstance(item, Le) and isinstance(item.le, int | float) and item.le < _UNBOUNDED:
            high = f"to {item.le}"
    if low and not high:
        low = low.replace("from", "of at least")
    return " ".join(part for part in (what, low, high) if part)


def fields_of(model: type[BaseModel]) -> dict[str, Shape]:
    """Return the shape of every key of a section."""
    return {
        name: shape_of(field.annotation, tuple(field.metadata)) for name, field in model.model_fields.items()
    }


# ----------------------------------------------------------------------------------------------- secrecy


def is_secret(path: tuple[str, ...], shape: Shape) -> bool:
    """Tell whether values at ``path`` are never shown: by type, and by name where a text can stand."""
    if shape.secret:
        return True
    if shape.kind in {"number", "switch", "section", "map"} or shape.choices or shape.marker is not None:
        return False
    names = [part for part in path if not part.isdecimal()]
    inspected = names if shape.kind == "any" else names[-1:]
    return any(_SECRET_NAME.search(name) for name in inspected)


def hide_passwords(text: str) -> str:
    """Return a text in which the passwords of URLs are hidden."""
    if "=" in text:
        text = _PASSWORD_IN_QUERY.sub(rf"\1{HIDDEN}", text)
    text = _TOKEN_IN_HOOK.sub(HIDDEN, text) if "/hook/" in text else text
    return _PASSWORD_IN_URL.sub(rf"\1:{HIDDEN}@", text) if "@" in text else text


def passwords_in(text: str) -> list[str]:
    """Return the passwords that ``hide_passwords`` hides."""
    found = [match[0].split(":", 1)[1][:-1] for match in _PASSWORD_IN_URL.finditer(text)]
    found += [match[0].split("=", 1)[1] for match in _PASSWORD_IN_QUERY.finditer(text)]
    found += _TOKEN_IN_HOOK.findall(text)
    return [password for password in found if password]
