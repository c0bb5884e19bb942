"""``user``: the accounts of the browser chat and the console, and API tokens."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click
import orjson

from feishu_bot.cli.shared import closing, config_option, json_option, open_store
from feishu_bot.errors import BotError

if TYPE_CHECKING:
    from collections.abc import Callable

    from feishu_bot.store.work import Transaction

T = TypeVar("T")


@click.group()
def user() -> None:
    """Make accounts for the browser chat and the console, and tokens for scripts."""


def _run(config_file: str | None, function: Callable[[Transaction], T]) -> T:
    with open_store(config_file, make=True) as store:
        done: T = asyncio.run(closing(store, store.run(function)))
        return done


def _new_password() -> str:
    """Return a hashed password from the terminal or from standard input, never from an argument."""
    from feishu_bot.passwords import hash_password  # noqa: PLC0415  # argon2 takes longer than --help

    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    try:
        return hash_password(password)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _checked(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    from feishu_bot.store.accounts import check_name  # noqa: PLC0415  # SQLAlchemy takes longer than --help

    try:
        return check_name(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


name_argument = click.argument("name", callback=_checked)


def _unknown(name: str) -> BotError:
    return BotError(f"there is no account {name}")


@user.command("add")
@config_option
@name_argument
@click.option("--admin", "role", flag_value="admin", help="May do everything in the console.")
@click.option(
    "--viewer", "role", flag_value="viewer", help="May look at the console and change nothing there."
)
def add(config_file: str | None, name: str, role: str | None) -> None:
    """Make an account; the password is asked for, or read from standard input."""
    from feishu_bot.store.accounts import Role, add_account  # noqa: PLC0415  # as above

    password = _new_password()
    wanted = Role(role or "user")
    if not _run(config_file, lambda tx: add_account(tx, name, password, wanted)):
        raise BotError(f"there is an account {name} already; user passwd changes its password")
    click.echo(f"added {name} ({wanted.value})")


@user.command("list")
@config_option
@json_option
def list_(config_file: str | None, *, as_json: bool) -> None:
    """List the accounts with their sessions and tokens."""
    from feishu_bot.store.accounts import API, SESSION, list_accounts, list_tokens  # noqa: PLC0415  # as above

    def read(tx: Transaction) -> list[dict[str, Any]]:
        return [
            {
                "name": account.name,
                "role": account.role.value,
                "created_at": _iso(account.created_at),
                "sessions": len(list_tokens(tx, account.name, SESSION)),
                "tokens": [
                    {"id": token.id, "label": token.label, "used_at": _iso(token.used_at)}
                    for token in list_tokens(tx, account.name, API)
                ],
            }
            for account in list_accounts(tx)
        ]

    found = _run(config_file, read)
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    if not found:
        click.echo("no accounts: the chat answers on this machine only")
    for row in found:
        tokens = ", ".join(f"{token['id']} ({token['label']})" for token in row["tokens"]) or "none"
        click.echo(
            f"{row['name']:<20} {row['role']:<7} since {row['created_at']}  sessions: {row['sessions']}  tokens: {tokens}"
        )


def _iso(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@user.command("passwd")
@config_option
@name_argument
def passwd(config_file: str | None, name: str) -> None:
    """Change a password; the account's sessions end, and wrong passwords are forgotten."""
    from feishu_bot.store.accounts import set_password  # noqa: PLC0415  # as above

    password = _new_password()
    if not _run(config_file, lambda tx: set_password(tx, name, password)):
        raise _unknown(name)
    click.echo(f"changed the password of {name}; its sessions have ended")


@user.command("remove")
@config_option
@name_argument
def remove(config_file: str | None, name: str) -> None:
    """Remove an account with its sessions and tokens; its conversations stay (forget erases them)."""
    from feishu_bot.store.accounts import remove_account  # noqa: PLC0415  # as above

    if not _run(config_file, lambda tx: remove_account(tx, name)):
        raise _unknown(name)
    click.echo(f"removed {name}")


@user.command("token")
@config_option
@name_argument
@click.option("--label", default="made by bot.py", show_default=True, help="What the token is for.")
@click.option("--revoke", type=int, metavar="ID", help="Revoke the token with this id (user list) instead.")
def token(config_file: str | None, name: str, label: str, revoke: int | None) -> None:
    """Make an API token and print it, this one time: Authorization: Bearer TOKEN."""
    from feishu_bot.store import accounts  # noqa: PLC0415  # as above

    if revoke is not None:
        if not _run(config_file, lambda tx: accounts.revoke(tx, name, accounts.API, revoke)):
            raise BotError(f"{name} has no token {revoke}")
        click.echo(f"revoked token {revoke} of {name}")
        return
    secret = accounts.new_secret()
    if _run(config_file, lambda tx: accounts.add_token(tx, name, accounts.API, secret, label=label)) is None:
        raise _unknown(name)
    click.echo(secret)
