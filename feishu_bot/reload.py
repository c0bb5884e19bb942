"""What of a changed configuration holds at once, and what needs a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from feishu_bot.config import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from feishu_bot.config import BotSettings

_LIVE: Final = ("access", "admin", "ai", "alerts", "budget_margin", "budgets", "chat", "logging")
_LIVE_OF_SERVER: Final = ("max_waiting", "max_waiting_age_s", "min_free_mb")
# Platforms drop on arrival what is not addressed; what a store keeps in memory is made for its settings.
_FIXED_IN: Final = {"ai": "conversation_persistence", "chat": "require_at_in_groups"}


def changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield the key paths whose values differ; lists are compared as a whole."""
    if isinstance(old, Settings) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from changes(getattr(old, name), getattr(new, name), f"{path}.{name}" if path else name)
    elif isinstance(old, Mapping) and isinstance(new, Mapping) and path == "platforms":
        for name in sorted(old.keys() | new.keys()):
            yield from changes(old.get(name), new.get(name), f"{path}.{name}")
    elif old != new:
        yield path


def is_live(path: str) -> bool:
    """Say whether a change at this key path holds at once."""
    section, _, rest = path.partition(".")
    if section == "server":
        return rest in _LIVE_OF_SERVER
    return section in _LIVE and rest.partition(".")[0] != _FIXED_IN.get(section)


def merge(old: BotSettings, new: BotSettings) -> BotSettings:
    """Return the settings that hold from now on: the new ones where they can hold at once, else the old."""
    changed: dict[str, Any] = {}
    for section in _LIVE:
        fixed = _FIXED_IN.get(section)
        value = getattr(new, section)
        if fixed is not None:
            value = value.model_copy(update={fixed: getattr(getattr(old, section), fixed)})
        changed[section] = value
    server = {name: getattr(new.server, name) for name in _LIVE_OF_SERVER}
    return old.model_copy(update={**changed, "server": old.server.model_copy(update=server)})
