"""Which database threads are kept in, and who speaks where nobody is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from feishu_bot.config import database_from, process_variables
from feishu_bot.state.models import DEFAULT_ORG, DEFAULT_USER
from feishu_bot.store.transactions import MEMORY

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """Which database: ``backend`` is mock, sqlite, postgresql, mysql or mariadb. A ``connection_string`` wins."""

    backend: str = "mock"
    host: str = "localhost"
    port: int | None = None
    name: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    pool_size: int = 5
    max_overflow: int = 10
    connection_string: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The database's URL; ``:memory:`` for the mock."""
        if self.connection_string is not None:
            return self.connection_string
        given = {
            "DB_BACKEND": self.backend,
            "DB_HOST": self.host,
            "DB_PORT": "" if self.port is None else str(self.port),
            "DB_NAME": self.name or "",
            "DB_USER": self.user or "",
            "DB_PASSWORD": self.password or "",
        }
        found = database_from(given)
        return MEMORY if found is None or found.url == "mock" else found.url


@dataclass(frozen=True, slots=True)
class StateConfig:
    """The database, who speaks where nobody is named, and whether histories are kept by default."""

    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    user_id: str = DEFAULT_USER
    org_id: str = DEFAULT_ORG
    enable_persistence: bool = False

    @classmethod
    def from_env(cls, dotenv: str | Path = ".env") -> Self:
        """Read ``DB_*``, ``ENABLE_DB_PERSISTENCE``, ``DEFAULT_USER_ID`` and ``DEFAULT_ORG_ID``.

        What the process's environment does not set is taken from the file ``dotenv`` where there is one.
        ``CONVERSATION_DB_URL`` and ``DATABASE_PATH`` stand above ``DB_BACKEND``. ValueError for a number that is
        none.
        """
        found = process_variables(Path(dotenv))
        named = database_from(found)
        database = DatabaseConfig(
            backend=(found.get("DB_BACKEND") or "mock").strip().lower(),
            host=found.get("DB_HOST") or "localhost",
            port=_number(found, "DB_PORT", None),
            name=found.get("DB_NAME") or None,
            user=found.get("DB_USER") or None,
            password=found.get("DB_PASSWORD") or None,
            pool_size=_number(found, "DB_POOL_SIZE", 5) or 5,
            max_overflow=_number(found, "DB_MAX_OVERFLOW", 10) or 0,
            connection_string=None if named is None or named.origin == "DB_BACKEND" else named.url,
        )
        return cls(
            database=database,
            user_id=found.get("DEFAULT_USER_ID") or DEFAULT_USER,
            org_id=found.get("DEFAULT_ORG_ID") or DEFAULT_ORG,
            enable_persistence=found.get("ENABLE_DB_PERSISTENCE", "").strip().lower()
            in {"1", "true", "yes", "on"},
        )


def _number(variables: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = variables.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number")
    return int(text)
