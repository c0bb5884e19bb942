"""Attacks on every door of a running server: what the routes are is asked from it, so that a new one is attacked too."""

from __future__ import annotations

import re
from base64 import b64encode
from urllib.parse import quote

import orjson
import pytest
from yarl import URL

from feishu_bot.config import ServerSettings
from feishu_bot.store import schema
from feishu_bot.testing.onebot import message_event
from feishu_bot.testing.onebot import sign as sign_onebot
from feishu_bot.testing.qq import FakeQQ, private_event, signed_event
from feishu_bot.web.doors import Doors
from feishu_bot.web.openapi import PARAMETER, document
from tests.e2e.bots import SECRET, configuration, until
from tests.e2e.browsers import Browser, add_accounts
from tests.platforms.onebots import Nothing

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
# What may stand in a path or a query and should not: another place, another line, another language.
_ENCODED = (
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "%00",
    "%0d%0aSet-Cookie:%20a=b",
    quote(MARKUP, safe=""),
    "%ff%fe",
    "%",
)
HOSTILE = _ENCODED + tuple(
    quote(text, safe="")
    for text in ("../../etc/passwd", "....//", "/etc/passwd", "C:\\Windows", "\\\\host\\share", "\u2028", "é" * 300, "9" * 400,
                 "-1", "1e9", "' OR 1=1 --", "1;DROP TABLE accounts", "{{7*7}}", "${7*7}", "\U0001f600")
)  # fmt: skip
HOSTILE_QUERIES = (*_ENCODED, "//evil.example", "-1")
# Signed by a platform, which has no page and no token; and the login, which has tests of its own.
NOT_BY_TOKEN = {("POST", "/webhook/{account}"), ("POST", "/login")}
# Fields that every change understands, so that it is refused for who asks and not for what it is asked.
BODY = {"message": "hi", "title": "mine now", "message_id": 1, "label": "x", "request_id": "r", "old": "o" * 8,
        "new": "n" * 8, "platform": "web", "user_key": "web:ann", "text": "hi"}  # fmt: skip
FORM = {
    "do": "delete",
    "id": "1",
    "sure": "yes",
    "name": "ann",
    "job": "usage",
    "target": "all",
    "order": "0" * 16,
}


@pytest.fixture
async def bot(bots, sqlite_url):
    return await bots.start(configuration(sqlite_url, budgets=[{"name": "daily", "limit_tokens": 100_000}]))


@pytest.fixture
async def tokens(sqlite_url, bot):
    return await add_accounts(sqlite_url, ann="user", bob="user", ada="admin")


def test_every_page_is_attacked():
    made = Doors(
        Nothing(), ServerSettings(), account=None, language=lambda: "en", chat=Nothing, inside=Nothing()
    )
    routes = made.routes()
    pages = {PARAMETER.sub(r"{\1}", route.path) for route in routes if route.method == "GET"}
    told = {
        path for path, methods in document(routes, base="", version="")["paths"].items() if "get" in methods
    }
    assert pages - told == set(PAGES) - {"/static/{name}"}


async def operations(browser):
    """All that can be asked of the server: ``(method, path)``, with parameters in braces."""
    _, document = await browser.ask("GET", "/openapi.json")
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


PAGES = (
    *(
        "/",
        "/login",
        "/account",
        "/docs",
        "/admin",
        "/admin/dead",
        "/admin/dead/{letter}",
        "/admin/conversations",
    ),
    *("/admin/conversations/{id}", "/admin/budgets", "/admin/jobs", "/admin/platforms", "/admin/config"),
    *(
        "/admin/logs",
        "/admin/people",
        "/admin/people/{name}",
        "/admin/audit",
        "/static/{name}",
        "/openapi.json",
    ),
)


QUERIES = ("q", "page", "next", "format", "before", "after", "at", "limit", "offset", "level", "days", "by", "in", "c", "done", "not")  # fmt: skip


def kept(record):
    """What an attack could have changed of the record."""
    tables = (schema.accounts, schema.conversations, schema.messages, schema.controls, schema.audit)
    found = {table.name: sorted(map(str, record.rows(table))) for table in tables}
    return found | {"tokens": record.count(schema.tokens)}


# ----------------------------------------------------------------------------------------------------- CSRF


async def test_no_change_is_made_without_the_token_of_our_own_page(bot, tokens, sqlite_record):
    async with Browser(bot, token=tokens["ada"]) as script:
        assert (await script.ask("POST", "/chat", {"message": "hi"}))[0] == 200
    async with Browser(bot) as ada, Browser(bot) as other:
        await ada.log_in("ada")
        await other.log_in("ada")
        before, changes = kept(sqlite_record), []
        for method, path in await operations(ada):
            if method == "GET" or (method, path) in NOT_BY_TOKEN:
                continue
            changes.append((method, path))
            where, is_form = re.sub(r"\{\w+\}", "1", path), path.startswith("/admin")
            for token in ("", "0" * 64, ada.csrf[:-1], other.csrf):
                sent, ada.csrf = ada.csrf, token or None
                if is_form:
                    answer = await ada.ask(method, where, headers={}, data={**FORM, "csrf": token})
                else:
                    answer = await ada.ask(method, where, BODY)
                ada.csrf = sent
                assert (answer[0], answer[1]["error"]["code"]) == (403, "csrf"), (method, path, token, answer)
        assert len(changes) >= 17, "all of them are known to the description"
        assert kept(sqlite_record) == before


async def test_no_page_of_another_site_makes_a_change(bot, tokens, sqlite_record):
    async with Browser(bot) as nobody, Browser(bot) as ada:
        await ada.log_in("ada")
        before = kept(sqlite_record)
        for method, path in await operations(ada):
            if method == "GET":
                continue
            where = re.sub(r"\{\w+\}", "1", path)
            # A form of another site: the browser sends the cookie with none of these, SameSite; here it does.
            for kind in (
                "text/plain",
                "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x",
            ):
                headers = {"Content-Type": kind, "Origin": "https://evil.example", "X-CSRFToken": ""}
                status, _ = await ada.ask(method, where, b'{"message":"hi"}', headers=headers)
                assert status in {401, 403, 404}, (method, path, kind, status)
            assert (await nobody.ask(method, where, BODY))[0] in {303, 400, 401, 403, 404}, (method, path)
        assert kept(sqlite_record) == before


# ------------------------------------------------------------------------------------------ somebody else's


async def test_what_is_somebody_elses_is_404_by_every_call(bot, tokens, sqlite_record):
    async with Browser(bot, token=tokens["ann"]) as ann:
        _, said = await ann.ask("POST", "/chat", {"message": "a secret", "request_id": "mine"})
    number = said["conversation_id"]
    async with Browser(bot) as ann, Browser(bot) as bob:
        await ann.log_in("ann")
        await bob.log_in("bob")
        own = sqlite_record.rows(schema.tokens, account="ann")
        before, asked = kept(sqlite_record), []
        for method, path in await operations(bob):
            if "{id}" not in path:
                continue
            asked.append((method, path))
            for one in {number, *(token.id for token in own)}:
                status, text = await bob.ask(
                    method, path.replace("{id}", str(one)), None if method == "GET" else BODY
                )
                assert status == (403 if path.startswith("/admin") else 404), (method, path, text)
                assert "a secret" not in str(text)
        assert len(asked) >= 9
        body = {"message": "and?", "conversation_id": number}
        assert (await bob.ask("POST", "/chat", body))[0] == 404
        assert (await bob.ask("GET", "/search?q=secret"))[1]["items"] == []
        assert (await bob.ask("GET", "/chat/pending"))[1]["items"] == []
        assert kept(sqlite_record) == before
        status, other = await bob.ask("POST", "/chat", {"message": "mine", "request_id": "mine"})
        assert (status, other["response"]) == (200, "mine"), "the same request id of another is another"


# ---------------------------------------------------------------------------- paths, queries, headers


def no_harm(status, headers, text, what):
    assert status < 500, (what, status, text)
    assert "a=b" not in headers.get("Set-Cookie", ""), what
    assert not re.match(r"(https?:)?[/\\\\]{2}|javascript:", headers.get("Location", "")), what
    assert "root:" not in text, what
    if headers.get("Content-Type", "").startswith("text/html"):
        assert "<script>alert" not in text, what
        assert "<img src=x" not in text, what
        assert "unsafe" not in headers["Content-Security-Policy"], what


async def test_no_path_and_no_query_leads_out_breaks_a_header_or_a_page(bot, tokens):
    async with Browser(bot) as ada, Browser(bot) as nobody:
        await ada.log_in("ada")
        places = {path for method, path in await operations(ada) if method == "GET"} | set(PAGES)
        attacks = []
        for path in sorted(places):
            if "{" in path:
                attacks += [(path, re.sub(r"\{\w+\}", lambda _name, t=text: t, path)) for text in HOSTILE]
            else:
                attacks += [(path, f"{path}?{name}={text}") for name in QUERIES for text in HOSTILE_QUERIES]
        for path, where in attacks:
            for browser in (ada, nobody) if path.startswith("/admin") else (ada,):
                address = URL(bot.url + where, encoded=True)
                async with browser.session.get(address, allow_redirects=False) as response:
                    no_harm(response.status, response.headers, await response.text(), where)
    assert bot.complaints() == []


async def test_an_exports_headers_hold_nothing_anybody_has_written(bot, tokens):
    async with Browser(bot) as ann, Browser(bot) as ada:
        await ann.log_in("ann")
        await ada.log_in("ada")
        _, said = await ann.ask("POST", "/chat", {"message": f"{MARKUP}\r\nSet-Cookie: a=b"})
        number = said["conversation_id"]
        for title in (f'x"; filename="{MARKUP}.html', "a\r\nSet-Cookie: a=b", "名字\u202egnp.exe", "../../x"):
            assert (await ann.ask("PATCH", f"/conversations/{number}", {"title": title}))[0] == 200
            for browser, place in ((ann, "/conversations"), (ada, "/admin/conversations")):
                for kind in ("json", "jsonl", "csv", "md"):
                    status, _ = await browser.ask("GET", f"{place}/{number}/export?format={kind}")
                    headers = browser.response.headers
                    assert status == 200
                    told = f'attachment; filename="conversation-{number}.{kind}"'
                    assert headers["Content-Disposition"] == told
                    assert headers["X-Content-Type-Options"] == "nosniff"
                    assert "html" not in headers["Content-Type"]
                    assert "Set-Cookie" not in headers


# -------------------------------------------------------------------------------------------------- uploads


@pytest.mark.parametrize(
    "name",
    ["", "a\r\nSet-Cookie: a=b.txt", "a\0.txt", "\u2028.txt", "x" * 201 + ".txt", None, 7, ["a.txt"]],
    ids=["empty", "line", "nul", "separator", "long", "none", "number", "list"],
)
async def test_a_name_of_a_file_that_is_none_is_refused(bot, tokens, name, sqlite_record):
    body = {"message": "hi", "files": [{"name": name, "data": b64encode(b"hello").decode()}]}
    async with Browser(bot, token=tokens["ann"]) as ann:
        assert (await ann.ask("POST", "/chat", body))[0] == 400
    assert sqlite_record.count(schema.inbox) == 0


async def test_names_of_files_are_words_and_no_file_is_written(bots, model, sqlite_url, tmp_path):
    bot = await bots.start(configuration(sqlite_url, model=model))
    tokens = await add_accounts(sqlite_url, ann="user", ada="admin")
    before = {path for path in tmp_path.rglob("*") if "log" not in path.name}
    async with Browser(bot, token=tokens["ann"]) as ann, Browser(bot) as ada:
        await ada.log_in("ada")
        for name in (
            "../../../tmp/owned.txt",
            "/etc/cron.d/owned.txt",
            f"{MARKUP}.txt",
            'a";x="b.txt',
            "名字.txt",
        ):
            files = [{"name": name, "data": b64encode(b"hello").decode()}]
            status, said = await ann.ask("POST", "/chat", {"message": "read this", "files": files})
            assert status == 200
            number = said["conversation_id"]
            _, found = await ann.ask("GET", f"/conversations/{number}/messages?html")
            assert name in found["items"][-1]["content"]
            assert "<script" not in found["items"][-1]["html"]
            assert "<img" not in found["items"][-1]["html"]
            text = await ada.open(f"/admin/conversations/{number}")
            assert "<script>alert" not in text
            assert "<img src=x" not in text
            for kind in ("json", "csv", "md"):
                assert (await ann.ask("GET", f"/conversations/{number}/export?format={kind}"))[0] == 200
                assert "owned" not in ann.response.headers["Content-Disposition"]
    made = {path for path in tmp_path.rglob("*") if "log" not in path.name} - before
    assert not [path for path in made if "owned" in path.name or "script" in path.name]
    assert bot.complaints() == []


async def test_uploads_beyond_what_is_allowed_are_refused_and_store_nothing(bots, sqlite_url, sqlite_record):
    bot = await bots.start(configuration(sqlite_url, server={"max_body_bytes": 20_000}))
    small = {"name": "a.txt", "data": b64encode(b"x" * 100).decode()}
    large = {"name": "a.txt", "data": b64encode(b"x" * 20_000).decode()}
    async with Browser(bot) as local:
        for files, status in (
            ([large], 413),
            ([small] * 5, 400),
            ([{**small, "data": "no base64 !"}], 400),
            ([{**small, "data": ""}], 400),
            ("a.txt", 400),
            ([7], 400),
        ):
            assert (await local.ask("POST", "/chat", {"message": "hi", "files": files}))[0] == status, files
    assert sqlite_record.count(schema.inbox) == 0
    assert bot.complaints() == []


async def test_a_form_of_the_console_that_is_too_large_is_refused(bot, tokens):
    async with Browser(bot) as ada:
        await ada.log_in("ada")
        for path in {
            path for method, path in await operations(ada) if path.startswith("/admin") and method == "POST"
        }:
            fields = {"do": "x", "csrf": ada.csrf, "say": "x" * 70_000}
            assert (await ada.ask("POST", path, headers={}, data=fields))[0] == 400, path
            many = {f"f{n}": "x" for n in range(30)} | {"csrf": ada.csrf}
            assert (await ada.ask("POST", path, headers={}, data=many))[0] == 400, path


# ----------------------------------------------------------------------------------------- platform payloads


async def test_what_platforms_bring_is_words_in_the_console(
    bots, people, feishu, http, sqlite_url, sqlite_record
):
    async with FakeQQ(app_secret=SECRET) as qq:
        platforms = {
            "qq": {"enabled": True, "app_id": "1", "app_secret": SECRET, "base_url": qq.url, "token_url": qq.token_url},
            "onebot": {"enabled": True, "secret": SECRET, "access_token": SECRET},
        }  # fmt: skip
        bot = await bots.start(configuration(sqlite_url, feishu=feishu, platforms=platforms))
        await people.say(bot, MARKUP, user="ann<b>")
        await people.say(bot, f"{MARKUP} in the group", user="bob", chat=f"oc_{MARKUP}")
        headers, body = signed_event(private_event(MARKUP, user="U<b>1"), secret=SECRET)
        async with http.post(f"{bot.url}/webhook/qq", data=body, headers=headers) as answer:
            assert answer.status == 200
        event = message_event(MARKUP, message_id=1, group_id=5, at=True, card=MARKUP, nickname=MARKUP)
        body = orjson.dumps(event)
        async with http.post(
            f"{bot.url}/webhook/onebot", data=body, headers=sign_onebot(body, SECRET)
        ) as answer:
            assert answer.status < 300
        await until(lambda: sqlite_record.count(schema.messages) >= 8, "the answers")
        await add_accounts(sqlite_url, ada="admin")
        async with Browser(bot) as ada:
            await ada.log_in("ada")
            numbers = [row.id for row in sqlite_record.rows(schema.conversations)]
            for path in ("", "?by=user", "/conversations", "/conversations?q=alert", "/budgets", "/dead", "/audit", "/logs",
                         *(f"/conversations/{n}" for n in numbers)):  # fmt: skip
                text = await ada.open("/admin" + path)
                no_harm(200, ada.response.headers, text, path)
                assert "<b>" not in text, path
