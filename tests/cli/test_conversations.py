"""``search``, ``export``, ``import``, ``forget`` and ``usage`` as they are typed."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import insert, update

from feishu_bot.store.conversations import append, get_or_create
from feishu_bot.store.schema import messages, usage
from feishu_bot.store.transactions import Transactions
from feishu_bot.store.values import new_message

NOON = datetime(2025, 6, 18, 12, tzinfo=UTC)  # 20:00 in Shanghai
on_sqlite = pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)  # the database has no say in it


@pytest.fixture
def database(db_url):
    database = Transactions(db_url, clock=lambda: NOON)
    yield database
    database.close()


@pytest.fixture
def bot(typed, db_url):
    return partial(typed, db_url)


def say(database, user_key, *said, at=NOON):
    def work(tx):
        row = get_or_create(tx, user_key, user_key.partition(":")[0])
        new = [new_message(("user", "assistant")[n % 2], content, 5) for n, content in enumerate(said)]
        ids = [m["id"] for m in append(tx, row["id"], new)]
        tx.connection.execute(update(messages).where(messages.c.id.in_(ids)).values(timestamp=at))

    database.write(work)


def call(n, *, user="web:ann", model="echo", at=NOON, tokens=10, cost=None, chat=None):
    platform = "web" if user is None else user.partition(":")[0]
    return {
        "inbox_id": n,
        "attempt": 1,
        "call": 0,
        "user_key": user,
        "user_id": user,
        "chat_id": chat,
        "platform": platform,
        "model": model,
        "input_tokens": tokens,
        "output_tokens": 1,
        "cost_micro_usd": None if cost is None else round(cost * 1_000_000),
        "outcome": "ok",
        "at": at,
    }


def book(database, *calls):
    database.write(lambda tx: tx.connection.execute(insert(usage), list(calls)) and None)


# --------------------------------------------------------------------------------------------------- search


def test_search_shows_where_a_hit_was_said_newest_first(bot, database):
    say(database, "web:private:ann", "今天天气真好", "天气 indeed")
    say(database, "qq:group:bob", "no weather")
    assert bot("search", "天气") == (
        0,
        (
            "2025-06-18 20:00:00  #1  web:private:ann  assistant\n"
            "    «天气» indeed\n"
            "2025-06-18 20:00:00  #1  web:private:ann  user\n"
            "    今天«天气»真好\n"
        ),
        "",
    )


def test_search_prints_json(bot, database):
    say(database, "web:private:ann", "天气")
    code, out, _ = bot("search", "天气", "--json")
    (hit,) = json.loads(out)
    assert code == 0
    assert (hit["content"], hit["timestamp"], hit["user_key"]) == (
        "天气",
        "2025-06-18T12:00:00Z",
        "web:private:ann",
    )


def test_search_that_finds_nothing_succeeds_and_says_so(bot):
    assert bot("search", "天气") == (0, "", "nothing found\n")
    assert bot("search", "天气", "--json") == (0, "[]\n", "")


def test_search_is_narrowed_by_person_account_and_local_days(bot, database):
    say(database, "qq:group:ann", "天气 early", at=datetime(2025, 6, 17, 15, 59, tzinfo=UTC))
    say(database, "qq:private:ann", "天气 midnight", at=datetime(2025, 6, 17, 16, tzinfo=UTC))
    say(database, "web:private:bob", "天气 late", at=datetime(2025, 6, 18, 15, 59, tzinfo=UTC))

    def found(*options):
        code, out, _ = bot("search", "天气", "--json", *options)
        assert code == 0
        return [hit["content"].split()[1] for hit in json.loads(out)]

    assert found() == ["late", "midnight", "early"]
    assert found("--user", "qq:ann") == found("--user", "qq:channel:ann") == ["midnight", "early"]
    assert found("--platform", "web") == ["late"]
    assert found("--since", "2025-06-18") == ["late", "midnight"]
    assert found("--until", "2025-06-17") == ["early"]
    assert found("--since", "2025-06-18", "--until", "2025-06-18") == ["late", "midnight"]
    assert found("--until", "2025-06-18T00:01") == ["midnight", "early"]
    assert found("--since", "2025-06-17T16:00:01Z") == ["late"]
    assert found("--limit", "1") == ["late"]


@on_sqlite
def test_a_message_cannot_take_over_the_terminal(bot, database):
    say(database, "web:private:ann", "天气 \x1b]0;evil\x07 \u202e")
    _, out, _ = bot("search", "天气")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\u202e" not in out


@on_sqlite
@pytest.mark.parametrize(
    "arguments",
    [
        ["search", " "],
        ["search", "x", "--since", "yesterday"],
        ["search", "x", "--until", "2025-02-30"],
        ["search", "x", "--limit", "0"],
        ["usage", "--since", "2025"],
        ["usage", "--by", "moon"],
        ["export", "--format", "xml"],
        ["import", "/does/not/exist"],
        ["forget", ""],
        ["cleanup", "--days", "36501"],
        ["search"],
    ],
)
def test_wrong_use_is_exit_2(bot, arguments):
    code, out, err = bot(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


# ----------------------------------------------------------------------------------------- export and import


def test_what_is_exported_is_imported_and_not_twice(bot, database, tmp_path):
    say(database, "web:private:ann", "hello", "天气\r\n")
    say(database, "qq:group:bob", "=1+1")
    for kind in ("json", "jsonl", "csv"):
        file = tmp_path / f"all.{kind}"
        assert bot("export", "--out", file) == (
            0,
            f"wrote 2 conversation(s) with 3 message(s) to {file}\n",
            "",
        )
        known = "imported 0 conversation(s) with 0 message(s); 2 known already\n"
        assert bot("import", file) == (0, known, "")
        assert bot("forget", "web:ann", "--json")[0] == bot("forget", "qq:bob")[0] == 0
        assert bot("import", file) == (0, "imported 2 conversation(s) with 3 message(s)\n", "")
    _code, out, _ = bot("search", "天气", "--json")
    assert [hit["content"] for hit in json.loads(out)] == ["天气\r\n"]


def test_an_export_goes_to_stdout_as_it_is(bot, database):
    say(database, "web:private:ann", "天气 \u2028\r\n end")
    code, out, err = bot("export")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    assert found["messages"][0]["content"] == "天气 \u2028\r\n end"
    code, out, _ = bot("export", "--format", "csv")
    assert '"天气 \u2028\r\n end"' in out
    assert bot("export", "--user", "web:bob") == (0, "[]\n", "")


@on_sqlite
def test_a_directory_gets_a_file_per_conversation(bot, database, tmp_path):
    say(database, "web:private:ann", "hello")
    say(database, "qq:group:bob", "hi")
    out = f"{tmp_path}/out/"
    written = f"wrote 2 conversation(s) with 2 message(s) to 2 file(s) in {out}\n"
    assert bot("export", "--format", "md", "--out", out) == (0, written, "")
    names = ["qq_group_bob_2.md", "web_private_ann_1.md"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == names
    assert bot("export", "--out", out)[0] == 0
    assert bot("import", out, "--json") == (
        0,
        '{\n  "conversations": 0,\n  "messages": 0,\n  "known": 2\n}\n',
        "",
    )


@on_sqlite
def test_a_damaged_file_is_refused_in_one_line(bot, database, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"conversation": {"user_key": "a", "platform": "web"}}\n{"message": {"role": "x"}}\n')
    code, out, err = bot("import", file)
    assert (code, out) == (1, "")
    assert err == "error: x.jsonl: line 2: role must be one of user, assistant, system, tool, not 'x'\n"
    code, out, err = bot("export", "--out", "/dev/null/x.json")
    assert (code, out, err.count("\n")) == (1, "", 1)


# --------------------------------------------------------------------------------------------------- forget


def test_forget_prints_a_receipt(bot, database):
    say(database, "web:private:ann", "秘密", "answer")
    book(database, call(1, cost=0.25))
    code, out, _ = bot("forget", "web:private:ann", "--dry-run")
    assert code == 0
    assert out.startswith("web:ann: would be erased at 20")
    assert bot("search", "秘密")[1] != ""
    code, out, _ = bot("forget", "web:private:ann")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("web:ann: erased at 20")
    assert lines[1] == "conversations  1  with 2 message(s)"
    assert lines[8] == "ledger         1  row(s) without a name; kept: 11 token(s), 0.2500 USD"
    assert lines[-1] == "Backups and exports made before still hold what they held then."
    assert bot("search", "秘密")[1] == ""
    receipt = json.loads(bot("forget", "web:ann", "--json")[1])
    assert (receipt["conversations"], receipt["usage_rows"], receipt["dry_run"]) == (0, 0, False)


# ---------------------------------------------------------------------------------------------------- usage


def test_usage_is_summed_by_whatever_is_asked_for(bot, database):
    book(
        database,
        call(1, tokens=100, cost=0.5, chat="g1"),
        call(2, user="qq:bob", model="gpt", tokens=5),
        call(3, user=None, tokens=2, cost=0.25),
    )

    def rows(by, key=None):
        code, out, _ = bot("usage", "--by", by, "--json")
        assert code == 0
        return [
            (row[key or by], row["calls"], row["total_tokens"], row["cost_usd"])
            for row in json.loads(out)["rows"]
        ]

    assert rows("user") == [("web:ann", 1, 101, 0.5), ("qq:bob", 1, 6, None), (None, 1, 3, 0.25)]
    assert rows("platform") == [("web", 2, 104, 0.75), ("qq", 1, 6, None)]
    assert rows("model") == [("echo", 2, 104, 0.75), ("gpt", 1, 6, None)]
    assert rows("chat") == [("g1", 1, 101, 0.5), (None, 2, 9, 0.25)]
    assert rows("day") == [("2025-06-18", 3, 110, 0.75)]
    assert json.loads(bot("usage", "--json")[1])["total"] == {
        "calls": 3,
        "input_tokens": 107,
        "output_tokens": 3,
        "total_tokens": 110,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "cost_usd": 0.75,
    }


def test_usage_prints_a_table(bot, database):
    book(database, call(1, tokens=1000, cost=0.5), call(2, user=None, tokens=2))
    assert bot("usage", "--by", "user")[1].splitlines() == [
        "user         calls  input  output  tokens  cost USD",
        "web:ann          1   1000       1    1001    0.5000",
        "(forgotten)      1      2       1       3         -",
        "total            2   1002       2    1004    0.5000",
    ]
    assert bot("usage")[1].splitlines() == [
        "       calls  input  output  tokens  cost USD",
        "total      2   1002       2    1004    0.5000",
    ]


def test_the_days_of_usage_are_those_of_the_configured_time_zone(bot, database):
    for n, at in enumerate(["2025-06-17T15:59:59Z", "2025-06-17T16:00:00Z", "2025-06-18T15:59:59.999999Z", "2025-06-20T00:00:00Z"]):  # fmt: skip
        book(database, call(n, at=datetime.fromisoformat(at)))

    def days(*options):
        found = json.loads(bot("usage", "--by", "day", "--json", *options)[1])
        assert sum(row["calls"] for row in found["rows"]) == found["total"]["calls"]
        return [(row["day"], row["calls"]) for row in found["rows"]]

    assert days() == [("2025-06-20", 1), ("2025-06-18", 2), ("2025-06-17", 1)]
    assert days("--since", "2025-06-18") == [("2025-06-20", 1), ("2025-06-18", 2)]
    assert days("--since", "2025-06-18T12:00") == [("2025-06-20", 1), ("2025-06-18", 1)]
    assert days("--since", "2026-01-01") == []


def test_the_figures_of_a_month_are_the_sum_of_its_rows_to_the_millionth(bot, database):
    """Ten thousand costs that no binary fraction is equal to, in three months of Shanghai's calendar."""
    first = datetime(2025, 5, 31, 16, tzinfo=UTC)  # midnight, 1 June
    rows = [
        call(
            n,
            user=f"web:u{n % 7}",
            model=f"m{n % 3}",
            at=first + timedelta(minutes=13 * n),
            tokens=n,
            cost=(n * 7919 % 1_000_003) / 1_000_000,
        )
        for n in range(10_000)
    ]
    for at in range(0, len(rows), 500):
        book(database, *rows[at : at + 500])
    july = datetime(2025, 6, 30, 16, tzinfo=UTC)
    june = [row for row in rows if row["at"] < july]
    micro_usd = sum(row["cost_micro_usd"] for row in june)
    span = ("--since", "2025-06-01", "--until", "2025-07-01")
    for by in ("user", "chat", "platform", "model", "day"):
        found = json.loads(bot("usage", "--by", by, "--json", *span)[1])
        lines = list(csv.DictReader(io.StringIO(bot("usage", "--by", by, "--csv", *span)[1], newline="")))
        for table in (found["rows"], lines):
            assert sum(round(float(row["cost_usd"]) * 1_000_000) for row in table) == micro_usd
            assert sum(int(row["total_tokens"]) for row in table) == sum(
                row["input_tokens"] + 1 for row in june
            )
            assert sum(int(row["calls"]) for row in table) == len(june)
        assert round(found["total"]["cost_usd"] * 1_000_000) == micro_usd


def test_csv_holds_no_formula_and_tells_an_unknown_cost_from_none(bot, database):
    book(database, call(1, user="=cmd:x", cost=0.000001), call(2, user="web:ann", tokens=5), call(3, user=None, cost=0.0, tokens=9))  # fmt: skip
    assert bot("usage", "--by", "user", "--csv")[1].splitlines() == [
        "user,calls,input_tokens,cached_tokens,output_tokens,reasoning_tokens,total_tokens,cost_usd",
        "'=cmd:x,1,10,0,1,0,11,0.000001",
        ",1,9,0,1,0,10,0.000000",
        "web:ann,1,5,0,1,0,6,",
    ]
    assert bot("usage", "--csv")[1].splitlines()[1] == "3,24,0,3,0,27,0.000001"
    assert bot("usage", "--csv", "--json")[0] == 2
