"""Structured logging over the standard library: bound fields, console or JSON lines, secrets hidden.

Modules log a constant event name with their values in ``extra``; only the server calls ``configure``, the library
never does. A level that is off costs what it costs in the standard library.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import deque
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType
    from typing import TextIO

    from feishu_bot.config import LogSettings

HIDDEN = "***"
MIN_SECRET_LENGTH = 3  # shorter texts stand in every other word
_MINUTE_S = 60.0
RECENT = 10  # warnings and errors that are remembered
_MAX_REASON = 300  # characters of one of them
RECENT_LINES = 2000  # lines of the log that are remembered
_MAX_LINE = 2000  # characters of one of them

_bound: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default={})  # noqa: B039 - it is never changed
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_RESERVED = frozenset({"time", "level", "logger", "event", "exception"})
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
_CONTROL_IN_LINES = {code: text for code, text in _CONTROL.items() if code not in {ord("\n"), ord("\t")}}
_BARE = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f]+")
_QUIET = ("aiohttp.access", "alembic", "apscheduler")  # their INFO says nothing of ours


class bind:  # noqa: N801 - a context manager that reads like a function
    """Within it, every record of this task (and of tasks it starts) carries the fields.

    ``with bind(account="feishu", lane=key, inbox=7): …``; an inner ``bind`` adds to the outer one.
    """

    __slots__ = ("_fields", "_token")

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self._token: Token[Mapping[str, Any]] | None = None

    def __enter__(self) -> Self:
        self._token = _bound.set({**_bound.get(), **self._fields})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _bound.reset(self._token)
            self._token = None


class Seldom:
    """Writes no more than ``most`` warnings a minute, and with the next one how many it left out.

    For what anybody out there can cause as often as he likes. ``clock`` counts seconds.
    """

    def __init__(
        self, logger: logging.Logger, *, most: int = 600, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._most = most
        self._clock = clock
        self._since = clock()
        self._written = 0
        self._left_out = 0

    def warning(self, event: str, fields: Mapping[str, Any]) -> None:
        """Write a warning, or count it."""
        now = self._clock()
        if now - self._since >= _MINUTE_S:
            self._since, self._written = now, 0
        if self._written >= self._most:
            self._left_out += 1
            return
        self._written += 1
        left_out = {"left_out": self._left_out} if self._left_out else {}
        self._left_out = 0
        self._logger.warning(event, extra={**fields, **left_out}, stacklevel=2)


class SecretFilter:
    """Replaces known secret values in texts, also where they stand escaped or in a URL."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._forms: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Hide these values from now on; those of fewer than three characters are passed over."""
        for secret in secrets:
            if len(secret) >= MIN_SECRET_LENGTH:
                text = secret.encode("utf-8", "replace").decode()
                escaped = orjson.dumps(text).decode()[1:-1]
                whole = quote(text, safe="")
                self._forms |= {
                    secret,
                    text,
                    repr(secret)[1:-1],
                    escaped,
                    quote(text),
                    whole,
                    secret.translate(_CONTROL),
                }
        if self._forms:
            longest_first = sorted(self._forms, key=lambda form: (-len(form), form))
            self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def hide(self, text: str) -> str:
        return self._pattern.sub(HIDDEN, text) if self._pattern is not None else text

    def hide_in(self, value: Any) -> Any:
        """Return a field's value with every text in it hidden where it must be."""
        if self._pattern is None or value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide(str(key)): self.hide_in(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.hide_in(item) for item in value]
        text = str(value)
        hidden = self.hide(text)
        return value if hidden == text else hidden


class _Formatter(logging.Formatter):
    """What both forms share: fields, instants, exceptions."""

    def __init__(self, secrets: SecretFilter) -> None:
        super().__init__()
        self.secrets = secrets

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the bound fields and the record's own extras, which win."""
        fields = {**_bound.get(), **{k: v for k, v in vars(record).items() if k not in _STANDARD}}
        return {name: self.secrets.hide_in(value) for name, value in fields.items()}

    def event(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a library's record whose arguments do not fit
            message = str(record.msg)
        return self.secrets.hide(message)

    def exception(self, record: logging.LogRecord) -> str | None:
        parts = []
        if record.exc_info and record.exc_info[0] is not None:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(record.stack_info)
        return self.secrets.hide("\n".join(parts)) if parts else None


def _instant(created: float) -> str:
    second = int(created)
    return f"{_second(second)}.{int((created - second) * 1000):03d}Z"


@lru_cache(maxsize=8)
def _second(second: int) -> str:
    """Return an instant without its fraction; most lines are of the same second as the one before."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class ConsoleFormatter(_Formatter):
    """One line for people: instant, level, event, ``key=value``, logger; an exception follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        event = self.event(record)
        if not event.isprintable():
            event = event.translate(_CONTROL)
        parts = [_instant(record.created), f"{record.levelname:<7}", event]
        parts += [f"{name}={_console_value(value)}" for name, value in self.fields(record).items()]
        parts.append(f"[{record.name}]")
        line = " ".join(parts)
        exception = self.exception(record)
        if exception is not None:
            line += "\n  " + exception.translate(_CONTROL_IN_LINES).replace("\n", "\n  ")
        return line


def _console_value(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if _BARE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').translate(_CONTROL) + '"'


class JsonFormatter(_Formatter):
    """One JSON object a line: time (UTC), level, logger, event, the fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": _instant(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": self.event(record),
        }
        for name, value in self.fields(record).items():
            document[f"{name}_" if name in _RESERVED else name] = value
        exception = self.exception(record)
        if exception is not None:
            document["exception"] = exception
        try:
            return orjson.dumps(document, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # an integer beyond 64 bits, a lone surrogate, nesting without end
            texts = {
                name: str(value).encode("utf-8", "backslashreplace").decode()
                for name, value in document.items()
            }
            return orjson.dumps(texts).decode()


class RecentErrors(logging.Handler):
    """Remembers the last few errors, and warnings that give a reason, with nothing in them that is secret."""

    def __init__(self, secrets: SecretFilter, *, most: int = RECENT) -> None:
        super().__init__(logging.WARNING)
        self.secrets = secrets
        self._last: deque[tuple[str, str, str, str]] = deque(maxlen=most)

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a record."""
        reason = getattr(record, "reason", None) or getattr(record, "kind", None)
        if reason is None and record.exc_info and record.exc_info[0] is not None:
            reason = record.exc_info[0].__name__
        if reason is None and record.levelno < logging.ERROR:
            return
        event = self.secrets.hide(str(record.msg))[:_MAX_REASON]
        words = self.secrets.hide(str(reason))[:_MAX_REASON] if reason is not None else ""
        self._last.append((_instant(record.created), record.levelname.lower(), event, words))

    def last(self) -> list[dict[str, str]]:
        """Return them, the newest last."""
        return [
            dict(zip(("at", "level", "event", "reason"), item, strict=True)) for item in self._last.copy()
        ]


class RecentLines:
    """The last lines that were written, with their instants (Unix seconds) and levels: an hour, or ``most``."""

    def __init__(self, *, most: int = RECENT_LINES) -> None:
        self._last: deque[tuple[float, str, str]] = deque(maxlen=most)

    def add(self, record: logging.LogRecord, line: str) -> None:
        """Remember a line; of a very long one, its beginning."""
        self._last.append((record.created, record.levelname.lower(), line[:_MAX_LINE]))

    def last(self, since: float) -> list[tuple[float, str, str]]:
        """Return those written since an instant, the newest first."""
        return [line for line in reversed(self._last.copy()) if line[0] >= since]


class _Handler(logging.StreamHandler["TextIO"]):
    """The handler that ``configure`` has put in; the next one replaces it and goes on with its ``lines``."""

    def __init__(self, stream: TextIO, lines: RecentLines) -> None:
        super().__init__(stream)
        self.lines = lines

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        self.lines.add(record, line)
        return line


class Logging:
    """The logging that is in force; ``close`` takes it away again. ``errors`` holds what went wrong lately."""

    def __init__(self, handler: _Handler, errors: RecentErrors, secrets: SecretFilter) -> None:
        self._handler = handler
        self._secrets = secrets
        self.errors = errors
        self.lines = handler.lines

    def hide(self, secrets: Iterable[str]) -> None:
        """Hide these values too from now on."""
        self._secrets.add(secrets)

    def close(self) -> None:
        """Stop writing to the stream."""
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().removeHandler(self.errors)


def configure(settings: LogSettings, *, secrets: Iterable[str] = (), stream: TextIO | None = None) -> Logging:
    """Send the records of the whole process to ``stream`` (stderr), as the settings say.

    Called again, it replaces what it set before (a reload). ``secrets`` are values that no line may show.
    """
    hidden = SecretFilter(secrets)
    root = logging.getLogger()
    replaced = [old for old in root.handlers if isinstance(old, _Handler)]
    lines = replaced[-1].lines if replaced else RecentLines()
    handler = _Handler(stream if stream is not None else sys.stderr, lines)
    handler.setFormatter(JsonFormatter(hidden) if settings.format == "json" else ConsoleFormatter(hidden))
    for old in replaced:
        root.removeHandler(old)
    root.addHandler(handler)
    errors = next((known for known in root.handlers if isinstance(known, RecentErrors)), None)
    if errors is None:
        errors = RecentErrors(hidden)
        root.addHandler(errors)
    errors.secrets = hidden
    root.setLevel(settings.level)
    quiet = max(logging.WARNING, root.level) if root.level > logging.DEBUG else logging.NOTSET
    for name in _QUIET:
        logging.getLogger(name).setLevel(quiet)
    # A connection that broke is told by whoever used it, in one line; the pool tells it again with a stack.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    # What no line shows need not be collected for each record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001  # nor who has called: "Optimization", Logging HOWTO
    # The standard report of a failed write repeats the record's arguments, which nothing has hidden.
    logging.raiseExceptions = False
    return Logging(handler, errors, hidden)
