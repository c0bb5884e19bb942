"""Recorded requests of Feishu and QQ through the real HTTP door."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from feishu_bot.app import App
from feishu_bot.config import load
from feishu_bot.reference import platform_settings
from feishu_bot.store import schema
from feishu_bot.testing.feishu import sign_and_encrypt, text_event
from feishu_bot.testing.qq import FakeQQ, sign
from tests.e2e.bots import KEY, SECRET, Record, configuration

VECTORS_QQ = orjson.loads(Path(__file__).parents[1].joinpath("platforms/vectors/qq.json").read_bytes())
VECTORS = orjson.loads(Path(__file__).parents[1].joinpath("platforms/vectors/feishu.json").read_bytes())
BOT = "ou_e6e14f667cfe239d7b129b521dce0569"  # in the recorded mentions
NOW = 1767225600.0


class Door:
    """A server in this process, with one account for each set of secrets that the recorded requests use."""

    def __init__(self, feishu, db_url):
        self.accounts = {}
        accounts = {}
        for case in VECTORS["event_cases"]:
            secrets = case["config"]
            name = f"feishu-{len(accounts)}"
            stale = "now" in case["expect"]
            known = self.accounts.setdefault(
                (secrets["encrypt_key"], secrets["verification_token"], stale), name
            )
            if known == name:
                accounts[name] = {
                    "type": "feishu",
                    "enabled": True,
                    "app_id": "cli_x",
                    "app_secret": SECRET,
                    "encrypt_key": secrets["encrypt_key"],
                    "verification_token": secrets["verification_token"],
                    "bot_open_id": BOT,
                    "base_url": feishu.url,
                    "max_event_age_s": 3600 if stale else None,
                }
        accounts["cards"] = {
            **accounts["feishu-0"],
            "encrypt_key": "",
            "verification_token": VECTORS["legacy_card_cases"][0]["verification_token"],
        }
        self.config = configuration(db_url, platforms=accounts)

    def account_of(self, case):
        secrets = case["config"]
        return self.accounts[secrets["encrypt_key"], secrets["verification_token"], "now" in case["expect"]]


@pytest.fixture
async def door(feishu, http, sqlite_url, tmp_path):
    made = Door(feishu, sqlite_url)
    async with opened(made, http, sqlite_url, tmp_path) as door:
        yield door


@asynccontextmanager
async def opened(door, http, sqlite_url, folder):
    """Run a server with the accounts of ``door``; it takes ``send`` and ``record``."""
    file = folder / "config.yaml"
    file.write_bytes(orjson.dumps(door.config))
    settings = load(file, platform_settings=platform_settings()).settings
    app = App(settings, clock=lambda: NOW)
    await app.start()

    async def send(account, body, headers):
        url = f"http://127.0.0.1:{app.port}/webhook/{account}"
        async with http.post(url, data=body, headers=headers) as response:
            return response.status, await response.read()

    door.send = send
    door.record = Record(sqlite_url)
    yield door
    await app.stop()
    door.record.close()


class QQDoor:
    """The same for QQ: an account for each secret, and one that takes what is unsigned."""

    def __init__(self, qq, db_url):
        secrets = sorted({case["config"]["secret"] for case in VECTORS_QQ["event_cases"]})
        self.accounts = {secret: f"qq-{n}" for n, secret in enumerate(secrets)}
        base = {"type": "qq", "enabled": True, "app_id": "1", "base_url": qq.url, "token_url": qq.token_url}
        accounts = {name: {**base, "app_secret": secret} for secret, name in self.accounts.items()}
        accounts["open"] = {**base, "app_secret": secrets[0], "insecure": True}
        documented = [c["secret"] for c in VECTORS_QQ["official"] if "secret" in c]
        for n, secret in enumerate(dict.fromkeys(documented)):
            accounts[f"doc-{n}"] = {**base, "app_secret": secret}
            self.accounts[secret] = f"doc-{n}"
        self.config = configuration(db_url, platforms=accounts)


@pytest.fixture
async def qq_door(http, sqlite_url, tmp_path):
    async with (
        FakeQQ(clock=lambda: NOW) as qq,
        opened(QQDoor(qq, sqlite_url), http, sqlite_url, tmp_path) as door,
    ):
        yield door


async def test_every_recorded_request_gets_the_status_that_is_right_for_it_and_is_stored_or_not(door):
    for case in VECTORS["event_cases"]:
        expected, request = case["expect"], case["request"]
        before = {row.id for row in door.record.inbox()}
        account = door.account_of(case)
        status, body = await door.send(account, request["body"].encode(), request["headers"])
        assert str(status) in str(expected["status"]).split(" or "), case["name"]
        new = [row for row in door.record.inbox() if row.id not in before]
        if status != 200:
            assert orjson.loads(body).keys() == {"error"}
            assert new == [], case["name"]
        elif "json" in expected:
            assert orjson.loads(body) == expected["json"]
            assert new == [], case["name"]
        elif "dedupe_key" in expected and new:
            # A repeat of an event that another case has brought already makes no row.
            assert new[0].event_key.removesuffix("#seen").endswith(expected["dedupe_key"]), case["name"]
    names = {row.event_key for row in door.record.inbox()}
    for case in VECTORS["event_cases"]:
        if (key := case["expect"].get("dedupe_key")) is not None:
            assert any(name.removesuffix("#seen").endswith(key) for name in names), case["name"]
    await door.record.settled()
    assert all(row.state != "dead" for row in door.record.inbox())
    door.record.check_ends()


async def test_every_recorded_request_of_qq_gets_the_answer_that_is_right_for_it_and_is_stored_or_not(
    qq_door,
):
    for case in VECTORS_QQ["event_cases"]:
        expected, request = case["expect"], case["request"]
        before = {row.id for row in qq_door.record.inbox()}
        account = qq_door.accounts[case["config"]["secret"]]
        status, body = await qq_door.send(account, request["body"].encode(), request["headers"])
        assert status == expected["status"], case["name"]
        new = [row for row in qq_door.record.inbox() if row.id not in before]
        if status != 200:
            assert orjson.loads(body).keys() == {"error"}
            assert new == [], case["name"]
        else:
            assert orjson.loads(body) == expected["json"], case["name"]
        if "dedupe_key" in expected:
            (row,) = new
            assert row.event_key.removesuffix("#seen").partition(":")[2] == expected["dedupe_key"], case[
                "name"
            ]
            status, body = await qq_door.send(account, request["body"].encode(), request["headers"])
            assert (status, orjson.loads(body)) == (200, expected["json"])
            assert qq_door.record.count(schema.inbox) == len(before) + 1
        elif status == 200:
            assert new == [], case["name"]
    await qq_door.record.settled()
    assert all(row.state != "dead" for row in qq_door.record.inbox())
    qq_door.record.check_ends()


async def test_the_documented_check_of_the_address_is_answered_as_documented(qq_door):
    case = next(c for c in VECTORS_QQ["official"] if c["kind"] == "op13")
    body = case["request"]["body"].encode()
    account = qq_door.accounts[case["secret"]]
    status, answer = await qq_door.send(account, body, sign(body, secret=case["secret"]))
    assert (status, orjson.loads(answer)) == (200, case["response"])
    assert qq_door.record.inbox() == []


async def test_the_check_of_the_address_never_signs_a_forged_event_for_an_attacker(qq_door):
    attack = VECTORS_QQ["signing_oracle"]
    naive = attack["signature_a_naive_server_returns"]
    secret = VECTORS_QQ["event_cases"][0]["config"]["secret"]
    request = attack["attacker_request"]
    event_ts, word = request["d"]["event_ts"], request["d"]["plain_token"]
    shifted = {"op": 13, "d": {"event_ts": event_ts + word[:1], "plain_token": word[1:]}}
    spaced = orjson.dumps(request).replace(b'"plain_token"', b'"plain\\u005ftoken"')
    bodies = [orjson.dumps(request), orjson.dumps(shifted), spaced]
    for account in (qq_door.accounts[secret], "open"):
        for body in bodies:
            for headers in ({}, {"X-Signature-Timestamp": event_ts, "X-Signature-Ed25519": "0" * 128}):
                status, answer = await qq_door.send(account, body, headers)
                assert status in {400, 401, 403}
                assert naive.encode() not in answer
                assert b"signature" not in answer
            status, answer = await qq_door.send(account, body, sign(body, secret=secret))
            assert (status, b"signature" in answer) == (400, False)
    assert qq_door.record.inbox() == []
    # What such a signature would be worth: the forged event is one.
    forged = attack["forged_event"]
    assert forged["headers"]["X-Signature-Ed25519"] == naive
    status, _ = await qq_door.send(qq_door.accounts[secret], forged["body"].encode(), forged["headers"])
    assert status == 200


async def test_a_legacy_card_is_acknowledged_and_ignored_and_a_tampered_one_refused(door):
    good, tampered = VECTORS["legacy_card_cases"]
    status, _ = await door.send("cards", good["body"].encode(), good["headers"])
    assert status == 200
    status, _ = await door.send("cards", tampered["body"].encode(), tampered["headers"])
    assert status == 401
    (row,) = door.record.inbox()
    assert (row.state, row.reason) == ("ignored", "event")
    assert "c-legacy" not in row.payload


async def test_a_changed_byte_of_a_signed_body_is_refused_and_nothing_is_stored(
    bots, people, feishu, sqlite_url, sqlite_record
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    headers, body = sign_and_encrypt(text_event("hello"), encrypt_key=KEY)
    positions = range(0, len(body), max(1, len(body) // 60))
    changed = [body[:p] + bytes((body[p] ^ 1,)) + body[p + 1 :] for p in positions]
    changed += [body + b" ", body[:-1], b" " + body, b""]
    statuses = await asyncio.gather(*(people.send(bot, other, headers) for other in changed))
    assert set(statuses) == {401}
    for table in (schema.inbox, schema.lanes, schema.outbox, schema.totals):
        assert sqlite_record.rows(table) == []
    assert len(bot.lines("request refused")) == len(changed)
    assert await people.send(bot, body, headers) == 200


async def test_a_lowercase_signature_header_name_and_a_challenge_without_signature_are_right(
    bots, people, http, feishu, sqlite_url
):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu))
    _, body = sign_and_encrypt({"type": "url_verification", "challenge": "c", "token": ""}, encrypt_key=KEY)
    async with http.post(f"{bot.url}/webhook/feishu", data=body) as response:
        assert (response.status, await response.json()) == (200, {"challenge": "c"})
