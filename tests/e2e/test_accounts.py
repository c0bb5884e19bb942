"""Coming in: sessions, tokens, the CSRF token, roles, a proxy that logs in; and those who should not."""

from __future__ import annotations

import re

import pytest
from yarl import URL

from feishu_bot.store import schema
from feishu_bot.store.accounts import MAX_PER_ACCOUNT
from tests.e2e.bots import configuration
from tests.e2e.browsers import PASSWORD, Browser, add_accounts


@pytest.fixture
async def bot(bots, sqlite_url):
    return await bots.start(configuration(sqlite_url))


@pytest.fixture
async def tokens(sqlite_url, bot):
    """One account of each role, made beside the running server; yields their API tokens."""
    return await add_accounts(sqlite_url, ann="user", vic="viewer", ada="admin")


@pytest.fixture
async def browser(bot, tokens):
    async with Browser(bot) as made:
        yield made


async def test_who_logs_in_talks_as_his_account_until_he_logs_out(browser, sqlite_record):
    status, _ = await browser.ask("GET", "/")
    assert (status, browser.response.headers["Location"]) == (303, "/login?next=/")
    assert (await browser.ask("POST", "/chat", {"message": "hi"}))[0] == 401
    assert await browser.log_in("ann") == (200, {"name": "ann", "role": "user"})
    status, answer = await browser.ask("POST", "/chat", {"message": "hi"})
    assert (status, answer["response"]) == (200, "hi")
    assert sqlite_record.rows(schema.conversations)[0].user_key == "web:private:ann"
    assert (await browser.ask("GET", "/login?next=/account"))[0] == 303, "he is in already"
    assert (await browser.ask("POST", "/logout"))[0] == 204
    assert (await browser.ask("POST", "/chat", {"message": "hi"}))[0] == 401
    assert sqlite_record.count(schema.tokens, kind="session") == 0


async def test_the_cookie_is_signed_and_out_of_the_reach_of_scripts(browser, bots, sqlite_url):
    await browser.ask("POST", "/login", {"name": "ann", "password": PASSWORD})
    cookie = browser.response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Secure" not in cookie
    value = re.search("session=([^;]+)", cookie)[1]
    secret, mac = value.split(".")
    for forged in (
        secret,
        f"{secret}.",
        f"{secret}.{'0' * 64}",
        f"x{value}",
        f"{secret}.{mac[:-1]}",
        "",
        ".",
    ):
        async with Browser(browser.bot, headers={"Cookie": f"session={forged}"}) as other:
            assert (await other.ask("GET", "/account/sessions"))[0] == 401
    for server in ({"public_url": "https://bot.example.org"}, {"trusted_proxies": ["127.0.0.1"]}):
        behind = await bots.start(configuration(sqlite_url, server=server))
        forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "10.0.0.1"}
        async with Browser(behind, headers=forwarded if "trusted_proxies" in server else {}) as other:
            await other.ask("POST", "/login", {"name": "ann", "password": PASSWORD})
            assert "Secure" in other.response.headers["Set-Cookie"]


async def test_a_session_id_from_before_the_login_is_worth_nothing_after_it(browser, bot):
    await browser.log_in("ann")
    before = browser.session.cookie_jar.filter_cookies(URL(bot.url))["session"].value
    await browser.log_in("ada")
    after = browser.session.cookie_jar.filter_cookies(URL(bot.url))["session"].value
    assert after != before
    for planted in (before, "chosen-by-somebody", f"chosen.{'0' * 64}"):
        async with Browser(bot, headers={"Cookie": f"session={planted}"}) as other:
            assert (await other.ask("GET", "/account/sessions"))[0] == 401
            status, _ = await other.ask("POST", "/login", {"name": "ann", "password": PASSWORD})
            assert status == 200
            assert planted not in other.response.headers["Set-Cookie"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/chat", {"message": "hi"}),
        ("POST", "/logout", None),
        ("POST", "/account/tokens", {"label": "x"}),
        ("DELETE", "/account/tokens/1", None),
        ("DELETE", "/account/sessions/1", None),
        ("POST", "/account/password", {"old": PASSWORD, "new": "another password"}),
        ("POST", "/send", {"platform": "web", "user_key": "web:ann", "text": "hi"}),
    ],
)
async def test_a_change_without_the_token_of_our_own_page_is_refused(browser, method, path, body):
    await browser.log_in("ada")
    right = browser.csrf
    for wrong in ("", right[:-1], right + "0", "é"):
        browser.csrf = wrong
        status, answer = await browser.ask(method, path, body)
        assert (status, answer["error"]["code"]) == (403, "csrf"), wrong
    async with Browser(browser.bot) as other:
        await other.log_in("ann")
        browser.csrf = other.csrf
    assert (await browser.ask(method, path, body))[0] == 403, "that of another session"


async def test_no_other_site_logs_anybody_in(browser):
    body = {"name": "ann", "password": PASSWORD}
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://example.org"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):
        status, _ = await browser.ask("POST", "/login", body, headers=headers)
        assert (status, "Set-Cookie" in browser.response.headers) == (403, False), headers
    assert (await browser.ask("POST", "/login", body, headers={"Sec-Fetch-Site": "same-origin"}))[0] == 200


async def test_wrong_passwords_and_names_are_told_apart_by_nothing_and_run_out(browser, bots, sqlite_url):
    first = await browser.log_in("ann", "wrong password")
    assert first == await browser.log_in("nobody", "wrong password")
    assert first[0] == 401
    other = await bots.start(configuration(sqlite_url))
    async with Browser(other) as elsewhere:
        for n in range(MAX_PER_ACCOUNT - 1):
            assert (await (browser, elsewhere)[n % 2].log_in("ann", "wrong password"))[0] == 401
        for one in (browser, elsewhere):
            status, answer = await one.log_in("ann")
            assert (status, answer["error"]["code"]) == (429, "too_many_attempts"), "also the right one"
            assert 0 < int(one.response.headers["Retry-After"]) <= 900
    assert (await browser.log_in("vic"))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"name": "ann"}',
        b'{"name": 1, "password": 2}',
        b'{"name": "", "password": ""}',
        b'{"name": "a\\u0000", "password": "xxxxxxxx"}',
        b'{"name": ["ann"], "password": "xxxxxxxx"}',
    ],
)
async def test_what_is_no_login_is_400(browser, bot, body):
    assert (await browser.ask("POST", "/login", body))[0] == 400
    assert bot.complaints() == []


async def test_strange_names_and_passwords_are_just_wrong(browser, bot):
    for name in ("x" * 10_000, "\r\nSet-Cookie: a=b", "' OR 1=1 --", "<script>", "😀", "../../etc/passwd"):
        status, _ = await browser.log_in(name, "x" * 5000)
        assert status == 401
        assert "Set-Cookie" not in browser.response.headers
    assert bot.complaints() == []


@pytest.mark.parametrize(
    "place",
    [
        "https://example.org/",
        "//example.org",
        "/\\example.org",
        "\\\\example.org",
        "/%0d%0aSet-Cookie:a=b",
        "javascript:alert(1)",
        "/\texample.org",
        "account",
        " /account",
    ],
)
async def test_the_login_leads_nowhere_but_here(browser, place):
    async with browser.session.get(f"{browser.bot.url}/login", params={"next": place}) as response:
        assert 'data-place="/' in await response.text()
        assert "example.org" not in (await response.text()).split("data-place=")[1].split(">")[0]
    await browser.log_in("ann")
    async with browser.session.get(
        f"{browser.bot.url}/login", params={"next": place}, allow_redirects=False
    ) as response:
        assert response.status == 303
        assert re.fullmatch(r"/([^/\\].*)?", response.headers["Location"])
        assert "Set-Cookie" not in response.headers


async def test_a_token_needs_no_csrf_token_and_is_revoked_at_once(browser, bot, tokens):
    async with Browser(bot, token=tokens["ann"]) as script:
        assert (await script.ask("POST", "/chat", {"message": "hi"}))[0] == 200
        assert (await script.ask("POST", "/account/tokens", {"label": "more"}))[0] == 403
        await browser.log_in("ann")
        status, made = await browser.ask("POST", "/account/tokens", {"label": "new <b>"})
        assert status == 201
        _, listed = await browser.ask("GET", "/account/tokens")
        assert [item["label"] for item in listed["items"]] == ["new <b>", "tests"]
        assert made["token"] not in str(listed)
        for item in listed["items"]:
            assert (await browser.ask("DELETE", f"/account/tokens/{item['id']}"))[0] == 204
            assert (await browser.ask("DELETE", f"/account/tokens/{item['id']}"))[0] == 404
        assert (await script.ask("POST", "/chat", {"message": "hi"}))[0] == 401
        assert script.response.headers["WWW-Authenticate"] == "Bearer"
    async with Browser(bot, token="nonsense") as script:
        assert (await script.ask("POST", "/chat", {"message": "hi"}))[0] == 401


async def test_sessions_are_listed_and_ended_one_by_one(browser, bot):
    await browser.log_in("ann")
    async with Browser(bot, headers={"User-Agent": "<script>alert(1)</script>"}) as other:
        await other.log_in("ann")
        _, listed = await browser.ask("GET", "/account/sessions")
        assert [item["current"] for item in listed["items"]].count(True) == 1
        (theirs,) = [item for item in listed["items"] if not item["current"]]
        assert theirs["label"] == "<script>alert(1)</script>"
        assert theirs["address"] == "127.0.0.1"
        async with Browser(bot) as stranger:
            await stranger.log_in("vic")
            assert (await stranger.ask("DELETE", f"/account/sessions/{theirs['id']}"))[0] == 404
        assert (await browser.ask("DELETE", f"/account/sessions/{theirs['id']}"))[0] == 204
        assert (await other.ask("GET", "/account/sessions"))[0] == 401
    assert "<script>alert" not in await browser.open("/account")


async def test_a_changed_password_ends_the_other_sessions(browser, bot):
    await browser.log_in("ann")
    async with Browser(bot) as other:
        await other.log_in("ann")
        assert (
            await browser.ask("POST", "/account/password", {"old": "wrong one", "new": "another password"})
        )[0] == 403
        assert (await browser.ask("POST", "/account/password", {"old": PASSWORD, "new": "short"}))[0] == 400
        assert (await browser.ask("POST", "/account/password", {"old": PASSWORD, "new": "another password"}))[
            0
        ] == 204
        assert (await browser.ask("GET", "/account/sessions"))[0] == 200
        assert (await other.ask("GET", "/account/sessions"))[0] == 401
        assert (await other.log_in("ann"))[0] == 401
        assert (await other.log_in("ann", "another password"))[0] == 200


async def test_only_an_administrator_sends(bot, tokens):
    order = {"platform": "nowhere", "user_key": "nowhere:ann", "text": "hi"}
    for name, status in (("ann", 403), ("vic", 403), ("ada", 400)):
        async with Browser(bot, token=tokens[name]) as script:
            assert (await script.ask("POST", "/send", order))[0] == status, name


async def test_the_local_user_is_gone_with_the_first_account_and_back_after_the_last(bot, bots, sqlite_url):
    async with Browser(bot) as local:
        assert (await local.ask("GET", "/"))[0] == 200
        assert (await local.ask("POST", "/chat", {"message": "hi"}))[0] == 200
        await add_accounts(sqlite_url, ann="user")
        assert (await local.ask("POST", "/chat", {"message": "hi"}))[0] == 401
        assert (await local.ask("GET", "/"))[0] == 303
        status, _ = await local.ask("GET", "/", headers={"X-Forwarded-For": "10.0.0.1"})
        assert status == 403, "from no proxy of ours"


async def test_while_there_is_no_account_others_are_told_how_to_make_one(bot):
    async with Browser(bot, headers={"Host": "bot.example.org", "Accept-Language": "en"}) as other:
        status, page = await other.ask("GET", "/")
        assert status == 403
        assert "user add NAME" in page
        status, answer = await other.ask("POST", "/chat", {"message": "hi"})
        assert status == 403
        assert "bot.py user add NAME" in answer["error"]["message"]


async def test_from_outside_only_an_administrators_token_opens_the_doors(bots, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, server={"private_networks": ["10.0.0.0/8"]}))
    tokens = await add_accounts(sqlite_url, ann="user", ada="admin")
    for name, status in (("ann", 403), ("ada", 200)):
        async with Browser(bot, token=tokens[name]) as script:
            assert (await script.ask("GET", "/readyz"))[0] == status
            assert (await script.ask("POST", "/chat", {"message": "hi"}))[0] == status


async def test_a_proxy_of_ours_names_the_user_and_nobody_else_does(bots, sqlite_url, sqlite_record):
    server = {"trusted_proxies": ["127.0.0.1"], "user_header": "X-Auth-User"}
    bot = await bots.start(configuration(sqlite_url, server=server))
    await add_accounts(sqlite_url, ada="admin")
    named = {"X-Forwarded-For": "10.1.1.1", "X-Auth-User": "guest@example.org"}
    async with Browser(bot, headers=named) as guest:
        await guest.open()
        assert (await guest.ask("POST", "/chat", {"message": "hi"}))[0] == 200
        guest.csrf = None
        assert (await guest.ask("POST", "/chat", {"message": "hi"}))[0] == 403, (
            "a browser sends no more by itself"
        )
    assert sqlite_record.rows(schema.conversations)[0].user_key == "web:private:guest@example.org"
    for header in ({"X-Auth-User": "local"}, {"X-Auth-User": "a b"}, {"X-Auth-User": ""}, {}):
        async with Browser(bot, headers={"X-Forwarded-For": "10.1.1.1", **header}) as nobody:
            assert (await nobody.ask("GET", "/account/sessions"))[0] == 401, header
    stranger = await bots.start(configuration(sqlite_url, server={"user_header": "X-Auth-User"}))
    async with Browser(stranger, headers={"X-Auth-User": "ada"}) as nobody:
        assert (await nobody.ask("GET", "/account/sessions"))[0] == 401


async def test_behind_a_path_everything_is_below_it(bots, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, server={"base_path": "/bot"}))
    async with Browser(bot) as local:
        assert "/bot/static/page.css" in await local.open("/bot/")
        assert (await local.ask("GET", "/bot/static/page.css"))[0] == 200
        assert (await local.ask("POST", "/bot/chat", {"message": "hi"}))[0] == 200
        assert (await local.ask("GET", "/bot/healthz"))[0] == 200
        assert (await local.ask("GET", "/healthz"))[0] == 200
        assert (await local.ask("POST", "/chat", {"message": "hi"}))[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/words.py",
        "/static//etc/passwd",
        "/static/page.css%00",
        "/static/",
    ],
)
async def test_no_path_leads_out_of_the_static_files(browser, path):
    async with browser.session.get(URL(browser.bot.url + path, encoded=True)) as response:
        assert response.status == 404
        assert "import" not in await response.text()
