"""The doctor: finds nothing wrong with what is right, and names what is not."""

from __future__ import annotations

import json

import pytest

from feishu_bot.config import PlatformSettings
from feishu_bot.store import schema
from feishu_bot.testing.chats import Chats
from feishu_bot.testing.feishu import FakeFeishu
from feishu_bot.testing.trials import trials_of
from tests.e2e.bots import SECRET, configuration, merged, until

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


QQ = {
    "signed": "HTTP 200",
    "repeated": "HTTP 200",
    "unsigned": "HTTP 401",
    "unsigned check of the address": "HTTP 403",
    "tampered": "HTTP 401",
    "check of the address": "HTTP 200",
    "recorded": "1 time(s)",
}
DOORS = {
    "unsigned": "HTTP 401",
    "tampered": "HTTP 403",
    "WebSocket without a token": "HTTP 401",
    "WebSocket with a wrong token": "HTTP 403",
}
OWN_BOT = {
    "signed": "HTTP 204",
    "repeated": "HTTP 204",
    "of another bot than it says": "HTTP 400",
    "stale by a week": "HTTP 204",
    "WebSocket of a strange bot": "HTTP 403",
    "WebSocket with the token, no upgrade": "HTTP 400",
    "recorded": "1 time(s)",
}


@pytest.mark.parametrize("self_ids", [["10001"], []], ids=["bots named", "no bot named"])
async def test_every_platforms_doors_are_tried_and_nobody_is_disturbed(
    self_ids, operator, bots, db_url, record
):
    async with Chats() as chats:
        accounts = merged(chats.accounts, {"onebot": {"self_ids": self_ids}})
        bot = await bots.start(configuration(db_url, platforms=accounts))
        await chats.connect(bot.url)
        (link,) = chats.onebot.links
        code, found = await examined(operator, bot.url)
        assert code == 0, found
        tried = {what: words for what, (_, words) in found.items()}
        expected = {f"qq: {what}": words for what, words in QQ.items()}
        expected |= {
            f"onebot: {what}": words for what, words in (DOORS | (OWN_BOT if self_ids else {})).items()
        }
        assert {k: v for k, v in tried.items() if k in expected} == expected
        if not self_ids:
            assert found["onebot: signed"][0] == "warning"
            assert "self_ids is empty" in tried["onebot: signed"]
        assert tried["feishu: recorded"] == "1 time(s)"
        await record.settled()
        assert {row.state for row in record.inbox()} == {"ignored"}, "nothing was answered"
        assert not link.closed.is_set()
        await chats.all["onebot"].say("still there")
        await until(lambda: chats.onebot.texts() == ["still there"], "the answer")
        assert bot.complaints() == []


def test_a_platform_without_trials_of_its_own_is_tried_with_an_unsigned_request():
    class Novel(PlatformSettings):
        """A platform that has just been written."""

    (trial,) = trials_of(Novel(type="novel"), "new", now=0.0, key="k").trials
    assert (trial.path, trial.expect, trial.headers.get("X-Signature")) == ("/webhook/new", 401, None)
    assert trials_of(Novel(type="novel", insecure=True), "new", now=0.0, key="k").trials == ()
