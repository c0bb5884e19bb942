"""The doctor: finds nothing wrong with what is right, and names what is not."""

from __future__ import annotations

import json

import pytest

from feishu_bot.store import schema
from feishu_bot.testing.feishu import FakeFeishu
from tests.e2e.bots import SECRET, configuration, merged

AGED = {"platforms": {"feishu": {"max_event_age_s": 300}}}


async def examined(operator, url: str, **more) -> tuple[int, dict[str, tuple[str, str]]]:
    """Return the doctor's exit code, and state and words of each check."""
    code, text = await operator.types("doctor", "--url", url, "--json", **more)
    checks = json.loads(text[: text.rindex("]") + 1])
    return code, {check["what"]: (check["state"], check["found"]) for check in checks}


@pytest.mark.parametrize("changes", [{}, AGED], ids=["any age", "age checked"])
async def test_a_server_that_takes_and_refuses_what_it_should_is_found_in_order(
    operator, people, feishu, db_url, record, changes
):
    bot = await operator.workers(merged(configuration(db_url, feishu=feishu), changes), 2)
    code, found = await examined(operator, bot.url)
    assert code == 0, found
    assert {what: words for what, (_, words) in found.items() if what.startswith("feishu: ")} == {
        "feishu: signed and encrypted": "HTTP 200",
        "feishu: repeated": "HTTP 200",
        "feishu: unsigned": "HTTP 401",
        "feishu: tampered": "HTTP 401",
        "feishu: not encrypted": "HTTP 400",
        "feishu: challenge": "HTTP 200",
        "feishu: stale by a week": "HTTP 401" if changes else "HTTP 200",
        "feishu: recorded": "1 time(s)",
    }
    assert found["credentials of feishu"] == ("ok", "feishu: bot ou_fake_bot")
    assert found["processes"] == ("ok", "2 running, versions 0.1.0")
    assert found["database"][0] == found["clock of the database"][0] == found["server"][0] == "ok"
    assert found["backup"][0] == "warning"
    await record.settled()
    assert {row.state for row in record.inbox()} == {"ignored"}, "nothing was answered"
    assert feishu.texts() == []
    assert bot.complaints() == []


async def test_a_server_with_another_key_is_found_out(operator, bots, feishu, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    wrong = configuration(sqlite_url, feishu=feishu, platforms={"feishu": {"encrypt_key": "another key"}})
    config = bots.write(wrong)
    code, found = await examined(operator, bot.url, config=config)
    assert code == 1
    assert found["feishu: signed and encrypted"] == ("bad", "HTTP 401, expected 200")
    assert found["feishu: recorded"] == ("bad", "0 time(s), expected once: is this the server's database?")
    assert found["feishu: unsigned"][0] == "ok"


async def test_wrong_credentials_and_a_server_that_is_not_there_are_bad(operator, bots, sqlite_url):
    async with FakeFeishu(app_secret="another secret than " + SECRET) as feishu:
        bots.write(configuration(sqlite_url, feishu=feishu))
        code, found = await examined(operator, "http://127.0.0.1:9", config=bots.folder / "config-0.yaml")
    assert code == 1
    assert found["credentials of feishu"][0] == "bad"
    assert SECRET not in str(found)
    assert found["server"] == ("bad", "http://127.0.0.1:9 does not answer: ClientConnectorError")
    assert found["processes"] == ("warning", "0 running")


async def test_an_account_with_a_token_alone_is_examined_by_it(
    operator, bots, feishu, sqlite_url, sqlite_record
):
    token = {"encrypt_key": "", "verification_token": "token-of-the-tests"}
    config = configuration(sqlite_url, feishu=feishu, platforms={"feishu": token})
    bot = await bots.start(config)
    code, found = await examined(operator, bot.url)
    assert code == 0, found
    assert found["feishu: with a wrong token"] == ("ok", "HTTP 403")
    assert found["feishu: recorded"] == ("ok", "1 time(s)")
    assert sqlite_record.count(schema.inbox) == 1


async def test_a_database_that_is_not_there_is_bad_and_is_not_made(operator, bots, tmp_path):
    bots.write(configuration(f"sqlite:///{tmp_path}/none/bot.db"))
    code, text = await operator.types("doctor", config=bots.folder / "config-0.yaml")
    assert code == 1
    assert "bad      database" in text
    assert "no server has run" in text
    assert not (tmp_path / "none" / "bot.db").exists()
