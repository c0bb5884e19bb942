"""What the commands share: options, the configuration, the store beside a running server."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from feishu_bot import __version__, log
from feishu_bot.ai.prices import models_without_price
from feishu_bot.config import load
from feishu_bot.reference import platform_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from feishu_bot.config import Loaded
    from feishu_bot.config.settings import BotSettings
    from feishu_bot.store.store import Store
    from feishu_bot.store.work import Transaction

T = TypeVar("T")

_BAR = 30  # characters
_SHOW_EVERY_S = 0.1

config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="The configuration; default: config.yaml in the working directory, if there is one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_config(config_file: str | None, overrides: dict[str, Any] | None = None) -> Loaded:
    """Read the configuration. Raises ConfigError."""
    return load(
        config_file,
        platform_settings=platform_settings(),
        overrides=overrides,
        unpriced=models_without_price,
    )


class _Outside:
    """A planner for commands that begin no messages."""

    history_turns = 0

    def tenant(self, account: str) -> str:  # noqa: ARG002  # the planner's signature
        return "default"

    def plan(self, *_args: Any, **_keywords: Any) -> Any:
        raise AssertionError("commands begin no messages")

    degrade = plan


@contextmanager
def open_store(config_file: str | None, *, make: bool = False) -> Iterator[Store]:
    """Open the configured store beside a running server, or without one; ``make``: also where there is none yet."""
    from feishu_bot.store.engine import normalise_url  # noqa: PLC0415  # SQLAlchemy takes longer than --help
    from feishu_bot.store.snapshot import check_exists  # noqa: PLC0415  # as above
    from feishu_bot.store.store import Store  # noqa: PLC0415  # as above

    loaded = load_config(config_file)
    logging = log.configure(
        loaded.settings.logging.model_copy(update={"level": "WARNING"}), secrets=loaded.secret_values()
    )
    persistence = loaded.settings.ai.conversation_persistence
    store = Store(persistence.db_url, auto_migrate=persistence.auto_migrate)
    try:
        if not make:
            check_exists(normalise_url(persistence.db_url))
        store.open(_Outside(), version=__version__)
        yield store
    finally:
        logging.close()


@contextmanager
def open_settings(config_file: str | None) -> Iterator[BotSettings]:
    """Yield the configuration, for a command that opens the database itself."""
    loaded = load_config(config_file)
    logging = log.configure(
        loaded.settings.logging.model_copy(update={"level": "WARNING"}), secrets=loaded.secret_values()
    )
    try:
        yield loaded.settings
    finally:
        logging.close()


class Act(Protocol):
    """Runs a function in a writing transaction of its own. Raises StoreUnavailable."""

    def __call__(self, function: Callable[[Transaction], T], /) -> T: ...


@contextmanager
def open_database(settings: BotSettings) -> Iterator[Act]:
    """Yield what runs a short function on the database beside a running server; it makes no database.

    Raises StoreUnavailable, also where there is no database yet, and SchemaMismatch.
    """
    from feishu_bot.errors import StoreUnavailable  # noqa: PLC0415  # SQLAlchemy takes longer than --help
    from feishu_bot.store import engine as engines  # noqa: PLC0415  # as above
    from feishu_bot.store import migrations  # noqa: PLC0415  # as above
    from feishu_bot.store.snapshot import sqlite_path  # noqa: PLC0415  # as above
    from feishu_bot.store.work import Transaction  # noqa: PLC0415  # as above

    engine = engines.open_engine(settings.ai.conversation_persistence.db_url)
    kind = engines.capabilities(engine).kind
    try:
        file = sqlite_path(engine)
        if kind == "sqlite" and (file is None or not file.exists()):
            raise StoreUnavailable(f"there is no database {file or 'in a file'} yet: no server has run")
        migrations.check(engine)

        def act(function: Callable[[Transaction], T], /) -> T:
            with engines.store_errors(), engine.begin() as connection:
                return function(Transaction(connection, kind, engines.database_now_ms(connection)))

        yield act
    finally:
        engine.dispose()


async def closing(store: Store, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what the coroutine returns, and close the store whatever happens."""
    try:
        return await coroutine
    finally:
        await store.close()


class Show(Protocol):
    """Shows what is done and how far it is; ``total`` None: nobody knows how far it goes, 0: nor how far it is."""

    def __call__(self, what: str, done: int, total: int | None = None, /) -> None: ...


@contextmanager
def progress() -> Iterator[Show | None]:
    """Yield a function that shows how far long work is, or None when nobody looks at stderr."""
    if not sys.stderr.isatty():
        yield None
        return
    shown_at = 0.0

    def show(what: str, done: int, total: int | None = None, /) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at < _SHOW_EVERY_S:
            return
        shown_at = now
        if total == 0:
            text = what
        elif total:
            filled = _BAR * min(done, total) // total
            text = f"[{'#' * filled}{'.' * (_BAR - filled)}] {100 * min(done, total) // total:3} %  {what}"
        else:
            text = f"{done:,} {what}"
        click.echo(f"\r\x1b[2K{text}", nl=False, err=True)

    try:
        yield show
    finally:
        click.echo("\r\x1b[2K", nl=False, err=True)
