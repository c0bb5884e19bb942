"""``chat``: the terminal's door."""

from __future__ import annotations

import asyncio
import getpass
import signal
import sys

import click

from feishu_bot.cli.shared import config_option, open_settings

MAX_NAME = 64  # characters


@click.command()
@config_option
@click.option("--user", metavar="U", help="Who talks; default: the name of the login.")
def chat(config_file: str | None, user: str | None) -> None:
    """Talk to the bot in this terminal, through the same pipeline, history and budgets as everywhere.

    Each line is a message; Ctrl-D ends. A server may run beside or not.
    """
    name = (user if user is not None else _login()).strip()
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise click.UsageError(f"--user: expected 1 to {MAX_NAME} printable characters")
    with open_settings(config_file) as settings:
        from feishu_bot.terminal import TerminalChat  # noqa: PLC0415  # takes longer than --help

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            asyncio.run(TerminalChat(settings, name).run(sys.stdin, sys.stdout))
        except KeyboardInterrupt:
            click.echo()


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a name for its user
        return "local"
