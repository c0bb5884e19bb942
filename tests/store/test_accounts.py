"""Accounts, what stands for them, and who tries too often; the same on each database."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select

from feishu_bot.store import accounts as store_accounts
from feishu_bot.store import schema
from feishu_bot.store.accounts import (
    API,
    ATTEMPTS_MS,
    MAX_PER_ACCOUNT,
    MAX_PER_ADDRESS,
    SESSION,
    SESSION_MS,
    Role,
    network_of,
)
from tests.stores import opened


def call(name, *arguments, **keywords):
    """A function of the store, for ``store.run``."""
    return lambda tx: getattr(store_accounts, name)(tx, *arguments, **keywords)


async def test_names_are_told_apart_as_bytes_and_given_once(store):
    assert not await store.read(store_accounts.any_account)
    assert await store.run(call("add_account", "ann", "hash", Role.USER))
    assert await store.run(call("add_account", "Ann", "other", Role.ADMIN))
    assert not await store.run(call("add_account", "ann", "another", Role.ADMIN))
    assert await store.read(store_accounts.any_account)
    assert [(a.name, a.role) for a in await store.read(store_accounts.list_accounts)] == [
        ("Ann", Role.ADMIN),
        ("ann", Role.USER),
    ]
    assert await store.read(call("password_of", "ann")) == "hash"
    assert await store.read(call("password_of", "bob")) is None


async def test_of_a_secret_only_its_hash_is_kept_and_it_stands_for_its_own_kind(store):
    await store.run(call("add_account", "ann", "hash", Role.VIEWER))
    token_id = await store.run(call("add_token", "ann", API, "secret", label="a script"))
    rows = await store.read(lambda tx: tx.connection.execute(select(schema.tokens)).all())
    assert all("secret" not in str(row) for row in rows)
    known = await store.read(call("who_has", API, "secret"))
    assert (known.account, known.role, known.token_id) == ("ann", Role.VIEWER, token_id)
    assert await store.read(call("who_has", SESSION, "secret")) is None
    assert await store.read(call("who_has", API, rows[0].hash)) is None
    assert await store.run(call("add_token", "bob", API, "else", label="")) is None


async def test_a_session_ends_after_its_time_a_token_does_not(store, clock):
    await store.run(call("add_account", "ann", "hash", Role.USER))
    await store.run(call("add_token", "ann", SESSION, "browser", label="Firefox", address="192.0.2.1"))
    await store.run(call("add_token", "ann", API, "script", label="cron"))
    clock.now_ms += SESSION_MS - 1
    known = await store.read(call("who_has", SESSION, "browser"))
    assert known.stale
    await store.run(call("note_use", known.token_id, "192.0.2.2"))
    (session,) = await store.read(call("list_tokens", "ann", SESSION))
    assert (session.address, session.used_at) == ("192.0.2.2", clock.now_ms)
    assert not (await store.read(call("who_has", SESSION, "browser"))).stale
    clock.now_ms += 1
    assert await store.read(call("who_has", SESSION, "browser")) is None
    assert await store.read(call("list_tokens", "ann", SESSION)) == []
    assert (await store.read(call("who_has", API, "script"))).account == "ann"


async def test_another_password_ends_the_other_sessions_and_removing_ends_everything(store):
    await store.run(call("add_account", "ann", "hash", Role.USER))
    kept = await store.run(call("add_token", "ann", SESSION, "one", label=""))
    await store.run(call("add_token", "ann", SESSION, "two", label=""))
    await store.run(call("add_token", "ann", API, "three", label=""))
    assert await store.run(call("set_password", "ann", "new", keep=kept))
    assert [t.id for t in await store.read(call("list_tokens", "ann", SESSION))] == [kept]
    assert await store.run(call("set_password", "ann", "newer"))
    assert await store.read(call("list_tokens", "ann", SESSION)) == []
    assert len(await store.read(call("list_tokens", "ann", API))) == 1
    assert not await store.run(call("set_password", "bob", "x"))
    assert await store.run(call("remove_account", "ann"))
    assert await store.read(call("who_has", API, "three")) is None
    assert not await store.run(call("remove_account", "ann"))


async def test_one_revokes_ones_own_only(store):
    for name in ("ann", "bob"):
        await store.run(call("add_account", name, "hash", Role.USER))
    token_id = await store.run(call("add_token", "ann", API, "s", label=""))
    assert await store.run(call("revoke", "bob", API, token_id)) == 0
    assert await store.run(call("revoke", "ann", SESSION, token_id)) == 0
    assert await store.run(call("revoke", "ann", API, token_id)) == 1


async def test_too_many_attempts_on_an_account_have_to_wait_from_wherever_they_come(store, clock):
    for n in range(MAX_PER_ACCOUNT):
        assert await store.run(call("take_attempt", "ann", f"192.0.2.{n}")) == 0
    assert await store.run(call("take_attempt", "ann", "198.51.100.1")) == ATTEMPTS_MS
    assert await store.run(call("take_attempt", "bob", "198.51.100.1")) == 0
    clock.now_ms += ATTEMPTS_MS
    assert await store.run(call("take_attempt", "ann", "198.51.100.1")) == 0


async def test_too_many_attempts_from_an_address_have_to_wait_whatever_the_account(store):
    for n in range(MAX_PER_ADDRESS):
        assert await store.run(call("take_attempt", f"name{n}", f"2001:db8::{n:x}")) == 0
    assert await store.run(call("take_attempt", "ann", "2001:db8::ffff")) == ATTEMPTS_MS
    assert await store.run(call("take_attempt", "ann", "2001:db8:0:1::1")) == 0


async def test_the_right_password_is_no_wrong_one(store):
    for _ in range(3 * MAX_PER_ADDRESS):
        assert await store.run(call("take_attempt", "ann", "192.0.2.1")) == 0
        await store.run(call("forget_attempts", "ann", "192.0.2.1"))


async def test_attempts_at_once_do_not_slip_through_together(store):
    waits = await asyncio.gather(
        *(store.run(call("take_attempt", "ann", "192.0.2.1")) for _ in range(3 * MAX_PER_ACCOUNT))
    )
    assert waits.count(0) == MAX_PER_ACCOUNT


async def test_what_is_remembered_of_attempts_does_not_grow_for_ever(store, clock):
    for n in range(20):
        await store.run(call("take_attempt", f"name{n}", f"192.0.2.{n}"))
    clock.now_ms += ATTEMPTS_MS
    await store.run(call("take_attempt", "ann", "192.0.2.1"))
    rows = await store.read(lambda tx: tx.connection.execute(select(schema.login_attempts)).all())
    assert len(rows) == 2


async def test_all_processes_sign_cookies_with_one_key(db_url):
    async with opened(db_url) as one, opened(db_url) as other:
        assert await one.read(store_accounts.cookie_key) is None
        keys = await asyncio.gather(
            *(s.run(store_accounts.make_cookie_key) for s in (one, other, one, other))
        )
        assert len(set(keys)) == 1
        assert await other.read(store_accounts.cookie_key) == keys[0]


def test_roles_are_ordered():
    assert [role.may(Role.VIEWER) for role in (Role.USER, Role.VIEWER, Role.ADMIN)] == [False, True, True]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("nonsense" * 20, ("nonsense" * 20)[:64]),
    ],
)
def test_one_customers_addresses_count_as_one(address, network):
    assert network_of(address) == network


@pytest.mark.parametrize(
    "name", ["", "-a", "a b", "a\nb", "a:b", "ä", "a" * 65, "a/b", "<a>", "a\0", "local", "LOCAL"]
)
def test_a_name_that_no_account_can_have_is_refused(name):
    with pytest.raises(ValueError, match="name has"):
        store_accounts.check_name(name)


async def test_a_role_is_changed_and_the_last_administrator_is_known(store):
    await store.run(call("add_account", "ann", "hash", Role.ADMIN))
    await store.run(call("add_account", "bob", "hash", Role.VIEWER))
    assert await store.run(call("is_last_admin", "ann"))
    assert not await store.run(call("is_last_admin", "bob"))
    for _ in range(2):  # also where it changes nothing
        assert await store.run(call("set_role", "bob", Role.ADMIN))
    assert not await store.run(call("is_last_admin", "ann"))
    assert not await store.run(call("set_role", "nobody", Role.ADMIN))
    assert (await store.read(call("find_account", "bob"))).role is Role.ADMIN
