"""``run``, ``check`` and ``init``."""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

import click

from feishu_bot import event_loop, log
from feishu_bot.cli.shared import config_option, json_option, load_config
from feishu_bot.config import commented_config
from feishu_bot.errors import ConfigError
from feishu_bot.reference import platform_settings

if TYPE_CHECKING:
    from feishu_bot.app import App


@click.command()
@config_option
@click.option("--host", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0 takes any free one.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that share the port.")
@click.option(
    "--lease-s", type=click.FloatRange(0.5), default=15.0, hidden=True
)  # shorter ones are for tests
def run(
    config_file: str | None = None,
    host: str | None = None,
    port: int | None = None,
    workers: int | None = None,
    lease_s: float = 15.0,
) -> None:
    """Run the server until SIGTERM or Ctrl-C."""
    # A message makes thousands of short-lived objects and hardly a cycle: collecting every 700 of them, as Python
    # does by default, took an eighth of the processor's time.
    gc.set_threshold(20_000, 50, 100)
    overrides = {"server.host": host, "server.port": port, "server.workers": workers}
    reread = partial(load_config, config_file, overrides)
    loaded = reread()
    logging = log.configure(loaded.settings.logging, secrets=loaded.secret_values())
    try:
        for warning in loaded.warnings:
            getLogger(__name__).warning("configuration", extra={"warning": warning})
        # What follows takes most of the start's time; --help and check need none of it.
        from feishu_bot.web.connections import raise_file_limit  # noqa: PLC0415  # see above

        raise_file_limit()
        if loaded.settings.server.workers > 1:
            from feishu_bot.supervisor import Supervisor  # noqa: PLC0415  # see above

            if not hasattr(os, "fork"):
                raise click.UsageError("server.workers: this system cannot fork; run 1, or several servers")
            supervisor = Supervisor(
                loaded,
                reread=reread,
                errors=logging.errors,
                lines=logging.lines,
                ready=_say_url,
                lease_ms=round(lease_s * 1000),
            )
            sys.exit(supervisor.run())
        from feishu_bot.app import App  # noqa: PLC0415  # see above
        from feishu_bot.operation import Process  # noqa: PLC0415  # see above

        process = Process(
            reread=reread,
            errors=logging.errors,
            lines=logging.lines,
            origins=loaded.origins,
            lease_ms=round(lease_s * 1000),
        )
        event_loop.run(App(loaded.settings, process).run(ready=_say_where))
    finally:
        logging.close()


def _say_where(app: App) -> None:
    _say_url(f"http://{app.settings.server.host}:{app.port}/")


def _say_url(url: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\n  Open {url} and say hello. Ctrl-C stops.\n", err=True)


@click.command()
@config_option
@json_option
def check(config_file: str | None, *, as_json: bool) -> None:
    """Validate the configuration and print it, secrets hidden, with where each value comes from."""
    from feishu_bot.ai.mcp_servers import check_servers  # noqa: PLC0415  # takes longer than --help
    from feishu_bot.ai.models import check_models  # noqa: PLC0415  # takes longer than --help
    from feishu_bot.store.machines import problem_of  # noqa: PLC0415  # as above

    loaded = load_config(config_file)
    ai = loaded.settings.ai
    mistakes = check_models(ai) + check_servers(ai.mcp_servers)
    problem = problem_of(ai.conversation_persistence.db_url)
    if problem is not None:
        mistakes = [*mistakes, f"ai.conversation_persistence.db_url: {problem}"]
    if mistakes:
        raise ConfigError(mistakes)
    click.echo(loaded.to_json() if as_json else loaded.render())
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)


@click.command()
@click.argument("file", default="config.yaml", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(file: str, *, force: bool) -> None:
    """Write a commented configuration to FILE (default: config.yaml)."""
    path = Path(file)
    if path.exists() and not force:
        raise click.UsageError(f"{file} exists; --force replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commented_config(platform_settings()), encoding="utf-8")
    click.echo(f"wrote {file}; `bot.py check --config {file}` shows what it means")
