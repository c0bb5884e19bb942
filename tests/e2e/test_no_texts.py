"""``ai.conversation_persistence.enabled: false``: when a message has ended, its text is nowhere."""

from __future__ import annotations

import orjson

from feishu_bot.store import schema
from feishu_bot.testing.model import Behaviour
from feishu_bot.testing.serving import Failure
from tests.e2e.bots import configuration

MARK = "xyzzy"


def mark(text):
    return f"{MARK} {text}"


async def test_no_text_is_kept_whichever_way_a_message_ended(bots, people, model, feishu, db_url, record):
    config = configuration(
        db_url,
        feishu=feishu,
        model=model,
        budgets=[{"name": "ever", "window": "total", "limit_tokens": 100_000}],
        ai={"conversation_persistence": {"enabled": False}},
        access={"deny": ["feishu:ou_mallory"]},
        chat={"max_input_tokens": 50},
    )
    bot = await bots.start(config)
    await people.say(bot, mark("answered"))
    await people.replies(1)
    await people.say(bot, mark("again"))
    await people.replies(2)
    assert [m["content"] for m in model.requests[-1].body["messages"]][1:] == [mark("again")], "no history"
    model.script(Behaviour("status", status=401))
    await people.say(bot, mark("dead"))
    await people.replies(3)
    await people.say(bot, mark("denied"), user="mallory")
    await people.say(bot, mark("long ") * 50)
    await people.say(bot, f"/{MARK}")
    await people.say(bot, mark("unaddressed"), chat="oc_team", at_bot=False)
    await people.replies(6)
    feishu.fail(Failure(status=400, code=230027))
    await people.say(bot, mark("undeliverable"))
    async with people.http.post(
        f"{bot.url}/chat", data=orjson.dumps({"message": mark("web"), "request_id": "r"})
    ) as response:
        assert (await response.json())["response"] == f"echo: {mark('web')}"
    await record.settled()
    assert sorted(r.state for r in record.inbox()) == [
        *["answered"] * 5,
        "dead",
        "ignored",
        "refused",
        "refused",
    ]
    assert record.rows(schema.messages) == []
    assert not [text for text in record.texts() if MARK in text]
    assert len(record.ledger()) == 4
    record.check_accounts()
    record.check_ends()
    async with people.http.post(
        f"{bot.url}/chat", data=orjson.dumps({"message": mark("web"), "request_id": "r"})
    ) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_kept"
    assert MARK not in bot.log.read_text()


async def test_an_answer_survives_a_kill_although_no_text_is_kept_afterwards(
    bots, people, model, feishu, db_url, record
):
    config = configuration(
        db_url, feishu=feishu, model=model, ai={"conversation_persistence": {"enabled": False}}
    )
    bot = await bots.start(config, crash=("committed", 1))
    await people.say(bot, mark("hello"))
    await bot.ended()
    assert any(MARK in text for text in record.texts())
    await bots.start(config)
    assert await people.replies(1) == [f"echo: {mark('hello')}"]
    await record.settled()
    assert not [text for text in record.texts() if MARK in text]
