"""``/metrics``, ``/readyz`` and the log tell what has happened, with the right numbers."""

from __future__ import annotations

import pytest

from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import KEY, MODEL, configuration, until


class Numbers:
    """One reading of ``/metrics``."""

    def __init__(self, text):
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        self._values = {name: float(value) for name, value in lines}

    def get(self, name, **labels):
        shown = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        return self._values[f"feishu_bot_{name}" + (f"{{{shown}}}" if shown else "")]

    def ends(self, account="feishu"):
        names = ("answered", "refused", "ignored", "expired", "dead")
        return {name: self.get("ended_total", account=account, end=name) for name in names}


@pytest.fixture
def read(people):
    async def read(bot):
        async with people.http.get(f"{bot.url}/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            return Numbers(await response.text())

    return read


async def test_every_event_is_counted_once_by_its_arrival_and_once_by_its_end(
    bots, people, model, feishu, db_url, record, read
):
    bot = await bots.start(
        configuration(db_url, feishu=feishu, model=model, access={"deny": ["feishu:ou_mallory"]})
    )
    assert (await read(bot)).get("messages_active") == 0
    event = people.event("hello")
    for _ in range(3):
        await people.post(bot, event)
    await people.replies(1)
    feishu.fail(Failure(code=230020), times=2)
    await people.say(bot, "retried")
    await people.replies(2)
    await people.say(bot, "denied", user="mallory")
    await people.say(bot, "unaddressed", chat="oc_team", at_bot=False)
    model.script(Behaviour("status", status=401))
    await people.say(bot, "dead", user="bob")
    await people.replies(4)
    feishu.fail(Failure(status=400, code=230027))
    await people.say(bot, "undeliverable", user="cyd")
    await record.settled()
    assert await people.send(bot, b"{}", {}) == 401
    await until(lambda: len(bot.lines("message ended")) == 5, "the last line")
    now = await read(bot)
    assert now.get("received_total", account="feishu") == 6
    assert now.get("duplicates_total", account="feishu") == 2
    assert now.ends() == {"answered": 3, "refused": 1, "ignored": 1, "expired": 0, "dead": 1}
    assert now.get("refused_requests_total", account="feishu", status="401") == 1
    assert now.get("delivered_total") == 4
    assert now.get("delivery_retries_total") == 2
    assert now.get("replies_given_up_total") == 1
    assert now.get("acknowledge_seconds_count") == 8
    assert now.get("answer_seconds_count") == 5
    for direction, column in (("input", "input_tokens"), ("output", "output_tokens")):
        booked = sum(getattr(call, column) for call in record.ledger())
        assert now.get("tokens_total", model=MODEL, direction=direction) == booked > 0
    for line in bot.lines("message ended"):
        assert line.keys() >= {"inbox", "account", "lane", "end", "reason", "attempt", "ms"}
    assert KEY not in bot.log.read_text()
    record.check_ends()


async def test_the_depth_and_age_of_what_waits_are_shown_and_make_the_server_degraded(
    bots, people, model, feishu, sqlite_url, sqlite_record, read
):
    model.default = Behaviour("hang")
    config = configuration(sqlite_url, feishu=feishu, model=model, server={"max_waiting_age_s": 1})
    bot = await bots.start(config)
    async with people.http.get(f"{bot.url}/readyz") as response:
        assert (response.status, (await response.json())["status"]) == (200, "ok")
    for n in range(3):
        await people.say(bot, f"{n}")
    feishu.down = True
    await people.say(bot, "/help", user="bob")

    for _ in range(300):
        now = await read(bot)
        if now.get("queue_age_seconds") > 1.1 and now.get("outbox_age_seconds") > 0.5:
            break
        await sqlite_record.pause()
    assert now.get("queue_depth") == 3
    assert now.get("outbox_depth") == 1
    assert now.get("messages_active") == 1
    received, ends = now.get("received_total", account="feishu"), now.ends()
    assert received == sum(ends.values()) + now.get("queue_depth"), "accepted = five ends + open"
    async with people.http.get(f"{bot.url}/readyz") as response:
        body = await response.json()
        assert (response.status, body["status"]) == (200, "degraded")
        assert any(reason.startswith("the oldest message has waited") for reason in body["degraded"])


async def test_answers_at_the_browsers_door_are_counted_too(bots, http, sqlite_url, read):
    bot = await bots.start(configuration(sqlite_url))
    for request_id in ("a", "a", "b"):
        data = b'{"message": "hi", "request_id": "%s"}' % request_id.encode()
        async with http.post(f"{bot.url}/chat", data=data) as response:
            assert response.status == 200
    now = await read(bot)
    assert now.get("received_total", account="web") == 2
    assert now.get("duplicates_total", account="web") == 1
    assert now.ends("web")["answered"] == 2
