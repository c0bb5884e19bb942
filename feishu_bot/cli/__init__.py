"""The command line: every command with ``--help``, exit 0 / 1 (failed) / 2 (wrong use or configuration)."""

from __future__ import annotations

import sys

import click

from feishu_bot import __version__
from feishu_bot.cli import (
    accounts,
    conversations,
    database,
    demo,
    doctor,
    operation,
    queue,
    selftest,
    server,
    talk,
)
from feishu_bot.errors import BotError, ConfigError


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="feishu-bot")
@click.pass_context
def bot(context: click.Context) -> None:
    """Run and look after a chat-bot webhook server for Feishu/Lark and others.

    Without a command: run.
    """
    if context.invoked_subcommand is None:
        context.invoke(server.run)


# A module of this package holds the commands of one subject; the order here is that of --help.
for command in (
    server.run,
    server.check,
    server.init,
    talk.chat,
    operation.status,
    operation.drain,
    operation.pause,
    operation.resume,
    operation.reload,
    operation.send,
    doctor.doctor,
    selftest.selftest,
    demo.demo,
    accounts.user,
    queue.cleanup,
    queue.dead,
    conversations.search,
    conversations.usage,
    conversations.export,
    conversations.import_,
    conversations.forget,
    database.backup,
    database.restore,
    database.db,
):
    bot.add_command(command)


def main() -> None:
    """Run the command line; errors end in one line on stderr."""
    try:
        bot(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(1)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ConfigError as error:
        for mistake in error.mistakes:
            click.echo(mistake, err=True)
        sys.exit(2)
    except (BotError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
