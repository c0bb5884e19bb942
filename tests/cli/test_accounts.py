"""``user`` as it is typed."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import pytest

from feishu_bot.passwords import hash_password, is_right
from feishu_bot.store import accounts
from tests.stores import opened


@pytest.fixture
def bot(typed, sqlite_url):
    return partial(typed, sqlite_url)


def read(url, function):
    async def run():
        async with opened(url) as store:
            return await store.read(function)

    return asyncio.run(run())


def test_accounts_are_made_listed_and_removed(bot):
    assert bot("user", "list")[1] == "no accounts: the chat answers on this machine only\n"
    assert bot("user", "add", "ann", "--admin", stdin="correct horse\n")[:2] == (0, "added ann (admin)\n")
    assert bot("user", "add", "bob", "--viewer", stdin="correct horse\n")[1] == "added bob (viewer)\n"
    assert bot("user", "add", "cleo", stdin="correct horse\n")[1] == "added cleo (user)\n"
    code, _, err = bot("user", "add", "ann", stdin="correct horse\n")
    assert (code, err) == (1, "error: there is an account ann already; user passwd changes its password\n")
    listed = json.loads(bot("user", "list", "--json")[1])
    assert [(row["name"], row["role"]) for row in listed] == [
        ("ann", "admin"),
        ("bob", "viewer"),
        ("cleo", "user"),
    ]
    assert bot("user", "remove", "bob")[1] == "removed bob\n"
    assert bot("user", "remove", "bob")[0] == 1


def test_a_password_comes_from_standard_input_and_is_kept_as_a_hash(bot, sqlite_url):
    bot("user", "add", "ann", stdin="correct horse\n")
    stored = read(sqlite_url, lambda tx: accounts.password_of(tx, "ann"))
    assert stored.startswith("$argon2id$")
    assert is_right(stored, "correct horse")
    assert not is_right(stored, "correct horse ")
    assert bot("user", "passwd", "ann", stdin="battery staple\r\n")[0] == 0
    stored = read(sqlite_url, lambda tx: accounts.password_of(tx, "ann"))
    assert is_right(stored, "battery staple")
    assert bot("user", "passwd", "bob", stdin="battery staple\n")[0] == 1


@pytest.mark.parametrize("password", ["", "1234567", "x" * 1001])
def test_a_password_that_will_not_do_is_refused(bot, password):
    code, _, err = bot("user", "add", "ann", stdin=password + "\n")
    assert code == 2
    assert "8 to 1000 characters" in err


@pytest.mark.parametrize("arguments", [("ann", "hunter22"), ("a b",), ("ä",), ()])
def test_wrong_use_is_2(bot, arguments):
    assert bot("user", "add", *arguments, stdin="correct horse\n")[0] == 2


def test_a_token_is_printed_once_and_revoked(bot, sqlite_url):
    bot("user", "add", "ann", stdin="correct horse\n")
    code, secret, _ = bot("user", "token", "ann", "--label", "cron")
    assert code == 0
    known = read(sqlite_url, lambda tx: accounts.who_has(tx, accounts.API, secret.strip()))
    assert known.account == "ann"
    listed = bot("user", "list")[1]
    assert f"{known.token_id} (cron)" in listed
    assert secret.strip() not in listed
    assert bot("user", "token", "ann", "--revoke", str(known.token_id))[0] == 0
    assert bot("user", "token", "ann", "--revoke", str(known.token_id))[0] == 1
    assert bot("user", "token", "bob")[0] == 1


def test_who_is_not_there_is_never_right_and_takes_as_long():
    assert not is_right(None, "correct horse")
    assert not is_right("nonsense", "correct horse")
    assert not is_right(hash_password("correct horse"), "x" * 1001)
