"""The types of values in the configuration, and the words for what is expected of each."""

from __future__ import annotations

import re
from datetime import timedelta
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    SecretStr,
)
from pydantic_core import CoreSchema, core_schema

ACCOUNT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
HIDDEN = "***"


class Settings(BaseModel):
    """The base of every part of the tree: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class Expected(str):
    """Marks an annotation with what is expected there, in words for a mistake's line."""

    __slots__ = ()


class Marker(Enum):
    """What an annotated text is, beyond a text."""

    URL = "url"  # may be shown, without its password
    FILE = "file"  # relative: from the configuration file's folder
    DATABASE = "database"  # a URL whose file, for SQLite, is relative in the same way


Secret = SecretStr


class Secrets:
    """One secret, or several while one rotates; never shown by ``repr``, ``str`` or a dump.

    Falsy when none is set. The first is the one to use for calls that we make.
    """

    __slots__ = ("_values",)

    def __init__(self, *values: str) -> None:
        self._values = tuple(value for value in values if value)

    def values(self) -> tuple[str, ...]:
        """Return every accepted value, the current one first."""
        return self._values

    @property
    def current(self) -> str:
        """The value to use for our own calls; ``""`` when none is set."""
        return self._values[0] if self._values else ""

    def __bool__(self) -> bool:
        return bool(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secrets) and other._values == self._values

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        return f"Secrets({', '.join([repr(HIDDEN)] * len(self._values))})"

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read a text, a list of texts or None."""
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, SecretStr):
            return cls(value.get_secret_value())
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return cls(*value)
        raise ValueError("not a text or a list of texts")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda secrets: HIDDEN if secrets else None, when_used="json"
            ),
        )


_DURATION = re.compile(r"(\d{1,8})\s*(s|m|h|d)", re.ASCII)
_LONGEST = timedelta(days=36500)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(value: object) -> object:
    """Read ``90s``, ``30m``, ``6h`` or ``2d`` as a timedelta; pass a timedelta through."""
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a duration with its unit")
    length = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if length > _LONGEST:
        raise ValueError("too long for a duration")
    if not length:
        raise ValueError("not longer than nothing")
    return length


def format_duration(length: timedelta) -> str:
    """Return the shortest text that ``parse_duration`` reads as ``length`` (whole seconds)."""
    seconds = int(length.total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _parse_network(value: object) -> object:
    if isinstance(value, str):
        try:
            return ip_network(value.strip(), strict=False)
        except ValueError:
            raise ValueError("not an address or network") from None
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    raise ValueError("not an address or network")


def _check_http_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("not an http(s) URL")
    return value.rstrip("/")


def _check_database_url(value: str) -> str:
    scheme = value.partition(":")[0].partition("+")[0]
    if scheme not in {"sqlite", "postgresql", "postgres", "mysql", "mariadb"} or "://" not in value:
        raise ValueError("not the URL of a database that is known")
    if scheme != "sqlite":
        try:
            usable = (urlsplit(value).port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("not a URL: host or port cannot be read")
    return value


def _check_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("not a time zone") from None
    return value


_MONTHS = {
    name: n
    for n, name in enumerate(
        ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], 1
    )
}
_DAYS = {name: n for n, name in enumerate(["sun", "mon", "tue", "wed", "thu", "fri", "sat"])}
_CRON_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
_CRON_ITEM = re.compile(r"(?:\*|(\w{1,3})(?:-(\w{1,3}))?)(?:/(\d{1,3}))?", re.ASCII)


def _check_cron_item(item: str, field: tuple[str, int, int, dict[str, int]]) -> None:
    name, low, high, words = field
    match = _CRON_ITEM.fullmatch(item)
    if match is None:
        raise ValueError(f"the {name} field cannot be read")
    first, last, step = match.groups()
    bounds = []
    for text in (first, last):
        if text is None:
            continue
        number = words.get(text.lower(), int(text) if text.isdigit() else -1)
        if not low <= number <= high:
            raise ValueError(f"the {name} field is not within {low}-{high}")
        bounds.append(number)
    if len(bounds) == 2 and bounds[0] > bounds[1]:  # noqa: PLR2004 - a range has two ends
        raise ValueError(f"the {name} field has a range that runs backwards")
    if step is not None and (int(step) == 0 or len(bounds) == 1):
        raise ValueError(f"the {name} field has a step without a range")


def check_cron(value: str) -> str:
    """Return a standard crontab line unchanged; ValueError says which of the five fields is wrong.

    Days of the week are 0 to 7, where 0 and 7 are Sunday (crontab(5)).
    """
    parts = value.split()
    if len(parts) != len(_CRON_FIELDS):
        raise ValueError(f"{len(parts)} fields instead of five")
    for part, field in zip(parts, _CRON_FIELDS, strict=True):
        for item in part.split(","):
            _check_cron_item(item, field)
    return value


def _plain_text(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("empty")
    return value


BASE_PATH = r"^((/[A-Za-z0-9._~-]+)+)?$"
HEADER = r"^[A-Za-z0-9-]{1,64}$"

Text = Annotated[str, BeforeValidator(_plain_text), Expected("a text that is not empty")]
FilePath = Annotated[str, BeforeValidator(_plain_text), Expected("a path"), Marker.FILE]
Count = Annotated[int, Field(ge=1, le=2**53)]
Rate = Annotated[int, Field(ge=1, le=100_000)] | None
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, when_used="json"),
    Expected("a duration such as 90s, 30m, 6h or 2d"),
]
Network = Annotated[
    IPv4Network | IPv6Network,
    BeforeValidator(_parse_network),
    Expected("an address or network such as 10.0.0.0/8"),
]
HttpUrl = Annotated[
    str, BeforeValidator(lambda v: _check_http_url(v) if isinstance(v, str) else v),
    Expected("a URL such as https://host/path"),
    Marker.URL,
]  # fmt: skip
AlertTarget = Annotated[
    str, BeforeValidator(_plain_text),
    BeforeValidator(lambda v: _check_http_url(v) if isinstance(v, str) and "/" in v else v),
    Expected("an account, or a URL such as https://open.feishu.cn/open-apis/bot/v2/hook/…"),
    Marker.URL,
]  # fmt: skip
DatabaseUrl = Annotated[
    str, BeforeValidator(lambda v: _check_database_url(v) if isinstance(v, str) else v),
    Expected("a URL that begins with sqlite:///, postgresql://, mysql:// or mariadb://"),
    Marker.DATABASE,
]  # fmt: skip
Cron = Annotated[
    str, BeforeValidator(lambda v: check_cron(v) if isinstance(v, str) else v),
    Expected('a crontab line such as "0 3 * * *" (minute, hour, day, month, day of week)'),
]  # fmt: skip
TimeZone = Annotated[
    str, BeforeValidator(lambda v: _check_zone(v) if isinstance(v, str) else v),
    Expected("a time zone such as Asia/Shanghai or UTC"),
]  # fmt: skip
