"""Agents, personas and models, chosen by rules, by people and by scripts."""

from __future__ import annotations

import pytest

from feishu_bot.store import schema
from tests.e2e.bots import MODEL, configuration
from tests.e2e.test_chat import Door

CODER, SPARE = "openai:gpt-4.1", "openai:gpt-4o-mini"
AI = {
    "system_prompt": "Be kind.",
    "fallback_models": [SPARE],
    "personas": {"pirate": "You are a pirate.", "Dr. Who": "You travel.", "海盗": "你是海盗。"},
    "agents": {
        "coder": {"model": CODER, "system_prompt": "You write code.", "temperature": 0, "max_history_turns": 1,
                  "max_output_tokens": 77, "description": "writes code"},
        "sailor": {"persona": "pirate"},
    },
    "agent_for": [
        {"match": {"platform": "feishu", "chat": "oc_dev*"}, "agent": "coder"},
        {"match": {"user": "feishu:ou_sam"}, "agent": "sailor"},
        {"match": {"tenant": "other"}, "agent": "coder"},
    ],
}  # fmt: skip


@pytest.fixture
async def bot(bots, feishu, model, sqlite_url):
    return await bots.start(
        configuration(
            sqlite_url, feishu=feishu, model=model, ai=AI,
            chats=[{"match": {"type": "group", "chat": "oc_sea"}, "agent": "sailor"}],
        )
    )  # fmt: skip


def asked(model, n=-1):
    """Return model and system prompt of a request."""
    body = model.requests[n].body
    return body["model"], body["messages"][0]["content"]


KIND, PIRATE, CODE = ("gpt-4o", "Be kind."), ("gpt-4o", "You are a pirate."), ("gpt-4.1", "You write code.")


@pytest.mark.parametrize(
    ("user", "chat", "expected"),
    [("ann", None, KIND), ("ann", "oc_team", KIND), ("ann", "oc_dev1", CODE), ("sam", None, PIRATE),
     ("ann", "oc_sea", PIRATE)],
)  # fmt: skip
async def test_the_first_rule_that_matches_says_who_answers(bot, people, model, user, chat, expected):
    await people.say(bot, "hi", user=user, chat=chat)
    await people.replies(1, chat or f"oc_{user}")
    assert asked(model) == expected


async def test_an_agent_has_its_own_bounds_and_temperature(bot, people, model):
    for n in (1, 2, 3):
        await people.say(bot, f"q{n}", chat="oc_dev")
        await people.replies(n, "oc_dev")
    body = model.requests[-1].body
    assert (body["max_tokens"], body["temperature"]) == (77, 0)
    assert [m["content"] for m in body["messages"][1:]] == ["q2", "echo: q2", "q3"]


async def test_people_choose_an_agent_for_their_conversation(bots, people, feishu, model, db_url, record):
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, ai=AI))
    for n, words in enumerate(["/agent", "/agent Coder", "hi", "/agent", "/new", "hi", "/agent nobody"], 1):
        await people.say(bot, words)
        await people.replies(n)
    listed, chosen, _, again, _, _, unknown = people.feishu.texts()
    assert listed.splitlines() == [
        "Agents:", "- default (current)", "- coder: writes code", "- sailor", "/agent NAME chooses one for this conversation.",
    ]  # fmt: skip
    assert chosen == "The agent “coder” now answers in this conversation."
    assert "- coder: writes code (current)" in again
    assert unknown.startswith("There is no agent nobody.")
    assert [asked(model, n) for n in (0, 1)] == [CODE, KIND]
    await record.settled()
    old, new = record.rows(schema.conversations)
    assert (old.agent, old.title, old.message_count) == ("coder", "hi", 2)
    assert (new.agent, new.message_count) == (None, 2)


async def test_a_persona_is_stored_with_the_conversation_and_taken_back(
    bots, people, feishu, model, db_url, record
):
    bot = await bots.start(configuration(db_url, feishu=feishu, model=model, ai=AI))
    said = [
        "/persona set Dr. Who",
        "hi",
        "/persona 海盗",
        "hi",
        "/人格",
        "/persona off",
        "hi",
        "/persona pirat",
    ]
    for n, words in enumerate(said, 1):
        await people.say(bot, words)
        await people.replies(n)
        if words.startswith("/persona 海"):
            assert record.rows(schema.conversations)[0].active_persona_id == "海盗"
    assert [asked(model, n)[1] for n in range(3)] == ["You travel.", "你是海盗。", "Be kind."]
    texts = people.feishu.texts()
    assert "- 海盗 (current)" in texts[4]
    assert texts[5] == "The usual persona is back."
    assert texts[7] == "There is no persona pirat. Did you mean /persona pirate? /persona lists them."
    (conversation,) = record.rows(schema.conversations)
    assert conversation.active_persona_id is None
    assert [m["content"] for m in model.requests[-1].body["messages"]][1:] == ["hi", "echo: hi"] * 2 + ["hi"]


async def test_a_model_is_chosen_among_the_configured_ones_for_one_conversation(bot, people, model):
    for n, words in enumerate(["/model", "/model gpt-4.1", "hi", "/model gpt-5", "/model off", "hi"], 1):
        await people.say(bot, words)
        await people.replies(n)
    listed, chosen, _, unknown, reset, _ = people.feishu.texts()
    assert listed.splitlines()[1:-1] == [f"- {MODEL} (current)", f"- {SPARE}", f"- {CODER}"]
    assert chosen == f"This conversation now uses the model {CODER}."
    assert unknown.startswith("There is no model gpt-5 to choose.")
    assert reset == "This conversation uses the usual model again."
    await people.say(bot, "hi", user="bob")
    await people.replies(1, "oc_bob")
    assert [asked(model, n) for n in range(3)] == [("gpt-4.1", "Be kind."), KIND, KIND]


async def test_choosing_an_agent_takes_back_model_and_persona(bot, people, model):
    for n, words in enumerate(["/model gpt-4o-mini", "/persona pirate", "hi", "/agent coder", "hi"], 1):
        await people.say(bot, words)
        await people.replies(n)
    assert [asked(model, n) for n in range(2)] == [("gpt-4o-mini", "You are a pirate."), CODE]


async def test_where_several_share_a_conversation_only_admins_choose(bots, people, feishu, model, sqlite_url):
    chat = {"scope": "chat", "admins": ["feishu:ou_boss"]}
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai=AI, chat=chat))
    for n, (user, words) in enumerate(
        [("ann", "/model gpt-4.1"), ("ann", "/persona pirate"), ("ann", "/agent coder"), ("ann", "/model"),
         ("boss", "/model gpt-4.1"), ("ann", "hi")], 1
    ):  # fmt: skip
        await people.say(bot, words, user=user, chat="oc_team")
        await people.replies(n, "oc_team")
    texts = people.feishu.texts("oc_team")
    assert texts[:3] == ["Several people share this conversation; only administrators may change this."] * 3
    assert f"- {MODEL} (current)" in texts[3]
    assert asked(model) == ("gpt-4.1", "Be kind.")


async def test_what_is_configured_no_more_is_passed_over(bots, people, feishu, model, sqlite_url):
    bot = await bots.start(configuration(sqlite_url, feishu=feishu, model=model, ai=AI))
    for n, words in enumerate(["/agent coder", "/persona pirate", "/model gpt-4o-mini"], 1):
        await people.say(bot, words)
        await people.replies(n)
    await bot.stop()
    bot = await bots.start(
        configuration(sqlite_url, feishu=feishu, model=model, ai={"system_prompt": "New."})
    )
    await people.say(bot, "hi")
    await people.replies(4)
    assert asked(model) == ("gpt-4o", "New.")


async def test_a_script_names_the_agent_and_a_new_conversation_keeps_it(
    bots, http, model, sqlite_url, sqlite_record
):
    door = Door(http, await bots.start(configuration(sqlite_url, model=model, ai=AI)))
    status, first = await door.ask("hi", agent="coder")
    assert status == 200
    await door.ask("again", conversation_id=first["conversation_id"])
    await door.ask("once", conversation_id=first["conversation_id"], agent="sailor")
    await door.ask("back", conversation_id=first["conversation_id"])
    await door.ask("other", agent="default")
    assert [asked(model, n) for n in range(5)] == [CODE, CODE, PIRATE, CODE, KIND]
    status, refused = await door.ask("hi", agent="nobody")
    assert (status, refused["error"]["message"]) == (
        400,
        "agent: unknown; this server has default, coder, sailor",
    )
    assert [c.agent for c in sqlite_record.rows(schema.conversations)] == ["coder", "default"]


async def test_a_script_chooses_before_the_first_question(bots, http, model, sqlite_url):
    door = Door(http, await bots.start(configuration(sqlite_url, model=model, ai=AI)))
    status, first = await door.ask("/persona pirate")
    assert (status, first["response"]) == (200, "The persona of this conversation is now “pirate”.")
    await door.ask("hi", conversation_id=first["conversation_id"])
    assert asked(model) == PIRATE
