"""Accounts made, changed and removed from the console: by administrators alone, asked about, on record, shown once."""

from __future__ import annotations

import asyncio
import html
import re

import orjson
import pytest

from feishu_bot.passwords import is_right
from feishu_bot.store import schema
from feishu_bot.store.accounts import MAX_PER_ACCOUNT
from tests.e2e.browsers import PASSWORD, Browser
from tests.e2e.conftest import bots, nursery, sqlite_record  # noqa: F401
from tests.web.test_console import ada, bot, post, tokens  # noqa: F401

# The fixtures are those of the console's own tests.
pytestmark = pytest.mark.usefixtures("tokens")


def secret_of(text):
    """What a page shows once."""
    return html.unescape(re.search(r'id="secret">([^<]+)<', text)[1])


def audited(record):
    return [
        (row.actor, row.action, row.target, row.after and orjson.loads(row.after))
        for row in record.rows(schema.audit)
    ]


async def order(browser, do, name, **fields):
    return await post(browser, "/admin/people", do=do, name=name, **fields)


async def test_an_account_is_made_and_its_password_is_shown_once(ada, bot, sqlite_record):  # noqa: F811
    text = await ada.open("/admin/people")
    number = re.search(r'name="order" value="(\w+)"', text)[1]
    fields = {"role": "viewer", "order": number}
    status, asked = await post(ada, "/admin/people", sure=None, do="add", name="new", **fields)
    assert status == 200
    assert "Make the account new (viewer)?" in asked
    assert sqlite_record.count(schema.accounts, name="new") == 0, "without a script, a page asks"
    status, text = await order(ada, "add", "new", **fields)
    assert status == 200
    assert ada.response.headers["Cache-Control"] == "no-store"
    password = secret_of(text)
    assert re.fullmatch(r"([a-hjkmnp-z2-9]{5}-){3}[a-hjkmnp-z2-9]{5}", password)
    (row,) = sqlite_record.rows(schema.accounts, name="new")
    assert row.role == "viewer"
    assert is_right(row.password, password)
    status, text = await order(ada, "add", "new", **fields)
    assert (status, "not=why_shown" in ada.response.headers["Location"]) == (303, True), "sent twice"
    assert is_right(sqlite_record.rows(schema.accounts, name="new")[0].password, password)
    assert audited(sqlite_record) == [("web:ada", "account.add", "web:new", {"role": "viewer"})]
    assert password not in await ada.open("/admin/audit")
    async with Browser(bot) as new:
        assert (await new.log_in("new", password))[0] == 200
        assert "read-only" in (await new.open("/admin")).lower()


async def test_a_name_that_is_taken_or_none_makes_no_account(ada, sqlite_record):  # noqa: F811
    before = sqlite_record.rows(schema.accounts)
    for name, why in (("ann", "why_taken"), ("a b", "why_name"), ("<b>", "why_name"), ("", "why_name")):
        assert (await order(ada, "add", name, role="user"))[0] == 303
        assert f"not={why}" in ada.response.headers["Location"], name
    assert "is an account of this name" in await ada.open("/admin/people?not=why_taken")
    for fields in ({"role": "king"}, {"role": ""}, {}):
        assert (await order(ada, "add", "new", **fields))[0] == 400
    assert sqlite_record.rows(schema.accounts) == before
    assert sqlite_record.count(schema.audit) == 0


async def test_two_forms_of_one_page_are_two_orders(ada, sqlite_record):  # noqa: F811
    for name in ("one", "two"):
        assert (await order(ada, "add", name, role="user", order="0" * 16))[0] == 200
    assert sqlite_record.count(schema.audit, action="account.add") == 2


async def test_a_role_holds_from_the_next_request_on(ada, bot, sqlite_record):  # noqa: F811
    async with Browser(bot) as ann:
        await ann.log_in("ann")
        assert (await ann.ask("GET", "/admin"))[0] == 403
        assert (await order(ada, "role", "ann", role="admin"))[0] == 303
        assert "New account" in await ann.open("/admin/people")
        assert (await order(ada, "role", "ann", role="user"))[0] == 303
        assert (await ann.ask("GET", "/admin"))[0] == 403
        assert (await order(ann, "role", "ann", role="admin"))[0] == 403
    assert audited(sqlite_record)[0] == ("web:ada", "account.role", "web:ann", {"role": "admin"})


async def test_the_last_administrator_stays(ada, sqlite_record):  # noqa: F811
    for do, fields in (("role", {"role": "viewer"}), ("remove", {})):
        assert (await order(ada, do, "ada", **fields))[0] == 303
        assert "not=why_last_admin" in ada.response.headers["Location"]
    assert "last administrator" in await ada.open("/admin/people?not=why_last_admin")
    assert sqlite_record.rows(schema.accounts, name="ada")[0].role == "admin"
    assert (await order(ada, "role", "ann", role="admin"))[0] == 303
    assert (await order(ada, "remove", "ada"))[0] == 303, "now there is another"
    assert (await ada.ask("GET", "/admin"))[0] == 303, "and she is out"
    assert [row[1] for row in audited(sqlite_record)] == ["account.role", "account.remove"]


async def test_of_two_administrators_who_remove_each_other_one_stays(ada, bot, sqlite_record):  # noqa: F811
    await order(ada, "role", "ann", role="admin")
    async with Browser(bot) as ann:
        await ann.log_in("ann")
        await asyncio.gather(order(ada, "remove", "ann"), order(ann, "remove", "ada"))
    assert sqlite_record.count(schema.accounts, role="admin") == 1


async def test_a_new_password_ends_the_sessions_and_forgives_wrong_ones(ada, bot):  # noqa: F811
    async with Browser(bot) as ann:
        await ann.log_in("ann")
        async with Browser(bot) as guesser:
            for _ in range(MAX_PER_ACCOUNT):
                await guesser.log_in("ann", "wrong password")
            assert (await guesser.log_in("ann"))[0] == 429
        _, text = await order(ada, "password", "ann")
        assert (await ann.ask("GET", "/account/sessions"))[0] == 401
        assert (await ann.log_in("ann", PASSWORD))[0] == 401, "the old one"
        assert (await ann.log_in("ann", secret_of(text)))[0] == 200


async def test_sessions_are_ended_one_by_one_and_all_at_once(ada, bot, sqlite_record):  # noqa: F811
    async with Browser(bot) as first, Browser(bot, headers={"User-Agent": "<b>phone"}) as second:
        await first.log_in("ann")
        await second.log_in("ann")
        text = await ada.open("/admin/people/ann")
        assert "&lt;b&gt;phone" in text
        ids = [row.id for row in sqlite_record.rows(schema.tokens, account="ann", kind="session")]
        assert (await order(ada, "session", "vic", id=ids[0]))[0] == 303
        assert "not=why_gone" in ada.response.headers["Location"], "it is another's"
        assert (await order(ada, "session", "ann", id=ids[0]))[0] == 303
        assert (await first.ask("GET", "/account/sessions"))[0] == 401
        assert (await second.ask("GET", "/account/sessions"))[0] == 200
        assert (await order(ada, "sessions", "ann"))[0] == 303
        assert (await second.ask("GET", "/account/sessions"))[0] == 401
    assert audited(sqlite_record) == [
        ("web:ada", "session.end", "web:ann", {"id": ids[0]}),
        ("web:ada", "session.end", "web:ann", {"id": None}),
    ]


async def test_a_token_is_made_shown_once_and_revoked(ada, bot, sqlite_record):  # noqa: F811
    status, text = await order(ada, "token", "vic", label="<b>report")
    secret = secret_of(text)
    assert status == 200
    async with Browser(bot, token=secret) as script:
        assert (await script.ask("GET", "/admin/live"))[0] == 200
        text = await ada.open("/admin/people/vic")
        assert "&lt;b&gt;report" in text
        assert secret not in text
        (made,) = sqlite_record.rows(schema.tokens, label="<b>report")
        assert (await order(ada, "revoke", "vic", id=made.id))[0] == 303
        assert (await script.ask("GET", "/admin/live"))[0] == 401
    for fields in ({}, {"label": "  "}):
        assert (await order(ada, "token", "vic", **fields))[0] == 400
    assert [row[1] for row in audited(sqlite_record)] == ["token.add", "token.revoke"]


ORDERS = (
    ("add", {"role": "admin"}),
    ("role", {"role": "admin"}),
    ("password", {}),
    ("remove", {}),
    ("sessions", {}),
    ("session", {"id": "1"}),
    ("token", {"label": "x"}),
    ("revoke", {"id": "1"}),
)


async def test_only_an_administrator_in_a_browser_changes_accounts(ada, bot, tokens, sqlite_record):  # noqa: F811
    before = sqlite_record.rows(schema.accounts), sqlite_record.count(schema.tokens, kind="api")
    for name, ways in (("ann", "browser"), ("vic", "browser"), ("ada", "token")):
        async with Browser(bot, token=tokens[name] if ways == "token" else None) as browser:
            if ways == "browser":
                await browser.log_in(name)
            for do, fields in ORDERS:
                assert (await order(browser, do, "new" if do == "add" else "ann", **fields))[0] == 403, do
    for do, fields in ORDERS:  # from another site, or without the token of the page
        sent = {"do": do, "name": "new" if do == "add" else "ann", "sure": "yes", **fields}
        assert (await post(ada, "/admin/people", token="", **sent))[0] == 403, do
        elsewhere = {"Origin": "https://evil.example"}
        assert (await ada.ask("POST", "/admin/people", headers=elsewhere, data=sent))[0] == 403, do
    assert (sqlite_record.rows(schema.accounts), sqlite_record.count(schema.tokens, kind="api")) == before
    assert sqlite_record.count(schema.audit) == 0


async def test_what_means_nothing_changes_nothing(ada, sqlite_record):  # noqa: F811
    for do, name, fields in (
        ("explode", "ann", {}),
        ("", "ann", {}),
        ("role", "../ann", {"role": "user"}),
        ("role", "ann", {"role": "root"}),
        ("session", "ann", {"id": "1 or 1=1"}),
        ("revoke", "ann", {"id": "-1"}),
        ("revoke", "ann", {}),
    ):
        assert (await order(ada, do, name, **fields))[0] == 400, (do, name, fields)
    for do, fields in ORDERS[1:]:
        assert (await order(ada, do, "nobody", **fields))[0] == 303
        assert "not=why_gone" in ada.response.headers["Location"], do
    assert (await ada.ask("GET", "/admin/people/nobody"))[0] == 404
    assert (await ada.ask("GET", "/admin/people/.."))[0] in {200, 404}, "a client may shorten it to /admin"
    assert sqlite_record.count(schema.audit) == 0
