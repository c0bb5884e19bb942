"""The console: who may see it, what its pages show, what its buttons do, and that hostile words stay words."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import orjson
import pytest
from sqlalchemy import insert

from feishu_bot.model import ChatType, InboundMessage
from feishu_bot.store import schema
from tests.e2e.bots import configuration, until
from tests.e2e.browsers import Browser, add_accounts

# The servers of these tests are those of the end-to-end tests.
from tests.e2e.conftest import bots, nursery, sqlite_record  # noqa: F401

SECTIONS = (
    *("", "/dead", "/conversations", "/budgets", "/jobs"),
    *("/platforms", "/config", "/logs", "/people", "/audit"),
)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
KEY = "sk-very-secret-key"


def configured(url, **changes):
    return configuration(
        url,
        ai={"model": "echo", "api_key": KEY},
        budgets=[{"name": "daily", "limit_tokens": 100_000, "limit_cost_usd": 2}],
        **changes,
    )


@pytest.fixture
async def bot(bots, sqlite_url):  # noqa: F811
    return await bots.start(configured(sqlite_url))


@pytest.fixture
async def tokens(sqlite_url, bot):
    return await add_accounts(sqlite_url, ann="user", vic="viewer", ada="admin")


@pytest.fixture
async def ada(bot, tokens):
    async with Browser(bot) as made:
        await made.log_in("ada")
        await made.open("/admin")
        yield made


async def post(browser, path, *, sure="yes", token=None, **fields):
    """Send a form as a browser does, or with another ``token``; returns status and page."""
    fields |= {"sure": sure} if sure else {}
    fields |= {"csrf": browser.csrf or "" if token is None else token}
    sent, browser.csrf = browser.csrf, None
    try:
        return await browser.ask("POST", path, headers={}, data=fields)
    finally:
        browser.csrf = sent


def add_letter(record, *, text="lost words", reason="the model failed", state="dead", number=1, **more):
    """A message of Ann's that was given up."""
    message = InboundMessage("web", f"k{number}", chat_type=ChatType.PRIVATE, sender_id="ann", text=text)
    payload = orjson.loads(message.to_json()) | more
    record.execute(
        insert(schema.inbox).values(
            account="web",
            event_key=f"k{number}",
            lane_key=f"web:private:ann{number}",
            payload=orjson.dumps(payload).decode(),
            state=state,
            reason=reason,
            attempts=5,
            received_at=record.now_ms(),
            ended_at=record.now_ms(),
        )
    )
    return f"in-{record.rows(schema.inbox)[-1].id}"


async def test_each_role_sees_what_it_may(bot, tokens):
    for name, status in (("ann", 403), ("vic", 200), ("ada", 200)):
        async with Browser(bot) as browser:
            assert (await browser.ask("GET", "/admin"))[0] == 303, "to the login first"
            assert browser.response.headers["Location"] == "/login?next=/admin"
            assert (await browser.ask("GET", "/admin/live"))[0] == 401
            await browser.log_in(name)
            for section in SECTIONS:
                found, text = await browser.ask("GET", "/admin" + section)
                assert found == status, (name, section, text)
            assert (await browser.ask("GET", "/admin/live"))[0] == status


async def test_the_local_user_has_no_console(bot):
    async with Browser(bot) as browser:
        assert (await browser.ask("GET", "/"))[0] == 200
        status, text = await browser.ask("GET", "/admin")
        assert status == 403
        assert "user add NAME --admin" in text


async def test_there_is_none_where_it_is_disabled(bots, sqlite_url):  # noqa: F811
    bot = await bots.start(configured(sqlite_url, admin={"enabled": False}))
    await add_accounts(sqlite_url, ada="admin")
    async with Browser(bot) as browser:
        await browser.log_in("ada")
        for section in (*SECTIONS, "/live"):
            assert (await browser.ask("GET", "/admin" + section))[0] == 404
        assert (await post(browser, "/admin/dead", do="retry_all"))[0] == 404


async def test_a_viewer_has_no_buttons_and_changes_nothing(bot, tokens, sqlite_record):  # noqa: F811
    letter = add_letter(sqlite_record)
    async with Browser(bot) as vic:
        await vic.log_in("vic")
        for section in (*SECTIONS, f"/dead/{letter}", "/people/ada"):
            text = await vic.open("/admin" + section)
            assert 'method="post"' not in text, section
        for path, fields in (
            ("dead", {"do": "retry", "id": letter}),
            ("dead", {"do": "drop", "id": letter}),
            ("conversations", {"do": "delete", "id": "1"}),
            ("budgets", {"do": "reset", "budget": "daily", "key": "web:ann"}),
            ("jobs", {"do": "run", "job": "usage"}),
            ("platforms", {"do": "pause", "target": "all"}),
        ):
            assert (await post(vic, f"/admin/{path}", **fields))[0] == 403
    assert [row.state for row in sqlite_record.rows(schema.inbox)] == ["dead"]
    assert sqlite_record.count(schema.audit) == sqlite_record.count(schema.controls, kind="pause") == 0


async def test_a_dead_letter_is_retried_from_the_page(ada, sqlite_record):  # noqa: F811
    letter = add_letter(sqlite_record, text="what is lost?", reason="the model failed")
    text = await ada.open("/admin/dead")
    assert letter in text
    assert "the model failed" in text
    text = await ada.open(f"/admin/dead/{letter}")
    assert "what is lost?" in text
    order = re.search(r'name="order" value="(\w+)"', text)[1]
    fields = {"do": "retry", "id": letter, "order": order}
    status, asked = await post(ada, "/admin/dead", sure=None, **fields)
    assert status == 200, "without a script, a page asks"
    assert f"Retry {letter}?" in asked
    assert sqlite_record.rows(schema.inbox)[0].state == "dead"
    assert (await post(ada, "/admin/dead", **fields))[0] == 303
    assert (await post(ada, "/admin/dead", **fields))[0] == 303, "sent twice, it is one order"
    await until(lambda: sqlite_record.rows(schema.inbox)[0].state == "answered", "the answer")
    (row,) = sqlite_record.rows(schema.audit)
    assert (row.actor, row.action, row.target) == ("web:ada", "dead.retry", letter)
    assert row.at <= datetime.now(UTC)
    assert letter in await ada.open("/admin/audit")


async def test_all_letters_of_a_search_are_retried_and_others_dropped(ada, sqlite_record):  # noqa: F811
    for number in range(130):
        add_letter(sqlite_record, number=number, reason="first" if number < 120 else "second")
    text = await ada.open("/admin/dead?q=second")
    assert text.count('name="do" value="drop"') == 10
    text = await ada.open("/admin/dead?page=2")
    assert 'rel="prev"' in text
    assert (await post(ada, "/admin/dead", do="retry_all", q="first"))[0] == 303
    assert "done=120" in ada.response.headers["Location"]
    assert sqlite_record.count(schema.inbox, state="dead") == 10
    left = sqlite_record.rows(schema.inbox, state="dead")[0].id
    assert (await post(ada, "/admin/dead", do="drop", id=f"in-{left}"))[0] == 303
    assert sqlite_record.count(schema.inbox, state="dead") == 9
    assert (await post(ada, "/admin/dead", do="drop", id=f"in-{left}"))[0] == 303
    assert "not=why_gone" in ada.response.headers["Location"]
    assert sqlite_record.count(schema.audit) == 3, "two pieces of a hundred, and what was dropped"


async def test_payloads_show_no_secret(ada, sqlite_record):  # noqa: F811
    letter = add_letter(sqlite_record, text=f"my key is {KEY}", reason=KEY, verify_token="abcdefg")
    for path in ("/admin/dead", f"/admin/dead/{letter}", "/admin/config", "/admin/logs"):
        text = await ada.open(path)
        assert KEY not in text
        assert "abcdefg" not in text
    assert "***" in await ada.open(f"/admin/dead/{letter}")


async def test_the_configuration_says_where_each_value_came_from(ada):
    text = await ada.open("/admin/config")
    assert re.search(r"model: echo +# \S*config-0\.yaml:\d+", text)
    assert re.search(r"answer_within: .*# default", text)
    text = await ada.open("/admin/config?q=db_url")
    assert "answer_within" not in text


async def test_the_log_is_that_of_the_process(ada):
    text = await ada.open("/admin/logs?q=database+ready&level=info")
    assert "database ready" in text.replace("&#34;", '"')
    assert "sessions warmed" not in text
    assert (await ada.ask("GET", "/admin/logs?level=nonsense"))[0] == 400


async def test_what_is_not_from_our_own_page_is_refused(ada, bot, sqlite_record):  # noqa: F811
    letter = add_letter(sqlite_record)
    fields = {"do": "drop", "id": letter}
    assert (await post(ada, "/admin/dead", token="", **fields))[0] == 403
    assert (await post(ada, "/admin/dead", token="0" * 64, **fields))[0] == 403
    right, ada.csrf = ada.csrf, None
    assert (await ada.ask("POST", "/admin/dead", {**fields, "csrf": right}))[0] == 403, "JSON is no form"
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    sent = {**fields, "sure": "yes", "csrf": right}
    assert (await ada.ask("POST", "/admin/dead", headers=elsewhere, data=sent))[0] == 403
    origin = {"Origin": "https://evil.example"}
    assert (await ada.ask("POST", "/admin/dead", headers=origin, data=sent))[0] == 403
    assert sqlite_record.count(schema.inbox, state="dead") == 1
    ada.csrf = right
    async with Browser(bot) as nobody:
        assert (await post(nobody, "/admin/dead", **fields))[0] == 303, "to the login"
        assert nobody.response.headers["Location"].startswith("/login")


NONSENSE = [
    ("dead", {"do": "retry", "id": "in-1 or 1=1"}),
    ("dead", {"do": "explode", "id": "in-1"}),
    ("dead", {}),
    ("conversations", {"do": "delete", "id": "../1"}),
    ("budgets", {"do": "grant", "budget": "daily", "key": "web:ann", "unit": "tokens", "amount": "-5"}),
    ("budgets", {"do": "grant", "budget": "daily", "key": "web:ann", "unit": "tokens", "amount": "1e9"}),
    ("budgets", {"do": "grant", "budget": "none", "key": "web:ann", "unit": "tokens", "amount": "5"}),
    ("budgets", {"do": "grant", "budget": "daily", "key": "", "unit": "tokens", "amount": "5"}),
    ("jobs", {"do": "run", "job": "rm -rf"}),
    ("platforms", {"do": "pause", "target": "account:nobody"}),
    ("platforms", {"do": "pause", "target": "all", "say": "x" * 501}),
    ("platforms", {"do": "pause", "target": "all", "say": "a\0b"}),
]


async def test_what_means_nothing_is_refused(ada, sqlite_record):  # noqa: F811
    for section, fields in NONSENSE:
        assert (await post(ada, f"/admin/{section}", **fields))[0] == 400, fields
    assert sqlite_record.count(schema.audit) == 0
    for path in [
        "/dead?page=0",
        "/dead?page=201",
        "/dead?page=%00",
        "/dead?q=" + "x" * 201,
        "/dead?q=%00",
        "/conversations?page=x",
        "/conversations/1?before=x",
        "?days=8",
        "?by=secret",
    ]:
        assert (await ada.ask("GET", "/admin" + path))[0] == 400, path
    for path in ("/dead/in-99", "/conversations/99", "/conversations/99/export", "/nothing"):
        assert (await ada.ask("GET", "/admin" + path))[0] == 404, path


async def test_conversations_are_found_read_exported_and_deleted(ada, bot, tokens, sqlite_record):  # noqa: F811
    async with Browser(bot, token=tokens["ann"]) as ann:
        _, first = await ann.ask("POST", "/chat", {"message": "the blue whale"})
        conversation = first["conversation_id"]
        for words in ("a red fox", HOSTILE):
            said = {"message": words, "conversation_id": conversation}
            assert (await ann.ask("POST", "/chat", said))[0] == 200
    assert f"/admin/conversations/{conversation}" in await ada.open("/admin/conversations")
    assert "web:private:ann" in await ada.open("/admin/conversations?in=heads&q=private%3Aann")
    assert "blue" not in await ada.open("/admin/conversations?in=heads&q=nobody")
    hit = await ada.open("/admin/conversations?q=whale")
    assert "<mark>whale</mark>" in hit
    link = re.search(rf'href="(/admin/conversations/{conversation}\?at=\d+)#m\d+"', hit)[1]
    assert "the blue whale" in await ada.open(link)
    text = await ada.open(f"/admin/conversations/{conversation}")
    assert "a red fox" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    status, told = await ada.ask("GET", f"/admin/conversations/{conversation}/export?format=md")
    assert status == 200
    assert "a red fox" in told
    assert "attachment" in ada.response.headers["Content-Disposition"]
    assert (await post(ada, "/admin/conversations", do="delete", id=conversation))[0] == 303
    assert (await ada.ask("GET", f"/admin/conversations/{conversation}"))[0] == 404
    await until(lambda: sqlite_record.count(schema.messages) == 0, "the rows' removal")
    (row,) = sqlite_record.rows(schema.audit)
    assert (row.action, row.target) == ("conversation.delete", f"conversation {conversation}")


async def test_a_long_conversation_is_read_page_by_page(ada, sqlite_record):  # noqa: F811
    now = datetime.now(UTC)
    sqlite_record.execute(
        insert(schema.conversations).values(
            id=7, public_id="p", user_key="web:private:ann", platform="web", created_at=now, last_activity=now
        )
    )
    for n in range(1, 121):
        sqlite_record.execute(
            insert(schema.messages).values(
                id=n, conversation_id=7, seq=n, role="user", content=f"word-{n}-", timestamp=now
            )
        )
    seen, path = [], "/admin/conversations/7"
    while path:
        text = await ada.open(path)
        seen = re.findall(r"word-(\d+)-", text) + seen
        earlier = re.search(r'href="(\?before=\d+)"', text)
        path = "/admin/conversations/7" + earlier[1] if earlier else None
    assert [int(n) for n in seen] == list(range(1, 121))
    text = await ada.open("/admin/conversations/7?after=20")
    assert re.findall(r"word-(\d+)-", text) == [str(n) for n in range(21, 71)]
    assert "?after=70" in text


async def test_budgets_are_granted_and_reset_on_record(ada, bot, tokens, sqlite_record):  # noqa: F811
    async with Browser(bot, token=tokens["ann"]) as ann:
        assert (await ann.ask("POST", "/chat", {"message": "hello"}))[0] == 200
    await until(lambda: sqlite_record.rows(schema.budget_windows), "the ledger")
    text = await ada.open("/admin/budgets")
    assert "web:ann" in text
    assert "/ 100,000 tokens" in text
    own = {"budget": "daily", "key": "web:ann"}
    granted = {**own, "do": "grant", "unit": "tokens", "amount": "500"}
    assert (await post(ada, "/admin/budgets", **granted))[0] == 303
    assert "/ 100,500 tokens" in await ada.open("/admin/budgets?q=ann")
    assert (await post(ada, "/admin/budgets", **{**granted, "unit": "cost", "amount": "0.5"}))[0] == 303
    assert "/ 2.5000 USD" in await ada.open("/admin/budgets")
    assert (await post(ada, "/admin/budgets", do="reset", **own))[0] == 303
    row = sqlite_record.rows(schema.budget_windows)[0]
    assert (row.used, row.granted, row.granted_micro_usd) == (0, 0, 0)
    actions = [row.action for row in sqlite_record.rows(schema.audit)]
    assert actions == ["budget.grant", "budget.grant", "budget.reset"]


async def test_a_job_runs_now(ada, sqlite_record):  # noqa: F811
    assert "7 * * * *" in await ada.open("/admin/jobs")
    assert (await post(ada, "/admin/jobs", do="run", job="usage"))[0] == 303
    await until(lambda: [r for r in sqlite_record.rows(schema.job_runs, job="usage") if r.node], "the run")
    assert [row.action for row in sqlite_record.rows(schema.audit)] == ["job.run"]


async def test_platforms_are_paused_and_go_on(ada, bot, tokens, sqlite_record):  # noqa: F811
    assert (await post(ada, "/admin/platforms", do="pause", target="account:web", say="back soon"))[0] == 303
    (row,) = sqlite_record.rows(schema.controls, kind="pause")
    assert orjson.loads(row.value) == {"say": "back soon", "by": "web:ada"}
    text = await ada.open("/admin/platforms")
    assert "back soon" in text
    assert (await post(ada, "/admin/platforms", do="resume", target="account:web"))[0] == 303
    assert sqlite_record.count(schema.controls, kind="pause") == 0
    assert (await post(ada, "/admin/platforms", do="resume", target="account:web"))[0] == 303
    actions = [row.action for row in sqlite_record.rows(schema.audit)]
    assert actions == ["pause", "resume"], "what changes nothing is not on record"


async def test_traffic_tokens_and_cost_are_drawn_by_platform_model_and_user(ada, sqlite_record):  # noqa: F811
    now = datetime.now(UTC)
    for number, (platform, model, user) in enumerate(
        [("feishu", "m-one", "feishu:ou_a"), ("qq", "m-two", "qq:b"), ("qq", "m-two", None)], start=1
    ):
        sqlite_record.execute(
            insert(schema.usage).values(
                inbox_id=number,
                attempt=1,
                call=1,
                platform=platform,
                model=model,
                user_id=user,
                input_tokens=30 * number,
                output_tokens=10,
                cost_micro_usd=250_000 if number > 1 else 750_000,
                outcome="ok",
                at=now,
            )
        )
    sqlite_record.execute(
        insert(schema.totals).values(
            day=now.date().isoformat(), account="feishu", end="answered", shard=1, count=42
        )
    )
    text = await ada.open("/admin?days=7&by=platform")
    assert text.count('<svg class="chart"') == 3
    assert re.search(r"<title>[\d-]+ · feishu: 42</title>", text)
    assert re.search(r"<title>[\d-]+ · qq: 170</title>", text)
    assert "1.25" in text
    text = await ada.open("/admin?days=90&by=model")
    legends = re.findall(r'class="c(\d)" width="10" height="10"/></svg>([^<]+?) <', text)
    assert {name: {c for c, n in legends if n == name} for name in ("m-one", "m-two")} == {
        "m-two": {"0"},
        "m-one": {"1"},
    }, "each has one colour in all charts"
    assert re.search(r"<title>[\d-]+ · m-one: 40</title>", text)
    text = await ada.open("/admin?days=30&by=user")
    assert re.search(r"<title>[\d-]+ · feishu:ou_a: 40</title>", text)
    assert "(forgotten): 100" in text


async def test_the_figures_are_live(ada, sqlite_record):  # noqa: F811
    _, live = await ada.ask("GET", "/admin/live")
    assert live["figures"]["processes"] == 1
    add_letter(sqlite_record)

    async def dead():
        return (await ada.ask("GET", "/admin/live"))[1]["figures"]["dead"]

    found = await dead()
    while found != 1:
        found = await dead()
    assert ada.response.headers["Cache-Control"] == "no-store"


async def test_hostile_names_titles_and_reasons_are_words_on_every_page(ada, sqlite_record):  # noqa: F811
    now, stamp = datetime.now(UTC), sqlite_record.now_ms()
    letter = add_letter(sqlite_record, text=HOSTILE, reason=HOSTILE)
    for table, values in (
        (schema.conversations, {"id": 5, "public_id": "p", "user_key": HOSTILE, "platform": "web", "title": HOSTILE,
                                "chat_id": HOSTILE, "created_at": now, "last_activity": now}),
        (schema.messages, {"id": 5, "conversation_id": 5, "seq": 1, "role": "assistant", "content": HOSTILE,
                           "sender_id": HOSTILE, "timestamp": now}),
        (schema.usage, {"inbox_id": 1, "attempt": 1, "call": 1, "platform": HOSTILE, "model": HOSTILE,
                        "user_id": HOSTILE, "input_tokens": 5, "output_tokens": 5, "outcome": "ok", "at": now}),
        (schema.totals, {"day": now.date().isoformat(), "account": "<b>", "end": "dead", "shard": 1, "count": 1}),
        (schema.job_runs, {"job": "<b>x", "fire_time": 1, "node": HOSTILE, "started_at": stamp, "finished_at": stamp,
                           "error": HOSTILE}),
        (schema.audit, {"at": now, "actor": HOSTILE, "action": "<b>", "target": HOSTILE, "before": HOSTILE,
                        "after": HOSTILE}),
        (schema.tokens, {"account": "<b>", "kind": "session", "hash": "h", "label": HOSTILE, "address": "<b>",
                         "created_at": stamp, "used_at": stamp}),
        (schema.controls, {"kind": "pause", "name": "account:<b>", "value": orjson.dumps({"say": HOSTILE}).decode(),
                           "at": stamp}),
    ):  # fmt: skip
        sqlite_record.execute(insert(table).values(**values))
    for path in (
        *SECTIONS,
        f"/dead/{letter}",
        "/conversations/5",
        "?by=user",
        "?by=model",
        "/dead?q=" + "%3Cb%3E%22onfocus=x",
        "?done=%3Cb%3E",
    ):
        text = await ada.open("/admin" + path)
        assert "<script>alert" not in text, path
        assert "<img src=x" not in text, path
        assert not re.search(r"<b>|\"onfocus", text), path
        policy = ada.response.headers["Content-Security-Policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<[^>]* (style|on\w+)=", text), path


async def test_the_console_speaks_chinese_too(ada):
    chinese = {"Cookie": "lang=zh"}
    async with Browser(ada.bot, headers=chinese) as nobody:
        text = (await nobody.ask("GET", "/login"))[1]
    assert 'lang="zh"' in text
    for section in SECTIONS:
        status, text = await ada.ask("GET", "/admin" + section, headers={"Accept-Language": "zh-CN,zh"})
        assert status == 200
        assert 'lang="zh"' in text
        assert "控制台" in text
