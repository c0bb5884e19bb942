"""What a caller of the library hands in, checked before anything is written.

The three databases differ in what they refuse (PostgreSQL takes no NUL, MariaDB no text that is too long, SQLite
nearly anything); here it is the same ``ValueError`` on each.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.model import MAX_KEY_LENGTH
from feishu_bot.store.work import NewMessage

if TYPE_CHECKING:
    from collections.abc import Mapping

ROLES: Final = frozenset({"user", "assistant", "system", "tool"})
MAX_PLATFORM_LENGTH: Final = 50
MAX_TITLE_LENGTH: Final = 255
MAX_TOKENS: Final = 2**40  # of one message: a sum of them never leaves 63 bits
_MAX_ID: Final = 2**63 - 1


_EARLIEST: Final = datetime(1000, 1, 1, tzinfo=UTC)  # what each database's calendar holds
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)


def check_text(value: object, name: str) -> str:
    """Return the text. ValueError if it is none, holds NUL or cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {type(value).__name__}")  # noqa: TRY004  # promised: ValueError
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character, which not every database can keep")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds a lone surrogate at character {error.start}") from None
    return value


def check_key(value: object, name: str, *, longest: int = MAX_KEY_LENGTH) -> str:
    """Return a text of 1 to ``longest`` characters."""
    text = check_text(value, name)
    if not 0 < len(text) <= longest:
        raise ValueError(f"{name} must have 1 to {longest} characters, not {len(text)}")
    return text


def check_optional_key(value: object, name: str, *, longest: int = MAX_KEY_LENGTH) -> str | None:
    """Return None, or a text of at most ``longest`` characters."""
    if value is None:
        return None
    text = check_text(value, name)
    if len(text) > longest:
        raise ValueError(f"{name} must have at most {longest} characters, not {len(text)}")
    return text


def check_number(value: object, name: str, *, least: int = 0, most: int = MAX_TOKENS) -> int:
    """Return a whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, not {type(value).__name__}")  # noqa: TRY004  # as above
    if not least <= value <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, not be {value}")
    return value


def check_id(value: object, name: str) -> int:
    """Return an id that any of the databases can look for."""
    return check_number(value, name, least=-_MAX_ID, most=_MAX_ID)


def check_instant(value: object, name: str) -> datetime | None:
    """Return None or an aware UTC datetime that every database can compare with; a naive one is read as UTC."""
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise ValueError(f"{name} must be a datetime, not {type(value).__name__}")  # noqa: TRY004  # as above
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    if value.year <= _EARLIEST.year:
        return _EARLIEST
    if value.year >= _LATEST.year:
        return min(value.replace(tzinfo=UTC), _LATEST)  # to the day: in another zone it may not exist
    return value.astimezone(UTC)


def check_filter(value: object, name: str) -> str | None:
    """Return None or a text, whichever: what no column can hold is only not found."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {type(value).__name__}")  # as above
    return value


def dump_object(value: Mapping[str, Any] | None, name: str) -> str | None:
    """Return the JSON of a mapping; None for an empty one. Whatever JSON cannot say is a ValueError."""
    if not value:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # a lone surrogate as \udc80
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None
    if not text.startswith("{"):
        raise ValueError(f"{name} must be a mapping, not {type(value).__name__}")
    return text


def load_object(text: str | None) -> dict[str, Any]:
    """Return the JSON object in ``text``; an empty one for anything else."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def new_message(
    role: object,
    content: object,
    tokens: object = 0,
    metadata: Mapping[str, Any] | None = None,
    *,
    key: object = None,
    sender_id: object = None,
) -> NewMessage:
    """Return a message that can be stored on every database. ValueError otherwise."""
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"role must be one of user, assistant, system, tool, not {role!r}")
    return NewMessage(
        role,
        check_text(content, "content"),
        check_number(tokens, "tokens"),
        None if sender_id is None else check_key(sender_id, "sender_id"),
        None,
        dump_object(metadata, "metadata"),
        None if key is None else check_key(key, "key"),
    )


def person_of(user_key: str) -> str | None:
    """Return the person ``platform:sender_id`` of a key ``platform:chat_type:sender_id``; None for other keys."""
    parts = user_key.split(":")
    return f"{parts[0]}:{parts[2]}" if len(parts) == 3 and all(parts) else None  # noqa: PLR2004  # three parts
